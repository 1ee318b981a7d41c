// The forward pass on Hopper, for heads of 64 and 128 whose scores are only limited by the window:
// the rest is forward.cu's. A producer keeps rings of keys and values filled by the copy engine;
// each consumer, a warpgroup, has 64 queries, and its scores and probabilities never leave
// registers. What lies beyond a head comes as zeros and is not written: the copy engine knows where
// a tensor ends.
//
// Two things keep the tensor cores busy during the softmax (FlashAttention-3, Shah et al.,
// https://arxiv.org/abs/2407.08608): consumers take turns, and a consumer's scores of a tile become
// probabilities while the values of the tile before are multiplied.
#ifdef TILEWISE_HOPPER

#include "cuda/attention/hopper.cuh"
#include "cuda/attention/hopper_launch.cuh"

namespace tilewise {
namespace {

template <typename T, int kDim, int kKeys>
__device__ void produce(const Launch<T>& launch, HopperShared<T, kDim, kKeys>& shared) {
  Turn<1> q;
  Turn<HopperShape<kDim>::kStages> k, v;
  const uint64_t once = evict_first(), often = evict_last();
  for_items<kDim, kKeys>(launch, [&](const Item& item) {
    const int count = item.keys.count();
    for (int n = 0; n <= count && count > 0; ++n) {
      if (n < count) {
        barrier_wait(&shared.k_empty[k.slot], k.odd ^ 1);
        shared.k[k.slot].load(launch.k, &shared.k_full[k.slot], item.at(n) * kKeys, item.kv_head,
                              item.batch, often);
        k.next();
      }
      if (n == 0) {
        barrier_wait(&shared.q_empty, q.odd ^ 1);
        shared.q.load(launch.q, &shared.q_full, item.query0, item.head, item.batch, once);
        q.next();
      } else {
        barrier_wait(&shared.v_empty[v.slot], v.odd ^ 1);
        shared.v[v.slot].load(launch.v, &shared.v_full[v.slot], item.at(n - 1) * kKeys,
                              item.kv_head, item.batch, often);
        v.next();
      }
    }
  });
}

// What a consumer does.
template <typename T, int kDim, int kKeys>
struct Work {
  using S = HopperShape<kDim>;

  const Launch<T>& launch;
  HopperShared<T, kDim, kKeys>& shared;
  const int consumer, thread;
  Turn<1> q = {};
  Turn<S::kStages> k = {}, v = {};
  float sums[kDim / 2], highest[2], total[2];
  float rescale[2];                  // what the sums are still to be multiplied by
  uint32_t p[kKeys / kStepRows][4];  // rounded, of the last tile

  __device__ Work(const Launch<T>& launch, HopperShared<T, kDim, kKeys>& shared)
      : launch(launch),
        shared(shared),
        consumer(threadIdx.x / kWarpgroup - 1),
        thread(threadIdx.x % kWarpgroup) {}

  // One thread speaks for its warpgroup, whose wgmma are done as soon as it has waited for them.
  __device__ void release(uint64_t* empty) const {
    if (thread == 0) barrier_arrive(empty);
  }

  // s = q k^T, on its way.
  __device__ __forceinline__ void multiply_keys(float (&s)[kKeys / 2]) {
    const uint64_t a = shared.q.across(consumer * kGroupRows), b = shared.k[k.slot].across(0);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) {
      wgmma<T>(s, advance(a, shared.q.step(i)), advance(b, shared.k[0].step(i)), i > 0);
    }
    wgmma_commit();
  }

  // sums = rescale sums + p v, on its way; the multiplication is done beside the scores'.
  __device__ __forceinline__ void multiply_values() {
#pragma unroll
    for (int i = 0; i < kDim / 2; ++i) sums[i] *= rescale[i / 2 % 2];
    const uint64_t b = shared.v[v.slot].down();
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kKeys / kStepRows; ++i) {
      wgmma<T, Major::mn>(sums, p[i], advance(b, i * kStepRows * kRowBytes), true);
    }
    wgmma_commit();
  }

  // Scores of a tile to probabilities.
  template <bool kChecked>
  __device__ __forceinline__ void attend(float (&s)[kKeys / 2], const Item& item, int n) {
    auto& scores = reinterpret_cast<Fragments<1, kKeys / 8>&>(s);
    const Attention<T>& a = launch.f.a;
    if constexpr (kChecked) {
      const int row = consumer * kGroupRows + thread / kWarpSize * 16;
      hide_outside(scores, Pairs<false>::of(item.query0, item.at(n) * kKeys, row),
                   ahead_of(a.size), a.options.left, a.options.right, a.size.seq_k);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      rescale[i] =
          soften<kChecked>(scores[0], 2 * i, highest[i], total[i], a.template factor<false>());
    }
  }

  __device__ __forceinline__ void round(const float (&s)[kKeys / 2]) {
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i) {
      p[i / 4][i % 4] = rounded_pair<T>(s[2 * i], s[2 * i + 1]);
    }
  }

  // Whose turn it is feeds the tensor cores; the others are at their softmax.
  __device__ static void turn_pass(int consumer) {
    const int next = consumer + 1 == S::kConsumers ? 0 : consumer + 1;
    named_barrier_arrive(1 + S::kConsumers + next, 2 * kWarpgroup);
  }
  __device__ void turn_take() const {
    named_barrier_sync(1 + S::kConsumers + consumer, 2 * kWarpgroup);
  }

  // The scores of tile n have come: its keys are not needed any more, nor are queries by the last.
  __device__ void keys_done(const Item& item, int n) {
    release(&shared.k_empty[k.slot]);
    k.next();
    if (n + 1 == item.keys.count()) release(&shared.q_empty);
  }

  // Of the first tile there are only scores.
  __device__ __forceinline__ void begin(const Item& item) {
    float s[kKeys / 2];
    barrier_wait(&shared.q_full, q.odd);
    q.next();
    barrier_wait(&shared.k_full[k.slot], k.odd);
    multiply_keys(s);
    wgmma_wait<0>(s);
    keys_done(item, 0);
    attend<true>(s, item, 0);
    barrier_wait(&shared.v_full[v.slot], v.odd);
    round(s);
  }

  // The scores of tile n and the product of the one before. To wait for the next values here is no
  // loss, and keeps ptxas from putting off most powers until after the wait for the sums.
  template <bool kChecked>
  __device__ __forceinline__ void step(const Item& item, int n) {
    float s[kKeys / 2];
    barrier_wait(&shared.k_full[k.slot], k.odd);
    turn_take();
    multiply_keys(s);
    multiply_values();
    turn_pass(consumer);
    wgmma_wait<1>(s);
    keys_done(item, n);
    attend<kChecked>(s, item, n);
    uint64_t* read = &shared.v_empty[v.slot];
    v.next();
    barrier_wait(&shared.v_full[v.slot], v.odd);
    wgmma_wait<0>(sums);
    release(read);
    round(s);
  }

  __device__ void run(const Item& item) {
#pragma unroll
    for (int i = 0; i < kDim / 2; ++i) sums[i] = 0.f;
    highest[0] = highest[1] = -INFINITY;
    total[0] = total[1] = 0.f;
    const int count = item.keys.count(), partial = item.partial();
    if (count > 0) {
      begin(item);
#pragma unroll 1
      for (int n = 1; n < partial; ++n) step<true>(item, n);
#pragma unroll 1
      for (int n = max(1, partial); n < count; ++n) step<false>(item, n);
      multiply_values();
      wgmma_wait<0>(sums);
      release(&shared.v_empty[v.slot]);
      v.next();
    }
    end(item);
  }

  __device__ void end(const Item& item) {
    const Forward<T>& f = launch.f;
    const int seq_q = f.a.size.seq_q, own = consumer * kGroupRows;
    const int row = own + thread / kWarpSize * 16 + thread % kWarpSize / 4;
    float part[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      total[i] += __shfl_xor_sync(0xffffffff, total[i], 1);
      total[i] += __shfl_xor_sync(0xffffffff, total[i], 2);
      part[i] = total[i] == 0.f ? 0.f : 1.f / total[i];
      const int query = item.query0 + row + 8 * i;
      if (thread % 4 == 0 && query < seq_q) {
        const int64_t place = static_cast<int64_t>(item.index) * seq_q + query;
        f.highest[place] = highest[i] * f.a.template factor<false>();
        f.total[place] = total[i];
      }
    }
    const auto meet = [&] { named_barrier_sync(1 + consumer, kWarpgroup); };
    if (thread == 0) bulk_wait_read<0>();
    meet();  // the tile before this one has been read
#pragma unroll
    for (int i = 0; i < kDim / 4; ++i) {
      const int col = i / 2 * 8 + thread % 4 * 2;
      const uint32_t offset = (row + i % 2 * 8) * kRowBytes + col % kPanelCols * sizeof(T);
      auto* panel = reinterpret_cast<uint8_t*>(shared.out.at[col / kPanelCols]);
      *reinterpret_cast<uint32_t*>(panel + swizzled(offset, Swizzle::bytes128)) =
          rounded_pair<T>(sums[2 * i] * part[i % 2], sums[2 * i + 1] * part[i % 2]);
    }
    fence_async();
    meet();
    if (thread > 0 || item.query0 + own >= seq_q) return;
#pragma unroll
    for (int i = 0; i < kDim / kPanelCols; ++i) {
      tensor_store(launch.out, shared.out.at[i] + own * kPanelCols,
                   {i * kPanelCols, item.query0 + own, item.head, item.batch});
    }
    bulk_commit();
  }
};

template <typename T, int kDim, int kKeys>
__global__ void __launch_bounds__(HopperShape<kDim>::kThreads, 1)
    hopper_kernel(const __grid_constant__ Launch<T> launch) {
  using S = HopperShape<kDim>;
  auto& shared = shared_tiles<HopperShared<T, kDim, kKeys>>();
  if (threadIdx.x == 0) {
    for (const CUtensorMap* map : {&launch.q, &launch.k, &launch.v, &launch.out}) {
      tensor_map_prefetch(*map);
    }
    shared.init();
  }
  __syncthreads();
  if (threadIdx.x < kWarpgroup) {
    registers_release<S::kProducerRegisters>();
    if (threadIdx.x == 0) produce(launch, shared);
  } else {
    registers_claim<S::kConsumerRegisters>();
    Work<T, kDim, kKeys> work(launch, shared);
    if (work.consumer == S::kConsumers - 1) work.turn_pass(work.consumer);  // to the first
    for_items<kDim, kKeys>(launch, [&](const Item& item) { work.run(item); });
    if (work.thread == 0) bulk_wait_read<0>();
  }
}

template <typename T, int kDim, int kKeys>
cudaError_t launch_hopper(const Forward<T>& f, int processors, cudaStream_t stream) {
  using S = HopperShape<kDim>;
  const Sizes& size = f.a.size;
  Launch<T> launch{};
  launch.f = f;
  cudaError_t status =
      make_map(&launch.q, f.a.q, size.batch, size.heads, size.seq_q, kDim, S::kQueries);
  const auto then = [&](CUtensorMap* map, const auto& x, int heads, int seq, int rows) {
    if (status == cudaSuccess) status = make_map(map, x, size.batch, heads, seq, kDim, rows);
  };
  then(&launch.k, f.a.k, size.kv_heads, size.seq_k, kKeys);
  then(&launch.v, f.a.v, size.kv_heads, size.seq_k, kKeys);
  then(&launch.out, f.out, size.heads, size.seq_q, kGroupRows);
  if (status != cudaSuccess) return status;

  const int64_t heads = int64_t{size.batch} * size.heads, tiles = tiles_of(size.seq_q, S::kQueries);
  if (heads * tiles > INT32_MAX) return cudaErrorInvalidConfiguration;
  const int64_t bytes = int64_t{2} * sizeof(T) * size.seq_k * kDim;  // of keys and values of a head
  const int64_t section =
      std::max<int64_t>(1, kLastingBytes / bytes) * (size.heads / size.kv_heads);
  launch.schedule = {static_cast<int>(heads), static_cast<int>(tiles),
                     static_cast<int>(std::min(section, heads)), f.a.options.right >= 0};
  return launch_clusters(hopper_kernel<T, kDim, kKeys>,
                         std::min<int64_t>(heads * tiles, processors), 1, S::kThreads,
                         kSharedBytes<HopperShared<T, kDim, kKeys>>, stream, launch);
}

}  // namespace

template <typename T>
bool is_for_hopper(const Forward<T>& f) {
  const Sizes& size = f.a.size;
  const bool fits = size.dim == size.v_dim && (size.dim == 64 || size.dim == 128);
  return fits && !is_scored(f.a) && has_map(f.a.q, size.batch, size.heads, size.seq_q) &&
         has_map(f.a.k, size.batch, size.kv_heads, size.seq_k) &&
         has_map(f.a.v, size.batch, size.kv_heads, size.seq_k) &&
         has_map(f.out, size.batch, size.heads, size.seq_q) &&
         attribute(cudaDevAttrComputeCapabilityMajor) == 9;
}

template <typename T>
cudaError_t hopper_forward(const Forward<T>& f, cudaStream_t stream) {
  const int processors = attribute(cudaDevAttrMultiProcessorCount);
  if (f.a.size.dim == 64) return launch_hopper<T, 64, 128>(f, processors, stream);
  const bool limited = f.a.options.left >= 0 || f.a.options.right >= 0;
  return limited ? launch_hopper<T, 128, 128>(f, processors, stream)
                 : launch_hopper<T, 128, 160>(f, processors, stream);
}

template bool is_for_hopper(const Forward<__half>&);
template bool is_for_hopper(const Forward<__nv_bfloat16>&);
template cudaError_t hopper_forward(const Forward<__half>&, cudaStream_t);
template cudaError_t hopper_forward(const Forward<__nv_bfloat16>&, cudaStream_t);

}  // namespace tilewise

#endif
