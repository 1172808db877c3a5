// The order in which scores are ranked. Free of torch.
#pragma once

#include <cstdint>
#include <cstring>

namespace lowcontext {

// Unsigned keys in the order of the floats; -0 and +0 share one, and NaN is below everything.
inline uint32_t order_key(float value) {
  if (value != value) return 0;
  value += 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

}  // namespace lowcontext
