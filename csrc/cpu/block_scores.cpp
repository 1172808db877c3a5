// antidiagonal_scores and block_means.
#include "../common/block_scores.h"

#include "../ops.h"
#include "arguments.h"
#include "items.h"
#include "launch.h"

namespace lowcontext {
namespace {

using torch::headeronly::ScalarType;

// Below this many multiplications, or elements, the start of other threads costs more than they
// save.
constexpr int64_t kSmall = int64_t{1} << 18;

Tensor antidiagonal_scores(const Tensor& q, const Tensor& k, int64_t stride, int64_t block,
                           double scale) {
  CellScores c{make_problem(q, k, k, scale, 0.0, std::nullopt)};
  LC_CHECK(stride > 0, "stride", "at least 1", stride);
  LC_CHECK(block > 0 && block % stride == 0, "block", concat("a multiple of stride ", stride),
           block);
  // Numbers of cells are compared as floats.
  LC_CHECK(c.kv_len / stride < int64_t{1} << 24, "k", "fewer than 2^24 cells", c.kv_len / stride);
  const KernelTable& kernels = active_kernels();
  c.stride = stride;
  c.block = block;
  Tensor scores = torch::stable::new_empty(
      q, {c.batch, c.q_heads, c.query_blocks(), c.key_blocks()}, ScalarType::Float);
  c.scores = static_cast<float*>(scores.mutable_data_ptr());
  const size_t floats = kernels.block_scores.cell_floats(c);
  const int64_t heads = c.batch * c.kv_heads;
  const bool small = c.batch * c.q_heads * c.q_len * c.kv_len / stride * c.head_dim < kSmall;
  run_items(heads * c.spans(), small, [&](int64_t item) {
    const int64_t head = item % heads;
    const int64_t span = c.spans() - 1 - item / heads;  // those with the most keys first
    kernels.block_scores.cell_scores(c, head / c.kv_heads, head % c.kv_heads, span,
                                     thread_scratch(floats));
  });
  return scores;
}

Tensor block_means(const Tensor& x, int64_t block, int64_t offset) {
  BlockMeans means{make_problem(x, x, x, 1.0, 0.0, std::nullopt)};
  LC_CHECK(offset >= 0, "offset", "at least 0", offset);
  LC_CHECK(block > 0, "block", "at least 1", block);
  means.offset = offset;
  means.block = block;
  const int64_t first = offset / block;
  const int64_t blocks = ceil_div(offset + means.q_len, block) - first;
  Tensor out = torch::stable::new_empty(x, {means.batch, means.q_heads, blocks, means.head_dim},
                                        ScalarType::Float);
  float* const data = static_cast<float*>(out.mutable_data_ptr());
  const KernelTable& kernels = active_kernels();
  const int64_t items = means.batch * means.q_heads * blocks;
  run_items(items, items * block * means.head_dim < kSmall, [&](int64_t item) {
    const int64_t head = item / blocks;
    kernels.block_scores.block_mean(means, head / means.q_heads, head % means.q_heads,
                                    first + item % blocks, data + item * means.head_dim);
  });
  return out;
}

}  // namespace
}  // namespace lowcontext

STABLE_TORCH_LIBRARY_IMPL(lowcontext, CPU, m) {
  m.impl("antidiagonal_scores", TORCH_BOX(&lowcontext::antidiagonal_scores));
  m.impl("block_means", TORCH_BOX(&lowcontext::block_means));
}
