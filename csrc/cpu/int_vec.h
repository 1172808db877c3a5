// Integers beside the floats of vec.h: a vector of kWidth sums of 32 bits, or of 2 kWidth factors of
// 16 bits. Internal linkage for the same reasons.
#pragma once

#include <cstdint>

#include "vec.h"

// GCC adds integers in an order of its own, for which 32 registers are not enough.
#define LC_IN_ORDER(x) __asm__("" : "+v"(x))

namespace lowcontext {
namespace {

#if defined(LOWCONTEXT_ISA_AVX512)

struct IntVec {
  __m512i v;
};

LC_INLINE IntVec zeros() { return {_mm512_setzero_si512()}; }
LC_INLINE IntVec load_ints(const void* p) { return {_mm512_loadu_si512(p)}; }
// 2 kWidth signed bytes as 16 bits each.
LC_INLINE IntVec widen(const int8_t* p) {
  return {_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
// Nibble i of every 16 bits, as a signed number.
template <int i>
LC_INLINE IntVec nibble(IntVec a) {
  return {_mm512_srai_epi16(_mm512_slli_epi16(a.v, 12 - 4 * i), 12)};
}
// sum + a b, each 32 bits of it the sum of two products of 16 bits.
LC_INLINE IntVec add_products(IntVec sum, IntVec a, IntVec b) {
  sum.v = _mm512_add_epi32(sum.v, _mm512_madd_epi16(a.v, b.v));
  LC_IN_ORDER(sum.v);
  return sum;
}
LC_INLINE Vec to_floats(IntVec a) { return {_mm512_cvtepi32_ps(a.v)}; }

#elif defined(LOWCONTEXT_ISA_AVX2)

struct IntVec {
  __m256i v;
};

LC_INLINE IntVec zeros() { return {_mm256_setzero_si256()}; }
LC_INLINE IntVec load_ints(const void* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
}
LC_INLINE IntVec widen(const int8_t* p) {
  return {_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
template <int i>
LC_INLINE IntVec nibble(IntVec a) {
  return {_mm256_srai_epi16(_mm256_slli_epi16(a.v, 12 - 4 * i), 12)};
}
LC_INLINE IntVec add_products(IntVec sum, IntVec a, IntVec b) {
  sum.v = _mm256_add_epi32(sum.v, _mm256_madd_epi16(a.v, b.v));
  LC_IN_ORDER(sum.v);
  return sum;
}
LC_INLINE Vec to_floats(IntVec a) { return {_mm256_cvtepi32_ps(a.v)}; }

#else

typedef int16_t Short8 __attribute__((vector_size(16)));

struct IntVec {
  Int4Register v;
};

LC_INLINE IntVec zeros() { return {Int4Register{0, 0, 0, 0}}; }
LC_INLINE IntVec load_ints(const void* p) {
  IntVec a;
  std::memcpy(&a.v, p, sizeof(a.v));
  return a;
}
LC_INLINE IntVec widen(const int8_t* p) {
  const Short8 wide = {p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]};
  return {reinterpret_cast<Int4Register>(wide)};
}
template <int i>
LC_INLINE IntVec nibble(IntVec a) {
  return {reinterpret_cast<Int4Register>(reinterpret_cast<Short8>(a.v) << (12 - 4 * i) >> 12)};
}
LC_INLINE IntVec add_products(IntVec sum, IntVec a, IntVec b) {
  const Short8 x = reinterpret_cast<Short8>(a.v), y = reinterpret_cast<Short8>(b.v);
  for (int i = 0; i < 4; ++i) sum.v[i] += x[2 * i] * y[2 * i] + x[2 * i + 1] * y[2 * i + 1];
  return sum;
}
LC_INLINE Vec to_floats(IntVec a) { return {__builtin_convertvector(a.v, Float4Register)}; }

#endif

}  // namespace
}  // namespace lowcontext
