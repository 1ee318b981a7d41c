// Decoding from caches in one piece and in pages, and appending to them.
#include <algorithm>
#include <cmath>

#include "selftest/selftest.h"

namespace tilewise::selftest {
namespace {

constexpr int kNone = -1;

struct Case {
  std::vector<int32_t> lengths;
  int64_t heads, kv_heads, seq, dim, v_dim, capacity;
  int64_t page_size;  // 0: no pages
  int64_t left;
  bool all;  // with slopes, a cap and sinks
  int64_t gap;

  int64_t batch() const { return static_cast<int64_t>(lengths.size()); }
  int64_t queries() const { return batch() * heads * seq; }
  int64_t half() const { return dim / 4; }  // pairs that are turned
  // Those that the tables have: not of the last token of the longest.
  int64_t positions() const { return *std::max_element(lengths.begin(), lengths.end()) - 1; }
  float scale() const { return (all ? -1.25f : 1.25f) / std::sqrt(static_cast<float>(dim)); }
  float softcap() const { return all ? 2.5f : 0.f; }
};

const Case kCases[]{
    {{9, 2}, 2, 1, 2, 16, 16, 20, 4, kNone, false, 0},
    {{70, 3}, 2, 1, 1, 64, 64, 75, 0, kNone, false, 0},
    {{300, 0, 257}, 6, 2, 3, 32, 24, 310, 0, kNone, false, 8},  // a split of one key
    {{600, 5}, 2, 1, 16, 128, 128, 640, 16, kNone, false, 0},   // two tiles of rows
    {{530, 40}, 8, 2, 2, 40, 33, 600, 1, 260, true, 1},         // no whole access
    {{300, 17}, 4, 4, 4, 192, 128, 512, 64, 30, true, 0},
    {{129}, 4, 2, 1, 256, 256, 256, 256, kNone, true, 8},
};

enum Input { kQ, kK, kV, kSlopes, kSinks, kNewK, kNewV, kCos, kSin };

// Which rows of a cache hold what.
class Rows {
 public:
  explicit Rows(const Case& c) : c_(c), most_((c.capacity + size() - 1) / size()) {
    if (!c.page_size) return;
    table.assign(static_cast<size_t>(c.batch() * most_), -1);
    for (int64_t b = 0; b < c.batch(); ++b) {
      for (int64_t i = 0; i * c.page_size < c.lengths[static_cast<size_t>(b)]; ++i) {
        const int64_t place = b * most_ + i;
        table[static_cast<size_t>(place)] = static_cast<int32_t>(pages() - 1 - place);
      }
    }
  }

  int64_t size() const { return c_.page_size ? c_.page_size : c_.capacity; }
  int64_t pages() const { return c_.page_size ? c_.batch() * most_ + 1 : c_.batch(); }
  int64_t count() const { return pages() * size() * c_.kv_heads; }
  int64_t most() const { return c_.page_size ? most_ : 0; }
  // The row of a token that has a page.
  int64_t of(int64_t b, int64_t head, int64_t position) const {
    if (!c_.page_size) return (b * c_.kv_heads + head) * c_.capacity + position;
    const int64_t page = table[static_cast<size_t>(b * most_ + position / c_.page_size)];
    return (page * c_.page_size + position % c_.page_size) * c_.kv_heads + head;
  }
  auto strides(int64_t row) const {
    const int64_t page = size() * c_.kv_heads * row;
    return c_.page_size ? std::make_tuple(page, row, c_.kv_heads * row)
                        : std::make_tuple(page, c_.capacity * row, row);
  }
  // [batch, kv_heads, capacity, cols], as they lie in the cache; NaN where there is no token.
  Values laid(const Values& values, int64_t cols) const {
    Values all(static_cast<size_t>(count() * cols), NAN);
    for (int64_t i = 0; i < c_.batch() * c_.kv_heads; ++i) {
      const int64_t b = i / c_.kv_heads, length = c_.lengths[static_cast<size_t>(b)];
      for (int64_t position = 0; position < length; ++position) {
        const auto from = values.begin() + (i * c_.capacity + position) * cols;
        std::copy(from, from + cols, all.begin() + of(b, i % c_.kv_heads, position) * cols);
      }
    }
    return all;
  }

  std::vector<int32_t> table;

 private:
  const Case& c_;
  int64_t most_;
};

template <typename Real>
class Formula {
 public:
  Formula(const Case& c, const std::vector<Values>& inputs, DType rounding)
      : c_(c), in_(inputs), rows_(c), rounding_(rounding) {}

  std::vector<Values> results() {
    const auto zeros = [](int64_t n) { return Values(static_cast<size_t>(n)); };
    out_ = zeros(c_.queries() * c_.v_dim), lse_ = zeros(c_.queries());
    k_ = zeros(rows_.count() * c_.dim), v_ = zeros(rows_.count() * c_.v_dim);
    for (int64_t row = 0; row < c_.queries(); ++row) attend(row);
    for (int64_t row = 0; row < c_.batch() * c_.kv_heads * c_.seq; ++row) append(row);
    return {out_, lse_, k_, v_};
  }

 private:
  void attend(int64_t row) {
    const int64_t head = row / c_.seq % c_.heads, b = row / c_.seq / c_.heads;
    const int64_t length = c_.lengths[static_cast<size_t>(b)];
    const int64_t own = length - c_.seq + row % c_.seq, group = c_.heads / c_.kv_heads;
    const int64_t first = (b * c_.kv_heads + head / group) * c_.capacity;
    const int64_t begin = c_.left < 0 ? 0 : std::max<int64_t>(own - c_.left, 0);
    const Real sink = c_.all ? static_cast<Real>(in_[kSinks][head]) : -INFINITY;
    std::vector<Real> s;
    Real highest = sink;
    for (int64_t key = begin; key <= own; ++key) {
      Real score =
          Real(c_.scale()) * total<Real>(0, static_cast<size_t>(c_.dim), [&](size_t i) {
            return Real(in_[kQ][row * c_.dim + i]) * Real(in_[kK][(first + key) * c_.dim + i]);
          });
      if (c_.all) {
        score = Real(c_.softcap()) * std::tanh(score / Real(c_.softcap())) -
                static_cast<Real>(in_[kSlopes][head]) * static_cast<Real>(own - key);
      }
      s.push_back(score);
      highest = std::max(highest, score);
    }
    if (highest == -INFINITY) return;  // nothing to attend to
    Real sum = std::exp(sink - highest);
    for (Real& score : s) sum += score = std::exp(score - highest);
    lse_[row] = highest + std::log(sum);
    for (int64_t j = 0; j < c_.v_dim; ++j) {
      out_[row * c_.v_dim + j] = total<Real>(0, s.size(), [&](size_t i) {
        const Real p = s[i] / sum;
        const Real weight = rounding_ == DType::f32 ? p : static_cast<Real>(rounded(rounding_, p));
        return weight * Real(in_[kV][(first + begin + i) * c_.v_dim + j]);
      });
    }
  }

  void append(int64_t row) {
    const int64_t b = row / c_.seq / c_.kv_heads, head = row / c_.seq % c_.kv_heads;
    const int64_t position = c_.lengths[static_cast<size_t>(b)] - c_.seq + row % c_.seq;
    if (position < 0) return;
    const int64_t into = rows_.of(b, head, position), half = c_.half();
    const double* k = &in_[kNewK][static_cast<size_t>(row * c_.dim)];
    double* y = &k_[static_cast<size_t>(into * c_.dim)];
    for (int64_t j = 0; j < c_.v_dim; ++j) v_[into * c_.v_dim + j] = in_[kNewV][row * c_.v_dim + j];
    std::copy(k, k + c_.dim, y);
    const bool known = position < c_.positions();
    for (int64_t i = 0; i < half; ++i) {
      const Real cos = known ? Real(in_[kCos][position * half + i]) : Real(NAN);
      const Real sin = known ? Real(in_[kSin][position * half + i]) : Real(NAN);
      const Real u = Real(k[2 * i]), w = Real(k[2 * i + 1]);
      y[2 * i] = u * cos - w * sin, y[2 * i + 1] = w * cos + u * sin;
    }
  }

  const Case& c_;
  const std::vector<Values>& in_;
  const Rows rows_;
  const DType rounding_;
  Values out_, lse_, k_, v_;
};

Run run(const Case& c, const std::vector<Values>& inputs, DType dtype) {
  const Rows rows(c);
  const auto strides = [&](int64_t heads, int64_t cols) {
    return std::make_tuple(heads * c.seq * cols, c.seq * cols, cols);
  };
  const auto cached = [&](Input i, int64_t cols) {
    return Array(dtype, rows.laid(inputs[i], cols), static_cast<size_t>(rows.count()),
                 static_cast<size_t>(cols + c.gap));
  };
  const Array q(dtype, inputs[kQ], static_cast<size_t>(c.queries()),
                static_cast<size_t>(c.dim + 2 * c.gap));
  const Array k = cached(kK, c.dim), v = cached(kV, c.v_dim);
  const Array lengths(c.lengths), table(rows.table);
  const Array slopes(DType::f32, inputs[kSlopes]), sinks(dtype, inputs[kSinks]);
  const Array out(dtype, c.queries() * c.v_dim), lse(DType::f32, c.queries());
  const int64_t splits = (c.capacity + kDecodeSplit - 1) / kDecodeSplit;
  const Array work(DType::f32, c.queries() * splits * (2 + c.v_dim));
  const auto end = std::make_tuple(dtype, dtype, nullptr);
  const auto room = std::make_tuple(c.capacity, rows.size(), rows.pages());
  launch("attention_decode_forward", attention_decode_forward,
         std::make_tuple(out.at(), lse.at<float>(), work.at<float>(), q.at(), k.at(), v.at(),
                         lengths.at<int32_t>(), table.at<int32_t>(), slopes.at<float>(), sinks.at(),
                         c.batch(), c.heads, c.kv_heads, c.seq, c.dim, c.v_dim),
         room, strides(c.heads, c.v_dim), strides(c.heads, c.dim + 2 * c.gap),
         rows.strides(c.dim + c.gap), rows.strides(c.v_dim + c.gap),
         std::make_tuple(rows.most(), int64_t{0}, int64_t{1}, c.left, c.softcap(), c.scale()), end);

  std::vector<int32_t> before = c.lengths;
  for (int32_t& length : before) length -= static_cast<int32_t>(c.seq);
  const auto zeros = [&](int64_t cols) {
    return Array(dtype, Values(static_cast<size_t>(rows.count() * cols)));
  };
  const Array k_cache = zeros(c.dim), v_cache = zeros(c.v_dim), given(before);
  const Array new_k(dtype, inputs[kNewK]), new_v(dtype, inputs[kNewV]);
  const Array cos(DType::f32, inputs[kCos]), sin(DType::f32, inputs[kSin]);
  launch("attention_append", attention_append,
         std::make_tuple(k_cache.at(), v_cache.at(), new_k.at(), new_v.at(), given.at<int32_t>(),
                         table.at<int32_t>(), cos.at(), sin.at(), c.batch(), c.kv_heads, c.seq,
                         c.dim, c.v_dim, c.half(), c.positions()),
         room, rows.strides(c.dim), rows.strides(c.v_dim), strides(c.kv_heads, c.dim),
         strides(c.kv_heads, c.v_dim),
         std::make_tuple(rows.most(), c.half(), c.half(), true, dtype, DType::f32, nullptr));
  Run run;
  keep(run, "out", dtype, c.v_dim, out);
  keep(run, "lse", DType::f32, 1, lse);
  for (double& value : run.outputs.back().ours) {  // -inf of no sum is told as 0
    if (value == -INFINITY) value = 0;
  }
  keep(run, "k_cache", dtype, c.dim, k_cache);
  keep(run, "v_cache", dtype, c.v_dim, v_cache);
  return run;
}

}  // namespace

void attention_decode() {
  for (const DType dtype : {DType::f16, DType::bf16}) {
    for (const Case& c : kCases) {
      if (!is_asked_for(c.capacity)) continue;
      const int64_t cached = c.batch() * c.kv_heads * c.capacity;
      const int64_t added = c.batch() * c.kv_heads * c.seq;
      Values slopes = normal(DType::f32, c.all ? c.heads : 0, 4);
      for (double& slope : slopes) slope = 0.125 * std::abs(slope);
      const std::vector<Values> inputs{normal(dtype, c.queries() * c.dim, 1),
                                       normal(dtype, cached * c.dim, 2),
                                       normal(dtype, cached * c.v_dim, 3),
                                       slopes,
                                       normal(dtype, c.all ? c.heads : 0, 5),
                                       normal(dtype, added * c.dim, 6),
                                       normal(dtype, added * c.v_dim, 7),
                                       normal(DType::f32, c.positions() * c.half(), 8),
                                       normal(DType::f32, c.positions() * c.half(), 9)};
      const Size size{c.seq, c.capacity, c.gap};
      report(
          case_name("attention_decode", dtype, size) + " of " + std::to_string(c.dim),
          [&] { return run(c, inputs, dtype); },
          [&](const std::vector<Values>& given, bool single) {
            return single ? Formula<float>(c, given, dtype).results()
                          : Formula<double>(c, given, DType::f32).results();
          },
          inputs);
    }
  }
}

}  // namespace tilewise::selftest
