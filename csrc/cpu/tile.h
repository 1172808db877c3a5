// The inner tile of decode and of scattered scores: R rows x kWidth / R keys, lanes over head_dim.
#pragma once

#include <cstdint>

#include "vec.h"

namespace lowcontext {
namespace {

// Element r * K + i = rows[r, :] . keys[i, :], K = kWidth / R. Rows are padded with zeros to whole
// vectors. `ahead` prefetches between the arithmetic: it is called with each kWidth channels d, and
// with each row of them.
template <int R, typename T, typename Ahead>
LC_INLINE Vec multiply_tile(const float* rows, int64_t row_stride, const T* const (&keys)[kWidth / R],
                            int64_t head_dim, Ahead& ahead) {
  constexpr int K = kWidth / R;
  const int64_t whole = head_dim / kWidth * kWidth;
  Vec acc[kWidth];
  LC_UNROLL
  for (int i = 0; i < kWidth; ++i) acc[i] = set1(0.0f);
  for (int64_t d = 0; d < whole; d += kWidth) {
    ahead.channels(d);
    Vec key[K];
    LC_UNROLL
    for (int i = 0; i < K; ++i) key[i] = load(keys[i] + d);
    LC_UNROLL
    for (int r = 0; r < R; ++r) {
      const Vec row = load(rows + r * row_stride + d);
      LC_UNROLL
      for (int i = 0; i < K; ++i) acc[r * K + i] = fma(row, key[i], acc[r * K + i]);
      ahead.row(d, r);
    }
  }
  if (whole < head_dim) {
    Vec key[K];
    for (int i = 0; i < K; ++i) key[i] = load_first(keys[i] + whole, head_dim - whole);
    LC_UNROLL
    for (int r = 0; r < R; ++r) {
      const Vec row = load(rows + r * row_stride + whole);
      LC_UNROLL
      for (int i = 0; i < K; ++i) acc[r * K + i] = fma(row, key[i], acc[r * K + i]);
    }
  }
  return sum_each(acc);
}

}  // namespace
}  // namespace lowcontext
