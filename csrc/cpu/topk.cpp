// soft_vote and topk.
//
//   votes[b, s, r, i] = sum over the heads h of s of exp(scores[b, h, r, i] - lse[b, h, r])
//
// topk sorts nothing. The k-th largest of the maxima of disjoint groups is a lower bound of the
// k-th largest entry: k groups have an entry that large. One vector pass makes the maxima, a second
// collects the few entries that reach the bound (2,300 of 131,072 random ones for k = 2048), and a
// radix select among those finds the k-th largest and which of its ties stay.
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

#include "../common/order.h"
#include "../common/votes.h"
#include "../ops.h"
#include "items.h"
#include "launch.h"

namespace lowcontext {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kItemEntries = 4096;
constexpr int64_t kSmallEntries = 16384;

Tensor soft_vote(const Tensor& scores, const Tensor& lse, int64_t heads) {
  LC_CHECK(scores.is_cpu() && lse.is_cpu(), "scores", "CPU tensors", "another device");
  LC_CHECK(scores.dim() == 4 && scores.is_contiguous() && scores.scalar_type() == ScalarType::Float,
           "scores", "contiguous float32 [B, Hq, R, N]", shape_text(scores));
  const int64_t B = scores.size(0), Hq = scores.size(1), R = scores.size(2), N = scores.size(3);
  LC_CHECK(lse.dim() == 3 && lse.is_contiguous() && lse.scalar_type() == ScalarType::Float &&
               lse.size(0) == B && lse.size(1) == Hq && lse.size(2) == R,
           "lse", concat("contiguous float32 [", B, ", ", Hq, ", ", R, "]"), shape_text(lse));
  LC_CHECK(heads > 0 && heads <= Hq && Hq % heads == 0, "heads", concat("a divisor of ", Hq),
           heads);
  Tensor out = torch::stable::new_empty(scores, {B, heads, R, N});
  const float* data = static_cast<const float*>(scores.const_data_ptr());
  const float* sums = static_cast<const float*>(lse.const_data_ptr());
  float* votes = static_cast<float*>(out.mutable_data_ptr());
  const int64_t group = Hq / heads, chunks = ceil_div(N, kItemEntries);
  const VoteKernels& kernels = active_kernels().votes;
  run_items(B * heads * R * chunks, scores.numel() < kSmallEntries, [&](int64_t item) {
    const int64_t first = item % chunks * kItemEntries;
    const int64_t row = item / chunks;  // of [B, heads, R]
    const int64_t r = row % R, head = row / R * group;
    VoteRun run;
    run.scores = data + (head * R + r) * N + first;
    run.head_stride = R * N;
    run.lse = sums + head * R + r;
    run.lse_stride = R;
    run.heads = group;
    run.count = std::min(kItemEntries, N - first);
    run.out = votes + row * N + first;
    kernels.vote(run);
  });
  return out;
}

// The rank-th largest (1 <= rank <= n) of the keys. Digits of 11, 11 and 10 bits from the top.
uint32_t rank_largest(const uint32_t* keys, int64_t n, int64_t rank, int64_t* histogram) {
  uint32_t prefix = 0, mask = 0;
  for (int shift : {21, 10, 0}) {
    const uint32_t digits = shift == 0 ? 1u << 10 : 1u << 11;
    std::memset(histogram, 0, digits * sizeof(*histogram));
    for (int64_t i = 0; i < n; ++i) {
      if ((keys[i] & mask) == prefix) ++histogram[keys[i] >> shift & (digits - 1)];
    }
    uint32_t digit = digits - 1;
    while (histogram[digit] < rank) rank -= histogram[digit--];
    prefix |= digit << shift;
    mask |= (digits - 1) << shift;
  }
  return prefix;
}

// Kept by a thread between calls: zeroing and faulting in fresh buffers for a row of 131,072 would
// cost more than the selection.
struct Workspace {
  std::vector<float> values;
  std::vector<int32_t> ids;
  std::vector<uint32_t> keys;
  std::vector<int64_t> histogram;

  void fit(int64_t n) {
    if (values.size() >= static_cast<size_t>(n) + 32) return;
    values.resize(static_cast<size_t>(n) + 32);
    ids.resize(values.size());
    keys.resize(values.size());
    histogram.resize(2048);
  }
};

Workspace& thread_workspace() {
  thread_local Workspace workspace;
  return workspace;
}

// The ids of the k largest entries of x, ascending; returns how many there are.
int64_t select_row(const VoteKernels& kernels, const float* x, int64_t n, int64_t k,
                   Workspace& work, int32_t* out) {
  if (k <= 0) return 0;
  float threshold = -std::numeric_limits<float>::infinity();
  // Groups of 16 leave the fewest entries above the bound; there must be more groups than k.
  int64_t size = 16;
  while (size > 1 && n / size < 2 * k) size /= 2;
  if (size > 1) {
    const int64_t groups = kernels.group_maxima(x, n, size, work.values.data());
    for (int64_t i = 0; i < groups; ++i) work.keys[i] = order_key(work.values[i]);
    const uint32_t bound = rank_largest(work.keys.data(), groups, k, work.histogram.data());
    const uint32_t bits = bound & 0x80000000u ? bound & 0x7fffffffu : ~bound;
    std::memcpy(&threshold, &bits, sizeof(threshold));
  }
  const int64_t found = kernels.collect(x, n, threshold, work.ids.data(), work.values.data());
  if (found <= k) {
    std::memcpy(out, work.ids.data(), found * sizeof(*out));
    return found;
  }
  for (int64_t i = 0; i < found; ++i) work.keys[i] = order_key(work.values[i]);
  const uint32_t last = rank_largest(work.keys.data(), found, k, work.histogram.data());
  int64_t ties = k;
  for (int64_t i = 0; i < found; ++i) ties -= work.keys[i] > last;
  int64_t count = 0;
  for (int64_t i = 0; i < found; ++i) {
    if (work.keys[i] < last || (work.keys[i] == last && ties-- <= 0)) continue;
    out[count++] = work.ids[i];
  }
  return count;
}

// scores [rows, N]; limits int32 [rows] or none.
Outputs topk(const Tensor& scores, int64_t k, std::optional<Tensor> limits) {
  LC_CHECK(scores.is_cpu() && scores.dim() == 2 && scores.is_contiguous() &&
               scores.scalar_type() == ScalarType::Float,
           "scores", "contiguous float32 [rows, N] on the CPU", shape_text(scores));
  const int64_t rows = scores.size(0), N = scores.size(1);
  LC_CHECK(k >= 0, "k", "at least 0", k);
  LC_CHECK(N <= std::numeric_limits<int32_t>::max(), "scores", "fewer than 2^31 entries", N);
  const int32_t* most = nullptr;
  if (limits.has_value()) {
    LC_CHECK(limits->is_cpu() && limits->dim() == 1 && limits->size(0) == rows &&
                 limits->is_contiguous() && limits->scalar_type() == ScalarType::Int,
             "limits", concat("contiguous int32 [", rows, "] on the CPU"), shape_text(*limits));
    most = static_cast<const int32_t*>(limits->const_data_ptr());
  }
  const int64_t width = std::min(k, N);
  Tensor ids = torch::stable::new_empty(scores, {rows, width}, ScalarType::Int);
  Tensor counts = torch::stable::new_empty(scores, {rows}, ScalarType::Int);
  const float* data = static_cast<const float*>(scores.const_data_ptr());
  int32_t* out = static_cast<int32_t*>(ids.mutable_data_ptr());
  int32_t* lengths = static_cast<int32_t*>(counts.mutable_data_ptr());
  const VoteKernels& kernels = active_kernels().votes;
  // An item is a run of rows, so that its buffers serve more than one short row.
  const int64_t step = std::max<int64_t>(1, kItemEntries / std::max<int64_t>(1, N));
  run_items(ceil_div(rows, step), rows * N < kSmallEntries, [&](int64_t item) {
    Workspace& work = thread_workspace();
    work.fit(N);
    for (int64_t row = item * step; row < std::min(rows, (item + 1) * step); ++row) {
      const int64_t limit = most == nullptr ? width : std::min<int64_t>(width, most[row]);
      int32_t* line = out + row * width;
      const int64_t count = select_row(kernels, data + row * N, N, limit, work, line);
      lengths[row] = static_cast<int32_t>(count);
      std::memset(line + count, 0, (width - count) * sizeof(*line));
    }
  });
  return {ids, counts};
}

}  // namespace
}  // namespace lowcontext

STABLE_TORCH_LIBRARY_IMPL(lowcontext, CPU, m) {
  m.impl("soft_vote", TORCH_BOX(&lowcontext::soft_vote));
  m.impl("topk", TORCH_BOX(&lowcontext::topk));
}
