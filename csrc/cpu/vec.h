// One vector of floats, its width fixed by the instruction set this file is compiled for:
// 16 lanes with LOWCONTEXT_ISA_AVX512, 8 with LOWCONTEXT_ISA_AVX2, 4 with neither (GCC vector
// extension). Everything has internal linkage: each instruction set has its own copy, and none can
// be picked by the linker for another. For the same reason nothing here instantiates a template of
// the standard library.
#pragma once

#include <cstdint>
#include <cstring>

#include "../common/problem.h"

#define LC_INLINE inline __attribute__((always_inline))
#if defined(__clang__)
#define LC_UNROLL _Pragma("clang loop unroll(full)")
#else
#define LC_UNROLL _Pragma("GCC unroll 16")
#endif

namespace lowcontext {
namespace {

LC_INLINE float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

LC_INLINE uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

constexpr float kInfinity = __builtin_inff();

LC_INLINE float to_float(float value) { return value; }
LC_INLINE float to_float(BFloat16 value) {
  return bits_to_float(static_cast<uint32_t>(value.bits) << 16);
}
LC_INLINE float to_float(Float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  if (magnitude >= 0x400u) return bits_to_float(sign | ((magnitude << 13) + 0x38000000u));
  const float tiny = static_cast<float>(magnitude) * 0x1p-24f;
  return bits_to_float(sign | float_to_bits(tiny));
}

LC_INLINE void from_float(float value, float* out) { *out = value; }
LC_INLINE void from_float(float value, BFloat16* out) {
  const uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    out->bits = static_cast<uint16_t>(bits >> 16 | 0x40u);  // keep a NaN a NaN
  } else {
    out->bits = static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
  }
}
LC_INLINE void from_float(float value, Float16* out) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // rounds to 65536 or more
    half = 0x7c00u;
  } else if (magnitude >= 0x38800000u) {
    half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  } else {  // subnormal: adding 0.5 leaves the multiple of 2^-24 in the low bits, rounded to even
    half = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

#if defined(LOWCONTEXT_ISA_AVX512)

struct Vec {
  static constexpr int kWidth = 16;
  __m512 v;
};
constexpr const char* kIsaName = "avx512";
constexpr int kPanelRows =
    12;  // rows x 2 vectors of accumulators in the panel kernels: 24 of 32 registers

LC_INLINE Vec set1(float x) { return {_mm512_set1_ps(x)}; }
LC_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
LC_INLINE Vec load(const BFloat16* p) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
LC_INLINE Vec load(const Float16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
LC_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
LC_INLINE void store(BFloat16* p, Vec a) {
  const __m512i x = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(x, 16), _mm512_set1_epi32(1));
  __m512i y =
      _mm512_srli_epi32(_mm512_add_epi32(x, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  y = _mm512_mask_or_epi32(y, nan, _mm512_srli_epi32(x, 16), _mm512_set1_epi32(0x40));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(y));
}
LC_INLINE void store(Float16* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, 0));
}
LC_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
LC_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
LC_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
LC_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
LC_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// NaN in b wins, as in maxps.
LC_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
// a < b ? x : y; y where unordered.
LC_INLINE Vec select_lt(Vec a, Vec b, Vec x, Vec y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}
LC_INLINE bool any_ne(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_NEQ_UQ) != 0; }
LC_INLINE void transpose(Vec (&r)[16]) {
  __m512 t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i].v, r[i + 1].v);
    t[i + 1] = _mm512_unpackhi_ps(r[i].v, r[i + 1].v);
  }
  for (int i = 0; i < 16; i += 4) {
    const __m512d a = _mm512_castps_pd(t[i]), b = _mm512_castps_pd(t[i + 1]);
    const __m512d c = _mm512_castps_pd(t[i + 2]), d = _mm512_castps_pd(t[i + 3]);
    r[i].v = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    r[i + 1].v = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    r[i + 2].v = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    r[i + 3].v = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
  for (int i = 0; i < 16; i += 8) {
    for (int j = 0; j < 4; ++j) {
      t[i + j] = _mm512_shuffle_f32x4(r[i + j].v, r[i + j + 4].v, 0x88);
      t[i + j + 4] = _mm512_shuffle_f32x4(r[i + j].v, r[i + j + 4].v, 0xdd);
    }
  }
  for (int i = 0; i < 8; ++i) {
    r[i].v = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    r[i + 8].v = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
  }
}

// Element i = the sum over the lanes of a[i].
LC_INLINE Vec sum_each(const Vec (&a)[16]) {
  __m512 t[8], u[4], v[2];
  for (int i = 0; i < 8; ++i) {
    t[i] = _mm512_add_ps(_mm512_unpacklo_ps(a[2 * i].v, a[2 * i + 1].v),
                         _mm512_unpackhi_ps(a[2 * i].v, a[2 * i + 1].v));
  }
  for (int i = 0; i < 4; ++i) {
    const __m512d x = _mm512_castps_pd(t[2 * i]), y = _mm512_castps_pd(t[2 * i + 1]);
    u[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)),
                         _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  }
  for (int i = 0; i < 2; ++i) {
    v[i] = _mm512_add_ps(_mm512_shuffle_f32x4(u[2 * i], u[2 * i + 1], 0x88),
                         _mm512_shuffle_f32x4(u[2 * i], u[2 * i + 1], 0xdd));
  }
  return {_mm512_add_ps(_mm512_shuffle_f32x4(v[0], v[1], 0x88),
                        _mm512_shuffle_f32x4(v[0], v[1], 0xdd))};
}

#elif defined(LOWCONTEXT_ISA_AVX2)

struct Vec {
  static constexpr int kWidth = 8;
  __m256 v;
};
constexpr const char* kIsaName = "avx2";
constexpr int kPanelRows = 6;  // 12 of 16 registers

LC_INLINE Vec set1(float x) { return {_mm256_set1_ps(x)}; }
LC_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
LC_INLINE Vec load(const BFloat16* p) {
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))};
}
LC_INLINE Vec load(const Float16* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
LC_INLINE void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
LC_INLINE void store(BFloat16* p, Vec a) {
  const __m256i x = _mm256_castps_si256(a.v);
  const __m256i high = _mm256_srli_epi32(x, 16);
  const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_srli_epi32(_mm256_add_epi32(x, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i y =
      _mm256_blendv_epi8(rounded, _mm256_or_si256(high, _mm256_set1_epi32(0x40)), nan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(y, y), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
LC_INLINE void store(Float16* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, 0));
}
LC_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
LC_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
LC_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
LC_INLINE Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
LC_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
LC_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
LC_INLINE Vec select_lt(Vec a, Vec b, Vec x, Vec y) {
  return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}
LC_INLINE bool any_ne(Vec a, Vec b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_NEQ_UQ)) != 0;
}
LC_INLINE Vec round_even(Vec a) {
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
LC_INLINE Vec scale_by_exp2(Vec a, Vec n) {
  const __m256i e =
      _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23);
  return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(e))};
}

LC_INLINE void transpose(Vec (&r)[8]) {
  __m256 t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i].v, r[i + 1].v);
    t[i + 1] = _mm256_unpackhi_ps(r[i].v, r[i + 1].v);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i].v = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1].v = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2].v = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3].v = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2f128_ps(r[i].v, r[i + 4].v, 0x20);
    t[i + 4] = _mm256_permute2f128_ps(r[i].v, r[i + 4].v, 0x31);
  }
  for (int i = 0; i < 8; ++i) r[i].v = t[i];
}

LC_INLINE Vec sum_each(const Vec (&a)[8]) {
  __m256 t[4], u[2];
  for (int i = 0; i < 4; ++i) t[i] = _mm256_hadd_ps(a[2 * i].v, a[2 * i + 1].v);
  for (int i = 0; i < 2; ++i) u[i] = _mm256_hadd_ps(t[2 * i], t[2 * i + 1]);
  return {_mm256_add_ps(_mm256_permute2f128_ps(u[0], u[1], 0x20),
                        _mm256_permute2f128_ps(u[0], u[1], 0x31))};
}

#else

typedef float Float4 __attribute__((vector_size(16), aligned(4)));
typedef int32_t Int4 __attribute__((vector_size(16), aligned(4)));
typedef float Float4Register __attribute__((vector_size(16)));
typedef int32_t Int4Register __attribute__((vector_size(16)));

struct Vec {
  static constexpr int kWidth = 4;
  Float4Register v;
};
constexpr const char* kIsaName = "portable";
constexpr int kPanelRows = 6;

LC_INLINE Vec set1(float x) { return {Float4Register{x, x, x, x}}; }
LC_INLINE Vec load(const float* p) { return {*reinterpret_cast<const Float4*>(p)}; }
template <typename T>
LC_INLINE Vec load(const T* p) {
  return {Float4Register{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}};
}
LC_INLINE void store(float* p, Vec a) { *reinterpret_cast<Float4*>(p) = a.v; }
template <typename T>
LC_INLINE void store(T* p, Vec a) {
  for (int i = 0; i < 4; ++i) from_float(a.v[i], p + i);
}
LC_INLINE Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
LC_INLINE Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
LC_INLINE Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
LC_INLINE Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
LC_INLINE Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
LC_INLINE Vec blend(Int4Register mask, Vec x, Vec y) {
  const Int4Register a = reinterpret_cast<Int4Register>(x.v),
                     b = reinterpret_cast<Int4Register>(y.v);
  return {reinterpret_cast<Float4Register>((a & mask) | (b & ~mask))};
}
LC_INLINE Vec max(Vec a, Vec b) { return blend(a.v > b.v, a, b); }
LC_INLINE Vec select_lt(Vec a, Vec b, Vec x, Vec y) { return blend(a.v < b.v, x, y); }
LC_INLINE bool any_ne(Vec a, Vec b) {
  const Int4Register m = a.v != b.v;
  return (m[0] | m[1] | m[2] | m[3]) != 0;
}
// Nearest integer of |a| < 2^22, ties to even: adding 1.5 * 2^23 leaves the fraction no bits.
LC_INLINE Vec round_even(Vec a) {
  Float4Register shifted = a.v + 12582912.0f;
  __asm__("" : "+m"(shifted));  // keeps the pair of additions from being folded
  return {shifted - 12582912.0f};
}
LC_INLINE Vec scale_by_exp2(Vec a, Vec n) {
  const Int4Register e = (__builtin_convertvector(n.v, Int4Register) + 127) << 23;
  return {a.v * reinterpret_cast<Float4Register>(e)};
}

LC_INLINE void transpose(Vec (&r)[4]) {
  for (int i = 0; i < 4; ++i) {
    for (int j = i + 1; j < 4; ++j) {
      const float x = r[i].v[j];
      r[i].v[j] = r[j].v[i];
      r[j].v[i] = x;
    }
  }
}

LC_INLINE Vec sum_each(const Vec (&a)[4]) {
  Vec r;
  for (int i = 0; i < 4; ++i) r.v[i] = (a[i].v[0] + a[i].v[1]) + (a[i].v[2] + a[i].v[3]);
  return r;
}

#endif

constexpr int kWidth = Vec::kWidth;

// The first n (0..kWidth) elements at p; the rest zero and not read.
template <typename T>
LC_INLINE Vec load_first(const T* p, int64_t n) {
  if (n >= kWidth) return load(p);
  float tmp[kWidth] = {};
  for (int64_t i = 0; i < n; ++i) tmp[i] = to_float(p[i]);
  return load(tmp);
}

template <typename T>
LC_INLINE void store_first(T* p, Vec a, int64_t n) {
  if (n >= kWidth) {
    store(p, a);
    return;
  }
  float tmp[kWidth];
  store(tmp, a);
  for (int64_t i = 0; i < n; ++i) from_float(tmp[i], p + i);
}

// The largest lane.
LC_INLINE float max_of(Vec a) {
  float lanes[kWidth];
  store(lanes, a);
  LC_UNROLL
  for (int half = kWidth / 2; half > 0; half /= 2) {
    LC_UNROLL
    for (int i = 0; i < half; ++i)
      lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
  }
  return lanes[0];
}

// 2^f for f in [-0.5, 0.5], relative error 1.6e-7.
LC_INLINE Vec exp2_fraction(Vec f) {
  Vec p = set1(0.0013264727f);
  p = fma(p, f, set1(0.0096715130f));
  p = fma(p, f, set1(0.0555073359f));
  p = fma(p, f, set1(0.2402224243f));
  p = fma(p, f, set1(0.6931470037f));
  return fma(p, f, set1(1.0f));
}

// 2^x for x <= 127; exactly 0 for -inf; NaN stays NaN; results below 2^-126 may be flushed to 0.
LC_INLINE Vec exp2(Vec x) {
#if defined(LOWCONTEXT_ISA_AVX512)
  // reduce(-inf) is 0 and scalef(1, -inf) is 0: no clamp is needed.
  const Vec f = {_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  return {_mm512_scalef_ps(exp2_fraction(f).v, (x - f).v)};
#else
  const Vec low = set1(-126.0f);
  const Vec clamped = max(low, x);
  const Vec n = round_even(clamped);
  return select_lt(x, low, set1(0.0f), scale_by_exp2(exp2_fraction(clamped - n), n));
#endif
}

// Relative error 3e-7, also near 0: soft caps multiply it by up to 50.
LC_INLINE Vec tanh(Vec x) {
  const Vec zero = set1(0.0f), one = set1(1.0f);
  const Vec magnitude = max(zero - x, x);
  const Vec e = exp2(magnitude * set1(-2.8853901f));
  Vec far = (one - e) / (one + e);
  far = select_lt(x, zero, zero - far, far);
  const Vec y = x * x;
  Vec p = set1(-1382.0f / 155925.0f);
  p = fma(p, y, set1(62.0f / 2835.0f));
  p = fma(p, y, set1(-17.0f / 315.0f));
  p = fma(p, y, set1(2.0f / 15.0f));
  p = fma(p, y, set1(-1.0f / 3.0f));
  const Vec near = fma(p * y, x, x);
  return select_lt(magnitude, set1(0.35f), near, far);
}

LC_INLINE float scalar_exp2(float x) {
  float tmp[kWidth];
  store(tmp, exp2(set1(x)));
  return tmp[0];
}

LC_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
LC_INLINE void prefetch_l2(const void* p) { __builtin_prefetch(p, 0, 2); }

}  // namespace
}  // namespace lowcontext
