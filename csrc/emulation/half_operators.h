// Arithmetic of a 16-bit type and of pairs of it. Sums, products and quotients of two such numbers
// are exact in fp32 or rounded there harmlessly, and a fused one is computed in fp64.
#pragma once

#define TILEWISE_HALF_OPERATORS(T, Pair)                                                  \
  inline T __hadd(T a, T b) { return T(float(a) + float(b)); }                            \
  inline T __hsub(T a, T b) { return T(float(a) - float(b)); }                            \
  inline T __hmul(T a, T b) { return T(float(a) * float(b)); }                            \
  inline T __hdiv(T a, T b) { return T(float(a) / float(b)); }                            \
  inline T __hneg(T a) { return T(-float(a)); }                                           \
  inline T __habs(T a) { return T(fabsf(float(a))); }                                     \
  inline T __hmax(T a, T b) { return T(fmaxf(float(a), float(b))); }                      \
  inline T __hmin(T a, T b) { return T(fminf(float(a), float(b))); }                      \
  inline bool __hisnan(T a) { return float(a) != float(a); }                              \
  inline T __hfma(T a, T b, T c) {                                                        \
    return T(static_cast<float>(double(float(a)) * double(float(b)) + double(float(c)))); \
  }                                                                                       \
  inline Pair __hadd2(Pair a, Pair b) { return {__hadd(a.x, b.x), __hadd(a.y, b.y)}; }    \
  inline Pair __hsub2(Pair a, Pair b) { return {__hsub(a.x, b.x), __hsub(a.y, b.y)}; }    \
  inline Pair __hmul2(Pair a, Pair b) { return {__hmul(a.x, b.x), __hmul(a.y, b.y)}; }    \
  inline Pair __hmax2(Pair a, Pair b) { return {__hmax(a.x, b.x), __hmax(a.y, b.y)}; }    \
  inline Pair __hmin2(Pair a, Pair b) { return {__hmin(a.x, b.x), __hmin(a.y, b.y)}; }    \
  inline Pair __hfma2(Pair a, Pair b, Pair c) {                                           \
    return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};                                \
  }
