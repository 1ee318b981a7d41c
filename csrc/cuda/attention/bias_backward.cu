// The gradient of a bias: a block has a tile of it, past which stream the queries, keys, values and
// gradients of every head of every batch that this tile was added to, and where the bias is the
// same for all queries, of every tile of these. They come some columns at a time, so that one
// kernel is for heads of all widths.
#include "cuda/attention/backward.cuh"

namespace tilewise {
namespace {

struct Shape {
  static constexpr int kTile = static_cast<int>(kBiasTile), kHalf = kTile / 2, kCols = 64;
  static constexpr int kDown = 2, kBuffers = 2;
};
// Each warp has the gradients of the scores of a quarter of the tile.
using Quarter = Fragments<Shape::kDown, Shape::kHalf / 8>;
static_assert(kAttentionWarps == 4 && Shape::kHalf == 16 * Shape::kDown);

inline __host__ __device__ int tiles_along(int size) {
  return (size + Shape::kTile - 1) / Shape::kTile;
}

// The gradient, [parts, batches, heads, queries, seq_k], with 1 of batches, heads or queries where
// the bias is the same for all. A part is the sum over some of what the bias was added to.
struct Bias {
  void* at;
  int batches, heads, queries;
  int64_t parts;
  bool single, wide;  // fp32; rows can be written 16 bytes at a time

  __host__ __device__ int64_t lines() const { return int64_t{batches} * heads; }
};

template <typename T>
struct Backward {
  Attention<T> a;
  Packed packed;
  Heads<const T> dout;
  const float* statistics;
  Bias bias;
};

// Which tile of the gradient a block has, and of which part.
struct Place {
  int key0, query_tile, batch, head;
  int64_t part, line;

  __device__ Place(const Bias& bias, int seq_k) {
    const int across = tiles_along(seq_k), down = tiles_along(bias.queries);
    const int64_t tiles = bias.lines() * down * across, tile = blockIdx.x % tiles;
    part = blockIdx.x / tiles;
    key0 = static_cast<int>(tile % across) * Shape::kTile;
    query_tile = static_cast<int>(tile / across % down);
    line = tile / across / down;
    batch = static_cast<int>(line / bias.heads);
    head = static_cast<int>(line % bias.heads);
  }
};

// Walks over what a tile was added to, a head and a tile of queries at a time; those that see none
// of its keys are passed over.
template <typename T>
struct Walk {
  const Backward<T>& b;
  const Place& place;
  const int head_end, tile_end;
  int64_t rest;  // of these, with the one it is at
  Block block;

  __device__ Walk(const Backward<T>& b, const Place& place)
      : b(b),
        place(place),
        head_end(b.bias.heads == 1 ? b.a.size.heads : place.head + 1),
        tile_end(b.bias.queries == 1 ? tiles_along(b.a.size.seq_q) : place.query_tile + 1),
        block(b.a.size, 0, 0, 0) {
    const int64_t heads = head_end - place.head, tiles = tile_end - place.query_tile;
    const int64_t all = (b.bias.batches == 1 ? b.a.size.batch : 1) * heads * tiles;
    const int64_t first = place.part * all / b.bias.parts;
    rest = (place.part + 1) * all / b.bias.parts - first;
    enter(place.batch + static_cast<int>(first / tiles / heads),
          place.head + static_cast<int>(first / tiles % heads),
          place.query_tile + static_cast<int>(first % tiles));
    pass();
  }

  __device__ void next() {
    step();
    pass();
  }

 private:
  __device__ void enter(int batch, int head, int tile) {
    if (rest == 0) return;
    block = Block(b.a.size, batch, head, tile);
    if (b.packed.ends_q) block.enter(b.a.size, b.packed);
  }

  __device__ void step() {
    int batch = block.batch, head = block.head, tile = block.tile + 1;
    if (tile == tile_end) tile = place.query_tile, ++head;
    if (head == head_end) head = place.head, ++batch;
    --rest;
    enter(batch, head, tile);
  }

  __device__ void pass() {
    while (rest > 0 && !sees()) step();
  }

  __device__ bool sees() const {
    const int last = min(place.key0 + Shape::kTile, block.seq_k) - 1;
    if (last < place.key0) return false;
    const Reach queries(place.key0, last, -block.ahead(), b.a.options.right, b.a.options.left,
                        block.seq_q, Shape::kTile);
    return queries.first <= block.tile && block.tile < queries.last;
  }
};

// What is multiplied at a time: some columns of q and k, or of dout and v. With the last of them
// the statistics are beside the rows of queries.
template <typename T>
struct Factors {
  Tile<T, Shape::kTile, Shape::kCols> queries;
  Tile<T, Shape::kHalf, Shape::kCols> keys[2];
};

template <typename T>
struct Shared {
  Factors<T> factors[Shape::kBuffers];
};

// Fetches one after the other all that is multiplied. Keys that are hidden from all queries come as
// they are: what they hold is in their own columns alone, which become 0.
template <typename T>
struct Stream {
  const Backward<T>& b;
  Walk<T> walk;
  const int past_scores = (b.a.size.dim + Shape::kCols - 1) / Shape::kCols * Shape::kCols;
  int col = 0;  // of q and k, and past them of dout and v

  __device__ void next(Factors<T>& to) {
    if (walk.rest > 0) {
      const Attention<T>& a = b.a;
      const Block& block = walk.block;
      const bool of_scores = col < a.size.dim;
      const int skipped = of_scores ? col : col - past_scores;
      const int cols = (of_scores ? a.size.dim : a.size.v_dim) - skipped;
      const Heads<const T> x = of_scores ? a.q : b.dout, y = of_scores ? a.k : a.v;
      const T* down = x.of(block.first_q, block.head) + skipped;
      const T* across = y.of(block.first_k, block.head / a.group()) + skipped;
      const int query0 = block.tile * Shape::kTile;
      fetch<false>(to.queries, down, x.row, query0, block.seq_q, cols, a.wide);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        fetch<false>(to.keys[half], across, y.row, walk.place.key0 + half * Shape::kHalf,
                     block.seq_k, cols, a.wide);
      }
      col += Shape::kCols;
      if (!of_scores && cols <= Shape::kCols) {
        fetch_statistics(to.queries, Shape::kTile, b.statistics, a.lines.count,
                         a.lines.of(block.first_q, block.head), query0, block.seq_q);
        col = 0;
        walk.next();
      }
    }
    copy_async_commit();
  }
};

// What a warp does.
template <typename T>
struct Work {
  const Backward<T>& b;
  const Place& place;
  Shared<T>& shared;
  const int warp = threadIdx.x / kWarpSize, row = warp / 2 * Shape::kHalf, half = warp % 2;
  const int key = place.key0 + half * Shape::kHalf;
  Quarter sums = {};

  __device__ void multiply(Quarter& s, Factors<T>& factors, int cols) {
    add_across<T>(
        s, factors.keys[half],
        [&](uint32_t(&a)[4], int m, int k) { load_rows(a, factors.queries, row + 16 * m, 16 * k); },
        cols);
  }

  __device__ void add(Quarter& s, Quarter& ds, const Block& block, Factors<T>& last) {
    const Scores<T> scores(b.a, block, block.head);
    const Kept kept(b.a.options.dropout, block.index, b.a.size.seq_q);
    const auto pairs = Pairs<false>::of(block.tile * Shape::kTile, key, row);
    differentiate<true, true, false>(
        s, ds, scores, kept, pairs, false, [&](int m, int, int e) -> Statistics {
          const int r = row + 16 * m + 8 * (e / 2) + threadIdx.x % kWarpSize / 4;
          const float4 of = last.queries.beside(r);
          return {of.x, of.y, of.z};
        });
#pragma unroll
    for (int i = 0; i < Shape::kDown * Shape::kHalf / 2; ++i) {
      const int m = i / (Shape::kHalf / 2), n = i / 4 % (Shape::kHalf / 8), e = i % 4;
      sums[m][n][e] += ds[m][n][e];
    }
  }

  // Nobody may have use for what is in shared memory.
  __device__ void put() {
    const Bias& bias = b.bias;
    const int64_t seq_k = b.a.size.seq_k;
    const int64_t start = (place.part * bias.lines() + place.line) * bias.queries * seq_k;
    const int query0 = place.query_tile * Shape::kTile;
    if (bias.queries == 1) {
      put_row(start);
    } else if (bias.single) {
      float* to = static_cast<float*>(bias.at) + start;
      for_pairs(sums, Pairs<false>::of(query0, key, row), [&](float sum, int query, int at) {
        if (query < bias.queries && at < seq_k) to[query * seq_k + at] = sum;
      });
    } else {
      constexpr int kHalf = Shape::kHalf;
      auto& tile = reinterpret_cast<Tile<T, kAttentionWarps * kHalf, kHalf>&>(shared);
      put_rows<false>(static_cast<T*>(bias.at) + start + key, seq_k, sums, tile, warp * kHalf,
                      query0 + row - warp * kHalf, bias.queries, static_cast<int>(seq_k) - key,
                      bias.wide);
    }
  }

  // The sum over the queries.
  __device__ void put_row(int64_t start) {
    auto& halves = reinterpret_cast<float(&)[2][Shape::kTile]>(shared);
    const int lane = threadIdx.x % kWarpSize, at = threadIdx.x;
#pragma unroll
    for (int i = 0; i < Shape::kHalf / 4; ++i) {
      const int n = i / 2, e = i % 2;
      float sum = (sums[0][n][e] + sums[0][n][e + 2]) + (sums[1][n][e] + sums[1][n][e + 2]);
#pragma unroll
      for (int other = 4; other < kWarpSize; other *= 2) {
        sum += __shfl_xor_sync(0xffffffff, sum, other);
      }
      if (lane < 4) halves[warp / 2][half * Shape::kHalf + 8 * n + 2 * lane + e] = sum;
    }
    __syncthreads();
    if (at >= Shape::kTile || place.key0 + at >= b.a.size.seq_k) return;
    const float sum = halves[0][at] + halves[1][at];
    if (b.bias.single) {
      static_cast<float*>(b.bias.at)[start + place.key0 + at] = sum;
    } else {
      static_cast<T*>(b.bias.at)[start + place.key0 + at] = from_float<T>(sum);
    }
  }
};

// Registers, compiled for sm_80, 90a, 100a and 120a: 252, 243, 230, 234. Shared bytes: 36864.
template <typename T>
__global__ void __launch_bounds__(kAttentionThreads, kMinBlocks)
    bias_backward_kernel(const Backward<T> b) {
  auto& shared = *reinterpret_cast<Shared<T>*>(dynamic_shared());
  const Place place(b.bias, b.a.size.seq_k);
  Walk<T> walk(b, place);
  Stream<T> stream{b, walk};
  Work<T> work{b, place, shared};
  int buffer = 0;
  const auto multiply = [&](Quarter& s, int cols) {
#pragma unroll 1
    for (; cols > 0; cols -= Shape::kCols) {
      copy_async_wait<0>();
      __syncthreads();  // the columns are there, and nobody reads those before any more
      stream.next(shared.factors[buffer ^ 1]);
      work.multiply(s, shared.factors[buffer], cols);
      buffer ^= 1;
    }
  };
  stream.next(shared.factors[0]);
#pragma unroll 1
  for (; walk.rest > 0; walk.next()) {
    Quarter s = {}, ds = {};
    multiply(s, b.a.size.dim);
    multiply(ds, b.a.size.v_dim);
    work.add(s, ds, walk.block, shared.factors[buffer ^ 1]);
  }
  __syncthreads();
  work.put();
}

}  // namespace

cudaError_t attention_bias_backward(
    void* dbias, const void* dout, const float* statistics, const void* q, const void* k,
    const void* v, const uint8_t* mask, const void* bias, const float* slopes, const void* sinks,
    const int32_t* ends_q, const int32_t* ends_k, int64_t batch, int64_t heads, int64_t kv_heads,
    int64_t seq_q, int64_t seq_k, int64_t dim, int64_t v_dim, int64_t rows_q, int64_t rows_k,
    int64_t dout_batch, int64_t dout_head, int64_t dout_row, int64_t q_batch, int64_t q_head,
    int64_t q_row, int64_t k_batch, int64_t k_head, int64_t k_row, int64_t v_batch, int64_t v_head,
    int64_t v_row, int64_t mask_batch, int64_t mask_head, int64_t mask_query, int64_t mask_key,
    int64_t bias_batch, int64_t bias_head, int64_t bias_query, int64_t bias_key,
    int64_t slopes_batch, int64_t slopes_head, int64_t left, int64_t right, float softcap,
    float scale, int64_t threshold, float kept_scale, const int64_t* seeds, const int64_t* offsets,
    int64_t seed_stride, int64_t offset_stride, int64_t seed, int64_t offset, int64_t bias_batches,
    int64_t bias_heads, int64_t bias_queries, int64_t parts, DType dtype, DType bias_dtype,
    DType sinks_dtype, cudaStream_t stream) {
  const Options options{
      mask,
      {mask_batch, mask_head, mask_query, mask_key},
      bias,
      {bias_batch, bias_head, bias_query, bias_key},
      slopes,
      slopes_batch,
      slopes_head,
      sinks,
      bias_dtype == DType::f32,
      sinks_dtype == DType::f32,
      limit_of(left),
      limit_of(right),
      softcap,
      {threshold, kept_scale, seeds, offsets, seed_stride, offset_stride, seed, offset}};
  const Packed packed{ends_q, ends_k, rows_q, rows_k};
  const auto is_of = [](int64_t size, int64_t whole) { return size == 1 || size == whole; };
  Sizes size;
  if (!are_like(dtype, bias_dtype, sinks_dtype) ||
      !sizes_of(size, batch, heads, kv_heads, seq_q, seq_k, dim, v_dim) || parts < 1 ||
      !is_of(bias_batches, batch) || !is_of(bias_heads, heads) || !is_of(bias_queries, seq_q)) {
    return cudaErrorInvalidValue;
  }
  const bool wide =
      can_vectorise<8>(addresses(dout, q, k, v), dim, v_dim, dout_batch, dout_head, dout_row,
                       q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row);
  const Bias of{dbias,
                static_cast<int>(bias_batches),
                static_cast<int>(bias_heads),
                static_cast<int>(bias_queries),
                parts,
                parts > 1 || bias_dtype == DType::f32,
                can_vectorise<8>(addresses(dbias), seq_k)};
  return for_half(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const Backward<T> b{{{static_cast<const T*>(q), q_batch, q_head, q_row},
                         {static_cast<const T*>(k), k_batch, k_head, k_row},
                         {static_cast<const T*>(v), v_batch, v_head, v_row},
                         size,
                         lines_of(size, packed),
                         options,
                         scale,
                         wide},
                        packed,
                        {static_cast<const T*>(dout), dout_batch, dout_head, dout_row},
                        statistics,
                        of};
    const int64_t tiles = int64_t{tiles_along(of.queries)} * tiles_along(size.seq_k);
    return launch_tiles(bias_backward_kernel<T>, of.lines() * parts, tiles,
                        int64_t{sizeof(Shared<T>)}, stream, b);
  });
}

}  // namespace tilewise
