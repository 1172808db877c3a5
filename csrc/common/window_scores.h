// The last queries' attention weights, summed along keys and along distances, as plain data. Free
// of torch.
//
//   p[r, j] = softmax_j(cap(scale * q[r, :] . k[j, :])),  j <= i_r = N - n + r,  r = 0 .. n - 1
//   vertical[j] = sum_r p[r, j]        slash[d] = sum_r p[r, i_r - d]
//
// for each query head; the heads of a KV head share its keys. Keys are cut into chunks of a fixed
// size, so that the result does not depend on the number of threads.
#pragma once

#include <cstdint>

#include "problem.h"

namespace lowcontext {

// n is q_len, N is kv_len; of the problem also scale and softcap.
struct WindowScores : Problem {
  static constexpr int64_t kChunk = 1024;  // keys of a work item
  static constexpr int64_t kStep = 64;     // keys scored at a time; divides kChunk

  int64_t stride = 0;  // lanes of a head: n, rounded up to whole panels of the kernels

  float* queries = nullptr;  // [B, Hkv, lanes / panel, D, panel], scaled
  float* maximum = nullptr;  // [B, Hkv, chunks, lanes]
  float* sum = nullptr;      // [B, Hkv, chunks, lanes]
  // [B, Hkv, chunks * kChunk, lanes] in tiles [step, panel of lanes, kStep, panel]; null where it
  // would be too large: logits are then computed twice.
  float* logits = nullptr;
  float* parts = nullptr;     // [B, Hkv, chunks, group, kChunk + stride]: slash sums of one chunk
  float* vertical = nullptr;  // [B, Hq, N]
  float* slash = nullptr;     // [B, Hq, N]

  int64_t lanes() const { return group() * stride; }
  int64_t chunks() const { return (kv_len + kChunk - 1) / kChunk; }
  int64_t chunk_end(int64_t chunk) const {
    return (chunk + 1) * kChunk < kv_len ? (chunk + 1) * kChunk : kv_len;
  }
  // Distance of entry 0 of a part, possibly negative: row 0 to the last key of the chunk.
  int64_t first_distance(int64_t chunk) const { return kv_len - q_len - chunk_end(chunk) + 1; }
};

}  // namespace lowcontext
