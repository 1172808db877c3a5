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

// Goes through the lanes of an item: heads of the group innermost, rows outermost. A cursor and not
// a function of the lane, for the division would cost as much as a cache miss.
class LaneCursor {
 public:
  LaneCursor(const Problem& p, const Plan& plan, const Item& item)
      : p_(p),
        group_(plan.group),
        query_(item.batch * p.q.stride_b + item.head * plan.group * p.q.stride_h +
               item.row * p.q.stride_l),
        output_((item.batch * p.q_heads + item.head * plan.group) * p.q_len + item.row) {}

  template <typename T>
  LC_INLINE const T* query() const {
    return static_cast<const T*>(p_.q.data) + query_ + head_ * p_.q.stride_h;
  }
  template <typename T>
  LC_INLINE T* output() const {
    return static_cast<T*>(p_.out) + (output_ + head_ * p_.q_len) * p_.head_dim;
  }
  LC_INLINE float* lse() const { return p_.lse + output_ + head_ * p_.q_len; }
  LC_INLINE void advance() {
    if (++head_ == group_) {
      head_ = 0;
      query_ += p_.q.stride_l;
      ++output_;
    }
  }

 private:
  const Problem& p_;
  int64_t group_;
  int64_t query_, output_;
  int64_t head_ = 0;
};

// out = sum_i 2^(m_i - m) o_i / sum_i 2^(m_i - m) l_i with m = max_i m_i, over the splits i.
template <typename T>
void combine_splits(const Problem& p, const Plan& plan, const Item& item, float* weights,
                    const float* partials) {
  const int64_t lanes = item.rows * plan.group;
  const int64_t capacity = plan.max_lanes();
  const int64_t size = plan.partial_floats(p.head_dim);
  LaneCursor cursor(p, plan, item);
  for (int64_t lane = 0; lane < lanes; ++lane, cursor.advance()) {
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
    T* out = cursor.output<T>();
    for (int64_t d = 0; d < p.head_dim; d += kWidth) {
      Vec acc = set1(0.0f);
      for (int64_t i = 0; i < plan.splits; ++i) {
        acc = fma(set1(weights[i]),
                  load_first(partials + i * size + lane * p.head_dim + d, p.head_dim - d), acc);
      }
      store_first(out + d, acc * scale, p.head_dim - d);
    }
    *cursor.lse() = log_sum(top, total);
  }
}

}  // namespace
}  // namespace lowcontext
