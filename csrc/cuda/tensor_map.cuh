// How the copy engine finds its way through a tensor: made on the host, passed to a kernel by value
// as `const __grid_constant__ CUtensorMap`.
#pragma once

#include <cstring>
#include <type_traits>

#include "cuda/wgmma.cuh"

namespace tilewise {

using EncodeTensorMap = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*,
                                     const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                                     const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                     CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's own function, asked for when first needed: the module loads without a driver.
inline cudaError_t find_encoder(EncodeTensorMap* encode) {
#ifdef TILEWISE_EMULATION
  *encode = cuTensorMapEncodeTiled;
#else
  void* found = nullptr;
  cudaDriverEntryPointQueryResult query;
  constexpr unsigned kVersion = 12000;  // of CUDA, the first that has it
  const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                              kVersion, cudaEnableDefault, &query);
  if (status != cudaSuccess) return status;
  if (query != cudaDriverEntryPointSuccess) return cudaErrorCallRequiresNewerDriver;
  *encode = reinterpret_cast<EncodeTensorMap>(found);
#endif
  return cudaSuccess;
}

constexpr int kMostRanks = 5;

// All that a map is made from, in units of the driver; what a rank has no use for is 0.
struct TensorMapKey {
  const void* base;
  cuuint64_t sizes[kMostRanks], strides[kMostRanks - 1];
  cuuint32_t box[kMostRanks];
  cuuint32_t rank;  // 0: this is none
  CUtensorMapDataType type;
  Swizzle swizzle;

  bool operator==(const TensorMapKey& other) const {
    static_assert(std::has_unique_object_representations_v<TensorMapKey>);
    return std::memcmp(this, &other, sizeof *this) == 0;
  }

  cudaError_t encode(CUtensorMap* map) const {
    EncodeTensorMap encode = nullptr;
    const cudaError_t status = find_encoder(&encode);
    if (status != cudaSuccess) return status;
    constexpr cuuint32_t kSteps[kMostRanks] = {1, 1, 1, 1, 1};
    const CUresult result =
        encode(map, type, rank, const_cast<void*>(base), sizes, strides, box, kSteps,
               CU_TENSOR_MAP_INTERLEAVE_NONE, static_cast<CUtensorMapSwizzle>(swizzle),
               CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return static_cast<cudaError_t>(result);  // the two number their errors alike
  }
};

// The maps that a thread had made last. A map is numbers that follow from its key and from nothing
// else, neither from a device nor from what lies at the address, or did: one found here is right.
struct TensorMaps {
  static constexpr int kSets = 64, kWays = 4;
  struct Slot {
    TensorMapKey key;
    CUtensorMap map;
  };
  Slot slots[kSets][kWays];
  unsigned char oldest[kSets];

  cudaError_t get(CUtensorMap* map, const TensorMapKey& key) {
    const size_t set = hash(key) % kSets;
    for (const Slot& slot : slots[set]) {
      if (slot.key == key) return *map = slot.map, cudaSuccess;
    }
    const cudaError_t status = key.encode(map);
    if (status == cudaSuccess) slots[set][oldest[set]++ % kWays] = {key, *map};
    return status;
  }

 private:
  static uint64_t hash(const TensorMapKey& key) {
    uint64_t words[sizeof key / sizeof(uint64_t)], total = 0;
    static_assert(sizeof words == sizeof key);
    std::memcpy(words, &key, sizeof key);
    constexpr uint64_t kOdd = 0x9e3779b97f4a7c15;
    for (const uint64_t word : words) total = (total ^ word) * kOdd, total ^= total >> 32;
    return total;
  }
};

// Of a tensor at `base`, sizes innermost first; strides, in elements, of all dimensions but the
// innermost, whose elements are neighbours. A copy moves a `box`, whose rows are at most
// row_bytes(swizzle) long unless there is no swizzle.
template <int kRank>
cudaError_t make_tensor_map(CUtensorMap* map, DType dtype, const void* base,
                            const int64_t (&sizes)[kRank], const int64_t (&strides)[kRank - 1],
                            const int (&box)[kRank], Swizzle swizzle) {
  static_assert(kRank <= kMostRanks);
  TensorMapKey key{};
  key.base = base;
  key.rank = kRank;
  key.type = dtype == DType::f32   ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
             : dtype == DType::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                   : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  key.swizzle = swizzle;
  const int64_t bytes = dtype == DType::f32 ? 4 : 2;
  for (int i = 0; i < kRank; ++i) {
    key.sizes[i] = static_cast<cuuint64_t>(sizes[i]);
    key.box[i] = static_cast<cuuint32_t>(box[i]);
    if (i > 0) key.strides[i - 1] = static_cast<cuuint64_t>(strides[i - 1] * bytes);
  }
  static thread_local TensorMaps maps;
  return maps.get(map, key);
}

}  // namespace tilewise
