// The forward pass on Hopper, for heads of 64 and 128 whose scores are only limited by the window:
// the rest is forward.cu's. A producer keeps rings of keys and values filled by the copy engine;
// each consumer, a warpgroup, has 64 queries, and its scores and probabilities never leave
// registers. What lies beyond a head, or a packed sequence, comes as zeros and is not written: the
// copy engine knows where they end.
//
// Two things keep the tensor cores busy during the softmax (FlashAttention-3, Shah et al.,
// https://arxiv.org/abs/2407.08608): consumers take turns, and a consumer's scores of a tile become
// probabilities while the values of the tile before are multiplied.
#ifdef TILEWISE_HOPPER

#include "cuda/attention/hopper.cuh"
#include "cuda/attention/hopper_launch.cuh"

namespace tilewise {
namespace {

template <bool kPacked, typename T, int kDim, int kKeys>
__device__ void produce(const Launch<T>& launch, HopperShared<T, kDim, kKeys>& shared) {
  using Ring = Turn<HopperShape<kDim>::kStages>;
  Turn<1> q;
  Ring v;  // keys are a tile ahead
  for_items<kPacked, kDim, kKeys>(launch, [&](const Item<kPacked>& item) {
    const int count = item.keys.count(), kv_head = item.head / launch.f.a.group();
    if (count == 0) return;
    const auto load_keys = [&](int n, const Ring& k) {
      barrier_wait(&shared.k_empty[k.slot], k.odd ^ 1);
      shared.k[k.slot].load(launch.k, &shared.k_full[k.slot], item.k.row(item.at(n) * kKeys),
                            kv_head, item.k.line(), evict_last());
    };
    load_keys(0, v);
    barrier_wait(&shared.q_empty, q.odd ^ 1);
    shared.q.load(launch.q, &shared.q_full, item.q.row(item.query0), item.head, item.q.line(),
                  evict_first());
    q.next();
    for (int n = 0; n < count; ++n) {
      Ring k = v;
      k.next();
      if (n + 1 < count) load_keys(n + 1, k);
      barrier_wait(&shared.v_empty[v.slot], v.odd ^ 1);
      shared.v[v.slot].load(launch.v, &shared.v_full[v.slot], item.k.row(item.at(n) * kKeys),
                            kv_head, item.k.line(), evict_last());
      v = k;
    }
  });
}

// What a consumer does.
template <bool kPacked, typename T, int kDim, int kKeys>
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
  __device__ __forceinline__ void attend(float (&s)[kKeys / 2], const Item<kPacked>& item, int n) {
    auto& scores = reinterpret_cast<Fragments<1, kKeys / 8>&>(s);
    const Attention<T>& a = launch.f.a;
    if constexpr (kChecked) {
      const int row = consumer * kGroupRows + thread / kWarpSize * 16;
      hide_outside(scores, Pairs<false>::of(item.query0, item.at(n) * kKeys, row),
                   item.ahead(), a.options.left, a.options.right, item.k.count);
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
  __device__ void keys_done(const Item<kPacked>& item, int n) {
    release(&shared.k_empty[k.slot]);
    k.next();
    if (n + 1 == item.keys.count()) release(&shared.q_empty);
  }

  // Of the first tile there are only scores.
  __device__ __forceinline__ void begin(const Item<kPacked>& item) {
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
  __device__ __forceinline__ void step(const Item<kPacked>& item, int n) {
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

  __device__ void run(const Item<kPacked>& item) {
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

  __device__ void end(const Item<kPacked>& item) {
    const Forward<T>& f = launch.f;
    const int seq_q = item.q.count, own = consumer * kGroupRows;
    const int row = own + thread / kWarpSize * 16 + thread % kWarpSize / 4;
    float part[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      total[i] += __shfl_xor_sync(0xffffffff, total[i], 1);
      total[i] += __shfl_xor_sync(0xffffffff, total[i], 2);
      part[i] = total[i] == 0.f ? 0.f : 1.f / total[i];
      const int query = item.query0 + row + 8 * i;
      if (thread % 4 == 0 && query < seq_q) {
        const int64_t place = f.a.lines.of(item.q.first, item.head) + query;
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
                   {i * kPanelCols, item.q.row(item.query0 + own), item.head, item.q.line()});
    }
    bulk_commit();
  }
};

// What a block does.
template <bool kPacked, int kDim, int kKeys, typename T>
__device__ __forceinline__ void forward(const Launch<T>& launch) {
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
    if (threadIdx.x == 0) produce<kPacked>(launch, shared);
  } else {
    registers_claim<S::kConsumerRegisters>();
    Work<kPacked, T, kDim, kKeys> work(launch, shared);
    if (work.consumer == S::kConsumers - 1) work.turn_pass(work.consumer);  // to the first
    for_items<kPacked, kDim, kKeys>(launch, [&](const Item<kPacked>& item) { work.run(item); });
    if (work.thread == 0) bulk_wait_read<0>();
  }
}

template <typename T, int kDim, int kKeys>
__global__ void __launch_bounds__(HopperShape<kDim>::kThreads, 1)
    hopper_kernel(const __grid_constant__ Launch<T> launch) {
  forward<false, kDim, kKeys>(launch);
}

template <typename T, int kDim, int kKeys>
__global__ void __launch_bounds__(HopperShape<kDim>::kThreads, 1)
    packed_hopper_kernel(const __grid_constant__ Launch<T> launch) {
  forward<true, kDim, kKeys>(launch);
}

template <bool kPacked, typename T, int kDim, int kKeys>
cudaError_t launch_hopper(const Forward<T>& f, const Packed& packed, cudaStream_t stream) {
  using S = HopperShape<kDim>;
  const Sizes& size = f.a.size;
  const int64_t seq_q = kPacked ? std::min<int64_t>(size.seq_q, packed.rows_q) : size.seq_q;
  const int64_t heads = int64_t{size.batch} * size.heads, tiles = tiles_of(seq_q, S::kQueries);
  if (heads * tiles > INT32_MAX) return cudaErrorInvalidConfiguration;
  const auto schedule = Schedule::of(size.batch * size.kv_heads, size.heads / size.kv_heads,
                                     static_cast<int>(tiles), size.seq_k, 2 * sizeof(T) * kDim,
                                     f.a.options.right >= 0);
  Launch<T> launch{{}, {}, {}, {}, f, packed, schedule};

  cudaError_t status = cudaSuccess;
  const auto map = [&](CUtensorMap* to, const auto& x, int heads, int seq, int64_t rows, int box) {
    if (status != cudaSuccess) return;
    if constexpr (kPacked) {
      status = make_map(to, in_sequences(x, rows, kDim), rows + 1, heads, rows, kDim, box);
    } else {
      status = make_map(to, x, size.batch, heads, seq, kDim, box);
    }
  };
  map(&launch.q, f.a.q, size.heads, size.seq_q, packed.rows_q, S::kQueries);
  map(&launch.k, f.a.k, size.kv_heads, size.seq_k, packed.rows_k, kKeys);
  map(&launch.v, f.a.v, size.kv_heads, size.seq_k, packed.rows_k, kKeys);
  map(&launch.out, f.out, size.heads, size.seq_q, packed.rows_q, kGroupRows);
  if (status != cudaSuccess) return status;
  const int64_t processors = attribute(cudaDevAttrMultiProcessorCount);
  const auto kernel =
      kPacked ? packed_hopper_kernel<T, kDim, kKeys> : hopper_kernel<T, kDim, kKeys>;
  return launch_clusters(kernel, std::min(heads * tiles, processors), 1, S::kThreads,
                         kSharedBytes<HopperShared<T, kDim, kKeys>>, stream, launch);
}

template <bool kPacked, typename T>
cudaError_t launch_for_width(const Forward<T>& f, const Packed& packed, cudaStream_t stream) {
  if (f.a.size.dim == 64) return launch_hopper<kPacked, T, 64, 128>(f, packed, stream);
  const bool limited = f.a.options.left >= 0 || f.a.options.right >= 0;
  return limited ? launch_hopper<kPacked, T, 128, 128>(f, packed, stream)
                 : launch_hopper<kPacked, T, 128, 160>(f, packed, stream);
}

}  // namespace

template <typename T>
bool is_for_hopper(const Forward<T>& f, const Packed& packed) {
  const Sizes& size = f.a.size;
  const bool fits = size.dim == size.v_dim && (size.dim == 64 || size.dim == 128);
  const auto has = [&](const auto& x, int heads, int seq, int64_t rows) {
    return packed.ends_q ? has_packed_map(x, heads, rows, size.dim)
                         : has_map(x, size.batch, heads, seq);
  };
  return fits && !is_scored(f.a) && has(f.a.q, size.heads, size.seq_q, packed.rows_q) &&
         has(f.a.k, size.kv_heads, size.seq_k, packed.rows_k) &&
         has(f.a.v, size.kv_heads, size.seq_k, packed.rows_k) &&
         has(f.out, size.heads, size.seq_q, packed.rows_q) &&
         attribute(cudaDevAttrComputeCapabilityMajor) == 9;
}

template <typename T>
cudaError_t hopper_forward(const Forward<T>& f, const Packed& packed, cudaStream_t stream) {
  return packed.ends_q ? launch_for_width<true>(f, packed, stream)
                       : launch_for_width<false>(f, packed, stream);
}

template bool is_for_hopper(const Forward<__half>&, const Packed&);
template bool is_for_hopper(const Forward<__nv_bfloat16>&, const Packed&);
template cudaError_t hopper_forward(const Forward<__half>&, const Packed&, cudaStream_t);
template cudaError_t hopper_forward(const Forward<__nv_bfloat16>&, const Packed&, cudaStream_t);

}  // namespace tilewise

#endif
