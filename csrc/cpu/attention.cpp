#include "arguments.h"

namespace lowcontext {
namespace {

Outputs attention(const Tensor& q, const Tensor& k, const Tensor& v, double scale, double softcap,
                  int64_t window, std::optional<Tensor> kv_start) {
  Problem problem = make_problem(q, k, v, scale, softcap, kv_start);
  LC_CHECK(window >= 0, "window", "0 (off) or a positive number of keys", window);
  problem.window = window < problem.kv_len ? window : 0;
  return solve(problem, q);
}

}  // namespace
}  // namespace lowcontext

STABLE_TORCH_LIBRARY_IMPL(lowcontext, CPU, m) {
  m.impl("attention", TORCH_BOX(&lowcontext::attention));
}
