// Angles, and rows turned by them; what they compute is in ../common/rotary.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "../common/rotary.h"
#include "best_scores.h"
#include "vec.h"

namespace lowcontext {
namespace {

// A loop of plain numbers, which compilers turn into vectors. The angle is reduced in fp64, to
// |r| <= pi/4 and within |d| 2^-53; the next terms of both series are below 2e-9 and 2e-10.
void angles(const Angles& a) {
  constexpr double kRound = 0x1.8p52;  // added and subtracted: the nearest integer
  for (int64_t i = 0; i < a.count; ++i) {
    if (a.from[i] == a.to[i]) continue;
    const float from = static_cast<float>(a.from[i]), to = static_cast<float>(a.to[i]);
    float* const cosines = a.table + i * 2 * a.pairs;
    float* const sines = cosines + a.pairs;
    const float* const f = a.inv_freq;
    const int64_t pairs = a.pairs;
#if defined(__clang__)
#pragma clang loop vectorize(assume_safety)
#else
#pragma GCC ivdep
#endif
    for (int64_t p = 0; p < pairs; ++p) {
      const double d = static_cast<double>(to * f[p]) - static_cast<double>(from * f[p]);
      const double n = d * 0.6366197723675814 + kRound - kRound;
      const float r =
          static_cast<float>(d - n * 1.5707963267948966 - n * 6.123233995736766e-17);
      const int32_t quarter = static_cast<int32_t>(n);
      const float z = r * r;
      const float sine =
          r + r * z *
                  (-1.0f / 6 + z * (1.0f / 120 + z * (-1.0f / 5040 + z * (1.0f / 362880))));
      const float cosine =
          1.0f +
          z * (-0.5f +
               z * (1.0f / 24 + z * (-1.0f / 720 + z * (1.0f / 40320 + z * (-1.0f / 3628800)))));
      const float cos = quarter & 1 ? sine : cosine;
      const float sin = quarter & 1 ? cosine : sine;
      cosines[p] = (quarter + 1) & 2 ? -cos : cos;
      sines[p] = quarter & 2 ? -sin : sin;
    }
  }
}

// n pairs: a row of kWidth cosines turns kWidth pairs.
LC_INLINE void turn_pairs(Vec* a, Vec* b, const float* cosines, const float* sines, int64_t n) {
  const Vec cos = load_first(cosines, n), sin = load_first(sines, n), x = *a;
  *a = x * cos - *b * sin;
  *b = *b * cos + x * sin;
}

template <typename T>
LC_INLINE void turn_row(const TurnedRows& t, const float* cosines, const T* x, T* out) {
  const int64_t P = t.pairs;
  const float* sines = cosines + P;
  for (int64_t p = 0; p < P; p += kWidth) {
    const int64_t n = P - p < kWidth ? P - p : kWidth;
    if (!t.interleaved) {
      Vec a = load_first(x + p, n), b = load_first(x + P + p, n);
      turn_pairs(&a, &b, cosines + p, sines + p, n);
      store_first(out + p, a, n);
      store_first(out + P + p, b, n);
      continue;
    }
    float first[kWidth] = {}, second[kWidth] = {};
    for (int64_t i = 0; i < n; ++i) {
      first[i] = to_float(x[2 * (p + i)]);
      second[i] = to_float(x[2 * (p + i) + 1]);
    }
    Vec a = load(first), b = load(second);
    turn_pairs(&a, &b, cosines + p, sines + p, n);
    store(first, a);
    store(second, b);
    for (int64_t i = 0; i < n; ++i) {
      from_float(first[i], out + 2 * (p + i));
      from_float(second[i], out + 2 * (p + i) + 1);
    }
  }
  const size_t rest = static_cast<size_t>(t.head_dim - 2 * P);
  std::memcpy(out + 2 * P, x + 2 * P, rest * sizeof(T));
}

template <typename T>
void turn_as(const TurnedRows& t) {
  constexpr int64_t kAhead = 4;  // rows
  const T* const x = static_cast<const T*>(t.x);
  T* out = static_cast<T*>(t.out);
  const size_t bytes = static_cast<size_t>(t.head_dim) * sizeof(T);
  for (int64_t i = 0; i < t.count; ++i, out += t.head_dim) {
    if (i + kAhead < t.count && t.rows[i + kAhead] >= 0) {
      prefetch_row(x + t.rows[i + kAhead] * t.stride, t.head_dim);
    }
    if (t.rows[i] < 0) {
      std::memset(out, 0, bytes);
      continue;
    }
    const T* const row = x + t.rows[i] * t.stride;
    if (t.from[i] == t.to[i]) {
      std::memcpy(out, row, bytes);
    } else {
      turn_row(t, t.table + i * 2 * t.pairs, row, out);
    }
  }
}

void turn(const TurnedRows& t) {
  switch (t.dtype) {
    case DType::kFloat32:
      return turn_as<float>(t);
    case DType::kBFloat16:
      return turn_as<BFloat16>(t);
    case DType::kFloat16:
      return turn_as<Float16>(t);
  }
}

constexpr RotaryKernels kRotary = {angles, turn};

}  // namespace
}  // namespace lowcontext
