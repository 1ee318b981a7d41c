// What nvcc knows without being told, for a C++ compiler: qualifiers, built-in variables and
// functions, launches. Written from CUDA's documentation; what is missing here fails to compile,
// by its name. Inline PTX does too: give it a function here and in a header for the GPU.
#pragma once

#include <cuda_runtime_api.h>
#include <math.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#define TILEWISE_EMULATION 1

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __cluster_dims__(...)
#define __align__(n) __attribute__((aligned(n)))

#include "emulation/runtime.h"

// The two things of CUDA that no function and no qualifier can stand for. csrc/cuda/launch.cuh has
// them for nvcc.
#define TILEWISE_SHARED(name, ...)  \
  static const char name##_key = 0; \
  auto& name = ::tilewise::emulation::shared_array<__VA_ARGS__>(&name##_key, #name)
#define TILEWISE_DYNAMIC_SHARED(name, type) \
  type* name = static_cast<type*>(::tilewise::emulation::dynamic_shared())

#include "emulation/arithmetic.h"
#include "emulation/atomic.h"
#include "emulation/launch.h"
#include "emulation/warp.h"

constexpr int warpSize = tilewise::emulation::kLanes;

#define asm \
  _Pragma("GCC error \"the emulator has no inline PTX, which it would have to execute\"") __asm__
