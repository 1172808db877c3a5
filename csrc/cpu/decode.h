// Attention with lanes over head_dim, for items of few rows (decode): each key and value row is
// read once, straight from the cache, for all rows of the item.
//
//     s[row, key] = q[row, :] . k[key, :]        dot products of kWidth (row, key) pairs at a time
//     o[row, :]   = o[row, :] 2^(m - m') + sum_key 2^(s[row, key] - m') v[key, :]
//
// Keys go in steps of kDecodeStep. Scattered rows defeat the hardware prefetcher, so the score loop
// prefetches the step's values, and the value loop the next step's keys.
#pragma once

#include <cstdint>

#include "keys.h"
#include "plan.h"
#include "rows.h"
#include "tile.h"
#include "vec.h"

namespace lowcontext {
namespace {

constexpr int64_t kDecodeLanes = kWidth < 8 ? kWidth : 8;
constexpr int64_t kDecodeStep = 32;  // keys and values, 2 x 16 KiB in fp32, fit a level-1 cache
constexpr int kAccumulators = kWidth == 16 ? 16 : 8;  // of 32 or 16 registers

LC_INLINE int64_t padded(int64_t head_dim) { return (head_dim + kWidth - 1) / kWidth * kWidth; }

struct DecodeScratch {
  float *q, *o;        // [kDecodeLanes, padded D]
  float* s;            // [kDecodeStep / keys of a block, kWidth]: kDecodeStep x rows floats
  int32_t* positions;  // [2, kDecodeStep]

  static size_t floats(const Problem& p) {
    return static_cast<size_t>(kDecodeLanes * (2 * padded(p.head_dim) + kDecodeStep) +
                               2 * kDecodeStep);
  }
  DecodeScratch(const Problem& p, float* base) {
    q = base;
    o = q + kDecodeLanes * padded(p.head_dim);
    s = o + kDecodeLanes * padded(p.head_dim);
    positions = reinterpret_cast<int32_t*>(s + kDecodeLanes * kDecodeStep);
  }
};

// A prefetch is dropped while the queue of misses is full. With rows of 4-byte elements the
// arithmetic runs ahead of the memory and many are, so each line is asked for again kNear keys
// before its use: dense 28 -> 34 GB/s, 64-wide tiles 25 -> 30, columns 17 -> 22 on one core that
// reads 38 GB/s (D = 128, four query heads). Two-byte rows gain nothing.
constexpr int64_t kNear = 8;
template <typename T>
constexpr bool kAskTwice = sizeof(T) == 4;

// Brings the rows that the next loop reads into the cache while this one computes, a few lines at a
// time. Neighbouring rows come one after the other, the order in which the hardware prefetcher
// joins in. Of scattered rows come the first lines of all, then the next lines of all: the hardware
// prefetcher runs past the end of what it sees, here into lines that are needed.
template <typename T>
class RowStream {
 public:
  RowStream(const T* base, int64_t stride, const int32_t* positions, int64_t count,
            int64_t head_dim)
      : base_(reinterpret_cast<const char*>(base)),
        stride_(stride * static_cast<int64_t>(sizeof(T))),
        positions_(positions),
        count_(count),
        row_bytes_(head_dim * static_cast<int64_t>(sizeof(T))),
        neighbours_(count > 1 && positions[1] == positions[0] + 1) {}

  // The lines that come next, kBytes of a row; null when there is nothing to do. The caller
  // prefetches them one by one between its arithmetic: in one burst, some are dropped.
  template <int64_t kBytes>
  LC_INLINE const char* next() {
    constexpr int64_t kStep = kBytes < 64 ? 64 : kBytes;
    if constexpr (kBytes < 64) {
      due_ += kBytes;
      if (due_ < 64) return nullptr;
      due_ = 0;
    }
    if (row_ >= count_) return nullptr;
    const char* line = base_ + positions_[row_] * stride_ + offset_;
    const bool more = offset_ + kStep < row_bytes_;
    if (neighbours_) {
      row_ += more ? 0 : 1;
      offset_ = more ? offset_ + kStep : 0;
    } else if (++row_ == count_ && more) {
      row_ = 0;
      offset_ += kStep;
    }
    return line;
  }

 private:
  const char* base_;
  int64_t stride_;
  const int32_t* positions_;
  int64_t count_, row_bytes_;
  bool neighbours_;
  int64_t row_ = 0, offset_ = 0, due_ = 0;
};

// Part r of R of the lines in [line, line + kBytes).
template <int64_t kBytes, int R>
LC_INLINE void prefetch_share(const char* line, int r) {
  constexpr int64_t kLines = kBytes < 64 ? 1 : kBytes / 64;
  for (int64_t i = r * kLines / R; i < (r + 1) * kLines / R; ++i) prefetch(line + 64 * i);
}

// Prefetches of the score loop: the step's values, and again the keys that are kNear away.
template <typename T, int R>
struct ScoreAhead {
  static constexpr int K = kWidth / R;
  static constexpr int64_t kBytes = K * kWidth * static_cast<int64_t>(sizeof(T));
  RowStream<T> values;
  const T* near[K];
  const char* upcoming;

  LC_INLINE void channels(int64_t) { upcoming = values.template next<kBytes>(); }
  LC_INLINE void row(int64_t d, int r) {
    prefetch_share<kBytes, R>(upcoming, r);
    if (kAskTwice<T> && d * static_cast<int64_t>(sizeof(T)) % 64 == 0) {
      for (int i = r * K / R; i < (r + 1) * K / R; ++i) prefetch(near[i] + d);
    }
  }
};

// s[block, row * K + key] for K = kWidth / R keys of each block.
template <typename T, int R>
void score_keys(const T* k, int64_t k_stride, RowStream<T> values, const int32_t* positions,
                int64_t keys, const float* q, int64_t head_dim, float* s) {
  constexpr int K = kWidth / R;
  ScoreAhead<T, R> ahead = {values, {}, nullptr};
  for (int64_t first = 0; first < keys; first += K) {
    const T* rows[K];
    LC_UNROLL
    for (int i = 0; i < K; ++i) {
      rows[i] = k + positions[min64(first + i, keys - 1)] * k_stride;
      ahead.near[i] = k + positions[min64(first + i + kNear, keys - 1)] * k_stride;
    }
    store(s + first / K * kWidth, multiply_tile<R>(q, padded(head_dim), rows, head_dim, ahead));
  }
}

// o[R, C vectors at d] = o * alpha[row] + sum_key s[row, key] v[key, d]; head_dim - d < kWidth only
// where C is 1.
template <typename T, int R, int C>
void accumulate_values(const T* v, int64_t v_stride, RowStream<T>& upcoming,
                       const int32_t* positions, int64_t keys, const float* s, const float* alpha,
                       int64_t d, int64_t head_dim, float* o) {
  constexpr int K = kWidth / R;
  const int64_t o_stride = padded(head_dim);
  v += d;
  o += d;
  RowStream<T> next_keys = upcoming;  // a copy stays in registers
  Vec acc[R][C];
  LC_UNROLL
  for (int r = 0; r < R; ++r) {
    LC_UNROLL
    for (int c = 0; c < C; ++c) acc[r][c] = set1(0.0f);
  }
  for (int64_t key = 0; key < keys; ++key) {
    const T* row = v + positions[key] * v_stride;
    const char* near =
        reinterpret_cast<const char*>(v + positions[min64(key + kNear, keys - 1)] * v_stride);
    const float* weights = s + key / K * kWidth + key % K;
    constexpr int64_t kBytes = C * kWidth * static_cast<int64_t>(sizeof(T));
    const char* line = next_keys.template next<kBytes>();
    Vec value[C];
    LC_UNROLL
    for (int c = 0; c < C; ++c) {
      value[c] = C > 1 ? load(row + c * kWidth) : load_first(row, head_dim - d);
    }
    LC_UNROLL
    for (int r = 0; r < R; ++r) {
      const Vec weight = set1(weights[r * K]);
      LC_UNROLL
      for (int c = 0; c < C; ++c) acc[r][c] = fma(weight, value[c], acc[r][c]);
      prefetch_share<kBytes, R>(line, r);
      if (kAskTwice<T>) prefetch_share<kBytes, R>(near, r);
    }
  }
  upcoming = next_keys;
  LC_UNROLL
  for (int r = 0; r < R; ++r) {
    LC_UNROLL
    for (int c = 0; c < C; ++c) {
      float* at = o + r * o_stride + c * kWidth;
      store(at, fma(load(at), set1(alpha[r * K]), acc[r][c]));
    }
  }
}

template <typename T, int R>
void run_decode_rows(const Problem& p, const Plan& plan, const Item& item, ItemQueue& queue,
                     float* base, float* partial) {
  constexpr int K = kWidth / R;
  constexpr int C = kAccumulators / R < 8 ? kAccumulators / R : 8;
  const DecodeScratch scratch(p, base);
  const int64_t head_dim = p.head_dim, stride = padded(head_dim);
  const int64_t lanes = item.rows * plan.group;
  const T* k = head_base<T>(p.k, item.batch, kv_head(p, plan, item));
  const T* v = head_base<T>(p.v, item.batch, kv_head(p, plan, item));
  const Vec query_factor = set1(query_scale(p));
  LaneCursor queries(p, plan, item);
  for (int64_t r = 0; r < R; ++r, queries.advance()) {
    const T* row = r < lanes ? queries.query<T>() : nullptr;
    for (int64_t d = 0; d < head_dim; d += kWidth) {
      store(scratch.q + r * stride + d,
            row == nullptr ? set1(0.0f) : load_first(row + d, head_dim - d) * query_factor);
      store(scratch.o + r * stride + d, set1(0.0f));
    }
  }
  // Lane r * K + i of these belongs to row r; the K partial sums of a row are added at the end.
  Vec maximum = set1(-kInfinity), sum = set1(0.0f);
  const int64_t row0 = p.kv_len - p.q_len + item.row;

  KeyWalker walker(p, plan, item);
  int32_t* now = scratch.positions;
  int32_t* then = now + kDecodeStep;
  int64_t keys = walker.next(now, kDecodeStep);
  float* s = scratch.s;
  while (keys > 0) {
    score_keys<T, R>(k, p.k.stride_l, RowStream<T>(v, p.v.stride_l, now, keys, head_dim), now,
                     keys, scratch.q, head_dim, s);
    const int64_t blocks = (keys + K - 1) / K;
    if (p.softcap > 0.0f) {
      const Vec cap = set1(p.softcap * kLog2E);
      for (int64_t i = 0; i < blocks; ++i) store(s + i * kWidth, tanh(load(s + i * kWidth)) * cap);
    }
    for (int64_t i = keys; i < blocks * K; ++i) {
      for (int r = 0; r < R; ++r) s[i / K * kWidth + r * K + i % K] = -kInfinity;
    }
    if (item.rows > 1) {
      for (int64_t i = 0; i < keys; ++i) {
        for (int64_t r = 0; r < lanes; ++r) {
          const int64_t behind = row0 + r / plan.group - now[i];
          if (behind < 0 || (p.window > 0 && behind >= p.window))
            s[i / K * kWidth + r * K + i % K] = -kInfinity;
        }
      }
    }
    Vec top = maximum;
    for (int64_t i = 0; i < blocks; ++i) top = max(top, load(s + i * kWidth));
    if (K > 1) {
      float lane[kWidth];
      store(lane, top);
      for (int r = 0; r < R; ++r) {
        float row_top = lane[r * K];
        for (int i = 1; i < K; ++i) row_top = lane[r * K + i] > row_top ? lane[r * K + i] : row_top;
        for (int i = 0; i < K; ++i) lane[r * K + i] = row_top;
      }
      top = load(lane);
    }
    const Vec zero_base = select_lt(top, set1(-3.0e38f), set1(0.0f), top);
    float alpha[kWidth];
    store(alpha, exp2(maximum - zero_base));
    Vec step_sum = set1(0.0f);
    for (int64_t i = 0; i < blocks; ++i) {
      const Vec x = exp2(load(s + i * kWidth) - zero_base);
      store(s + i * kWidth, x);
      step_sum = step_sum + x;
    }
    sum = fma(sum, load(alpha), step_sum);
    maximum = top;

    const int64_t keys_then = walker.next(then, kDecodeStep);
    RowStream<T> next_keys(k, p.k.stride_l, then, keys_then, head_dim);
    if (keys_then == 0) {
      if (const Item* next = queue.peek()) {
        const int64_t count = KeyWalker(p, plan, *next).next(then, kDecodeStep);
        const T* base = head_base<T>(p.k, next->batch, kv_head(p, plan, *next));
        next_keys = RowStream<T>(base, p.k.stride_l, then, count, head_dim);
      }
    }
    int64_t d = 0;
    for (; d + C * kWidth <= head_dim; d += C * kWidth) {
      accumulate_values<T, R, C>(v, p.v.stride_l, next_keys, now, keys, s, alpha, d, head_dim,
                                 scratch.o);
    }
    for (; d < head_dim; d += kWidth) {
      accumulate_values<T, R, 1>(v, p.v.stride_l, next_keys, now, keys, s, alpha, d, head_dim,
                                 scratch.o);
    }
    int32_t* swap = now;
    now = then;
    then = swap;
    keys = keys_then;
  }

  float maxima[kWidth], sums[kWidth];
  store(maxima, maximum);
  store(sums, sum);
  const int64_t capacity = plan.max_lanes();
  LaneCursor cursor(p, plan, item);
  for (int64_t r = 0; r < lanes; ++r, cursor.advance()) {
    float total = sums[r * K];
    for (int i = 1; i < K; ++i) total += sums[r * K + i];
    const float* o = scratch.o + r * stride;
    if (partial != nullptr) {
      for (int64_t d = 0; d < head_dim; d += kWidth) {
        store_first(partial + r * head_dim + d, load(o + d), head_dim - d);
      }
      partial[capacity * head_dim + r] = maxima[r * K];
      partial[capacity * (head_dim + 1) + r] = total;
    } else {
      const Vec scale = set1(total == 0.0f ? 0.0f : 1.0f / total);
      T* out = cursor.output<T>();
      for (int64_t d = 0; d < head_dim; d += kWidth)
        store_first(out + d, load(o + d) * scale, head_dim - d);
      *cursor.lse() = log_sum(maxima[r * K], total);
    }
  }
}

template <typename T>
void run_decode(const Problem& p, const Plan& plan, const Item& item, ItemQueue& queue,
                float* scratch, float* partial) {
  const int64_t lanes = plan.max_lanes();
  if (lanes <= 1) return run_decode_rows<T, 1>(p, plan, item, queue, scratch, partial);
  if (lanes <= 2) return run_decode_rows<T, 2>(p, plan, item, queue, scratch, partial);
  if (lanes <= 4) return run_decode_rows<T, 4>(p, plan, item, queue, scratch, partial);
  if constexpr (kDecodeLanes >= 8)
    return run_decode_rows<T, 8>(p, plan, item, queue, scratch, partial);
}

}  // namespace
}  // namespace lowcontext
