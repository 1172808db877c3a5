// What the kernels that score and rank keys are given. Free of torch. Strides are in elements.
#pragma once

#include <cstdint>

namespace lowcontext {

// kInt4: a byte holds channel i in its low and channel i + dim / 2 in its high four bits, signed.
enum class KeyType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kInt8 = 3, kInt4 = 4 };

constexpr bool is_integer(KeyType type) { return type >= KeyType::kInt8; }

// out[row, i] = (q[row, :] . keys[i, :]) * q_steps[row] * scales[i]; floating keys have neither
// steps nor scales. Rows are rounded up to 8 and the elements of a row to a multiple of 32, with
// zeros. Strides of keys are in elements, in bytes where they are integers.
struct ScoreRun {
  const float* q = nullptr;
  // For integer keys: 16-bit integers. With kInt4 a row is four planes, the channels of the bits
  // 0-3, 4-7, 8-11 and 12-15 of consecutive pairs of bytes.
  const int16_t* whole_q = nullptr;
  const float* q_steps = nullptr;
  int64_t q_stride = 0;  // of a row
  int64_t q_plane = 0;
  int64_t rows = 0;
  int64_t dim = 0;  // elements of a row of keys, bytes where they are integers
  KeyType type = KeyType::kFloat32;
  const void* keys = nullptr;
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
