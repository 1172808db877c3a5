// From tensors to a search, checked.
#pragma once

#include <limits>

#include "arguments.h"
#include "hierarchy.h"

namespace lowcontext {

constexpr int64_t kLargest = std::numeric_limits<int32_t>::max();

inline int64_t token_count(int64_t value, const char* name) {
  LC_CHECK(value >= 0 && value <= kLargest, name, "0 or a positive int32", value);
  return value;
}

inline Search make_search(const Tensor& q, const Tensor& k, int64_t block_q, int64_t block_k,
                          int64_t sink, int64_t window, int64_t picks, int64_t lists) {
  Search s = {};
  s.problem = make_problem(q, k, k, 1.0, 0.0, std::nullopt);
  LC_CHECK(s.problem.q_len > 0, "q", "at least one query", s.problem.q_len);
  LC_CHECK(block_q > 0 && block_q <= kLargest, "block_q", "a positive int32", block_q);
  LC_CHECK(block_k > 0 && block_k <= kLargest, "block_k", "a positive int32", block_k);
  LC_CHECK(window > 0, "window", "a positive number", window);
  LC_CHECK(picks > 0, "picks", "a positive number", picks);
  LC_CHECK(lists == 1 || lists == s.problem.kv_heads || lists == s.problem.q_heads, "lists",
           concat("1, ", s.problem.kv_heads, " or ", s.problem.q_heads), lists);
  s.block_q = block_q;
  s.block_k = block_k;
  s.sink = token_count(sink, "sink");
  s.window = window;
  s.picks = picks;
  s.lists = lists;
  return s;
}

inline void set_rows(Search& s, int64_t row_stride, bool mean_rows, int64_t representative) {
  LC_CHECK(row_stride > 0 && row_stride <= kLargest, "row_stride", "a positive int32", row_stride);
  LC_CHECK(representative >= 0 && representative <= 3, "representative", "0 to 3",
           representative);
  s.row_stride = row_stride;
  s.mean_rows = mean_rows;
  s.representative = static_cast<Representative>(representative);
}

inline Outputs allocate(Search& s, const Tensor& q, int64_t width) {
  LC_CHECK(width > 0 && width <= kLargest, "width", "a positive int32", width);
  using torch::headeronly::ScalarType;
  LC_CHECK(s.problem.kv_len + s.ahead <= kLargest - s.block_k, "ahead",
           concat("less than 2^31 - ", s.problem.kv_len), s.ahead);
  const int64_t batch = s.problem.batch, blocks = s.blocks();
  Tensor counts = torch::stable::new_empty(q, {batch, s.lists, blocks}, ScalarType::Int);
  Tensor starts = torch::stable::new_empty(q, {batch, s.lists, blocks, width}, ScalarType::Int);
  s.width = width;
  s.counts = static_cast<int32_t*>(counts.mutable_data_ptr());
  s.starts = static_cast<int32_t*>(starts.mutable_data_ptr());
  return {counts, starts};
}

}  // namespace lowcontext
