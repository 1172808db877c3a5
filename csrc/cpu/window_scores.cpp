#include <algorithm>
#include <cmath>
#include <limits>

#include "../common/window_scores.h"
#include "../ops.h"
#include "arguments.h"
#include "items.h"
#include "launch.h"

namespace lowcontext {
namespace {

using torch::headeronly::ScalarType;

// Logits of up to this many bytes are kept for the second pass over the keys: 32K keys of 32 query
// heads, and 1M keys of one.
constexpr int64_t kKeptBytes = int64_t{1} << 28;

// From maxima and sums of the chunks to those of the whole lane, in place of chunk 0.
void combine_chunks(const WindowScores& w, int64_t head) {
  float* maximum = w.maximum + head * w.chunks() * w.lanes();
  float* sum = w.sum + head * w.chunks() * w.lanes();
  for (int64_t lane = 0; lane < w.lanes(); ++lane) {
    float top = -std::numeric_limits<float>::infinity(), total = 0.0f;
    for (int64_t c = 0; c < w.chunks(); ++c) top = std::max(top, maximum[c * w.lanes() + lane]);
    for (int64_t c = 0; c < w.chunks(); ++c) {
      total += sum[c * w.lanes() + lane] * std::exp2(maximum[c * w.lanes() + lane] - top);
    }
    maximum[lane] = top;
    sum[lane] = lane % w.stride < w.q_len ? 1.0f / total : 0.0f;
  }
}

// slash[d] of one query head, from the parts of its chunks in ascending order of their keys.
void merge_parts(const WindowScores& w, int64_t head, int64_t g) {
  const int64_t width = WindowScores::kChunk + w.stride;
  float* slash = w.slash + (head * w.group() + g) * w.kv_len;
  std::fill(slash, slash + w.kv_len, 0.0f);
  for (int64_t c = 0; c < w.chunks(); ++c) {
    const float* part = w.parts + ((head * w.chunks() + c) * w.group() + g) * width;
    const int64_t base = w.first_distance(c);
    // Entries past the rows of the window are zero, those of negative distance weigh nothing.
    const int64_t stop =
        std::min(w.chunk_end(c) - c * WindowScores::kChunk + w.q_len - 1, w.kv_len - base);
    for (int64_t i = std::max<int64_t>(0, -base); i < stop; ++i) slash[base + i] += part[i];
  }
}

Outputs last_window_scores(const Tensor& q, const Tensor& k, double scale, double softcap) {
  WindowScores w{make_problem(q, k, k, scale, softcap, std::nullopt)};
  LC_CHECK(w.q_len > 0, "q", "at least one query", w.q_len);
  const KernelTable& kernels = active_kernels();
  const int64_t panel = kernels.shape.panel_lanes;
  w.stride = (w.q_len + panel - 1) / panel * panel;

  const int64_t heads = w.batch * w.kv_heads;
  const auto floats = [&](int64_t n) {
    return torch::stable::new_empty(q, {n}, ScalarType::Float);
  };
  Tensor vertical = torch::stable::new_empty(q, {w.batch, w.q_heads, w.kv_len}, ScalarType::Float);
  Tensor slash = torch::stable::new_empty(q, {w.batch, w.q_heads, w.kv_len}, ScalarType::Float);
  Tensor queries = floats(heads * w.lanes() * w.head_dim);
  Tensor statistics = floats(2 * heads * w.chunks() * w.lanes());
  Tensor parts = floats(heads * w.chunks() * w.group() * (WindowScores::kChunk + w.stride));
  const int64_t kept = heads * w.chunks() * WindowScores::kChunk * w.lanes();
  Tensor logits = floats(kept * 4 <= kKeptBytes ? kept : 0);
  const auto data = [](Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); };
  w.queries = data(queries);
  w.maximum = data(statistics);
  w.sum = w.maximum + heads * w.chunks() * w.lanes();
  w.logits = kept * 4 <= kKeptBytes ? data(logits) : nullptr;
  w.parts = data(parts);
  w.vertical = data(vertical);
  w.slash = data(slash);
  if (w.logits != nullptr) prefer_huge_pages(w.logits, static_cast<size_t>(kept) * 4);

  run_items(heads, false, [&](int64_t i) { kernels.window_pack(w, i / w.kv_heads, i % w.kv_heads); });
  const int64_t items = heads * w.chunks();
  const auto each = [&](void (*run)(const WindowScores&, int64_t, int64_t, int64_t)) {
    run_items(items, false, [&](int64_t i) {
      const int64_t head = i / w.chunks();
      run(w, head / w.kv_heads, head % w.kv_heads, i % w.chunks());
    });
  };
  each(kernels.window_scan);
  run_items(heads, false, [&](int64_t i) { combine_chunks(w, i); });
  each(kernels.window_add);
  run_items(w.batch * w.q_heads, false,
            [&](int64_t i) { merge_parts(w, i / w.group(), i % w.group()); });
  return {vertical, slash};
}

}  // namespace
}  // namespace lowcontext

STABLE_TORCH_LIBRARY_IMPL(lowcontext, CPU, m) {
  m.impl("last_window_scores", TORCH_BOX(&lowcontext::last_window_scores));
}
