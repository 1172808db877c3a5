#include "hierarchy_arguments.h"

namespace lowcontext {
namespace {

Outputs hip_tree(const Tensor& q, const Tensor& k, int64_t block_q, int64_t block_k, int64_t sink,
                 int64_t window, int64_t picks, int64_t lists, int64_t width, int64_t row_stride,
                 bool mean_rows, int64_t representative, int64_t ahead, int64_t leaf,
                 int64_t key_stride, int64_t beam) {
  Search search = make_search(q, k, block_q, block_k, sink, window, picks, lists);
  set_rows(search, row_stride, mean_rows, representative);
  search.ahead = token_count(ahead, "ahead");
  LC_CHECK(leaf > 0 && block_k % leaf == 0, "leaf", concat("a divisor of ", block_k), leaf);
  LC_CHECK(key_stride > 0 && key_stride <= leaf, "key_stride", concat("1 to ", leaf), key_stride);
  LC_CHECK(beam > 0, "beam", "a positive number", beam);
  Outputs out = allocate(search, q, width);
  run_tree(search, {leaf, key_stride, beam});
  return out;
}

}  // namespace
}  // namespace lowcontext

STABLE_TORCH_LIBRARY_IMPL(lowcontext, CPU, m) {
  m.impl("hip_tree", TORCH_BOX(&lowcontext::hip_tree));
}
