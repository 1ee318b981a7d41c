// What threads find out about parts of a row, and how it is merged: in the order of the columns'
// owners, so that the same input gives the same bits. All of it is made of floats.
#pragma once

#include "cuda/launch.cuh"

namespace tilewise {

template <int kValues>
struct Sums {
  static constexpr int kLast = kValues - 1;

  float at[kValues];

  __device__ static Sums nothing() { return {}; }
};

template <int kValues>
__device__ Sums<kValues> merge(Sums<kValues> a, Sums<kValues> b) {
#pragma unroll
  for (int i = 0; i < kValues; ++i) a.at[i] += b.at[i];
  return a;
}

// The mean of some numbers and the sum of their squared distances from it. Merged by the formula of
// Chan, Golub and LeVeque: the difference of the means is all that is ever squared, so nothing
// cancels where the mean is large.
struct Moments {
  float count, mean, squares;

  __device__ static Moments nothing() { return {}; }
};

__device__ inline Moments merge(Moments a, Moments b) {
  const float count = a.count + b.count, apart = b.mean - a.mean;
  const float share = count > 0.f ? __fdividef(b.count, count) : 0.f;
  return {count, a.mean + apart * share, a.squares + b.squares + apart * apart * a.count * share};
}

// The largest of some numbers, and the sum of exp(number - largest).
struct Exponentials {
  float top, sum;

  __device__ static Exponentials nothing() { return {-INFINITY, 0.f}; }
};

// For a T of 16 bits a few units of float32 in the last place are nothing, and a third of the
// instructions of expf leaves memory as what bounds a kernel.
template <typename T>
__device__ float exponential(float x) {
  constexpr float kLog2E = 1.44269504f;
  if constexpr (sizeof(T) < sizeof(float)) return exp2_approximate(x * kLog2E);
  return expf(x);
}

// What exponents are taken relative to: exp(-inf - -inf) would be NaN.
__device__ inline float finite_top(float top) { return top == -INFINITY ? 0.f : top; }

// A maximum passes over NaN, like fmaxf: NaN spreads through the sum.
__device__ inline Exponentials merge(Exponentials a, Exponentials b) {
  const float top = fmaxf(a.top, b.top), base = finite_top(top);
  return {top, a.sum * expf(a.top - base) + b.sum * expf(b.top - base)};
}

}  // namespace tilewise
