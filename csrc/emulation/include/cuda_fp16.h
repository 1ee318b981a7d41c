// IEEE half precision, rounded to nearest even; arithmetic in fp32.
#pragma once

#include <cstdint>

#include "emulation/arithmetic.h"
#include "emulation/half_operators.h"
#include "emulation/vectors.h"

struct __half_raw {
  unsigned short x;
};

struct __half {
  unsigned short bits;

  __half() = default;
  __half(float value);
  __half(__half_raw raw) : bits(raw.x) {}
  operator float() const;
  operator __half_raw() const { return {bits}; }
};

struct alignas(4) __half2 {
  __half x, y;
};

inline __half __ushort_as_half(unsigned short bits) { return __half(__half_raw{bits}); }
inline unsigned short __half_as_ushort(__half value) { return value.bits; }

inline float __half2float(__half value) {
  const unsigned sign = (value.bits & 0x8000u) << 16, rest = value.bits & 0x7fffu;
  if (rest >= 0x7c00) return __uint_as_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  // The exponent counts from another zero; the product also makes subnormal numbers normal.
  const float magnitude = __uint_as_float(rest << 13) * 0x1p112f;
  return __uint_as_float(sign | __float_as_uint(magnitude));
}

inline __half __float2half_rn(float value) {
  const unsigned bits = __float_as_uint(value);
  const unsigned sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  unsigned rounded;
  if (magnitude > 0x7f800000) return __ushort_as_half(0x7fff);  // CUDA's NaN
  if (magnitude >= 0x47800000) {  // 2^16, which is beyond what is rounded to infinity
    rounded = 0x7c00;
  } else if (magnitude >= 0x38800000) {  // 2^-14, the smallest normal number
    rounded = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  } else {  // adding 1/2 leaves multiples of 2^-24 in the mantissa, rounded
    const float sum = __uint_as_float(magnitude) + 0.5f;
    rounded = __float_as_uint(sum) - 0x3f000000;
  }
  return __ushort_as_half(static_cast<unsigned short>(sign | rounded));
}
inline __half __float2half(float value) { return __float2half_rn(value); }
inline __half::__half(float value) : bits(__float2half_rn(value).bits) {}
inline __half::operator float() const { return __half2float(*this); }

inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}
inline __half2 __float22half2_rn(float2 v) { return __floats2half2_rn(v.x, v.y); }
inline __half2 __float2half2_rn(float value) { return __floats2half2_rn(value, value); }
inline float2 __half22float2(__half2 v) { return {v.x, v.y}; }
inline float __low2float(__half2 v) { return v.x; }
inline float __high2float(__half2 v) { return v.y; }
inline __half __low2half(__half2 v) { return v.x; }
inline __half __high2half(__half2 v) { return v.y; }

TILEWISE_HALF_OPERATORS(__half, __half2)

using half = __half;
using half2 = __half2;
