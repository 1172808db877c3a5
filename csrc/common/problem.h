// The attention problem as plain data: what every native kernel is given. Free of torch.
//
//   out[b, h, r, :] = sum_j softmax_j(s[r, j]) v[b, h / G, j, :],   s = cap(scale * q[b, h, r, :] .
//   k[b, h / G, j, :])
//
// over the keys j that are listed for row r and visible: kv_start[b] <= j <= p and p - j < window,
// with p = Lk - Lq + r. All strides are in elements; the last dimension is contiguous.
#pragma once

#include <cstdint>

namespace lowcontext {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// [B, H, L, D]
struct TensorView {
  const void* data = nullptr;
  int64_t stride_b = 0;
  int64_t stride_h = 0;
  int64_t stride_l = 0;
};

// int32 [B, H, Nq] or [B, H, Nq, n]; a broadcast dimension has stride 0.
struct IndexView {
  const int32_t* data = nullptr;
  int64_t stride_b = 0;
  int64_t stride_h = 0;
  int64_t stride_n = 0;
  int64_t size = 0;  // n

  const int32_t* at(int64_t b, int64_t h, int64_t n) const {
    return data + b * stride_b + h * stride_h + n * stride_n;
  }
};

struct Problem {
  DType dtype = DType::kFloat32;
  int64_t batch = 0;
  int64_t q_heads = 0;
  int64_t kv_heads = 0;
  int64_t q_len = 0;
  int64_t kv_len = 0;
  int64_t head_dim = 0;
  TensorView q, k, v;
  void* out = nullptr;   // [B, Hq, Lq, D], contiguous
  float* lse = nullptr;  // [B, Hq, Lq], contiguous
  float scale = 1.0f;
  float softcap = 0.0f;  // 0: off
  int64_t window = 0;    // 0: off

  // Left padding: int32 or int64 [B], or neither.
  const int32_t* kv_start32 = nullptr;
  const int64_t* kv_start64 = nullptr;
  int64_t kv_start_stride = 0;

  // The index; dense when absent.
  bool sparse = false;
  int64_t index_heads = 1;  // 1, kv_heads or q_heads
  int64_t block_q = 0;
  int64_t block_k = 0;
  IndexView num_blocks, starts;
  IndexView num_columns, columns;  // columns.data null: no columns

  int64_t group() const { return q_heads / kv_heads; }  // query heads per KV head

  int64_t first_key(int64_t b) const {
    if (kv_start32 != nullptr) return kv_start32[b * kv_start_stride];
    if (kv_start64 != nullptr) return kv_start64[b * kv_start_stride];
    return 0;
  }
};

}  // namespace lowcontext
