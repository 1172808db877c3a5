// Scores of keys, soft votes and the vector parts of top-k; what they compute is in
// ../common/votes.h.
//
// Scores take dot products of kWidth (row, key) pairs at a time, lanes over head_dim, so that each
// key is read once for all rows of a group and in the order in which it lies in memory. Keys in 8
// or 4 bits meet queries in 16 bits: half the operations of floats, and no conversion of a channel.
#pragma once

#include <cstdint>

#include "../common/votes.h"
#include "int_vec.h"
#include "keys.h"
#include "vec.h"

namespace lowcontext {
namespace {

constexpr int kScoreRows = kWidth < 8 ? kWidth : 8;
// Keys whose scores with the first rows are followed by those with the next, while in the
// level-1 cache: 32 keys of 128 floats are 16 KiB.
constexpr int64_t kScoreKeys = 32;

// Stores the sums of R rows (those from `rows` on are padding) with n of K keys from `first` on.
template <int R>
LC_INLINE void store_scores(const ScoreRun& run, int64_t row, int64_t rows, int64_t first, int64_t n,
                            Vec scores) {
  constexpr int K = kWidth / R;
  float sums[kWidth];
  store(sums, scores);
  for (int64_t r = 0; r < R && r < rows; ++r) {
    float* out = run.out + (row + r) * run.out_stride + first;
    if (n >= K) {
      std::memcpy(out, sums + r * K, K * sizeof(float));
    } else {
      for (int64_t i = 0; i < n; ++i) out[i] = sums[r * K + i];
    }
  }
}

template <typename T>
struct FloatKeys {
  template <int R>
  static void score(const ScoreRun& run, int64_t row, int64_t rows, int64_t begin, int64_t end) {
    constexpr int K = kWidth / R;
    const T* keys = static_cast<const T*>(run.keys);
    const float* q = run.q + row * run.q_stride;
    const int64_t whole = run.dim / kWidth * kWidth;
    for (int64_t first = begin; first < end; first += K) {
      const T* key_rows[K];
      LC_UNROLL
      for (int i = 0; i < K; ++i) key_rows[i] = keys + min64(first + i, end - 1) * run.key_stride;
      Vec acc[kWidth];
      LC_UNROLL
      for (int i = 0; i < kWidth; ++i) acc[i] = set1(0.0f);
      for (int64_t d = 0; d < whole; d += kWidth) {
        Vec key[K];
        LC_UNROLL
        for (int i = 0; i < K; ++i) {
          key[i] = load(key_rows[i] + d);
          if (d * static_cast<int64_t>(sizeof(T)) % 64 == 0) {
            prefetch(reinterpret_cast<const char*>(key_rows[i] + d) + run.ahead);
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
        for (int i = 0; i < K; ++i) key[i] = load_first(key_rows[i] + whole, run.dim - whole);
        LC_UNROLL
        for (int r = 0; r < R; ++r) {
          const Vec query = load(q + r * run.q_stride + whole);
          LC_UNROLL
          for (int i = 0; i < K; ++i) acc[r * K + i] = fma(query, key[i], acc[r * K + i]);
        }
      }
      store_scores<R>(run, row, rows, first, min64(K, end - first), sum_each(acc));
    }
  }
};

// acc += queries x keys, 2 kWidth channels of each.
template <int R, int K>
LC_INLINE void add_channels(IntVec (&acc)[R * K], const int16_t* q, int64_t q_stride,
                            const IntVec (&key)[K]) {
  LC_UNROLL
  for (int r = 0; r < R; ++r) {
    const IntVec query = load_ints(q + r * q_stride);
    LC_UNROLL
    for (int i = 0; i < K; ++i) acc[r * K + i] = add_products(acc[r * K + i], query, key[i]);
  }
}

template <int plane, int R, int K>
LC_INLINE void add_nibbles(IntVec (&acc)[R * K], const int16_t* q, int64_t q_stride,
                           const IntVec (&bytes)[K]) {
  IntVec key[K];
  LC_UNROLL
  for (int i = 0; i < K; ++i) key[i] = nibble<plane>(bytes[i]);
  add_channels<R, K>(acc, q, q_stride, key);
}

template <int bits>
struct IntegerKeys {
  // Bytes of a key that one step reads.
  static constexpr int64_t kBytes = bits == 8 ? 2 * kWidth : 4 * kWidth;

  template <int R, int K>
  LC_INLINE static void step(const ScoreRun& run, const int16_t* q, const int8_t* const (&from)[K],
                             int64_t byte, IntVec (&acc)[R * K]) {
    IntVec key[K];
    if constexpr (bits == 8) {
      LC_UNROLL
      for (int i = 0; i < K; ++i) key[i] = widen(from[i]);
      add_channels<R, K>(acc, q + byte, run.q_stride, key);
    } else {
      LC_UNROLL
      for (int i = 0; i < K; ++i) key[i] = load_ints(from[i]);
      const int16_t* at = q + byte / 2;
      add_nibbles<0, R, K>(acc, at, run.q_stride, key);
      add_nibbles<1, R, K>(acc, at + run.q_plane, run.q_stride, key);
      add_nibbles<2, R, K>(acc, at + 2 * run.q_plane, run.q_stride, key);
      add_nibbles<3, R, K>(acc, at + 3 * run.q_plane, run.q_stride, key);
    }
  }

  template <int R>
  static void score(const ScoreRun& run, int64_t row, int64_t rows, int64_t begin, int64_t end) {
    constexpr int K = kWidth / R;
    const int8_t* keys = static_cast<const int8_t*>(run.keys);
    const int16_t* q = run.whole_q + row * run.q_stride;
    const int64_t whole = run.dim / kBytes * kBytes;
    for (int64_t first = begin; first < end; first += K) {
      const int8_t* from[K];
      LC_UNROLL
      for (int i = 0; i < K; ++i) from[i] = keys + min64(first + i, end - 1) * run.key_stride;
      IntVec acc[kWidth];
      LC_UNROLL
      for (int i = 0; i < kWidth; ++i) acc[i] = zeros();
      for (int64_t byte = 0; byte < whole; byte += kBytes) {
        step<R, K>(run, q, from, byte, acc);
        LC_UNROLL
        for (int i = 0; i < K; ++i) {
          if (byte % 64 == 0) prefetch(from[i] + run.ahead);
          from[i] += kBytes;
        }
      }
      if (whole < run.dim) {
        int8_t rest[K][kBytes] = {};
        for (int i = 0; i < K; ++i) {
          std::memcpy(rest[i], from[i], static_cast<size_t>(run.dim - whole));
          from[i] = rest[i];
        }
        step<R, K>(run, q, from, whole, acc);
      }
      Vec sums[kWidth];
      LC_UNROLL
      for (int i = 0; i < kWidth; ++i) sums[i] = to_floats(acc[i]);
      store_scores<R>(run, row, rows, first, min64(K, end - first), sum_each(sums));
    }
    for (int64_t r = row; r < row + rows; ++r) {
      float* out = run.out + r * run.out_stride;
      const Vec q_step = set1(run.q_steps[r]);
      for (int64_t i = begin; i < end; i += kWidth) {
        const Vec factor = load_first(run.scales + i, end - i) * q_step;
        store_first(out + i, load_first(out + i, end - i) * factor, end - i);
      }
    }
  }
};

template <typename Keys>
void score_all(const ScoreRun& run) {
  for (int64_t begin = 0; begin < run.count; begin += kScoreKeys) {
    const int64_t end = min64(begin + kScoreKeys, run.count);
    for (int64_t row = 0; row < run.rows; row += kScoreRows) {
      const int64_t rows = min64(kScoreRows, run.rows - row);
      if (rows == 1) {
        Keys::template score<1>(run, row, rows, begin, end);
      } else if (rows == 2) {
        Keys::template score<2>(run, row, rows, begin, end);
      } else if (rows <= 4) {
        Keys::template score<4>(run, row, rows, begin, end);
      } else {
        if constexpr (kScoreRows >= 8) Keys::template score<8>(run, row, rows, begin, end);
      }
    }
  }
}

void score_run(const ScoreRun& run) {
  switch (run.type) {
    case KeyType::kFloat32:
      return score_all<FloatKeys<float>>(run);
    case KeyType::kBFloat16:
      return score_all<FloatKeys<BFloat16>>(run);
    case KeyType::kFloat16:
      return score_all<FloatKeys<Float16>>(run);
    case KeyType::kInt8:
      return score_all<IntegerKeys<8>>(run);
    case KeyType::kInt4:
      return score_all<IntegerKeys<4>>(run);
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
