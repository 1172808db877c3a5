// Scores of scattered keys:  out[i] = max_r rows[r, :] . k[positions[i], :]
//
// A key is read from the cache once, for all rows.
#pragma once

#include <cstdint>

#include "plan.h"
#include "tile.h"
#include "vec.h"

namespace lowcontext {
namespace {

// Tiles of keys between a prefetch and its use.
constexpr int64_t kPrefetchTiles = 2;

template <typename T>
LC_INLINE void prefetch_row(const T* row, int64_t head_dim) {
  const char* begin = reinterpret_cast<const char*>(row);
  for (int64_t j = 0; j < head_dim * static_cast<int64_t>(sizeof(T)); j += 64) prefetch(begin + j);
}

struct NoPrefetch {
  LC_INLINE void channels(int64_t) {}
  LC_INLINE void row(int64_t, int) {}
};

template <typename T, int R>
void score_tiles(const ScoreCall& call) {
  constexpr int K = kWidth / R;
  const T* keys = static_cast<const T*>(call.keys);
  NoPrefetch none;
  for (int64_t first = 0; first < call.count; first += K) {
    const T* key_rows[K];
    LC_UNROLL
    for (int i = 0; i < K; ++i) {
      const int64_t at = first + i < call.count ? first + i : call.count - 1;
      key_rows[i] = keys + call.positions[at] * call.stride;
      const int64_t then = first + i + kPrefetchTiles * K;
      if (then < call.count) prefetch_row(keys + call.positions[then] * call.stride, call.head_dim);
    }
    Vec best = set1(-kInfinity);
    const float* row = call.rows;
    for (int64_t r = 0; r < call.num_rows; r += R, row += R * call.row_stride) {
      best = max(best, multiply_tile<R>(row, call.row_stride, key_rows, call.head_dim, none));
    }
    float lanes[kWidth];
    store(lanes, best);
    for (int i = 0; i < K && first + i < call.count; ++i) {
      float top = lanes[i];
      for (int j = 1; j < R; ++j) top = lanes[j * K + i] > top ? lanes[j * K + i] : top;
      float* out = call.out + first + i;
      *out = call.accumulate && *out > top ? *out : top;
    }
  }
}

template <typename T>
void score_as(const ScoreCall& call) {
  if (call.num_rows % 4 == 0) return score_tiles<T, 4>(call);
  if (call.num_rows % 2 == 0) return score_tiles<T, 2>(call);
  return score_tiles<T, 1>(call);
}

void best_scores(const ScoreCall& call) {
  switch (call.dtype) {
    case DType::kFloat32:
      return score_as<float>(call);
    case DType::kBFloat16:
      return score_as<BFloat16>(call);
    case DType::kFloat16:
      return score_as<Float16>(call);
  }
}

}  // namespace
}  // namespace lowcontext
