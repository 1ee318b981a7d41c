#include <algorithm>
#include <cmath>

#include "selftest/dropout.h"
#include "selftest/selftest.h"

namespace tilewise::selftest {
namespace {

constexpr float kSoftcap = 2.5f;
constexpr double kLn2 = 0.69314718055994530942;
constexpr int kNone = -1;

// What there is beside causality and the window.
enum class Kind { plain, padded, all };

struct Case {
  int64_t batch, heads, kv_heads, seq_q, seq_k, dim, v_dim, left, right;
  Kind kind;
  int64_t gap;          // elements between rows
  bool packed = false;  // one after the other: of the first sequence there are no queries, of the
                        // last no keys

  int64_t own_q(int64_t b) const { return packed ? seq_q * b / (batch - 1) : seq_q; }
  int64_t own_k(int64_t b) const { return packed ? seq_k * (batch - 1 - b) / (batch - 1) : seq_k; }
  int64_t queries() const { return batch * heads * seq_q; }
  int64_t keys() const { return batch * kv_heads * seq_k; }
  float scale() const { return 1.25f / std::sqrt(static_cast<float>(dim)); }
  float softcap() const { return kind == Kind::all ? kSoftcap : 0.f; }
};

const Case kCases[]{
    {1, 2, 1, 70, 70, 64, 64, kNone, 0, Kind::plain, 0},  // causal: tiles within and at the edge
    {2, 2, 2, 33, 130, 32, 24, kNone, kNone, Kind::plain, 8},     // a head narrower than its tile
    {1, 2, 2, 140, 75, 128, 128, 20, 40, Kind::plain, 0},         // some see nothing
    {1, 3, 1, 130, 340, 128, 128, kNone, kNone, Kind::plain, 8},  // more tiles than buffers
    {1, 3, 3, 200, 420, 64, 64, kNone, 0, Kind::plain, 8},
    {2, 4, 2, 19, 70, 8, 16, kNone, 0, Kind::padded, 8},
    {1, 4, 2, 67, 66, 40, 33, 50, 0, Kind::all, 1},  // rows that allow no whole access
    {2, 2, 1, 20, 35, 64, 128, kNone, 3, Kind::all, 0},
    {1, 2, 1, 70, 75, 96, 96, kNone, 0, Kind::plain, 8},
    {1, 2, 1, 70, 77, 192, 128, kNone, 0, Kind::plain, 8},
    {1, 2, 2, 40, 78, 200, 130, 20, 10, Kind::all, 0},
    {1, 2, 1, 70, 59, 256, 256, 30, 40, Kind::plain, 8},
    {1, 2, 1, 33, 36, 180, 121, kNone, 0, Kind::all, 1},  // rows that allow no whole access
    {4, 2, 1, 70, 140, 64, 64, kNone, 0, Kind::plain, 8, true},
    {4, 4, 2, 37, 50, 40, 33, 30, 2, Kind::all, 1, true},
    {3, 2, 1, 33, 62, 256, 256, kNone, 0, Kind::plain, 8, true},
};

enum Input { kQ, kK, kV, kDout, kDlse, kBias, kSlopes, kSinks };

// Which scores there are: of padding the same for all queries, else one in five is hidden.
std::vector<unsigned char> mask_of(const Case& c) {
  std::vector<unsigned char> mask;
  if (c.kind == Kind::plain || c.packed) return mask;
  const int64_t rows = c.batch * (c.kind == Kind::all ? c.seq_q : 1);
  for (int64_t i = 0; i < rows * c.seq_k; ++i) mask.push_back(i * 7 % 5 != 0);
  return mask;
}

// Queries or keys of a case: how many a sequence has, has room for, and where it begins if packed.
struct Side {
  int64_t batch, heads, room;
  std::vector<int32_t> ends;
  bool packed;

  static Side of(const Case& c, bool keys) {
    Side side{c.batch, keys ? c.kv_heads : c.heads, keys ? c.seq_k : c.seq_q, {0}, c.packed};
    for (int64_t b = 0; b < c.batch; ++b) {
      const int64_t own = keys ? c.own_k(b) : c.own_q(b);
      side.ends.push_back(side.ends.back() + static_cast<int32_t>(own));
    }
    return side;
  }
  // With one more, of no sequence.
  int64_t rows() const { return packed ? ends.back() + 1 : 0; }
  int64_t count() const { return heads * (packed ? rows() : batch * room); }

  // Strides of batches, heads and rows that are so long.
  std::tuple<int64_t, int64_t, int64_t> strides(int64_t row) const {
    if (packed) return {heads * row, row, heads * row};
    return {heads * room * row, room * row, row};
  }

  // Of [batch, heads, room, cols] as the launchers take it, or back: packed it is [rows, heads,
  // cols], of numbers [heads, rows].
  Values moved(const Values& from, int64_t cols, bool back, bool numbers = false) const {
    if (!packed || from.empty()) return from;
    const double rest = back ? 0 : NAN;
    Values to(static_cast<size_t>((back ? batch * heads * room : count()) * cols), rest);
    for (int64_t i = 0; i < batch * heads * room * cols; ++i) {
      const int64_t row = i / cols % room, head = i / cols / room % heads;
      const int64_t b = i / cols / room / heads, place = ends[b] + row;
      if (place >= ends[b + 1]) continue;
      const int64_t line = numbers ? head * rows() + place : place * heads + head;
      const int64_t other = line * cols + i % cols;
      back ? to[i] = from[other] : to[other] = from[i];
    }
    return to;
  }
};

template <typename Real>
class Formula {
 public:
  Formula(const Case& c, const std::vector<Values>& inputs, const Values& kept, DType rounding)
      : c_(c), in_(inputs), kept_(kept), mask_(mask_of(c)), rounding_(rounding) {
    const auto zeros = [](int64_t n) { return Values(static_cast<size_t>(n)); };
    out_ = zeros(c.queries() * c.v_dim), lse_ = zeros(c.queries());
    dq_ = zeros(c.queries() * c.dim), dk_ = zeros(c.keys() * c.dim);
    dv_ = zeros(c.keys() * c.v_dim), ds_ = zeros(c.queries() * c.seq_k);
  }

  std::vector<Values> results() {
    for (int64_t row = 0; row < c_.queries(); ++row) attend(row);
    std::vector<Values> all{out_, lse_, dq_, dk_, dv_};
    if (c_.kind == Kind::all) all.push_back(ds_);
    return all;
  }

 private:
  // As an operand of a product: rounded, if the kernel's dtype is to be imitated.
  Real operand(Real value) const {
    return rounding_ == DType::f32 ? value : static_cast<Real>(rounded(rounding_, value));
  }
  Real dot(Input a, int64_t row, Input b, int64_t other, int64_t cols) const {
    return total<Real>(0, cols, [&](size_t i) {
      return Real(in_[a][row * cols + i]) * Real(in_[b][other * cols + i]);
    });
  }

  void attend(int64_t row) {
    const int64_t query = row % c_.seq_q, head = row / c_.seq_q % c_.heads;
    const int64_t batch = row / c_.seq_q / c_.heads, group = c_.heads / c_.kv_heads;
    const int64_t first = (batch * c_.kv_heads + head / group) * c_.seq_k;
    const int64_t own_k = c_.own_k(batch), own = query + own_k - c_.own_q(batch);
    if (query >= c_.own_q(batch)) return;
    const bool all = c_.kind == Kind::all;
    std::vector<int64_t> seen;
    std::vector<Real> s, steep, p, dp;
    Real highest = all ? static_cast<Real>(in_[kSinks][head]) : -INFINITY;
    const Real sink = highest;
    for (int64_t key = 0; key < own_k; ++key) {
      if (c_.left >= 0 && key < own - c_.left) continue;
      if (c_.right >= 0 && key > own + c_.right) continue;
      const int64_t line = all ? batch * c_.seq_q + query : batch;
      if (!mask_.empty() && !mask_[line * c_.seq_k + key]) continue;
      Real score = Real(c_.scale()) * dot(kQ, row, kK, first + key, c_.dim), slope = 1;
      if (all) {
        const Real t = std::tanh(score / Real(kSoftcap));
        slope = 1 - t * t;
        score = Real(kSoftcap) * t +
                static_cast<Real>(in_[kBias][(head * c_.seq_q + query) * c_.seq_k + key]) -
                static_cast<Real>(in_[kSlopes][head]) * std::abs(static_cast<Real>(own - key));
      }
      seen.push_back(key), s.push_back(score), steep.push_back(slope);
      highest = std::max(highest, score);
    }
    if (highest == -INFINITY) return;  // nothing to attend to
    Real sum = std::exp(sink - highest);
    for (const Real score : s) sum += std::exp(score - highest);
    lse_[row] = highest + std::log(sum);
    Real delta = 0;
    for (size_t i = 0; i < seen.size(); ++i) {
      const Real kept = kept_.empty() ? Real(1) : Real(kept_[row * c_.seq_k + seen[i]]);
      p.push_back(std::exp(s[i] - highest) / sum);
      dp.push_back(kept * dot(kDout, row, kV, first + seen[i], c_.v_dim));
      delta += p[i] * dp[i];
      const Real weight = operand(p[i] * kept);
      for (int64_t j = 0; j < c_.v_dim; ++j) {
        out_[row * c_.v_dim + j] += weight * Real(in_[kV][(first + seen[i]) * c_.v_dim + j]);
        dv_[(first + seen[i]) * c_.v_dim + j] += weight * Real(in_[kDout][row * c_.v_dim + j]);
      }
    }
    delta -= static_cast<Real>(in_[kDlse][row]);
    for (size_t i = 0; i < seen.size(); ++i) {
      const Real exact = p[i] * (dp[i] - delta), ds = Real(c_.scale()) * operand(exact * steep[i]);
      ds_[row * c_.seq_k + seen[i]] = exact;
      for (int64_t j = 0; j < c_.dim; ++j) {
        dq_[row * c_.dim + j] += ds * Real(in_[kK][(first + seen[i]) * c_.dim + j]);
        dk_[(first + seen[i]) * c_.dim + j] += ds * Real(in_[kQ][row * c_.dim + j]);
      }
    }
  }

  const Case& c_;
  const std::vector<Values>& in_;
  const Values& kept_;
  const std::vector<unsigned char> mask_;
  const DType rounding_;
  Values out_, lse_, dq_, dk_, dv_, ds_;
};

Run run(const Case& c, const std::vector<Values>& inputs, const Dropout& dropout, DType dtype) {
  const Side queries = Side::of(c, false), keys = Side::of(c, true);
  const auto apart = [&](Input i, const Side& side, int64_t cols, int64_t gap) {
    return Array(dtype, side.moved(inputs[i], cols, false), static_cast<size_t>(side.count()),
                 static_cast<size_t>(cols + gap));
  };
  const bool all = c.kind == Kind::all, masked = c.kind != Kind::plain;
  const Array q = apart(kQ, queries, c.dim, c.gap), k = apart(kK, keys, c.dim, 2 * c.gap);
  const Array v = apart(kV, keys, c.v_dim, 3 * c.gap);
  const Array dout = apart(kDout, queries, c.v_dim, 4 * c.gap);
  const Array dlse(DType::f32, queries.moved(inputs[kDlse], 1, false, true));
  const Array bias(dtype, inputs[kBias]);
  const Array slopes(DType::f32, inputs[kSlopes]), sinks(DType::f32, inputs[kSinks]);
  const Array mask(mask_of(c)), seeds(dropout.seeds), offsets(dropout.offsets);
  const Array ends_q(c.packed ? queries.ends : std::vector<int32_t>());
  const Array ends_k(c.packed ? keys.ends : std::vector<int32_t>());
  const Array out(dtype, queries.count() * c.v_dim), dq(dtype, queries.count() * c.dim);
  const Array dk(dtype, keys.count() * c.dim), dv(dtype, keys.count() * c.v_dim);
  const Array highest(DType::f32, queries.count()), sum(DType::f32, queries.count());
  const Array statistics(DType::f32, 3 * queries.count());
  const DType of_ds = c.batch > 1 ? DType::f32 : dtype;
  const Array ds(of_ds, all ? c.queries() * c.seq_k : 0);  // a part of the gradient is of a batch

  const auto given =
      std::make_tuple(q.at(), k.at(), v.at(), mask.at<uint8_t>(), bias.at(), slopes.at<float>(),
                      sinks.at(), ends_q.at<int32_t>(), ends_k.at<int32_t>(), c.batch, c.heads,
                      c.kv_heads, c.seq_q, c.seq_k, c.dim, c.v_dim, queries.rows(), keys.rows());
  const auto to_q = queries.strides(c.dim), to_out = queries.strides(c.v_dim);
  const auto rows = std::tuple_cat(queries.strides(c.dim + c.gap), keys.strides(c.dim + 2 * c.gap),
                                   keys.strides(c.v_dim + 3 * c.gap));
  const auto of_dout = queries.strides(c.v_dim + 4 * c.gap);
  const int64_t line = all ? c.seq_k : 0;
  const auto options = std::tuple_cat(
      std::make_tuple(masked ? (all ? c.seq_q : 1) * c.seq_k : 0, int64_t{0}, line, int64_t{masked},
                      int64_t{0}, c.seq_q * line, line, int64_t{all}, int64_t{0}, int64_t{all},
                      c.left, c.right, c.softcap(), c.scale()),
      arguments(dropout, seeds, offsets));
  const auto end = std::make_tuple(dtype, dtype, DType::f32, nullptr);

  launch("attention_forward", attention_forward,
         std::make_tuple(out.at(), highest.at<float>(), sum.at<float>()), given, to_out, rows,
         options, end);
  launch("attention_queries_backward", attention_queries_backward,
         std::make_tuple(dq.at(), nullptr, statistics.at<float>(), dout.at(), dlse.at<float>(),
                         out.at(), highest.at<float>(), sum.at<float>()),
         given, to_q, of_dout, to_out, rows, options, std::make_tuple(all), end);
  launch("attention_keys_backward", attention_keys_backward,
         std::make_tuple(dk.at(), dv.at(), dout.at(), statistics.at<float>()), given,
         keys.strides(c.dim), keys.strides(c.v_dim), of_dout, rows, options, end);
  if (all) {
    launch("attention_bias_backward", attention_bias_backward,
           std::make_tuple(ds.at(), dout.at(), statistics.at<float>()), given, of_dout, rows,
           options, std::make_tuple(int64_t{1}, c.heads, c.seq_q, c.batch), end);
  }

  Run run;
  const auto keep_rows = [&](const char* name, const Side& side, int64_t cols, const Array& array) {
    keep(run, name, dtype, cols, array);
    run.outputs.back().ours = side.moved(run.outputs.back().ours, cols, true);
  };
  keep_rows("out", queries, c.v_dim, out);
  Values lse = queries.moved(highest.values(), 1, true, true);
  const Values sums = queries.moved(sum.values(), 1, true, true);
  for (size_t i = 0; i < lse.size(); ++i) {  // -inf of no sum is told as 0
    lse[i] = sums[i] == 0 ? 0 : static_cast<float>(kLn2 * lse[i] + std::log(sums[i]));
  }
  run.outputs.push_back({"lse", DType::f32, 1, lse});
  keep_rows("dq", queries, c.dim, dq);
  keep_rows("dk", keys, c.dim, dk);
  keep_rows("dv", keys, c.v_dim, dv);
  if (all) keep(run, "ds", of_ds, c.seq_k, ds);
  return run;
}

}  // namespace

void attention() {
  int turn = 0;
  for (const DType dtype : {DType::f16, DType::bf16}) {
    for (const Case& c : kCases) {
      if (!is_asked_for(c.seq_k)) continue;
      const bool all = c.kind == Kind::all;
      const Seeds given = turn++ % 2 ? Seeds::number : Seeds::array;
      const Dropout dropout = dropout_of(all ? given : Seeds::none, 1);
      const Values kept = all ? factors(dropout, c.queries(), c.seq_k) : Values();
      const auto some = [&](int64_t count, int seed) {
        return normal(dtype, all ? count : 0, seed);
      };
      Values slopes = some(c.heads, 7);
      for (double& slope : slopes) slope = 0.1 * std::abs(slope);
      const std::vector<Values> inputs{
          normal(dtype, c.queries() * c.dim, 1), normal(dtype, c.keys() * c.dim, 2),
          normal(dtype, c.keys() * c.v_dim, 3),  normal(dtype, c.queries() * c.v_dim, 4),
          normal(DType::f32, c.queries(), 5),    some(c.heads * c.seq_q * c.seq_k, 6),
          rounded(DType::f32, slopes),           some(c.heads, 8)};
      const Size size{c.seq_q, c.seq_k, c.gap};
      report(
          case_name("attention", dtype, size) + " of " + std::to_string(c.dim) +
              (c.packed ? " packed" : ""),
          [&] { return run(c, inputs, dropout, dtype); },
          [&](const std::vector<Values>& given, bool single) {
            return single ? Formula<float>(c, given, kept, dtype).results()
                          : Formula<double>(c, given, kept, DType::f32).results();
          },
          inputs);
    }
  }
}

}  // namespace tilewise::selftest
