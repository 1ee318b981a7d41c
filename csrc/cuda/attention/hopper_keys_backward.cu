// dk and dv on Hopper, for what the forward pass takes there: a block has 128 keys, past which the
// queries stream that see them, of each head that shares these keys. Keys are the rows of all
// products, so that p and ds are operands from registers as they are; queries and dout are tiles
// that are read both along their rows and down their columns.
//
// The tensor cores have work while a consumer computes powers: the product with the queries of the
// tile before, and the values' with dout of this one. While it computes gradients they are the
// other consumer's.
#ifdef TILEWISE_HOPPER

#include "cuda/attention/hopper_backward.cuh"

namespace tilewise {
namespace {

constexpr int kKeys = kBackwardRows, kQueries = 64, kStages = kBackwardStages;

// Of a consumer's registers dk and dv, scores, their gradients and an operand take 64 + 64 + 32 +
// 32 + 16 for heads of 128, and 32 + 32 + 32 + 32 + 16 for heads of 64. Shared bytes of a block:
// 166912 and 84992. nvcc 13.0 has no spills and serialises no product.
//
// By count, not measured: the tensor cores need 1024 and 512 cycles for the four products of a
// consumer's tile, which keep shared memory busy for 768 and 384, and its powers 256.
template <typename T, int kDim>
struct Shared {
  Panels<T, kKeys, kDim> k, v;
  Panels<T, kQueries, kDim> q[kStages], dout[kStages];
  float statistics[kStages][kStatistics][kQueries];  // of the queries in q
  // Of each slot: what belongs in it has come; all consumers' warps are done with it.
  uint64_t k_full, v_full, q_full[kStages], dout_full[kStages], empty[kStages];

  __device__ void init() {
    constexpr int kWarps = kWarpgroup / kWarpSize;
    barrier_init(&k_full, 1), barrier_init(&v_full, 1);
    for (int i = 0; i < kStages; ++i) {
      barrier_init(&q_full[i], 2);  // statistics arrive by themselves
      barrier_init(&dout_full[i], 1);
      barrier_init(&empty[i], kBackwardConsumers * kWarps);
    }
    barrier_init_fence();
  }
};

template <typename T>
struct KeysLaunch {
  CUtensorMap q, k, v, dout, dk, dv;
  KeysBackward<T> b;
  Schedule schedule;
};

// A tile of keys, and the tiles of queries that see it.
struct Item {
  int batch, kv_head, key0;
  Reach queries;

  template <typename T>
  __device__ Item(const Attention<T>& a, Schedule::Place place)
      : batch(place.head / a.size.kv_heads),
        kv_head(place.head % a.size.kv_heads),
        key0(place.tile * kKeys),
        queries(key0, min(key0 + kKeys, a.size.seq_k) - 1, -ahead_of(a.size), a.options.right,
                a.options.left, a.size.seq_q, kQueries) {}
};

// Copy the statistics of the queries from query0 on of a head; those there are none of are 0, which
// makes their probabilities 0.
template <typename T>
__device__ void copy_statistics(float (&to)[kStatistics][kQueries], const KeysBackward<T>& b,
                                int64_t row, int query0) {
  const int lane = threadIdx.x % kWarpSize;
  float values[kStatistics * kQueries / kWarpSize];
#pragma unroll
  for (int i = 0; i < kStatistics * kQueries / kWarpSize; ++i) {
    const int place = i * kWarpSize + lane, query = query0 + place % kQueries;
    const float* from = b.statistics + place / kQueries * b.a.lines.count + row + query;
    values[i] = query < b.a.size.seq_q ? *from : 0.f;
  }
#pragma unroll
  for (int i = 0; i < kStatistics * kQueries / kWarpSize; ++i) {
    const int place = i * kWarpSize + lane;
    to[place / kQueries][place % kQueries] = values[i];
  }
}

// What the first warp does.
template <typename T, int kDim>
__device__ void produce(const KeysLaunch<T>& launch, Shared<T, kDim>& shared, const Item& item) {
  const int count = item.queries.count(), group = launch.b.a.group();
  const bool leads = threadIdx.x == 0;
  const uint64_t once = evict_first(), often = evict_last();
  if (count == 0) return;
  if (leads) {
    shared.k.load(launch.k, &shared.k_full, item.key0, item.kv_head, item.batch, once);
  }
  Turn<kStages> turn;
#pragma unroll 1
  for (int head = item.kv_head * group; head < (item.kv_head + 1) * group; ++head) {
    const int64_t row = launch.b.a.lines.of(item.batch, head);
#pragma unroll 1
    for (int n = 0; n < count; ++n) {
      const int query0 = turn_of(item.queries, n) * kQueries;
      uint64_t* full = &shared.q_full[turn.slot];
      barrier_wait(&shared.empty[turn.slot], turn.odd ^ 1);
      if (leads) {
        shared.q[turn.slot].load(launch.q, full, query0, head, item.batch, often);
        if (n == 0 && head == item.kv_head * group) {
          shared.v.load(launch.v, &shared.v_full, item.key0, item.kv_head, item.batch, once);
        }
        shared.dout[turn.slot].load(launch.dout, &shared.dout_full[turn.slot], query0, head,
                                    item.batch, often);
      }
      __syncwarp();
      copy_statistics(shared.statistics[turn.slot], launch.b, row, query0);
      __syncwarp();
      if (leads) barrier_arrive(full);
      turn.next();
    }
  }
}

// What a consumer does.
template <typename T, int kDim>
struct Work {
  const KeysLaunch<T>& launch;
  Shared<T, kDim>& shared;
  const Item& item;
  const int thread, own;  // own: where in the block's keys the consumer's begin
  Turn<kStages> turn = {};
  float dk[kDim / 2], dv[kDim / 2], s[kQueries / 2], ds[kQueries / 2];
  uint32_t operand[kQueries / kStepRows][4];

  __device__ Work(const KeysLaunch<T>& launch, Shared<T, kDim>& shared, const Item& item)
      : launch(launch),
        shared(shared),
        item(item),
        thread(threadIdx.x % kWarpgroup),
        own((threadIdx.x / kWarpgroup - 1) * kGroupRows) {}

  // Of the queries of sums i and i + 1, which are neighbours.
  __device__ float2 statistics(int which, int slot, int i) const {
    return *reinterpret_cast<const float2*>(
        &shared.statistics[slot][which][2 * i + 2 * (thread % 4)]);
  }

  // Products of a tile to probabilities.
  __device__ __forceinline__ void attend(int n, int slot) {
    const Attention<T>& a = launch.b.a;
    if (n < partial(item.queries)) {
      const int row = own + thread / kWarpSize * 16;
      hide_outside(reinterpret_cast<Fragments<1, kQueries / 8>&>(s),
                   Pairs<true>::of(turn_of(item.queries, n) * kQueries, item.key0, row),
                   ahead_of(a.size), a.options.left, a.options.right, a.size.seq_k);
    }
    const float factor = a.template factor<false>();
#pragma unroll
    for (int i = 0; i < kQueries / 2; i += 4) {
      const float2 highest = statistics(0, slot, i), part = statistics(1, slot, i);
#pragma unroll
      for (int e = i; e < i + 4; e += 2) {
        s[e] = exp2_approximate(s[e] * factor - highest.x) * part.x;
        s[e + 1] = exp2_approximate(s[e + 1] * factor - highest.y) * part.y;
      }
    }
  }

  __device__ __forceinline__ void differentiate(int slot) {
#pragma unroll
    for (int i = 0; i < kQueries / 2; i += 4) {
      const float2 delta = statistics(2, slot, i);
#pragma unroll
      for (int e = i; e < i + 4; e += 2) {
        ds[e] = s[e] * (ds[e] - delta.x);
        ds[e + 1] = s[e + 1] * (ds[e + 1] - delta.y);
      }
    }
  }

  __device__ __forceinline__ void start_scores() {
    barrier_wait(&shared.q_full[turn.slot], turn.odd);
    start_across(s, shared.k, own, shared.q[turn.slot]);
  }
  __device__ __forceinline__ void start_gradients() {
    barrier_wait(&shared.dout_full[turn.slot], turn.odd);
    start_across(ds, shared.v, own, shared.dout[turn.slot]);
  }

  // Tile n of a head, the `number`-th of all. Its scores have come; on their way are the product
  // with the queries of the tile before and then gradients. Once a tile nothing is: where products
  // overlap from tile to tile without an end, ptxas serialises them all.
  template <bool kMore>
  __device__ __forceinline__ void step(int n, int number) {
    const int slot = turn.slot, before = slot ? slot - 1 : kStages - 1;
    attend(n, slot);
    wgmma_wait<1>(s);  // the last queries' product is done, and its operand may change
    if (number > 0 && thread % kWarpSize == 0) barrier_arrive(&shared.empty[before]);
    round_sums<T>(operand, s);
    start_down(dv, operand, shared.dout[slot]);

    wgmma_wait<0>(ds);
    differentiate(slot);
    round_sums<T>(operand, ds);
    __syncwarp();  // all lanes have read their statistics
    turn.next();
    if constexpr (kMore) start_scores();
    start_down(dk, operand, shared.q[slot]);
    if constexpr (kMore) {
      start_gradients();
      wgmma_wait<2>(s);
    }
  }

  __device__ void run() {
#pragma unroll
    for (int i = 0; i < kDim / 2; ++i) dk[i] = dv[i] = 0.f;
    wgmma_wait<0>(dk, dv);  // zeros come before the first product, not beside it
    const int count = item.queries.count(), all = count * launch.b.a.group();
    if (all > 0) {
      barrier_wait(&shared.k_full, 0);
      start_scores();
      barrier_wait(&shared.v_full, 0);
      start_gradients();
      wgmma_wait<1>(s);
      int n = 0;
#pragma unroll 1
      for (int number = 0; number < all - 1; ++number) {
        step<true>(n, number);
        if (++n == count) n = 0;
      }
      step<false>(n, all - 1);
      wgmma_wait<0>(dk, dv);
    }
    end();
  }

  // By way of the keys and values, of which this consumer alone has had these rows.
  __device__ void end() {
    stage(shared.k, own, dk, launch.b.a.scale);
    stage(shared.v, own, dv, 1.f);
    fence_async();
    named_barrier_sync(1 + own / kGroupRows, kWarpgroup);
    const int to = item.key0 + own;
    if (thread > 0 || to >= launch.b.a.size.seq_k) return;
    store(launch.dk, shared.k, own, to, item.kv_head, item.batch);
    store(launch.dv, shared.v, own, to, item.kv_head, item.batch);
    bulk_commit();
    bulk_wait_read<0>();
  }
};

template <typename T, int kDim>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    hopper_keys_kernel(const __grid_constant__ KeysLaunch<T> launch) {
  auto& shared = shared_tiles<Shared<T, kDim>>();
  if (threadIdx.x == 0) {
    for (const CUtensorMap* map :
         {&launch.q, &launch.k, &launch.v, &launch.dout, &launch.dk, &launch.dv}) {
      tensor_map_prefetch(*map);
    }
    shared.init();
  }
  __syncthreads();
  const Item item(launch.b.a, launch.schedule.at(blockIdx.x));
  if (threadIdx.x < kWarpgroup) {
    registers_release<kProducerRegisters>();
    if (threadIdx.x < kWarpSize) produce(launch, shared, item);
  } else {
    registers_claim<kConsumerRegisters>();
    Work<T, kDim>(launch, shared, item).run();
  }
}

template <typename T, int kDim>
cudaError_t launch_keys(const KeysBackward<T>& b, cudaStream_t stream) {
  const Sizes& size = b.a.size;
  KeysLaunch<T> launch{};
  launch.b = b;
  cudaError_t status = cudaSuccess;
  const auto map = [&](CUtensorMap* map, const auto& x, int heads, int seq, int rows) {
    if (status == cudaSuccess) status = make_map(map, x, size.batch, heads, seq, kDim, rows);
  };
  map(&launch.q, b.a.q, size.heads, size.seq_q, kQueries);
  map(&launch.dout, b.dout, size.heads, size.seq_q, kQueries);
  map(&launch.k, b.a.k, size.kv_heads, size.seq_k, kKeys);
  map(&launch.v, b.a.v, size.kv_heads, size.seq_k, kKeys);
  map(&launch.dk, b.dk, size.kv_heads, size.seq_k, kGroupRows);
  map(&launch.dv, b.dv, size.kv_heads, size.seq_k, kGroupRows);
  if (status != cudaSuccess) return status;

  const int64_t heads = int64_t{size.batch} * size.kv_heads, tiles = tiles_of(size.seq_k, kKeys);
  if (heads * tiles > INT32_MAX) return cudaErrorInvalidConfiguration;
  const bool last_sees_most = b.a.options.left >= 0 && b.a.options.right < 0;
  const auto row_bytes = static_cast<int>(2 * sizeof(T) * kDim * b.a.group());
  launch.schedule = Schedule::of(static_cast<int>(heads), 1, static_cast<int>(tiles), size.seq_q,
                                 row_bytes, last_sees_most);
  return launch_clusters(hopper_keys_kernel<T, kDim>, heads * tiles, 1, kBackwardThreads,
                         kSharedBytes<Shared<T, kDim>>, stream, launch);
}

}  // namespace

template <typename T>
bool is_for_hopper(const KeysBackward<T>& b) {
  const Sizes& size = b.a.size;
  return is_for_hopper(b.a) && has_map(b.dout, size.batch, size.heads, size.seq_q) &&
         has_map(b.dk, size.batch, size.kv_heads, size.seq_k) &&
         has_map(b.dv, size.batch, size.kv_heads, size.seq_k);
}

template <typename T>
cudaError_t hopper_keys_backward(const KeysBackward<T>& b, cudaStream_t stream) {
  return b.a.size.dim == 64 ? launch_keys<T, 64>(b, stream) : launch_keys<T, 128>(b, stream);
}

template bool is_for_hopper(const KeysBackward<__half>&);
template bool is_for_hopper(const KeysBackward<__nv_bfloat16>&);
template cudaError_t hopper_keys_backward(const KeysBackward<__half>&, cudaStream_t);
template cudaError_t hopper_keys_backward(const KeysBackward<__nv_bfloat16>&, cudaStream_t);

}  // namespace tilewise

#endif
