// Scores of panels of kWidth keys, lanes over keys:  out[panel] = max_{r, key} rows[r, :] . key
//
// A panel is fp32 [head_dim, kWidth], packed once and scored for the rows of many blocks of
// queries. Its lanes are reduced once, after all rows.
#pragma once

#include <cstdint>

#include "plan.h"
#include "vec.h"

namespace lowcontext {
namespace {

// Panels scored together: with 4 rows 16 accumulators of 32 registers, else 8 of 16.
constexpr int kScoredPanels = kWidth == 16 ? 4 : 2;

template <typename T>
void pack_as(const KeyPanelCall& call) {
  const int64_t step = call.step * call.stride;
  float* out = call.out;
  for (int64_t p = 0; p < call.count; ++p, out += call.head_dim * kWidth) {
    const T* keys = static_cast<const T*>(call.keys) + call.positions[p] * call.stride;
    for (int64_t d = 0; d < call.head_dim; d += kWidth) {
      const int64_t n = call.head_dim - d < kWidth ? call.head_dim - d : kWidth;
      Vec block[kWidth];
      for (int i = 0; i < kWidth; ++i) block[i] = load_first(keys + i * step + d, n);
      transpose(block);
      for (int64_t i = 0; i < n; ++i) store(out + (d + i) * kWidth, block[i]);
    }
  }
}

void pack_keys(const KeyPanelCall& call) {
  switch (call.dtype) {
    case DType::kFloat32:
      return pack_as<float>(call);
    case DType::kBFloat16:
      return pack_as<BFloat16>(call);
    case DType::kFloat16:
      return pack_as<Float16>(call);
  }
}

template <int R>
void score_key_panels(const PanelScoreCall& call) {
  constexpr int P = kScoredPanels;
  for (int64_t first = 0; first < call.count; first += P) {
    const float* keys[P];
    Vec best[P];
    LC_UNROLL
    for (int p = 0; p < P; ++p) {
      const int64_t at = first + p < call.count ? first + p : call.count - 1;
      keys[p] = call.keys + call.panels[at] * call.head_dim * kWidth;
      best[p] = set1(-kInfinity);
    }
    const float* row = call.rows;
    for (int64_t r = 0; r < call.num_rows; r += R, row += R * call.row_stride) {
      Vec acc[R][P];
      LC_UNROLL
      for (int j = 0; j < R; ++j) {
        LC_UNROLL
        for (int p = 0; p < P; ++p) acc[j][p] = set1(0.0f);
      }
      for (int64_t d = 0; d < call.head_dim; ++d) {
        Vec key[P];
        LC_UNROLL
        for (int p = 0; p < P; ++p) key[p] = load(keys[p] + d * kWidth);
        LC_UNROLL
        for (int j = 0; j < R; ++j) {
          const Vec query = set1(row[j * call.row_stride + d]);
          LC_UNROLL
          for (int p = 0; p < P; ++p) acc[j][p] = fma(query, key[p], acc[j][p]);
        }
      }
      LC_UNROLL
      for (int j = 0; j < R; ++j) {
        LC_UNROLL
        for (int p = 0; p < P; ++p) best[p] = max(best[p], acc[j][p]);
      }
    }
    for (int p = 0; p < P && first + p < call.count; ++p) {
      float* out = call.out + first + p;
      const float top = max_of(best[p]);
      *out = call.accumulate && *out > top ? *out : top;
    }
  }
}

void best_of_panels(const PanelScoreCall& call) {
  if (call.num_rows % 4 == 0) return score_key_panels<4>(call);
  if (call.num_rows % 2 == 0) return score_key_panels<2>(call);
  return score_key_panels<1>(call);
}

}  // namespace
}  // namespace lowcontext
