// Attention with lanes over rows, for items of many rows (prefill).
//
// The rows of an item (query rows x heads of the group) are cut into panels of two vectors of
// lanes. Keys and values are gathered, as floats, a step of kStep at a time. Per panel and step,
// with q already scaled:
//     s[key, lane]  = sum_d k[key, d] q[d, lane]
//     m'[lane]      = max(m[lane], max_key s[key, lane]),   p[key, lane] = 2^(s[key, lane] -
//     m'[lane]) o[d, lane]    = o[d, lane] 2^(m[lane] - m'[lane]) + sum_key v[key, d] p[key, lane]
// Both products broadcast the left factor from memory and keep kPanelRows x 2 accumulators in
// registers; the softmax has no reduction across lanes. Queries and output are transposed once per
// item.
#pragma once

#include <cstdint>

#include "keys.h"
#include "plan.h"
#include "rows.h"
#include "vec.h"

namespace lowcontext {
namespace {

constexpr int kLanes = 2 * kWidth;  // of a panel
constexpr int64_t kStep =
    128;  // keys of one softmax step; s [128, 32] is half of a 32 KiB level-1 cache

// s[M, lanes] = k[M, D] q[D, lanes], added to what is there where Add
template <int M, int NV, bool Add = false>
void score_rows(const float* k, int64_t stride, const float* q, int64_t head_dim, float* s) {
  Vec acc[M][NV];
  LC_UNROLL
  for (int i = 0; i < M; ++i) {
    LC_UNROLL
    for (int j = 0; j < NV; ++j) acc[i][j] = Add ? load(s + i * kLanes + j * kWidth) : set1(0.0f);
  }
  // One pointer for three rows: the rest are addressing modes of it.
  const float* rows[(M + 2) / 3];
  LC_UNROLL
  for (int i = 0; i < (M + 2) / 3; ++i) rows[i] = k + 3 * i * stride;
  for (int64_t d = 0; d < head_dim; ++d) {
    Vec b[NV];
    LC_UNROLL
    for (int j = 0; j < NV; ++j) b[j] = load(q + d * kLanes + j * kWidth);
    LC_UNROLL
    for (int i = 0; i < M; ++i) {
      const Vec a = set1(rows[i / 3][(i % 3) * stride + d]);
      LC_UNROLL
      for (int j = 0; j < NV; ++j) acc[i][j] = fma(a, b[j], acc[i][j]);
    }
  }
  LC_UNROLL
  for (int i = 0; i < M; ++i) {
    LC_UNROLL
    for (int j = 0; j < NV; ++j) store(s + i * kLanes + j * kWidth, acc[i][j]);
  }
}

// o[M, lanes] = o[M, lanes] * alpha[lanes] + v[keys, M]^T p[keys, lanes]; o is not read where alpha
// is null. The keys of the step are summed first: added one by one to a sum over the whole list,
// each would be rounded to the size of that sum.
template <int M, int NV>
void accumulate_rows(const float* v, int64_t stride, const float* p, int64_t keys,
                     const float* alpha, float* o) {
  Vec acc[M][NV];
  LC_UNROLL
  for (int i = 0; i < M; ++i) {
    LC_UNROLL
    for (int j = 0; j < NV; ++j) acc[i][j] = set1(0.0f);
  }
  for (int64_t key = 0; key < keys; ++key) {
    Vec b[NV];
    LC_UNROLL
    for (int j = 0; j < NV; ++j) b[j] = load(p + key * kLanes + j * kWidth);
    LC_UNROLL
    for (int i = 0; i < M; ++i) {
      const Vec a = set1(v[i]);
      LC_UNROLL
      for (int j = 0; j < NV; ++j) acc[i][j] = fma(a, b[j], acc[i][j]);
    }
    v += stride;
  }
  if (alpha != nullptr) {
    LC_UNROLL
    for (int j = 0; j < NV; ++j) {
      const Vec a = load(alpha + j * kWidth);
      LC_UNROLL
      for (int i = 0; i < M; ++i) acc[i][j] = fma(load(o + i * kLanes + j * kWidth), a, acc[i][j]);
    }
  }
  LC_UNROLL
  for (int i = 0; i < M; ++i) {
    LC_UNROLL
    for (int j = 0; j < NV; ++j) store(o + i * kLanes + j * kWidth, acc[i][j]);
  }
}

// The same with m < kPanelRows rows, known at run time.
template <int NV, int M = kPanelRows - 1, bool Add = false>
void score_tail(int64_t m, const float* k, int64_t stride, const float* q, int64_t head_dim,
                float* s) {
  if constexpr (M > 0) {
    if (m == M) return score_rows<M, NV, Add>(k, stride, q, head_dim, s);
    score_tail<NV, M - 1, Add>(m, k, stride, q, head_dim, s);
  }
}

template <int NV, int M = kPanelRows - 1>
void accumulate_tail(int64_t m, const float* v, int64_t stride, const float* p, int64_t keys,
                     const float* alpha, float* o) {
  if constexpr (M > 0) {
    if (m == M) return accumulate_rows<M, NV>(v, stride, p, keys, alpha, o);
    accumulate_tail<NV, M - 1>(m, v, stride, p, keys, alpha, o);
  }
}

// Brings rows that are needed next into the level-2 cache, a few at a time between blocks of
// arithmetic: in one burst they would wait for each other.
struct RowPrefetcher {
  const char** rows;
  int64_t row_bytes;
  int64_t count = 0;
  int64_t done = 0;
  int64_t per_call = 0;

  LC_INLINE void add(const void* row) { rows[count++] = static_cast<const char*>(row); }
  LC_INLINE void spread(int64_t calls) { per_call = (count + calls - 1) / max64(1, calls); }
  LC_INLINE void step() {
    const int64_t stop = min64(count, done + per_call);
    for (; done < stop; ++done) {
      for (int64_t i = 0; i < row_bytes; i += 64) prefetch_l2(rows[done] + i);
    }
  }
};

struct PanelScratch {
  float *q, *o;          // [panels, D, kLanes]
  float *maximum, *sum;  // [panels, kLanes]
  float* s;              // [kStep, kLanes]
  float *k, *v;          // [kStep, row_stride]
  int32_t* positions;    // [2, kStep]
  const char** rows;     // [2 * kStep + 2 * lanes]

  static int64_t panels(const Plan& plan) { return (plan.max_lanes() + kLanes - 1) / kLanes; }
  // An odd number of cache lines: the rows of a step then spread over all sets of the level-1
  // cache.
  static int64_t row_stride(int64_t head_dim) { return ((head_dim + 15) / 16 | 1) * 16; }
  static size_t floats(const Problem& p, const Plan& plan) {
    const int64_t n = panels(plan);
    return static_cast<size_t>(2 * n * (p.head_dim + 1) * kLanes +
                               kStep * (kLanes + 2 * row_stride(p.head_dim) + 2) +
                               2 * (2 * kStep + 2 * n * kLanes));
  }
  PanelScratch(const Problem& p, const Plan& plan, float* base) {
    const int64_t n = panels(plan);
    q = base;
    o = q + n * p.head_dim * kLanes;
    maximum = o + n * p.head_dim * kLanes;
    sum = maximum + n * kLanes;
    s = sum + n * kLanes;
    k = s + kStep * kLanes;
    v = k + kStep * row_stride(p.head_dim);
    positions = reinterpret_cast<int32_t*>(v + kStep * row_stride(p.head_dim));
    rows = reinterpret_cast<const char**>(positions + 2 * kStep);
  }
};

// q[panel, d, lane] = scale * q of the lane; lanes past the last are zero.
template <typename T>
void pack_queries(const Problem& p, const Plan& plan, const Item& item, float* out) {
  const int64_t lanes = item.rows * plan.group;
  const Vec scale = set1(query_scale(p));
  LaneCursor cursor(p, plan, item);
  for (int64_t lane = 0; lane < lanes; lane += kWidth) {
    float* base = out + lane / kLanes * (p.head_dim * kLanes) + lane % kLanes;
    const T* rows[kWidth];
    for (int i = 0; i < kWidth; ++i, cursor.advance()) {
      rows[i] = lane + i < lanes ? cursor.query<T>() : nullptr;
    }
    for (int64_t d = 0; d < p.head_dim; d += kWidth) {
      Vec block[kWidth];
      for (int i = 0; i < kWidth; ++i) {
        block[i] = rows[i] == nullptr ? set1(0.0f) : load_first(rows[i] + d, p.head_dim - d);
      }
      transpose(block);
      const int64_t n = min64(kWidth, p.head_dim - d);
      for (int64_t i = 0; i < n; ++i) store(base + (d + i) * kLanes, block[i] * scale);
    }
  }
  if (lanes % kLanes != 0 && lanes % kLanes <= kWidth) {  // the last panel has one vector of lanes
    float* base = out + lanes / kLanes * (p.head_dim * kLanes) + kWidth;
    for (int64_t d = 0; d < p.head_dim; ++d) store(base + d * kLanes, set1(0.0f));
  }
}

// Row i of out = k of positions[i], as floats.
template <typename T>
void gather_rows(const T* base, int64_t stride, const int32_t* positions, int64_t count,
                 int64_t head_dim, float* out, int64_t out_stride) {
  for (int64_t i = 0; i < count; ++i) {
    const T* row = base + positions[i] * stride;
    for (int64_t d = 0; d < head_dim; d += kWidth)
      store(out + d, load_first(row + d, head_dim - d));
    out += out_stride;
  }
}

// What a step of keys is to a panel.
struct PanelStep {
  const float *k, *v;
  int64_t stride;
  const int32_t* positions;
  int64_t keys;
  bool first;          // nothing accumulated yet
  int64_t row0;        // position of the first row of the item
  int64_t first_lane;  // of the panel
  int64_t last_lane;
};

template <int NV>
void run_panel(const Problem& p, const Plan& plan, const PanelStep& step, const float* q, float* s,
               float* maximum, float* sum, float* o, RowPrefetcher& next) {
  const int64_t group = plan.group;
  const int64_t first_position = step.row0 + step.first_lane / group;
  const int64_t last_position = step.row0 + step.last_lane / group;
  int64_t begin = 0, end = step.keys;
  while (end > begin && step.positions[end - 1] > last_position) --end;
  if (p.window > 0) {
    while (begin < end && step.positions[begin] <= first_position - p.window) ++begin;
  }
  const int64_t keys = end - begin;
  if (keys == 0 && !step.first) return;
  const int32_t* positions = step.positions + begin;
  const float* k = step.k + begin * step.stride;
  const float* v = step.v + begin * step.stride;

  int64_t i = 0;
  for (; i + kPanelRows <= keys; i += kPanelRows) {
    score_rows<kPanelRows, NV>(k + i * step.stride, step.stride, q, p.head_dim, s + i * kLanes);
    next.step();
  }
  score_tail<NV>(keys - i, k + i * step.stride, step.stride, q, p.head_dim, s + i * kLanes);

  if (p.softcap > 0.0f) {
    const Vec cap = set1(p.softcap * kLog2E);
    for (i = 0; i < keys; ++i) {
      for (int j = 0; j < NV; ++j)
        store(s + i * kLanes + j * kWidth, tanh(load(s + i * kLanes + j * kWidth)) * cap);
    }
  }

  // Lane l, row l / group, sees the key where position <= row0 + l / group < position + window.
  float iota[kLanes];
  for (int l = 0; l < kLanes; ++l) iota[l] = static_cast<float>(l);
  for (i = 0; i < keys; ++i) {
    const int64_t ahead = positions[i] - first_position;
    const bool future = ahead > 0;
    const bool past = p.window > 0 && positions[i] <= last_position - p.window;
    if (!future && !past) continue;
    const int64_t low = (positions[i] - step.row0) * group - step.first_lane;
    const int64_t high = p.window > 0 ? low + p.window * group : kLanes;
    const Vec first_lane = set1(static_cast<float>(clamp64(low, 0, kLanes)));
    const Vec stop_lane = set1(static_cast<float>(clamp64(high, 0, kLanes)));
    for (int j = 0; j < NV; ++j) {
      float* at = s + i * kLanes + j * kWidth;
      const Vec lane = load(iota + j * kWidth), hidden = set1(-kInfinity);
      store(at, select_lt(lane, first_lane, hidden, select_lt(lane, stop_lane, load(at), hidden)));
    }
  }

  // Four running maxima: one would wait for its own latency.
  Vec tops[4][NV], top[NV], base[NV], total[NV];
  LC_UNROLL
  for (int j = 0; j < NV; ++j) {
    const Vec start = step.first ? set1(-kInfinity) : load(maximum + j * kWidth);
    for (auto& each : tops) each[j] = start;
  }
  for (i = 0; i + 4 <= keys; i += 4) {
    LC_UNROLL
    for (int a = 0; a < 4; ++a) {
      LC_UNROLL
      for (int j = 0; j < NV; ++j)
        tops[a][j] = max(tops[a][j], load(s + (i + a) * kLanes + j * kWidth));
    }
  }
  for (; i < keys; ++i) {
    LC_UNROLL
    for (int j = 0; j < NV; ++j) tops[0][j] = max(tops[0][j], load(s + i * kLanes + j * kWidth));
  }
  LC_UNROLL
  for (int j = 0; j < NV; ++j)
    top[j] = max(max(tops[0][j], tops[1][j]), max(tops[2][j], tops[3][j]));
  float alpha[kLanes];
  Vec before[NV];  // sum of the steps so far
  for (int j = 0; j < NV; ++j) {
    // A lane that has seen no key subtracts 0: 2^(-inf) = 0, with no inf - inf.
    base[j] = select_lt(top[j], set1(-3.0e38f), set1(0.0f), top[j]);
    total[j] = before[j] = set1(0.0f);
    if (!step.first) {
      const Vec a = exp2(load(maximum + j * kWidth) - base[j]);
      store(alpha + j * kWidth, a);
      before[j] = load(sum + j * kWidth) * a;
    }
    store(maximum + j * kWidth, top[j]);
  }
  for (i = 0; i < keys; ++i) {
    for (int j = 0; j < NV; ++j) {
      const Vec x = exp2(load(s + i * kLanes + j * kWidth) - base[j]);
      store(s + i * kLanes + j * kWidth, x);
      total[j] = total[j] + x;
    }
  }
  for (int j = 0; j < NV; ++j) store(sum + j * kWidth, before[j] + total[j]);

  const float* scale = step.first ? nullptr : alpha;
  int64_t d = 0;
  for (; d + kPanelRows <= p.head_dim; d += kPanelRows) {
    accumulate_rows<kPanelRows, NV>(v + d, step.stride, s, keys, scale, o + d * kLanes);
    next.step();
  }
  accumulate_tail<NV>(p.head_dim - d, v + d, step.stride, s, keys, scale, o + d * kLanes);
}

// Row-major output of the item, divided by the sum of the lane; as is, with maximum and sum, into
// partial.
template <typename T>
void unpack_output(const Problem& p, const Plan& plan, const Item& item,
                   const PanelScratch& scratch, bool empty, float* partial) {
  const int64_t lanes = item.rows * plan.group;
  const int64_t capacity = plan.max_lanes();
  LaneCursor cursor(p, plan, item);
  for (int64_t lane = 0; lane < lanes; lane += kWidth) {
    const int64_t n = min64(kWidth, lanes - lane);
    const float* base = scratch.o + lane / kLanes * (p.head_dim * kLanes) + lane % kLanes;
    float sum[kWidth], maximum[kWidth];
    for (int i = 0; i < kWidth; ++i) {
      sum[i] = empty ? 0.0f : scratch.sum[lane + i];
      maximum[i] = empty ? -kInfinity : scratch.maximum[lane + i];
    }
    T* rows[kWidth];
    float* lse[kWidth];
    for (int64_t i = 0; i < n; ++i, cursor.advance()) {
      rows[i] = cursor.output<T>();
      lse[i] = cursor.lse();
    }
    const Vec total = load(sum), zero = set1(0.0f);
    const Vec scale = partial != nullptr ? set1(1.0f) : set1(1.0f) / total;
    for (int64_t d = 0; d < p.head_dim; d += kWidth) {
      const int64_t width = min64(kWidth, p.head_dim - d);
      Vec block[kWidth];
      for (int i = 0; i < kWidth; ++i) {
        block[i] = zero;
        if (i < width && !empty) {
          block[i] = load(base + (d + i) * kLanes) * scale;
          if (partial == nullptr)
            block[i] = select_lt(zero, total, block[i], total);  // total: 0 or NaN
        }
      }
      transpose(block);
      for (int64_t i = 0; i < n; ++i) {
        if (partial != nullptr) {
          store_first(partial + (lane + i) * p.head_dim + d, block[i], width);
        } else {
          store_first(rows[i] + d, block[i], width);
        }
      }
    }
    for (int64_t i = 0; i < n; ++i) {
      if (partial != nullptr) {
        partial[capacity * p.head_dim + lane + i] = maximum[i];
        partial[capacity * (p.head_dim + 1) + lane + i] = sum[i];
      } else {
        *lse[i] = log_sum(maximum[i], sum[i]);
      }
    }
  }
}

// The rows that the item after this one reads first, and the output rows of this one.
template <typename T>
void add_next_item(const Problem& p, const Plan& plan, const Item& item, const Item& next,
                   int32_t* positions, RowPrefetcher& prefetcher) {
  LaneCursor output(p, plan, item);
  for (int64_t i = 0; i < item.rows * plan.group; ++i, output.advance()) {
    prefetcher.add(output.output<T>());
  }
  LaneCursor query(p, plan, next);
  for (int64_t i = 0; i < next.rows * plan.group; ++i, query.advance()) {
    prefetcher.add(query.query<T>());
  }
  const T* k = head_base<T>(p.k, next.batch, kv_head(p, plan, next));
  const T* v = head_base<T>(p.v, next.batch, kv_head(p, plan, next));
  KeyWalker walker(p, plan, next);
  const int64_t keys = walker.next(positions, kStep);
  for (int64_t i = 0; i < keys; ++i) {
    prefetcher.add(k + positions[i] * p.k.stride_l);
    prefetcher.add(v + positions[i] * p.v.stride_l);
  }
}

template <typename T>
void run_panels(const Problem& p, const Plan& plan, const Item& item, ItemQueue& queue, float* base,
                float* partial) {
  const PanelScratch scratch(p, plan, base);
  const int64_t lanes = item.rows * plan.group;
  const int64_t panels = (lanes + kLanes - 1) / kLanes;
  const int64_t stride = PanelScratch::row_stride(p.head_dim);
  const T* k = head_base<T>(p.k, item.batch, kv_head(p, plan, item));
  const T* v = head_base<T>(p.v, item.batch, kv_head(p, plan, item));
  pack_queries<T>(p, plan, item, scratch.q);

  KeyWalker walker(p, plan, item);
  int32_t* now = scratch.positions;
  int32_t* then = now + kStep;
  int64_t keys = walker.next(now, kStep);
  const bool empty = keys == 0;
  PanelStep step;
  step.k = scratch.k;
  step.v = scratch.v;
  step.stride = stride;
  step.row0 = p.kv_len - p.q_len + item.row;
  step.first = true;
  while (keys > 0) {
    const int64_t keys_then = walker.next(then, kStep);
    gather_rows(k, p.k.stride_l, now, keys, p.head_dim, scratch.k, stride);
    gather_rows(v, p.v.stride_l, now, keys, p.head_dim, scratch.v, stride);
    RowPrefetcher prefetcher{scratch.rows, p.head_dim * static_cast<int64_t>(sizeof(T))};
    for (int64_t i = 0; i < keys_then; ++i) {
      prefetcher.add(k + then[i] * p.k.stride_l);
      prefetcher.add(v + then[i] * p.v.stride_l);
    }
    if (keys_then == 0) {
      const Item* next = queue.peek();
      if (next != nullptr) add_next_item<T>(p, plan, item, *next, then, prefetcher);
    }
    prefetcher.spread(panels * (keys / kPanelRows + p.head_dim / kPanelRows));
    step.positions = now;
    step.keys = keys;
    for (int64_t i = 0; i < panels; ++i) {
      step.first_lane = i * kLanes;
      step.last_lane = min64(lanes, (i + 1) * kLanes) - 1;
      const int64_t at = i * p.head_dim * kLanes;
      const auto run = step.last_lane - step.first_lane < kWidth ? run_panel<1> : run_panel<2>;
      run(p, plan, step, scratch.q + at, scratch.s, scratch.maximum + i * kLanes,
          scratch.sum + i * kLanes, scratch.o + at, prefetcher);
    }
    step.first = false;
    int32_t* swap = now;
    now = then;
    then = swap;
    keys = keys_then;
  }
  unpack_output<T>(p, plan, item, scratch, empty, partial);
}

}  // namespace
}  // namespace lowcontext
