// Scores of keys, soft votes and the vector parts of top-k; what they compute is in
// ../common/votes.h.
//
// Scores take dot products of kWidth (row, key) pairs at a time, lanes over head_dim, so that each
// key is read once for all rows of a group and in the order in which it lies in memory.
#pragma once

#include <cstdint>

#include "../common/votes.h"
#include "keys.h"
#include "vec.h"

namespace lowcontext {
namespace {

constexpr int kScoreRows = kWidth < 8 ? kWidth : 8;
// Keys whose scores with the first rows are followed by those with the next, while in the
// level-1 cache: 32 keys of 128 floats are 16 KiB.
constexpr int64_t kScoreKeys = 32;

// R rows (those past `rows` are zeros and not stored) with `count` keys.
template <typename T, int R>
void score_rows(const ScoreRun& run, const float* q, int64_t rows, const T* keys,
                const float* scales, int64_t count, float* out) {
  constexpr int K = kWidth / R;
  const int64_t whole = run.dim / kWidth * kWidth;
  for (int64_t first = 0; first < count; first += K) {
    const T* row[K];
    LC_UNROLL
    for (int i = 0; i < K; ++i) row[i] = keys + min64(first + i, count - 1) * run.key_stride;
    Vec acc[kWidth];
    LC_UNROLL
    for (int i = 0; i < kWidth; ++i) acc[i] = set1(0.0f);
    for (int64_t d = 0; d < whole; d += kWidth) {
      Vec key[K];
      LC_UNROLL
      for (int i = 0; i < K; ++i) {
        key[i] = load(row[i] + d);
        if (d * static_cast<int64_t>(sizeof(T)) % 64 == 0) {
          prefetch(reinterpret_cast<const char*>(row[i] + d) + run.ahead);
        }
      }
      LC_UNROLL
      for (int r = 0; r < R; ++r) {
        const Vec query = load(q + r * run.q_stride + d);
        LC_UNROLL
        for (int i = 0; i < K; ++i) acc[r * K + i] = fma(query, key[i], acc[r * K + i]);
      }
    }
    if (whole < run.dim) {
      Vec key[K];
      for (int i = 0; i < K; ++i) key[i] = load_first(row[i] + whole, run.dim - whole);
      LC_UNROLL
      for (int r = 0; r < R; ++r) {
        const Vec query = load(q + r * run.q_stride + whole);
        LC_UNROLL
        for (int i = 0; i < K; ++i) acc[r * K + i] = fma(query, key[i], acc[r * K + i]);
      }
    }
    float sums[kWidth];
    store(sums, sum_each(acc));
    const int64_t n = min64(K, count - first);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < n; ++i) {
        const float factor = scales == nullptr ? 1.0f : scales[first + i];
        out[r * run.out_stride + first + i] = sums[r * K + i] * factor;
      }
    }
  }
}

template <typename T>
void score_typed(const ScoreRun& run) {
  for (int64_t first = 0; first < run.count; first += kScoreKeys) {
    const int64_t count = min64(kScoreKeys, run.count - first);
    const T* keys = static_cast<const T*>(run.keys) + first * run.key_stride;
    const float* scales = run.scales == nullptr ? nullptr : run.scales + first;
    for (int64_t row = 0; row < run.rows; row += kScoreRows) {
      const int64_t rows = min64(kScoreRows, run.rows - row);
      const float* q = run.q + row * run.q_stride;
      float* out = run.out + row * run.out_stride + first;
      if (rows == 1) {
        score_rows<T, 1>(run, q, rows, keys, scales, count, out);
      } else if (rows == 2) {
        score_rows<T, 2>(run, q, rows, keys, scales, count, out);
      } else if (rows <= 4) {
        score_rows<T, 4>(run, q, rows, keys, scales, count, out);
      } else {
        if constexpr (kScoreRows >= 8) score_rows<T, 8>(run, q, rows, keys, scales, count, out);
      }
    }
  }
}

void score_run(const ScoreRun& run) {
  switch (run.type) {
    case KeyType::kFloat32:
      return score_typed<float>(run);
    case KeyType::kBFloat16:
      return score_typed<BFloat16>(run);
    case KeyType::kFloat16:
      return score_typed<Float16>(run);
    case KeyType::kInt8:
      return score_typed<int8_t>(run);
  }
}

float exp_sum(const float* x, int64_t n, float* maximum) {
  const int64_t whole = n / kWidth * kWidth;
  Vec top = set1(-kInfinity);
  for (int64_t i = 0; i < whole; i += kWidth) top = max(top, load(x + i));
  float lanes[kWidth];
  store(lanes, top);
  float largest = -kInfinity;
  for (int i = 0; i < kWidth; ++i) largest = lanes[i] > largest ? lanes[i] : largest;
  for (int64_t i = whole; i < n; ++i) largest = x[i] > largest ? x[i] : largest;
  *maximum = largest;
  if (largest == -kInfinity) return 0.0f;
  const Vec base = set1(largest), unit = set1(kLog2E);
  Vec total = set1(0.0f);
  for (int64_t i = 0; i < whole; i += kWidth) total = total + exp2((load(x + i) - base) * unit);
  store(lanes, total);
  float sum = 0.0f;
  for (int i = 0; i < kWidth; ++i) sum += lanes[i];
  for (int64_t i = whole; i < n; ++i) sum += scalar_exp2((x[i] - largest) * kLog2E);
  return sum;
}

void vote_run(const VoteRun& run) {
  const Vec unit = set1(kLog2E);
  for (int64_t i = 0; i < run.count; i += kWidth) {
    const int64_t n = min64(kWidth, run.count - i);
    Vec total = set1(0.0f);
    for (int64_t h = 0; h < run.heads; ++h) {
      // A row without candidates has an lse of -inf, and only scores of -inf.
      const float lse = run.lse[h * run.lse_stride];
      const Vec base = set1(lse == -kInfinity ? 0.0f : lse);
      total = total + exp2((load_first(run.scores + h * run.head_stride + i, n) - base) * unit);
    }
    const Vec first = load_first(run.scores + i, n);
    total = select_lt(set1(-kInfinity), first, total, set1(-kInfinity));
    store_first(run.out + i, total, n);
  }
}

int64_t group_maxima(const float* x, int64_t n, int64_t size, float* maxima) {
  // A group is one lane of `size` consecutive vectors.
  const int64_t span = size * kWidth;
  int64_t groups = 0, i = 0;
  for (; i + span <= n; i += span, groups += kWidth) {
    Vec top = set1(-kInfinity);
    for (int64_t j = 0; j < span; j += kWidth) {
      const Vec value = load(x + i + j);
      top = select_lt(top, value, value, top);
    }
    store(maxima + groups, top);
  }
  for (; i < n; i += size, ++groups) {
    float top = -kInfinity;
    for (int64_t j = i; j < min64(n, i + size); ++j) top = x[j] > top ? x[j] : top;
    maxima[groups] = top;
  }
  return groups;
}

int64_t collect(const float* x, int64_t n, float threshold, int32_t* ids, float* values) {
  int64_t count = 0, i = 0;
#if defined(LOWCONTEXT_ISA_AVX512)
  const __m512 low = _mm512_set1_ps(threshold), none = _mm512_set1_ps(-kInfinity);
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  for (; i + kWidth <= n; i += kWidth) {
    const __m512 value = _mm512_loadu_ps(x + i);
    const __mmask16 keep =
        _mm512_cmp_ps_mask(value, low, _CMP_GE_OQ) & _mm512_cmp_ps_mask(value, none, _CMP_GT_OQ);
    if (keep == 0) continue;
    const __m512i id = _mm512_add_epi32(lanes, _mm512_set1_epi32(static_cast<int32_t>(i)));
    // Whole vectors, not compressing stores: those take over a hundred cycles on Zen 4.
    _mm512_storeu_si512(ids + count, _mm512_maskz_compress_epi32(keep, id));
    _mm512_storeu_ps(values + count, _mm512_maskz_compress_ps(keep, value));
    count += __builtin_popcount(keep);
  }
#else
  const Vec low = set1(threshold), zero = set1(0.0f), one = set1(1.0f);
  for (; i + kWidth <= n; i += kWidth) {
    if (!any_ne(select_lt(load(x + i), low, zero, one), zero)) continue;
    for (int64_t j = i; j < i + kWidth; ++j) {
      if (x[j] >= threshold && x[j] > -kInfinity) {
        ids[count] = static_cast<int32_t>(j);
        values[count++] = x[j];
      }
    }
  }
#endif
  for (; i < n; ++i) {
    if (x[i] >= threshold && x[i] > -kInfinity) {
      ids[count] = static_cast<int32_t>(i);
      values[count++] = x[i];
    }
  }
  return count;
}

constexpr VoteKernels kVotes = {score_run, exp_sum, vote_run, group_maxima, collect};

}  // namespace
}  // namespace lowcontext
