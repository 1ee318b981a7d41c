// What a launch of attention is about: where its tensors lie, and what becomes of the scores.
#pragma once

#include "cuda/cluster_launch.cuh"
#include "cuda/dropout.cuh"
#include "cuda/scores.cuh"

namespace tilewise {

constexpr int kAttentionWarps = 4;
constexpr int kAttentionThreads = kAttentionWarps * kWarpSize;
constexpr int64_t kMostPositions = int64_t{1} << 29;  // sums of a few of them are ints
constexpr float kLog2E = 1.4426950408889634f;

// A [batch, heads, seq, dim] whose rows are each in one piece.
template <typename T>
struct Heads {
  T* at;
  int64_t batch, head, row;

  __device__ T* of(int64_t b, int64_t h) const { return at + b * batch + h * head; }
};

// What is added to the scores and what hides them: each may be missing. dtype of the bias and of
// the sinks: that of q, or fp32.
struct Options {
  const uint8_t* mask;
  Strides mask_strides;
  const void* bias;
  Strides bias_strides;
  const float* slopes;
  int64_t slopes_batch, slopes_head;
  const void* sinks;
  bool bias_single, sinks_single;
  int left, right;  // of what a query sees beside its own place; -1 is all
  float softcap;
  Dropout dropout;
};

struct Sizes {
  int batch, heads, kv_heads, seq_q, seq_k, dim, v_dim;
};

// Where sequences that are packed one after the other begin and end, among so many rows. Without
// ends none are packed.
struct Packed {
  const int32_t *ends_q, *ends_k;
  int64_t rows_q, rows_k;
};

// The rows of one of them, of which no more than `longest` count. Wrong ends lead to no other rows
// than there are.
struct Sequence {
  int first, count;

  __device__ Sequence(const int32_t* ends, int64_t rows, int number, int longest) {
    const int64_t begin = ends[number], end = min(int64_t{ends[number + 1]}, rows);
    const bool there = begin >= 0 && begin < end;
    first = there ? static_cast<int>(begin) : 0;
    count = there ? static_cast<int>(min(end - begin, int64_t{longest})) : 0;
  }
};

// Of numbers that are [batch, heads, seq_q], how far apart batches and heads are, and how many
// there are; of packed sequences they are [heads, rows_q], and a step of the batch is a row.
struct Lines {
  int64_t batch, head, count;

  __device__ int64_t of(int64_t b, int64_t h) const { return b * batch + h * head; }
};

// The forward pass takes 1 / (1 - p) of dropout to the end.
template <typename T>
struct Attention {
  Heads<const T> q, k, v;
  Sizes size;
  Lines lines;
  Options options;
  float scale;
  bool wide;  // all rows can be moved 16 bytes at a time

  // What scores, or products that are not scaled yet, are multiplied by to be in units of log 2.
  template <bool kScored>
  __device__ float factor() const {
    return kScored ? kLog2E : scale * kLog2E;
  }
  __device__ int group() const { return size.heads / size.kv_heads; }
};

// Which head a block works on, which of its tiles, and how long the sequences are. first_q and
// first_k are what the strides of batches take: the batch, or the first row of a packed sequence,
// as these are the strides of rows then.
struct Block {
  int64_t index;  // batch * heads + head
  int batch, head, tile, first_q, first_k, seq_q, seq_k;

  __device__ Block(const Sizes& size, int heads) : seq_q(size.seq_q), seq_k(size.seq_k) {
    const unsigned all = static_cast<unsigned>(size.batch) * heads;
    const unsigned which = blockIdx.x % all;
    index = which;
    tile = blockIdx.x / all;
    batch = first_q = first_k = which / heads;
    head = which % heads;
  }

  __device__ Block(const Sizes& size, int heads, const Packed& packed) : Block(size, heads) {
    enter(size, packed);
  }

  // The head of queries and the tile that are said.
  __device__ Block(const Sizes& size, int batch, int head, int tile)
      : index(int64_t{batch} * size.heads + head),
        batch(batch),
        head(head),
        tile(tile),
        first_q(batch),
        first_k(batch),
        seq_q(size.seq_q),
        seq_k(size.seq_k) {}

  // Take the sequence with the batch's number.
  __device__ void enter(const Sizes& size, const Packed& packed) {
    const Sequence q(packed.ends_q, packed.rows_q, batch, size.seq_q);
    const Sequence k(packed.ends_k, packed.rows_k, batch, size.seq_k);
    first_q = q.first, first_k = k.first, seq_q = q.count, seq_k = k.count;
  }

  // How far the place of a query among the keys is from its own number.
  __device__ int ahead() const { return seq_k - seq_q; }

  // Take the last of so many tiles first, or the first. Returns whether there is one left: a packed
  // sequence may have less than the longest.
  __device__ bool take(int tiles, bool last_first) {
    if (tile >= tiles) return false;
    if (last_first) tile = tiles - 1 - tile;
    return true;
  }
};

// The tiles, of `tile` positions each, of the other side that [from, to] see, `to` included; those
// that all of these see whole come first.
struct Reach {
  int first, whole_begin, whole_end, last;

  __device__ Reach(int from, int to, int ahead, int left, int right, int size, int tile) {
    const int begin = left < 0 ? 0 : max(0, from + ahead - left);
    const int end = right < 0 ? size : min(size, to + ahead + right + 1);
    first = begin / tile;
    last = end > begin ? (end + tile - 1) / tile : first;
    const int all_begin = left < 0 ? 0 : max(0, to + ahead - left);
    const int all_end = right < 0 ? size : max(0, min(size, from + ahead + right + 1));
    whole_begin = min((all_begin + tile - 1) / tile, last);
    whole_end = max(whole_begin, min(all_end / tile, last));
  }

  __device__ int count() const { return last - first; }
  __device__ int whole() const { return whole_end - whole_begin; }

  // The n-th tile in this order.
  __device__ int at(int n) const {
    if (n < whole()) return whole_begin + n;
    const int before = first + n - whole();
    return before < whole_begin ? before : before + whole();
  }
};

// --- Of launches.

inline int64_t tiles_of(int64_t size, int tile) { return (size + tile - 1) / tile; }

// A side of the window, as an int that counts as much.
inline int limit_of(int64_t side) {
  return side < 0 ? -1 : static_cast<int>(std::min(side, kMostPositions));
}

inline bool are_like(DType dtype, DType bias_dtype, DType sinks_dtype) {
  const auto is_like = [&](DType other) { return other == dtype || other == DType::f32; };
  return is_like(bias_dtype) && is_like(sinks_dtype);
}

// The sizes, if there is a kernel for them.
inline bool sizes_of(Sizes& size, int64_t batch, int64_t heads, int64_t kv_heads, int64_t seq_q,
                     int64_t seq_k, int64_t dim, int64_t v_dim) {
  for (const int64_t n : {batch, heads, kv_heads, seq_q, seq_k, dim, v_dim}) {
    if (n <= 0 || n > kMostPositions) return false;
  }
  size = {static_cast<int>(batch), static_cast<int>(heads), static_cast<int>(kv_heads),
          static_cast<int>(seq_q), static_cast<int>(seq_k), static_cast<int>(dim),
          static_cast<int>(v_dim)};
  return heads % kv_heads == 0;
}

inline Lines lines_of(const Sizes& size, const Packed& packed) {
  const int64_t heads = size.heads, seq_q = size.seq_q;
  if (packed.ends_q) return {1, packed.rows_q, heads * packed.rows_q};
  return {heads * seq_q, seq_q, size.batch * heads * seq_q};
}

// Whether scores are more than products times a positive scale, or rows are moved by elements.
template <typename T>
bool is_scored(const Attention<T>& a) {
  const Options& o = a.options;
  const bool asked = o.mask || o.bias || o.slopes || o.sinks || o.softcap != 0.f;
  return asked || o.dropout.threshold != 0 || !(a.scale > 0.f) || !a.wide;
}

// What heads of q and k are padded to, and those of v, which are no wider.
template <int kOfKeys, int kOfValues>
struct Widths {
  static_assert(kOfValues <= kOfKeys);
  static constexpr int kDim = kOfKeys, kVDim = kOfValues;
};

// Call body with the widths that heads are padded to, and with `scored`, as constants.
template <typename Body>
cudaError_t for_widths(const Sizes& size, bool scored, Body body) {
  const auto with = [&](auto widths) {
    return scored ? body(widths, std::true_type{}) : body(widths, std::false_type{});
  };
  const int wider = std::max(size.dim, size.v_dim);
  if (wider <= 32) return with(Widths<32, 32>{});
  if (wider <= 64) return with(Widths<64, 64>{});
  if (wider <= 96) return with(Widths<96, 96>{});
  if (wider <= 128) return with(Widths<128, 128>{});
  if (wider <= 192 && size.v_dim <= 128) return with(Widths<192, 128>{});
  if (wider <= 256) return with(Widths<256, 256>{});
  return cudaErrorInvalidValue;
}

// Launch a block for each tile of each head.
template <typename... Given>
cudaError_t launch_tiles(void (*kernel)(Given...), int64_t heads, int64_t tiles, int64_t shared,
                         cudaStream_t stream, const Given&... given) {
  if (heads * tiles > INT32_MAX) return cudaErrorInvalidConfiguration;
  return launch_clusters(kernel, heads * tiles, 1, kAttentionThreads, shared, stream, given...);
}

}  // namespace tilewise
