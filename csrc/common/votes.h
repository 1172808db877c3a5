// What the kernels that score and rank keys are given. Free of torch. Strides are in elements.
#pragma once

#include <cstdint>

namespace lowcontext {

enum class KeyType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kInt8 = 3 };

// out[row, i] = (q[row, :] . keys[i, :]) * scales[i], scales 1 where null.
struct ScoreRun {
  const float* q = nullptr;  // [rows rounded up to 8, q_stride], q_stride a multiple of 16, zeros
  int64_t q_stride = 0;      // where there is no query or no element
  int64_t rows = 0;
  int64_t dim = 0;
  KeyType type = KeyType::kFloat32;
  const void* keys = nullptr;  // [count, dim]
  int64_t key_stride = 0;
  int64_t ahead = 0;  // bytes from a key to what shall be in the cache when the next ones are read
  const float* scales = nullptr;
  int64_t count = 0;
  float* out = nullptr;
  int64_t out_stride = 0;
};

// out[i] = sum over the heads of exp(scores[head, i] - lse[head]); -inf where scores[0, i] is -inf.
struct VoteRun {
  const float* scores = nullptr;
  int64_t head_stride = 0;
  const float* lse = nullptr;
  int64_t lse_stride = 0;
  int64_t heads = 0;
  int64_t count = 0;
  float* out = nullptr;
};

struct VoteKernels {
  void (*score)(const ScoreRun& run);
  // Maximum of x[0, n), and the sum of exp(x - maximum) over it; 0 where the maximum is -inf.
  float (*exp_sum)(const float* x, int64_t n, float* maximum);
  void (*vote)(const VoteRun& run);
  // Maxima of disjoint groups of at most `size` entries that cover x[0, n); NaN counts as -inf.
  // Returns the number of groups, at most n / size + 32.
  int64_t (*group_maxima)(const float* x, int64_t n, int64_t size, float* maxima);
  // The entries that are at least `threshold` and above -inf, in order; returns their number. May
  // write 16 entries more.
  int64_t (*collect)(const float* x, int64_t n, float threshold, int32_t* ids, float* values);
};

}  // namespace lowcontext
