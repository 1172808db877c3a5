// mass_mask: the largest entries of rows that together hold a share of their mass.
//
//   mass_i = floor(x_i * 2^39 / 2^e)        2^e <= max x < 2^(e + 1)
//
// Entries are taken in falling order, of equal ones the lower index first, while the mass before
// them is below the target. Nothing is sorted: masses are added up by digits of 11, 10 and 10 bits
// of their entries, from the top, until the last entry taken is known. Sums of integers do not
// depend on their order, so the set is that of every backend.
#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "../ops.h"
#include "items.h"
#include "launch.h"

namespace lowcontext {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kItemEntries = 4096;
constexpr int64_t kSmallEntries = 4096;
constexpr int64_t kShareUnits = 1 << 30;

// The bits of a float that is not negative, which have its order; -1 for the others and for NaN.
int32_t order_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return x >= 0.0f ? bits & 0x7fffffff : -1;
}

int64_t mass_of(int32_t order, int32_t top) {
  if (order < 0) return 0;
  const int32_t exponent = order >> 23;
  const int64_t fraction = (order & 0x7fffff) | (exponent > 0 ? 0x800000 : 0);
  return fraction << 16 >> std::min(std::max(top >> 23, 1) - std::max(exponent, 1), 40);
}

// ceil(total * share / 2^30) without the 93 bits of the product.
int64_t target_of(int64_t total, int64_t share) {
  const int64_t high = total >> 32, low = total & 0xffffffff;
  return (high * share << 2) + ((low * share + kShareUnits - 1) >> 30);
}

struct Workspace {
  std::vector<int32_t> orders;
  std::vector<int64_t> sums = std::vector<int64_t>(2048);
};

// Marks n entries of x in `keep`; those of `forced`, unless it is null, come first.
void mask_row(const float* x, const bool* forced, int64_t n, int64_t share, Workspace& work,
              bool* keep) {
  int32_t* orders = work.orders.data();
  int64_t* sums = work.sums.data();
  int32_t top = -1;
  for (int64_t i = 0; i < n; ++i) {
    orders[i] = order_of(x[i]);
    top = std::max(top, orders[i]);
  }
  std::memset(sums, 0, 2048 * sizeof(*sums));
  int64_t total = 0, wanted = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t mass = mass_of(orders[i], top);
    total += mass;
    keep[i] = forced != nullptr && forced[i] && orders[i] >= 0;
    if (keep[i]) {
      wanted -= mass;
      orders[i] = -1;
    } else if (orders[i] >= 0) {
      sums[orders[i] >> 20] += mass;
    }
  }
  wanted += target_of(total, share);
  if (wanted <= 0) return;
  int32_t last = 0;
  for (int shift : {20, 10, 0}) {
    if (shift < 20) {
      std::memset(sums, 0, 1024 * sizeof(*sums));
      for (int64_t i = 0; i < n; ++i) {
        if (orders[i] >> (shift + 10) != last >> (shift + 10)) continue;
        sums[orders[i] >> shift & 1023] += mass_of(orders[i], top);
      }
    }
    int32_t digit = shift == 20 ? 2047 : 1023;
    while (sums[digit] < wanted) wanted -= sums[digit--];
    last |= digit << shift;
  }
  const int64_t each = mass_of(last, top);
  int64_t ties = (wanted + each - 1) / each;
  for (int64_t i = 0; i < n; ++i) {
    if (orders[i] > last || (orders[i] == last && ties-- > 0)) keep[i] = true;
  }
}

// weights [rows, N]; share in units of 2^-30; forced bool [R, N] for rows r, r + R, ..., or none.
Tensor mass_mask(const Tensor& weights, int64_t share, std::optional<Tensor> forced) {
  LC_CHECK(weights.is_cpu() && weights.dim() == 2 && weights.is_contiguous() &&
               weights.scalar_type() == ScalarType::Float,
           "weights", "contiguous float32 [rows, N] on the CPU", shape_text(weights));
  const int64_t rows = weights.size(0), N = weights.size(1);
  LC_CHECK(N <= 1 << 23, "weights", "at most 2^23 entries in a row", N);
  LC_CHECK(0 < share && share <= kShareUnits, "share", "1 to 2^30", share);
  const bool* flags = nullptr;
  int64_t flag_rows = 1;
  if (forced.has_value()) {
    LC_CHECK(forced->is_cpu() && forced->dim() == 2 && forced->is_contiguous() &&
                 forced->scalar_type() == ScalarType::Bool && forced->size(1) == N &&
                 forced->size(0) > 0,
             "forced", concat("contiguous bool [R, ", N, "] on the CPU"), shape_text(*forced));
    flags = static_cast<const bool*>(forced->const_data_ptr());
    flag_rows = forced->size(0);
  }
  Tensor keep = torch::stable::new_empty(weights, {rows, N}, ScalarType::Bool);
  const float* data = static_cast<const float*>(weights.const_data_ptr());
  bool* out = static_cast<bool*>(keep.mutable_data_ptr());
  const int64_t step = std::max<int64_t>(1, kItemEntries / std::max<int64_t>(1, N));
  run_items(ceil_div(rows, step), rows * N < kSmallEntries, [&](int64_t item) {
    thread_local Workspace work;
    if (work.orders.size() < static_cast<size_t>(N)) work.orders.resize(N);
    for (int64_t row = item * step; row < std::min(rows, (item + 1) * step); ++row) {
      const bool* row_flags = flags == nullptr ? nullptr : flags + row % flag_rows * N;
      mask_row(data + row * N, row_flags, N, share, work, out + row * N);
    }
  });
  return keep;
}

}  // namespace
}  // namespace lowcontext

STABLE_TORCH_LIBRARY_IMPL(lowcontext, CPU, m) {
  m.impl("mass_mask", TORCH_BOX(&lowcontext::mass_mask));
}
