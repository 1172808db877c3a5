// Kernels of WindowScores, with lanes over queries: s[key, lane] = sum_d k[key, d] q[d, lane].
//
// A first pass over the keys finds the maximum and the sum of each lane and chunk, a second one
// adds the weights up. A panel of lanes belongs to one query head: lane r of a head is query r,
// lanes from n on have zero queries and weigh nothing.
#pragma once

#include <cstdint>

#include "../common/window_scores.h"
#include "keys.h"
#include "panel.h"
#include "vec.h"

namespace lowcontext {
namespace {

constexpr int64_t kMaxWindowDim = 256;
// Rows of the key buffer are an odd number of cache lines apart, for all sets of a level-1 cache.
constexpr int64_t kKeyStride = kMaxWindowDim + 16;

// queries of one KV head: [panel, d, lane], scaled to logits in log2 units (or in units of the
// cap).
template <typename T>
void window_pack_as(const WindowScores& w, int64_t b, int64_t h) {
  float* out = w.queries + (b * w.kv_heads + h) * w.lanes() * w.head_dim;
  const float factor = query_scale(w);
  for (int64_t lane = 0; lane < w.lanes(); ++lane) {
    const int64_t r = lane % w.stride;
    const T* row = head_base<T>(w.q, b, h * w.group() + lane / w.stride) + r * w.q.stride_l;
    float* to = out + lane / kLanes * kLanes * w.head_dim + lane % kLanes;
    for (int64_t d = 0; d < w.head_dim; ++d) {
      to[d * kLanes] = r < w.q_len ? to_float(row[d]) * factor : 0.0f;
    }
  }
}

// keys[i] = k of position first + i, as floats.
template <typename T>
void window_gather(const WindowScores& w, int64_t b, int64_t h, int64_t first, int64_t count,
                   float* keys) {
  const T* row = head_base<T>(w.k, b, h) + first * w.k.stride_l;
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t d = 0; d < w.head_dim; d += kWidth) {
      store(keys + i * kKeyStride + d, load_first(row + d, w.head_dim - d));
    }
    row += w.k.stride_l;
  }
}

// Logits in log2 units of `count` keys from `first` on and one panel of lanes: s[kStep, panel].
void window_logits(const WindowScores& w, const float* keys, int64_t first, int64_t count,
                   const float* queries, int64_t panel, float* s) {
  const float* q = queries + panel * kLanes * w.head_dim;
  int64_t i = 0;
  for (; i + kPanelRows <= count; i += kPanelRows) {
    score_rows<kPanelRows, 2>(keys + i * kKeyStride, kKeyStride, q, w.head_dim, s + i * kLanes);
  }
  score_tail<2>(count - i, keys + i * kKeyStride, kKeyStride, q, w.head_dim, s + i * kLanes);
  if (w.softcap > 0.0f) {
    const Vec cap = set1(w.softcap * kLog2E);
    for (i = 0; i < count * kLanes; i += kWidth) store(s + i, tanh(load(s + i)) * cap);
  }
  const int64_t row0 = panel * kLanes % w.stride;
  for (i = max64(0, w.kv_len - w.q_len + row0 + 1 - first); i < count; ++i) {
    const int64_t hidden = first + i - (w.kv_len - w.q_len) - row0;  // lanes before the key
    for (int64_t lane = 0; lane < min64(hidden, kLanes); ++lane) {
      s[i * kLanes + lane] = -kInfinity;
    }
  }
}

LC_INLINE float* stored_logits(const WindowScores& w, int64_t b, int64_t h, int64_t first,
                               int64_t panel, float* buffer) {
  if (w.logits == nullptr) return buffer;
  const int64_t head = (b * w.kv_heads + h) * w.chunks() * WindowScores::kChunk;
  return w.logits + (head + first) * w.lanes() + panel * kLanes * WindowScores::kStep;
}

// Maximum and sum of 2^(s - maximum) of each lane over one chunk of keys.
template <typename T>
void window_scan_as(const WindowScores& w, int64_t b, int64_t h, int64_t chunk) {
  alignas(64) float keys[WindowScores::kStep * kKeyStride];
  alignas(64) float buffer[WindowScores::kStep * kLanes];
  const int64_t head = b * w.kv_heads + h;
  const float* queries = w.queries + head * w.lanes() * w.head_dim;
  float* maximum = w.maximum + (head * w.chunks() + chunk) * w.lanes();
  float* sum = w.sum + (head * w.chunks() + chunk) * w.lanes();
  for (int64_t i = 0; i < w.lanes(); i += kWidth) {
    store(maximum + i, set1(-kInfinity));
    store(sum + i, set1(0.0f));
  }
  const int64_t end = w.chunk_end(chunk);
  for (int64_t first = chunk * WindowScores::kChunk; first < end; first += WindowScores::kStep) {
    const int64_t count = min64(WindowScores::kStep, end - first);
    window_gather<T>(w, b, h, first, count, keys);
    for (int64_t panel = 0; panel < w.lanes() / kLanes; ++panel) {
      float* s = stored_logits(w, b, h, first, panel, buffer);
      window_logits(w, keys, first, count, queries, panel, s);
      for (int64_t j = 0; j < kLanes; j += kWidth) {
        float* top = maximum + panel * kLanes + j;
        float* total = sum + panel * kLanes + j;
        const Vec old = load(top);
        Vec now = old;
        for (int64_t i = 0; i < count; ++i) now = max(now, load(s + i * kLanes + j));
        // A lane that has seen no key subtracts 0: 2^(-inf) = 0, with no inf - inf.
        const Vec base = select_lt(now, set1(-3.0e38f), set1(0.0f), now);
        Vec acc = load(total) * exp2(old - base);
        for (int64_t i = 0; i < count; ++i) {
          acc = acc + exp2(load(s + i * kLanes + j) - base);
        }
        store(top, now);
        store(total, acc);
      }
    }
  }
}

// Adds the weights of one chunk of keys; maximum and sum of chunk 0 hold those of the whole lane,
// the sum inverted, 0 for lanes without a query.
template <typename T>
void window_add_as(const WindowScores& w, int64_t b, int64_t h, int64_t chunk) {
  alignas(64) float keys[WindowScores::kStep * kKeyStride];
  alignas(64) float buffer[WindowScores::kStep * kLanes];
  Vec totals[WindowScores::kStep];
  const int64_t head = b * w.kv_heads + h;
  const float* queries = w.queries + head * w.lanes() * w.head_dim;
  const float* maximum = w.maximum + head * w.chunks() * w.lanes();
  const float* inverse = w.sum + head * w.chunks() * w.lanes();
  const int64_t width = WindowScores::kChunk + w.stride;
  float* parts = w.parts + (head * w.chunks() + chunk) * w.group() * width;
  std::memset(parts, 0, static_cast<size_t>(w.group() * width) * sizeof(float));
  const int64_t end = w.chunk_end(chunk);
  for (int64_t first = chunk * WindowScores::kChunk; first < end; first += WindowScores::kStep) {
    const int64_t count = min64(WindowScores::kStep, end - first);
    if (w.logits == nullptr) window_gather<T>(w, b, h, first, count, keys);
    for (int64_t g = 0; g < w.group(); ++g) {
      for (int64_t i = 0; i < WindowScores::kStep; ++i) totals[i] = set1(0.0f);
      for (int64_t row = 0; row < w.stride; row += kLanes) {
        const int64_t lane = g * w.stride + row;
        const int64_t panel = lane / kLanes;
        float* s = stored_logits(w, b, h, first, panel, buffer);
        if (w.logits == nullptr) window_logits(w, keys, first, count, queries, panel, s);
        const Vec top[2] = {load(maximum + lane), load(maximum + lane + kWidth)};
        const Vec scale[2] = {load(inverse + lane), load(inverse + lane + kWidth)};
        // Row r of key j has distance (N - n + r) - j.
        float* slash = parts + g * width + (end - 1 - first) + row;
        for (int64_t i = 0; i < count; ++i) {
          LC_UNROLL
          for (int j = 0; j < 2; ++j) {
            const Vec p = exp2(load(s + i * kLanes + j * kWidth) - top[j]) * scale[j];
            totals[i] = totals[i] + p;
            store(slash - i + j * kWidth, load(slash - i + j * kWidth) + p);
          }
        }
      }
      float* vertical = w.vertical + (head * w.group() + g) * w.kv_len + first;
      for (int64_t i = 0; i < count; i += kWidth) {
        Vec block[kWidth];
        for (int j = 0; j < kWidth; ++j) block[j] = totals[i + j];
        store_first(vertical + i, sum_each(block), count - i);
      }
    }
  }
}

void window_pack(const WindowScores& w, int64_t b, int64_t h) {
  switch (w.dtype) {
    case DType::kFloat32:
      return window_pack_as<float>(w, b, h);
    case DType::kBFloat16:
      return window_pack_as<BFloat16>(w, b, h);
    case DType::kFloat16:
      return window_pack_as<Float16>(w, b, h);
  }
}

void window_scan(const WindowScores& w, int64_t b, int64_t h, int64_t chunk) {
  switch (w.dtype) {
    case DType::kFloat32:
      return window_scan_as<float>(w, b, h, chunk);
    case DType::kBFloat16:
      return window_scan_as<BFloat16>(w, b, h, chunk);
    case DType::kFloat16:
      return window_scan_as<Float16>(w, b, h, chunk);
  }
}

void window_add(const WindowScores& w, int64_t b, int64_t h, int64_t chunk) {
  switch (w.dtype) {
    case DType::kFloat32:
      return window_add_as<float>(w, b, h, chunk);
    case DType::kBFloat16:
      return window_add_as<BFloat16>(w, b, h, chunk);
    case DType::kFloat16:
      return window_add_as<Float16>(w, b, h, chunk);
  }
}

}  // namespace
}  // namespace lowcontext
