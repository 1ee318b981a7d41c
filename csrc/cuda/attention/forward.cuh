// What the kernels of the forward pass have in common: what they are given, and the softmax.
#pragma once

#include "cuda/attention/scores.cuh"

namespace tilewise {

template <typename T>
struct Forward {
  Attention<T> a;
  Heads<T> out;
  float *highest, *total;
};

// Of the scores of a query that a lane has in half `half` of its sums to powers of two, of which
// `total` is the sum so far; returned is what all that was summed up to now is to be multiplied by.
// kEmpty: there may be none yet.
template <bool kEmpty, int kAcross>
__device__ __forceinline__ float soften(float (&s)[kAcross][4], int half, float& highest,
                                        float& total, float factor) {
  float above = highest;
#pragma unroll
  for (int n = 0; n < kAcross; ++n) above = fmaxf(above, fmaxf(s[n][half], s[n][half + 1]));
  above = fmaxf(above, __shfl_xor_sync(0xffffffff, above, 1));
  above = fmaxf(above, __shfl_xor_sync(0xffffffff, above, 2));
  const float base = kEmpty && above == -INFINITY ? 0.f : above * factor;
  const float rescale = exp2_approximate(highest * factor - base);
  highest = above;
  float sum = total * rescale;
#pragma unroll
  for (int n = 0; n < kAcross; ++n) {
#pragma unroll
    for (int e = half; e < half + 2; ++e) {
      s[n][e] = exp2_approximate(s[n][e] * factor - base);
      sum += s[n][e];
    }
  }
  total = sum;
  return rescale;
}

// Whether the kernel of Hopper takes this, and on this GPU; and its launch.
template <typename T>
bool is_for_hopper(const Forward<T>& f, const Packed& packed);
template <typename T>
cudaError_t hopper_forward(const Forward<T>& f, const Packed& packed, cudaStream_t stream);

}  // namespace tilewise
