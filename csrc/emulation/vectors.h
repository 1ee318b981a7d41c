// CUDA's built-in vectors, with the alignment they have there.
#pragma once

#include <cstdint>

#define TILEWISE_VECTORS(name, type)                                                          \
  struct name##1 { type x; };                                                                 \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };                                    \
  struct name##3 { type x, y, z; };                                                           \
  struct alignas(4 * sizeof(type) < 16 ? 4 * sizeof(type) : 16) name##4 { type x, y, z, w; }; \
  inline name##1 make_##name##1(type x) { return {x}; }                                       \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                            \
  inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }                 \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }

TILEWISE_VECTORS(char, signed char)
TILEWISE_VECTORS(uchar, unsigned char)
TILEWISE_VECTORS(short, short)
TILEWISE_VECTORS(ushort, unsigned short)
TILEWISE_VECTORS(int, int)
TILEWISE_VECTORS(uint, unsigned)
TILEWISE_VECTORS(longlong, long long)
TILEWISE_VECTORS(ulonglong, unsigned long long)
TILEWISE_VECTORS(float, float)
TILEWISE_VECTORS(double, double)

#undef TILEWISE_VECTORS

struct dim3 {
  unsigned x, y, z;

  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
  constexpr operator uint3() const { return {x, y, z}; }
};
