// Kernels of CellScores and BlockMeans.
//
// Scores have lanes over query cells. Queries are packed once per item, [panel, t, d, lane]; keys
// are gathered a step of cells at a time, one t after the other, and the products of all t are
// added up in s[key cell, lane]. The softmax goes over the steps with a running maximum: each key
// block leaves the sum of its weights relative to the maximum at that time, and those are scaled to
// the last one at the end. So a row of weights is never formed, whatever its length.
#pragma once

#include <cstdint>

#include "../common/block_scores.h"
#include "keys.h"
#include "panel.h"
#include "plan.h"
#include "vec.h"

namespace lowcontext {
namespace {

struct CellScratch {
  int64_t panels;
  int64_t step_cells;
  int64_t key_stride;    // an odd number of cache lines: the rows spread over all sets of a cache
  float* queries;        // [panels, stride, D, kLanes]
  float* keys;           // [step_cells, key_stride]
  float* s;              // [panels, step_cells, kLanes]
  float *maximum, *sum;  // [panels, kLanes]
  float* tops;           // [steps, panels, kLanes]: maximum up to a step
  float* weights;        // [key blocks, panels, kLanes]: sums relative to the top of their step
  float* cell;           // [panels, kLanes]: number of the query cell

  explicit CellScratch(const CellScores& c) {
    panels = ceil_div(c.lanes(), kLanes);
    step_cells = c.step_blocks() * c.cells();
    key_stride = PanelScratch::row_stride(c.head_dim);
  }
  int64_t width() const { return panels * kLanes; }
  size_t floats(const CellScores& c) const {
    const int64_t per_lane =
        c.stride * c.head_dim + step_cells + 3 + c.steps() + c.steps() * c.step_blocks();
    return static_cast<size_t>(width() * per_lane + step_cells * key_stride);
  }
  void place(const CellScores& c, float* base) {
    queries = base;
    keys = queries + width() * c.stride * c.head_dim;
    s = keys + step_cells * key_stride;
    maximum = s + width() * step_cells;
    sum = maximum + width();
    cell = sum + width();
    tops = cell + width();
    weights = tops + width() * c.steps();
  }
};

// The row of position `at`, or null where there is none.
template <typename T>
LC_INLINE const T* cell_row(const T* base, int64_t stride, int64_t at, int64_t first, int64_t end) {
  return at >= first && at < end ? base + (at - first) * stride : nullptr;
}

// queries[panel, t, d, lane] = factor * q[stride * cell + stride - 1 - t, d].
template <typename T>
void pack_cells(const CellScores& c, int64_t b, int64_t h, int64_t first_block,
                const CellScratch& scratch) {
  const Vec factor = set1(c.scale * kLog2E / static_cast<float>(c.stride));
  const int64_t per_block = c.group() * c.cells();
  const T* heads[kWidth];
  int64_t begin[kWidth];  // position of the first token of the lane's cell; behind the end: no lane
  for (int64_t lane = 0; lane < scratch.width(); lane += kWidth) {
    for (int64_t i = 0; i < kWidth; ++i) {
      const int64_t at = lane + i, rest = at % per_block;
      const int64_t cell = (first_block + at / per_block) * c.cells() + rest % c.cells();
      heads[i] = head_base<T>(c.q, b, h * c.group() + rest / c.cells());
      begin[i] = at < c.lanes() ? cell * c.stride : c.kv_len;
      scratch.cell[at] = static_cast<float>(cell);
    }
    float* out = scratch.queries + lane / kLanes * (c.stride * c.head_dim * kLanes) + lane % kLanes;
    for (int64_t t = 0; t < c.stride; ++t, out += c.head_dim * kLanes) {
      for (int64_t d = 0; d < c.head_dim; d += kWidth) {
        Vec block[kWidth];
        for (int64_t i = 0; i < kWidth; ++i) {
          const T* row =
              cell_row(heads[i], c.q.stride_l, begin[i] + c.stride - 1 - t, c.offset(), c.kv_len);
          block[i] = row == nullptr ? set1(0.0f) : load_first(row + d, c.head_dim - d);
        }
        transpose(block);
        for (int64_t i = 0; i < min64(kWidth, c.head_dim - d); ++i) {
          store(out + (d + i) * kLanes, block[i] * factor);
        }
      }
    }
  }
}

// Row i of the buffer = k of position stride * (first + i) + t, as floats; the row after it is
// needed next.
template <typename T>
void gather_cells(const CellScores& c, const T* base, int64_t first, int64_t count, int64_t t,
                  const CellScratch& scratch) {
  for (int64_t i = 0; i < count; ++i) {
    float* out = scratch.keys + i * scratch.key_stride;
    const int64_t at = (first + i) * c.stride + t;
    const T* row = cell_row(base, c.k.stride_l, at, 0, c.kv_len);
    const T* next = cell_row(base, c.k.stride_l, at + 1, 0, c.kv_len);
    for (int64_t d = 0; d < c.head_dim; d += kWidth) {
      store(out + d, row == nullptr ? set1(0.0f) : load_first(row + d, c.head_dim - d));
      if (next != nullptr) prefetch(next + d);
    }
  }
}

// s[key cell, lane] (+)= k q for one t.
template <bool Add>
void multiply_cells(const CellScores& c, int64_t count, const float* queries,
                    const CellScratch& scratch, float* s) {
  const int64_t stride = scratch.key_stride;
  int64_t i = 0;
  for (; i + kPanelRows <= count; i += kPanelRows) {
    score_rows<kPanelRows, 2, Add>(scratch.keys + i * stride, stride, queries, c.head_dim,
                                   s + i * kLanes);
  }
  score_tail<2, kPanelRows - 1, Add>(count - i, scratch.keys + i * stride, stride, queries,
                                     c.head_dim, s + i * kLanes);
}

// One step of the softmax, of one vector of lanes: `count` key cells from `first` on, whole blocks.
LC_INLINE void weigh_cells(const CellScores& c, int64_t first, int64_t count, const float* s,
                           Vec cell, float* maximum, float* sum, float* top, float* weights,
                           int64_t weights_stride) {
  const Vec old = load(maximum), hidden = set1(-kInfinity);
  Vec now = old;
  const auto logit = [&](int64_t i) {
    const Vec at = set1(static_cast<float>(first + i));
    return select_lt(cell, at, hidden, load(s + i * kLanes));
  };
  for (int64_t i = 0; i < count; ++i) now = max(now, logit(i));
  Vec total = load(sum) * exp2(old - now);
  for (int64_t i = 0; i < count; weights += weights_stride) {
    Vec acc = set1(0.0f);
    for (const int64_t end = i + c.cells(); i < end; ++i) acc = acc + exp2(logit(i) - now);
    store(weights, acc);
    total = total + acc;
  }
  store(maximum, now);
  store(sum, total);
  store(top, now);
}

template <typename T>
void score_span(const CellScores& c, int64_t b, int64_t h, int64_t span, float* base) {
  CellScratch scratch(c);
  scratch.place(c, base);
  const int64_t width = scratch.width();
  const int64_t first_block = c.first_block() + span * c.span();
  const int64_t stop_block = min64(first_block + c.span(), c.key_blocks());
  pack_cells<T>(c, b, h, first_block, scratch);
  // Every lane sees key cell 0, so no maximum is -inf after the first step.
  for (int64_t i = 0; i < width; i += kWidth) {
    store(scratch.maximum + i, set1(-kInfinity));
    store(scratch.sum + i, set1(0.0f));
  }
  const T* keys = head_base<T>(c.k, b, h);
  for (int64_t m = 0, step = 0; m < stop_block; m += c.step_blocks(), ++step) {
    const int64_t first = m * c.cells();
    const int64_t count = min64(c.step_blocks(), stop_block - m) * c.cells();
    for (int64_t t = 0; t < c.stride; ++t) {
      gather_cells(c, keys, first, count, t, scratch);
      for (int64_t panel = 0; panel < scratch.panels; ++panel) {
        const float* queries = scratch.queries + (panel * c.stride + t) * c.head_dim * kLanes;
        float* s = scratch.s + panel * scratch.step_cells * kLanes;
        (t == 0 ? multiply_cells<false> : multiply_cells<true>)(c, count, queries, scratch, s);
      }
    }
    for (int64_t lane = 0; lane < width; lane += kWidth) {
      const float* s = scratch.s + lane / kLanes * scratch.step_cells * kLanes + lane % kLanes;
      weigh_cells(c, first, count, s, load(scratch.cell + lane), scratch.maximum + lane,
                  scratch.sum + lane, scratch.tops + step * width + lane,
                  scratch.weights + m * width + lane, width);
    }
  }
  // sum = 1 / sum, 0 for cells without a query.
  for (int64_t lane = 0; lane < width; ++lane) {
    const int64_t begin = static_cast<int64_t>(scratch.cell[lane]) * c.stride;
    const bool exists = begin + c.stride > c.offset() && begin < c.kv_len;
    scratch.sum[lane] = exists ? 1.0f / scratch.sum[lane] : 0.0f;
  }
  const int64_t key_blocks = c.key_blocks();
  const auto row_of = [&](int64_t n, int64_t g) {
    const int64_t row = (b * c.q_heads + h * c.group() + g) * c.query_blocks() + n - c.first_block();
    return c.scores + row * key_blocks;
  };
  for (int64_t m = 0; m < stop_block; ++m) {
    float* weights = scratch.weights + m * width;
    const float* top = scratch.tops + m / c.step_blocks() * width;
    for (int64_t lane = 0; lane < width; lane += kWidth) {
      const Vec factor =
          exp2(load(top + lane) - load(scratch.maximum + lane)) * load(scratch.sum + lane);
      store(weights + lane, load(weights + lane) * factor);
    }
    const float* cell = weights;
    for (int64_t n = first_block; n < stop_block; ++n) {
      for (int64_t g = 0; g < c.group(); ++g, cell += c.cells()) {
        float total = 0.0f;
        for (int64_t i = 0; i < c.cells(); ++i) total += cell[i];
        row_of(n, g)[m] = total;
      }
    }
  }
  for (int64_t n = first_block; n < stop_block; ++n) {
    for (int64_t g = 0; g < c.group(); ++g) {
      float* row = row_of(n, g);
      for (int64_t m = stop_block; m < key_blocks; ++m) row[m] = 0.0f;
    }
  }
}

size_t cell_floats(const CellScores& c) { return CellScratch(c).floats(c); }

void cell_scores(const CellScores& c, int64_t b, int64_t h, int64_t span, float* scratch) {
  switch (c.dtype) {
    case DType::kFloat32:
      return score_span<float>(c, b, h, span, scratch);
    case DType::kBFloat16:
      return score_span<BFloat16>(c, b, h, span, scratch);
    case DType::kFloat16:
      return score_span<Float16>(c, b, h, span, scratch);
  }
}

template <typename T>
void mean_of_block(const BlockMeans& x, int64_t b, int64_t h, int64_t n, float* out) {
  const int64_t low = max64(n * x.block, x.offset);
  const int64_t high = min64((n + 1) * x.block, x.offset + x.q_len);
  const T* rows = head_base<T>(x.q, b, h) + (low - x.offset) * x.q.stride_l;
  const Vec share = set1(1.0f / static_cast<float>(high - low));
  for (int64_t d = 0; d < x.head_dim; d += kWidth) {
    const int64_t width = min64(kWidth, x.head_dim - d);
    Vec sum = set1(0.0f);
    for (int64_t i = 0; i < high - low; ++i) {
      sum = sum + load_first(rows + i * x.q.stride_l + d, width);
    }
    store_first(out + d, sum * share, width);
  }
}

void block_mean(const BlockMeans& x, int64_t b, int64_t h, int64_t n, float* out) {
  switch (x.dtype) {
    case DType::kFloat32:
      return mean_of_block<float>(x, b, h, n, out);
    case DType::kBFloat16:
      return mean_of_block<BFloat16>(x, b, h, n, out);
    case DType::kFloat16:
      return mean_of_block<Float16>(x, b, h, n, out);
  }
}

constexpr BlockScoreKernels kBlockScores = {cell_floats, cell_scores, block_mean};

}  // namespace
}  // namespace lowcontext
