// Where the lanes of an item lie in memory, and how the splits of an item are merged.
#pragma once

#include <cstdint>

#include "keys.h"
#include "plan.h"
#include "vec.h"

namespace lowcontext {
namespace {

LC_INLINE int64_t kv_head(const Problem& p, const Plan& plan, const Item& item) {
  return item.head * plan.group / (p.q_heads / p.kv_heads);
}

LC_INLINE int64_t output_index(const Problem& p, const Plan& plan, const Item& item, int64_t lane) {
  const int64_t h = item.head * plan.group + lane % plan.group;
  return (item.batch * p.q_heads + h) * p.q_len + item.row + lane / plan.group;
}

template <typename T>
LC_INLINE const T* query_row(const Problem& p, const Plan& plan, const Item& item, int64_t lane) {
  const int64_t h = item.head * plan.group + lane % plan.group;
  return head_base<T>(p.q, item.batch, h) + (item.row + lane / plan.group) * p.q.stride_l;
}

template <typename T>
LC_INLINE T* output_row(const Problem& p, const Plan& plan, const Item& item, int64_t lane) {
  return static_cast<T*>(p.out) + output_index(p, plan, item, lane) * p.head_dim;
}

LC_INLINE float* lse_of_lane(const Problem& p, const Plan& plan, const Item& item, int64_t lane) {
  return p.lse + output_index(p, plan, item, lane);
}

// out = sum_i 2^(m_i - m) o_i / sum_i 2^(m_i - m) l_i with m = max_i m_i, over the splits i.
template <typename T>
void combine_splits(const Problem& p, const Plan& plan, const Item& item, float* weights,
                    const float* partials) {
  const int64_t lanes = item.rows * plan.group;
  const int64_t capacity = plan.max_lanes();
  const int64_t size = plan.partial_floats(p.head_dim);
  for (int64_t lane = 0; lane < lanes; ++lane) {
    const float* maxima = partials + capacity * p.head_dim + lane;
    const float* sums = maxima + capacity;
    float top = -kInfinity, total = 0.0f;
    for (int64_t i = 0; i < plan.splits; ++i) top = maxima[i * size] > top ? maxima[i * size] : top;
    for (int64_t i = 0; i < plan.splits; ++i) {
      // A split that has seen no key weighs nothing; NaN stays NaN.
      weights[i] =
          maxima[i * size] == -kInfinity ? sums[i * size] : scalar_exp2(maxima[i * size] - top);
      total += weights[i] * sums[i * size];
    }
    const Vec scale = set1(total == 0.0f ? 0.0f : 1.0f / total);
    T* out = output_row<T>(p, plan, item, lane);
    for (int64_t d = 0; d < p.head_dim; d += kWidth) {
      Vec acc = set1(0.0f);
      for (int64_t i = 0; i < plan.splits; ++i) {
        acc = fma(set1(weights[i]),
                  load_first(partials + i * size + lane * p.head_dim + d, p.head_dim - d), acc);
      }
      store_first(out + d, acc * scale, p.head_dim - d);
    }
    *lse_of_lane(p, plan, item, lane) = log_sum(top, total);
  }
}

}  // namespace
}  // namespace lowcontext
