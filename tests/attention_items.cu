// items HEADS KV_HEADS CAUSAL BLOCKS QUERIES KEYS [QUERIES KEYS ...]: which block works on which tile
// of queries, of packed sequences of these lengths, by the schedule of Hopper's forward pass. A line
// each: block, first row of the sequence, head, first query, and how many tiles of keys these see.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda/attention/hopper.cuh"

using namespace tilewise;

namespace {

constexpr int kDim = 64, kKeys = 128, kMost = 1 << 16;

struct Line {
  int block, first, head, query0, keys;
};

__global__ void note(Line* lines, int* count, const Launch<__half> launch) {
  for_items<true, kDim, kKeys>(launch, [&](const Item<true>& item) {
    const int at = atomicAdd(count, 1);
    if (at >= kMost) return;
    lines[at] = {static_cast<int>(blockIdx.x), item.q.first, item.head, item.query0,
                 item.keys.count()};
  });
}

template <typename T>
T* zeros(size_t count) {
  T* x = nullptr;
  cudaMalloc(&x, count * sizeof(T));
  cudaMemset(x, 0, count * sizeof(T));
  return x;
}

}  // namespace

int main(int count, char** words) {
  const auto number = [&](int i) { return std::atoi(words[i]); };
  constexpr int kFirst = 5;
  const int batch = (count - kFirst) / 2;
  Launch<__half> launch{};
  Sizes& size = launch.f.a.size;
  size = {batch, number(1), number(2), 1 << 20, 1 << 20, kDim, kDim};
  launch.f.a.options.left = -1;
  launch.f.a.options.right = number(3) ? 0 : -1;
  std::vector<int32_t> ends[2] = {{0}, {0}};
  for (int i = 0; i < 2 * batch; ++i) {
    ends[i % 2].push_back(ends[i % 2].back() + number(kFirst + i));
  }
  int32_t* on_device[2];
  for (int i = 0; i < 2; ++i) {
    on_device[i] = zeros<int32_t>(batch + 1);
    cudaMemcpy(on_device[i], ends[i].data(), (batch + 1) * sizeof(int32_t), cudaMemcpyDefault);
  }
  launch.packed = {on_device[0], on_device[1], ends[0].back(), ends[1].back()};
  Line* lines = zeros<Line>(kMost);
  int* total = zeros<int>(1);
  const cudaError_t status =
      tilewise::launch(note, number(4), 1, 0, nullptr, lines, total, launch);
  if (status != cudaSuccess) std::fprintf(stderr, "%s\n", cudaGetErrorString(status));
  for (int i = 0; i < *total && i < kMost; ++i) {
    const Line& x = lines[i];
    std::printf("%d %d %d %d %d\n", x.block, x.first, x.head, x.query0, x.keys);
  }
  return status;
}
