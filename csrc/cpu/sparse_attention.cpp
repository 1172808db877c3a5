#include "arguments.h"

namespace lowcontext {
namespace {

Outputs sparse_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                         const Tensor& kv_num_blocks, const Tensor& kv_starts,
                         std::optional<Tensor> kv_num_columns, std::optional<Tensor> kv_columns,
                         int64_t block_q, int64_t block_k, double scale, double softcap,
                         std::optional<Tensor> kv_start) {
  Problem problem = make_problem(q, k, v, scale, softcap, kv_start);
  set_index(problem, kv_num_blocks, kv_starts, kv_num_columns, kv_columns, block_q, block_k);
  return solve(problem, q);
}

}  // namespace
}  // namespace lowcontext

STABLE_TORCH_LIBRARY_IMPL(lowcontext, CPU, m) {
  m.impl("sparse_attention", TORCH_BOX(&lowcontext::sparse_attention));
}
