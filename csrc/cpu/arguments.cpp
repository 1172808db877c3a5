#include "arguments.h"

#include <limits>

#include "launch.h"

namespace lowcontext {

using torch::headeronly::ScalarType;

DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      LC_CHECK(false, name, "dtype float32, bfloat16 or float16", "another");
  }
  return DType::kFloat32;
}

TensorView view_of(const Tensor& t, const char* name) {
  LC_CHECK(t.is_cpu(), name, "a CPU tensor", "another device");
  LC_CHECK(t.dim() == 4, name, "4 dimensions [B, H, L, D]", shape_text(t));
  LC_CHECK(t.stride(3) == 1, name, "a contiguous last dimension", concat("stride ", t.stride(3)));
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

IndexView index_view(const Tensor& t, const char* name, int64_t dims, int64_t batch, int64_t heads,
                     int64_t blocks) {
  LC_CHECK(t.is_cpu(), name, "a CPU tensor", "another device");
  LC_CHECK(t.scalar_type() == ScalarType::Int, name, "dtype int32", "another");
  LC_CHECK(t.dim() == dims, name, concat(dims, " dimensions"), shape_text(t));
  LC_CHECK((t.size(0) == batch || t.size(0) == 1) && t.size(1) == heads && t.size(2) == blocks,
           name, concat("shape [", batch, " or 1, ", heads, ", ", blocks, dims == 4 ? ", n]" : "]"),
           shape_text(t));
  IndexView view;
  view.data = static_cast<const int32_t*>(t.const_data_ptr());
  view.stride_b = t.size(0) == 1 ? 0 : t.stride(0);
  view.stride_h = t.stride(1);
  view.stride_n = t.stride(2);
  view.size = 1;
  if (dims == 4) {
    view.size = t.size(3);
    LC_CHECK(view.size <= 1 || t.stride(3) == 1, name, "a contiguous last dimension",
             concat("stride ", t.stride(3)));
  }
  return view;
}

Problem make_problem(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                     double softcap, const std::optional<Tensor>& kv_start) {
  Problem p;
  p.q = view_of(q, "q");
  p.k = view_of(k, "k");
  p.v = view_of(v, "v");
  p.dtype = dtype_of(q, "q");
  LC_CHECK(k.scalar_type() == q.scalar_type(), "k", "the dtype of q", "another");
  LC_CHECK(v.scalar_type() == q.scalar_type(), "v", "the dtype of q", "another");
  p.batch = q.size(0);
  p.q_heads = q.size(1);
  p.q_len = q.size(2);
  p.head_dim = q.size(3);
  p.kv_heads = k.size(1);
  p.kv_len = k.size(2);
  LC_CHECK(p.head_dim > 0 && p.head_dim <= 256 && p.head_dim % 8 == 0, "q",
           "a head_dim that is a multiple of 8 and at most 256", p.head_dim);
  LC_CHECK(k.size(0) == p.batch && k.size(3) == p.head_dim, "k",
           concat("shape [", p.batch, ", Hkv, Lk, ", p.head_dim, "]"), shape_text(k));
  LC_CHECK(v.size(0) == p.batch && v.size(1) == p.kv_heads && v.size(2) == p.kv_len &&
               v.size(3) == p.head_dim,
           "v", concat("shape ", shape_text(k)), shape_text(v));
  LC_CHECK(p.kv_heads > 0 && p.q_heads > 0 && p.q_heads % p.kv_heads == 0, "q",
           concat("a multiple of ", p.kv_heads, " heads"), p.q_heads);
  LC_CHECK(p.q_len <= p.kv_len, "k", concat("at least Lq = ", p.q_len, " keys"), p.kv_len);
  LC_CHECK(p.kv_len <= std::numeric_limits<int32_t>::max(), "k", "fewer than 2^31 keys", p.kv_len);
  LC_CHECK(softcap >= 0.0, "softcap", "0 (off) or a positive number", softcap);
  p.scale = static_cast<float>(scale);
  p.softcap = static_cast<float>(softcap);
  if (kv_start.has_value()) {
    const Tensor& t = *kv_start;
    LC_CHECK(t.is_cpu(), "kv_start", "a CPU tensor", "another device");
    LC_CHECK(t.dim() == 1 && t.size(0) == p.batch, "kv_start", concat("shape [", p.batch, "]"),
             shape_text(t));
    p.kv_start_stride = t.stride(0);
    if (t.scalar_type() == ScalarType::Int) {
      p.kv_start32 = static_cast<const int32_t*>(t.const_data_ptr());
    } else {
      LC_CHECK(t.scalar_type() == ScalarType::Long, "kv_start", "dtype int32 or int64", "another");
      p.kv_start64 = static_cast<const int64_t*>(t.const_data_ptr());
    }
  }
  return p;
}

void set_index(Problem& p, const Tensor& kv_num_blocks, const Tensor& kv_starts,
               const std::optional<Tensor>& kv_num_columns, const std::optional<Tensor>& kv_columns,
               int64_t block_q, int64_t block_k) {
  constexpr int64_t kLargest = std::numeric_limits<int32_t>::max();
  LC_CHECK(block_q > 0 && block_q <= kLargest, "block_q", "a positive int32", block_q);
  LC_CHECK(block_k > 0 && block_k <= kLargest, "block_k", "a positive int32", block_k);
  LC_CHECK(kv_num_blocks.dim() == 3, "kv_num_blocks", "3 dimensions [B, H, Nq]",
           shape_text(kv_num_blocks));
  const int64_t heads = kv_num_blocks.size(1);
  LC_CHECK(heads == 1 || heads == p.kv_heads || heads == p.q_heads, "kv_num_blocks",
           concat("1, ", p.kv_heads, " or ", p.q_heads, " heads"), heads);
  const int64_t blocks = (p.kv_len + block_q - 1) / block_q - (p.kv_len - p.q_len) / block_q;
  p.sparse = true;
  p.index_heads = heads;
  p.block_q = block_q;
  p.block_k = block_k;
  p.num_blocks = index_view(kv_num_blocks, "kv_num_blocks", 3, p.batch, heads, blocks);
  p.starts = index_view(kv_starts, "kv_starts", 4, p.batch, heads, blocks);
  LC_CHECK(kv_num_columns.has_value() == kv_columns.has_value(), "kv_columns",
           "given together with kv_num_columns", "one without the other");
  if (kv_columns.has_value()) {
    p.num_columns = index_view(*kv_num_columns, "kv_num_columns", 3, p.batch, heads, blocks);
    p.columns = index_view(*kv_columns, "kv_columns", 4, p.batch, heads, blocks);
    if (p.columns.size == 0) p.columns.data = nullptr;
  }
}

Outputs solve(Problem& p, const Tensor& q) {
  Tensor out = torch::stable::new_empty(q, {p.batch, p.q_heads, p.q_len, p.head_dim});
  Tensor lse = torch::stable::new_empty(q, {p.batch, p.q_heads, p.q_len}, ScalarType::Float);
  p.out = out.mutable_data_ptr();
  prefer_huge_pages(p.out, static_cast<size_t>(out.numel()) * out.element_size());
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  launch(p);
  return {out, lse};
}

}  // namespace lowcontext
