// Rows of keys turned from one position to another, as plain data. Free of torch.
//
//   d[i, p] = fl(to[i] f[p]) - fl(from[i] f[p])        products in fp32, their difference in fp64
//   out[i] = (a cos d - b sin d, b cos d + a sin d)    for the pairs of channels (a, b) of a row
//
// Rows whose position does not change are copied, bit for bit.
#pragma once

#include <cstdint>

#include "problem.h"

namespace lowcontext {

struct Angles {
  const float* inv_freq;  // [pairs]
  int64_t pairs;
  const int64_t* from;  // [count]
  const int64_t* to;    // [count]
  int64_t count;
  float* table;  // [count, 2, pairs]: cosines, sines
};

// Of one head.
struct TurnedRows : Angles {
  DType dtype;
  bool interleaved;  // pairs are channels (2p, 2p + 1), else (p, p + pairs)
  int64_t head_dim;
  const void* x;
  int64_t stride;       // elements between rows of x
  const int64_t* rows;  // [count]: which of them; zeros where negative
  void* out;            // [count, head_dim]
};

struct RotaryKernels {
  void (*angles)(const Angles&);
  void (*turn)(const TurnedRows&);
};

}  // namespace lowcontext
