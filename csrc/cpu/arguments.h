// From tensors to the problem, checked: what these accept, no kernel reads out of bounds.
#pragma once

#include <optional>

#include "../common/problem.h"
#include "../ops.h"

namespace lowcontext {

// float32, bfloat16 or float16.
DType dtype_of(const Tensor& t, const char* name);

// [B, H, L, D] with a contiguous last dimension.
TensorView view_of(const Tensor& t, const char* name);

// q [B, Hq, Lq, D], k and v [B, Hkv, Lk, D], float32, bfloat16 or float16; kv_start int32 or int64
// [B].
Problem make_problem(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                     double softcap, const std::optional<Tensor>& kv_start);

// The index: int32 [B or 1, H, Nq] and [B or 1, H, Nq, n] with H one of 1, Hkv, Hq.
void set_index(Problem& problem, const Tensor& kv_num_blocks, const Tensor& kv_starts,
               const std::optional<Tensor>& kv_num_columns, const std::optional<Tensor>& kv_columns,
               int64_t block_q, int64_t block_k);

// int32 [batch or 1, heads, blocks], or with dims = 4 [batch or 1, heads, blocks, n].
IndexView index_view(const Tensor& t, const char* name, int64_t dims, int64_t batch, int64_t heads,
                     int64_t blocks);

// Allocates out and lse, and solves the problem on torch's threads.
Outputs solve(Problem& problem, const Tensor& q);

}  // namespace lowcontext
