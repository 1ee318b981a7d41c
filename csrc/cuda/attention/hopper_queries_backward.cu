// dq on Hopper, for what the forward pass takes there, and before it the statistics that the kernel
// of dk and dv reads: a block has 128 queries, past which the keys and values stream that they see.
//
// The tensor cores have work while a consumer computes powers: the product with the keys of the
// tile before, and dout's with the values of this one. While it computes gradients they are the
// other consumer's.
#ifdef TILEWISE_HOPPER

#include "cuda/attention/hopper_backward.cuh"

namespace tilewise {
namespace {

constexpr int kQueries = kBackwardRows, kStages = kBackwardStages;

// Of a consumer's registers dq, scores, their gradients and these as an operand take 64 + 48 + 48 +
// 24 for heads of 128, and for heads of 64 32 + 64 + 64 + 32. Shared bytes of a block: 214016 and
// 132096. nvcc 13.0 has no spills and serialises no product.
//
// By count, not measured: the tensor cores need 1152 and 768 cycles for the three products of a
// consumer's tile, which keep shared memory busy for 832 and 512, and its powers 384 and 512.
template <int kDim>
constexpr int kKeys = kDim == 64 ? 128 : 96;

template <typename T, int kDim>
struct Shared {
  Panels<T, kQueries, kDim> q, dout;
  Panels<T, kKeys<kDim>, kDim> k[kStages], v[kStages];
  float delta[kQueries];
  // Of each slot: its bytes have come; all consumers are done with it.
  uint64_t q_full, dout_full, k_full[kStages], v_full[kStages], empty[kStages];

  __device__ void init() {
    barrier_init(&q_full, 1), barrier_init(&dout_full, 1);
    for (int i = 0; i < kStages; ++i) {
      barrier_init(&k_full[i], 1), barrier_init(&v_full[i], 1);
      barrier_init(&empty[i], kBackwardConsumers);
    }
    barrier_init_fence();
  }
};

template <typename T>
struct QueriesLaunch {
  CUtensorMap q, k, v, dout, dq;
  QueriesBackward<T> b;
  Schedule schedule;
};

// A tile of queries, and the tiles of keys that it sees: none if nobody asks for dq.
template <int kDim>
struct Queries {
  int index, batch, head, kv_head, query0, count;
  Reach keys;

  template <typename T>
  __device__ Queries(const QueriesBackward<T>& b, Schedule::Place place)
      : index(place.head),
        batch(place.head / b.a.size.heads),
        head(place.head % b.a.size.heads),
        kv_head(head / b.a.group()),
        query0(place.tile * kQueries),
        keys(query0, min(query0 + kQueries, b.a.size.seq_q) - 1, ahead_of(b.a.size),
             b.a.options.left, b.a.options.right, b.a.size.seq_k, kKeys<kDim>) {
    count = b.dq.at ? keys.count() : 0;
  }
};

// What the first thread does.
template <typename T, int kDim>
__device__ void produce(const QueriesLaunch<T>& launch, Shared<T, kDim>& shared,
                        const Queries<kDim>& block) {
  if (block.count == 0) return;
  const uint64_t once = evict_first(), often = evict_last();
  shared.q.load(launch.q, &shared.q_full, block.query0, block.head, block.batch, once);
  Turn<kStages> turn;
#pragma unroll 1
  for (int n = 0; n < block.count; ++n) {
    const int key0 = turn_of(block.keys, n) * kKeys<kDim>;
    barrier_wait(&shared.empty[turn.slot], turn.odd ^ 1);
    shared.k[turn.slot].load(launch.k, &shared.k_full[turn.slot], key0, block.kv_head, block.batch,
                             often);
    if (n == 0) {
      shared.dout.load(launch.dout, &shared.dout_full, block.query0, block.head, block.batch, once);
    }
    shared.v[turn.slot].load(launch.v, &shared.v_full[turn.slot], key0, block.kv_head, block.batch,
                             often);
    turn.next();
  }
}

// What a consumer does.
template <typename T, int kDim>
struct Work {
  static constexpr int kCols = kKeys<kDim>;

  const QueriesLaunch<T>& launch;
  Shared<T, kDim>& shared;
  const Queries<kDim>& block;
  const int thread, own, row;  // own: where in the block the consumer begins; row: its warp
  Turn<kStages> turn = {};
  Statistics rows[2];
  float dq[kDim / 2], s[kCols / 2], ds[kCols / 2];
  uint32_t operand[kCols / kStepRows][4];

  __device__ Work(const QueriesLaunch<T>& launch, Shared<T, kDim>& shared,
                  const Queries<kDim>& block)
      : launch(launch),
        shared(shared),
        block(block),
        thread(threadIdx.x % kWarpgroup),
        own((threadIdx.x / kWarpgroup - 1) * kGroupRows),
        row(own + thread / kWarpSize * 16) {}

  // sum(dout out), by as many lanes a row as it has accesses.
  __device__ void multiply_outputs() {
    constexpr int kWidth = kVector<T>, kLanes = kDim / kWidth, kRows = kWarpSize / kLanes;
    const QueriesBackward<T>& b = launch.b;
    const int lane = thread % kWarpSize, col = lane % kLanes * kWidth;
    const T* out = b.out.of(block.batch, block.head);
    const T* dout = b.dout.of(block.batch, block.head);
#pragma unroll
    for (int i = 0; i < 16; i += kRows) {
      const int r = row + i + lane / kLanes, query = block.query0 + r;
      float sum = 0.f;
      if (query < b.a.size.seq_q) {
        float ys[kWidth], dys[kWidth];
        load(ys, out + query * b.out.row + col);
        load(dys, dout + query * b.dout.row + col);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) sum += ys[j] * dys[j];
      }
#pragma unroll
      for (int other = kLanes / 2; other > 0; other /= 2) {
        sum += __shfl_xor_sync(0xffffffff, sum, other);
      }
      if (lane % kLanes == 0) shared.delta[r] = sum;
    }
    __syncwarp();
  }

  __device__ void begin() {
    const QueriesBackward<T>& b = launch.b;
    multiply_outputs();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int r = row + 8 * i + thread % kWarpSize / 4, query = block.query0 + r;
      Statistics& mine = rows[i];
      mine = {0.f, 0.f, 0.f};
      if (query >= b.a.size.seq_q) continue;
      const int64_t place = static_cast<int64_t>(block.index) * b.a.size.seq_q + query;
      const float total = b.total[place];
      if (total != 0.f) {
        const float dlse = b.dlse ? b.dlse[place] : 0.f;
        mine = {b.highest[place], 1.f / total, shared.delta[r] - dlse};
      }
      if (thread % 4 != 0) continue;
      b.statistics[place] = mine.highest;
      b.statistics[place + b.a.lines.count] = mine.part;
      b.statistics[place + 2 * b.a.lines.count] = mine.delta;
    }
  }

  // Products of tile n to probabilities.
  __device__ __forceinline__ void attend(int n) {
    const Attention<T>& a = launch.b.a;
    if (n < partial(block.keys)) {
      hide_outside(reinterpret_cast<Fragments<1, kCols / 8>&>(s),
                   Pairs<false>::of(block.query0, turn_of(block.keys, n) * kCols, row),
                   ahead_of(a.size), a.options.left, a.options.right, a.size.seq_k);
    }
    const float factor = a.template factor<false>();
#pragma unroll
    for (int i = 0; i < kCols / 2; ++i) {
      const Statistics& mine = rows[i / 2 % 2];
      s[i] = exp2_approximate(s[i] * factor - mine.highest) * mine.part;
    }
  }

  __device__ __forceinline__ void differentiate() {
#pragma unroll
    for (int i = 0; i < kCols / 2; ++i) ds[i] = s[i] * (ds[i] - rows[i / 2 % 2].delta);
  }

  __device__ __forceinline__ void start_scores() {
    barrier_wait(&shared.k_full[turn.slot], turn.odd);
    start_across(s, shared.q, own, shared.k[turn.slot]);
  }
  __device__ __forceinline__ void start_gradients() {
    barrier_wait(&shared.v_full[turn.slot], turn.odd);
    start_across(ds, shared.dout, own, shared.v[turn.slot]);
  }

  // Tile n. Its scores have come; on their way are the product with the keys of the tile before and
  // then gradients. As for dk and dv, there is a moment when nothing is.
  template <bool kMore>
  __device__ __forceinline__ void step(int n) {
    const int slot = turn.slot, before = slot ? slot - 1 : kStages - 1;
    attend(n);
    wgmma_wait<0>(ds);
    if (n > 0 && thread == 0) barrier_arrive(&shared.empty[before]);
    differentiate();
    round_sums<T>(operand, ds);
    turn.next();
    if constexpr (kMore) start_scores();
    start_down(dq, operand, shared.k[slot]);
    if constexpr (kMore) {
      start_gradients();
      wgmma_wait<2>(s);
    }
  }

  __device__ void run() {
    begin();
    if (!launch.b.dq.at) return;
#pragma unroll
    for (int i = 0; i < kDim / 2; ++i) dq[i] = 0.f;
    wgmma_wait<0>(dq);  // zeros come before the first product, not beside it
    if (block.count > 0) {
      barrier_wait(&shared.q_full, 0);
      start_scores();
      barrier_wait(&shared.dout_full, 0);
      start_gradients();
      wgmma_wait<1>(s);
#pragma unroll 1
      for (int n = 0; n < block.count - 1; ++n) step<true>(n);
      step<false>(block.count - 1);
      wgmma_wait<0>(dq);
    }
    end();
  }

  // By way of the queries, of which this consumer alone has had these rows.
  __device__ void end() {
    stage(shared.q, own, dq, launch.b.a.scale);
    fence_async();
    named_barrier_sync(1 + own / kGroupRows, kWarpgroup);
    const int to = block.query0 + own;
    if (thread > 0 || to >= launch.b.a.size.seq_q) return;
    store(launch.dq, shared.q, own, to, block.head, block.batch);
    bulk_commit();
    bulk_wait_read<0>();
  }
};

template <typename T, int kDim>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    hopper_queries_kernel(const __grid_constant__ QueriesLaunch<T> launch) {
  auto& shared = shared_tiles<Shared<T, kDim>>();
  if (threadIdx.x == 0) {
    if (launch.b.dq.at) {
      for (const CUtensorMap* map : {&launch.q, &launch.k, &launch.v, &launch.dout, &launch.dq}) {
        tensor_map_prefetch(*map);
      }
    }
    shared.init();
  }
  __syncthreads();
  const Queries<kDim> block(launch.b, launch.schedule.at(blockIdx.x));
  if (threadIdx.x < kWarpgroup) {
    registers_release<kProducerRegisters>();
    if (threadIdx.x == 0) produce(launch, shared, block);
  } else {
    registers_claim<kConsumerRegisters>();
    Work<T, kDim>(launch, shared, block).run();
  }
}

template <typename T, int kDim>
cudaError_t launch_queries(const QueriesBackward<T>& b, cudaStream_t stream) {
  const Sizes& size = b.a.size;
  QueriesLaunch<T> launch{};
  launch.b = b;
  cudaError_t status = cudaSuccess;
  const auto map = [&](CUtensorMap* map, const auto& x, int heads, int seq, int rows) {
    if (status == cudaSuccess) status = make_map(map, x, size.batch, heads, seq, kDim, rows);
  };
  if (b.dq.at) {
    map(&launch.q, b.a.q, size.heads, size.seq_q, kQueries);
    map(&launch.dout, b.dout, size.heads, size.seq_q, kQueries);
    map(&launch.k, b.a.k, size.kv_heads, size.seq_k, kKeys<kDim>);
    map(&launch.v, b.a.v, size.kv_heads, size.seq_k, kKeys<kDim>);
    map(&launch.dq, b.dq, size.heads, size.seq_q, kGroupRows);
  }
  if (status != cudaSuccess) return status;

  const int64_t heads = int64_t{size.batch} * size.heads, tiles = tiles_of(size.seq_q, kQueries);
  if (heads * tiles > INT32_MAX) return cudaErrorInvalidConfiguration;
  launch.schedule = Schedule::of(size.batch * size.kv_heads, b.a.group(), static_cast<int>(tiles),
                                 size.seq_k, 2 * sizeof(T) * kDim, b.a.options.right >= 0);
  return launch_clusters(hopper_queries_kernel<T, kDim>, heads * tiles, 1, kBackwardThreads,
                         kSharedBytes<Shared<T, kDim>>, stream, launch);
}

}  // namespace

template <typename T>
bool is_for_hopper(const QueriesBackward<T>& b) {
  const Sizes& size = b.a.size;
  return is_for_hopper(b.a) && has_map(b.dout, size.batch, size.heads, size.seq_q) &&
         (!b.dq.at || has_map(b.dq, size.batch, size.heads, size.seq_q));
}

template <typename T>
cudaError_t hopper_queries_backward(const QueriesBackward<T>& b, cudaStream_t stream) {
  return b.a.size.dim == 64 ? launch_queries<T, 64>(b, stream) : launch_queries<T, 128>(b, stream);
}

template bool is_for_hopper(const QueriesBackward<__half>&);
template bool is_for_hopper(const QueriesBackward<__nv_bfloat16>&);
template cudaError_t hopper_queries_backward(const QueriesBackward<__half>&, cudaStream_t);
template cudaError_t hopper_queries_backward(const QueriesBackward<__nv_bfloat16>&, cudaStream_t);

}  // namespace tilewise

#endif
