// Rotary embedding, alone and of heads that are normalised.
#include <algorithm>
#include <cmath>
#include <random>
#include <utility>

#include "selftest/selftest.h"

namespace tilewise::selftest {
namespace {

constexpr float kEps = 0.1f, kOffset = 0.5f;  // the latter is added to the weights

// Whole heads and parts of them, 16 bytes at a time and not, more pairs than a warp has lanes.
struct Shape {
  int64_t batch, heads, kv_heads, seq, dim, half, gap;
};

const Shape kShapes[]{{2, 3, 1, 4, 64, 32, 0}, {1, 1, 1, 1, 2, 1, 0},    {1, 2, 2, 5, 80, 32, 8},
                      {2, 1, 2, 3, 11, 3, 1},  {2, 4, 1, 9, 16, 8, 0},   {1, 3, 2, 4, 24, 8, 3},
                      {1, 7, 1, 5, 71, 35, 1}, {1, 1, 1, 2, 640, 320, 0}};

// They count from the offset; each row has its own; all batches have the same; packed sequences.
enum class Order { counted, named, shared, packed };
const std::pair<Order, const char*> kOrders[]{{Order::counted, " counted"},
                                              {Order::named, " named"},
                                              {Order::shared, " shared"},
                                              {Order::packed, " packed"}};

// The gradients that a launcher is asked for; without a norm always all.
struct Wanted {
  bool dq, dk, dq_weight, dk_weight;
};
constexpr Wanted kWanted[]{
    {true, true, true, true}, {true, false, false, true}, {false, true, true, false}};

// Heads in memory; NaN lies between them.
struct Layout {
  int64_t batch, heads, seq, dim, gap;
  bool by_token;

  int64_t row() const { return dim + gap; }
  int64_t head() const { return by_token ? row() : seq * row(); }
  int64_t token() const { return by_token ? heads * row() : row(); }
  auto strides() const { return std::make_tuple(heads * seq * row(), head(), token()); }
  // Where the elements are that rows [batch, heads, seq] have, in order.
  std::vector<size_t> places() const {
    std::vector<size_t> all;
    for (int64_t i = 0; i < batch * heads * seq; ++i) {
      const int64_t b = i / (heads * seq), h = i / seq % heads, s = i % seq;
      const int64_t begin = b * heads * seq * row() + h * head() + s * token();
      for (int64_t col = 0; col < dim; ++col) all.push_back(static_cast<size_t>(begin + col));
    }
    return all;
  }
  size_t count() const { return static_cast<size_t>(batch * heads * seq * row() - gap); }
  Values laid(const Values& values) const {
    Values all(count(), NAN);
    const std::vector<size_t> at = places();
    for (size_t i = 0; i < at.size(); ++i) all[at[i]] = values[i];
    return all;
  }
  // An infinity shows that what lies between was written.
  Values gathered(Values all) const {
    Values values;
    for (size_t at : places()) values.push_back(std::exchange(all[at], NAN));
    for (double between : all) values[0] = std::isnan(between) ? values[0] : INFINITY;
    return values;
  }
};

struct Turning {
  Shape shape;
  bool is_normed, interleaved;
  Order order;
  int64_t offset, count;  // of positions
  std::vector<int64_t> ids;
  std::vector<int32_t> ends;
  DType dtype, weight_dtype, table_dtype;
  Wanted wanted;
  Layout q, k, q_turned, k_turned;  // a gradient lies like what it is of

  int64_t ids_batch() const { return order == Order::named ? shape.seq : 0; }
  int64_t ids_seq() const { return order == Order::shared ? 2 : 1; }
};

// `chosen`: bits of what is not gone through one by one.
Turning turning_of(const Shape& shape, bool is_normed, bool interleaved, Order order, DType dtype,
                   unsigned chosen) {
  const int64_t batch = shape.batch, heads = shape.heads, kv_heads = shape.kv_heads;
  const int64_t seq = shape.seq;
  const auto layout = [&](int64_t count, int bit) {
    return Layout{batch, count, seq, shape.dim, shape.gap, (chosen >> bit) % 2 == 1};
  };
  Turning turning{shape,
                  is_normed,
                  interleaved,
                  order,
                  1,
                  seq + 2,
                  {},
                  {},
                  dtype,
                  chosen >> 4 & 1 ? dtype : DType::f32,
                  chosen >> 5 & 1 ? dtype : DType::f32,
                  kWanted[(chosen >> 6) % 3],
                  layout(heads, 0),
                  layout(kv_heads, 1),
                  layout(heads, 2),
                  layout(kv_heads, 3)};
  if (order == Order::named || order == Order::shared) {
    for (int64_t i = 0; i < 2 * batch * seq; ++i) turning.ids.push_back((i * i + 1) % (seq + 1));
  }
  if (order == Order::named && seq > 2) {  // which the tables do not have
    turning.ids[1] = -2;
    turning.ids[2] = turning.count - turning.offset;
  }
  if (order == Order::packed) {  // none, some, one, and what belongs to none
    for (int64_t end :
         {int64_t{0}, int64_t{0}, seq / 2, seq / 2 + 1, std::max(seq - 1, seq / 2 + 1)}) {
      turning.ends.push_back(static_cast<int32_t>(end));
    }
  }
  return turning;
}

// Whether a row belongs to a sequence, and its position.
std::pair<bool, int64_t> position_of(const Turning& turning, int64_t b, int64_t s) {
  int64_t position = s;
  bool is_row = true;
  if (!turning.ids.empty()) {
    position = turning.ids[static_cast<size_t>(b * turning.ids_batch() + s * turning.ids_seq())];
  }
  if (!turning.ends.empty()) {
    is_row = s < turning.ends.back();
    for (int32_t end : turning.ends) position = end <= s ? s - end : position;
  }
  return {is_row, position + turning.offset};
}

// cos and sin: [positions, half]; those of other positions are NaN. sign: -1 to turn back.
template <typename Real>
void turn(std::vector<Real>& row, const Turning& turning, const Values& cos, const Values& sin,
          int64_t position, Real sign) {
  const auto half = static_cast<size_t>(turning.shape.half);
  const bool is_known = 0 <= position && position < turning.count;
  for (size_t pair = 0; pair < half; ++pair) {
    const size_t at = static_cast<size_t>(position) * half + pair;
    const Real c = is_known ? Real(cos[at]) : Real(NAN);
    const Real s = is_known ? Real(sin[at]) * sign : Real(NAN);
    Real& a = row[turning.interleaved ? 2 * pair : pair];
    Real& b = row[turning.interleaved ? 2 * pair + 1 : pair + half];
    const Real first = a * c - b * s;
    b = b * c + a * s;
    a = first;
  }
}

enum Input { kQ, kK, kDq, kDk, kQWeight, kKWeight, kCos, kSin };

// Of q or of k: turned and its gradient; if it is normalised, rstd too, and the gradients of it and
// of its weight that are wanted.
template <typename Real>
std::vector<Values> side(const Turning& turning, const std::vector<Values>& inputs, int which) {
  const Shape& shape = turning.shape;
  const Values &x = inputs[kQ + which], &dy = inputs[kDq + which];
  const Values& weight = inputs[kQWeight + which];
  const int64_t heads = which ? shape.kv_heads : shape.heads;
  const auto dim = static_cast<size_t>(shape.dim);
  const auto n = static_cast<Real>(shape.dim);
  const auto w = [&](size_t i) {
    return weight.empty() ? Real(1) : Real(weight[i]) + Real(kOffset);
  };
  Values turned(x.size()), dx(x.size()), rstd(x.size() / dim), dweight(weight.size());
  std::vector<Real> products(x.size()), y(dim), g(dim);
  for (size_t row = 0; row < rstd.size(); ++row) {
    const auto at = static_cast<int64_t>(row);
    const auto [is_row, position] = position_of(turning, at / (heads * shape.seq), at % shape.seq);
    if (!is_row) continue;
    const auto v = [&](size_t i) { return Real(x[row * dim + i]); };
    Real r = 1;
    if (turning.is_normed) {
      const Real squares = total<Real>(0, dim, [&](size_t i) { return v(i) * v(i); });
      r = 1 / std::sqrt(squares / n + Real(kEps));
    }
    for (size_t i = 0; i < dim; ++i) {
      y[i] = v(i) * r * w(i);
      g[i] = Real(dy[row * dim + i]);
    }
    turn(y, turning, inputs[kCos], inputs[kSin], position, Real(1));
    turn(g, turning, inputs[kCos], inputs[kSin], position, Real(-1));
    const auto xhat = [&](size_t i) { return v(i) * r; };
    const Real dot = turning.is_normed
                         ? total<Real>(0, dim, [&](size_t i) { return g[i] * w(i) * xhat(i); }) / n
                         : Real(0);
    rstd[row] = r;
    for (size_t i = 0; i < dim; ++i) {
      turned[row * dim + i] = y[i];
      dx[row * dim + i] = turning.is_normed ? r * (g[i] * w(i) - xhat(i) * dot) : g[i];
      products[row * dim + i] = g[i] * xhat(i);
    }
  }
  for (size_t i = 0; i < dweight.size(); ++i) {
    dweight[i] = total<Real>(0, rstd.size(), [&](size_t row) { return products[row * dim + i]; });
  }
  if (!turning.is_normed) return {turned, dx};
  std::vector<Values> outputs{turned, rstd};
  const Wanted& wanted = turning.wanted;
  if (which ? wanted.dk : wanted.dq) outputs.push_back(dx);
  if (which ? wanted.dk_weight : wanted.dq_weight) outputs.push_back(dweight);
  return outputs;
}

template <typename Real>
std::vector<Values> reference(const Turning& turning, const std::vector<Values>& inputs) {
  std::vector<Values> outputs = side<Real>(turning, inputs, 0);
  for (Values& output : side<Real>(turning, inputs, 1)) outputs.push_back(std::move(output));
  return outputs;
}

// What all launchers are given, as they take it.
struct Given {
  Array q, k, dq_turned, dk_turned, q_weight, k_weight, cos, sin, ids, ends;
  Given(const Turning& turning, const std::vector<Values>& inputs)
      : q(turning.dtype, turning.q.laid(inputs[kQ])),
        k(turning.dtype, turning.k.laid(inputs[kK])),
        dq_turned(turning.dtype, turning.q_turned.laid(inputs[kDq])),
        dk_turned(turning.dtype, turning.k_turned.laid(inputs[kDk])),
        q_weight(turning.weight_dtype, inputs[kQWeight]),
        k_weight(turning.weight_dtype, inputs[kKWeight]),
        cos(turning.table_dtype, inputs[kCos], turning.count,
            turning.shape.half + turning.shape.gap),
        sin(turning.table_dtype, inputs[kSin], turning.count,
            turning.shape.half + 2 * turning.shape.gap),
        ids(turning.ids),
        ends(turning.ends) {}
};

auto shape_of(const Turning& turning) {
  const auto [batch, heads, kv_heads, seq, dim, half, gap] = turning.shape;
  return std::make_tuple(batch, heads, kv_heads, seq, dim, half);
}

auto places_of(const Turning& turning, const Given& given) {
  const int64_t sequences =
      turning.ends.empty() ? 0 : static_cast<int64_t>(turning.ends.size()) - 1;
  return std::make_tuple(turning.shape.half + turning.shape.gap,
                         turning.shape.half + 2 * turning.shape.gap, given.ids.at<int64_t>(),
                         turning.ids_batch(), turning.ids_seq(), given.ends.at<int32_t>(),
                         sequences, turning.offset, turning.count);
}

// What a launcher wrote, without what lies between.
void keep_heads(Run& run, const std::string& name, DType dtype, const Layout& layout,
                const Array& array) {
  keep(run, name, dtype, layout.dim, array);
  run.outputs.back().ours = layout.gathered(run.outputs.back().ours);
}

Run run_rotary(const Turning& turning, const std::vector<Values>& inputs) {
  const DType dtype = turning.dtype;
  const Given given(turning, inputs);
  const Array q_turned(dtype, turning.q_turned.count()), k_turned(dtype, turning.k_turned.count());
  const Array dq(dtype, turning.q.count()), dk(dtype, turning.k.count());
  const auto turn_all = [&](const Array& to_q, const Array& to_k, const Array& q, const Array& k,
                            const auto& strides, float sign) {
    launch("rotary_forward", rotary_forward,
           std::make_tuple(to_q.at(), to_k.at(), q.at(), k.at(), given.cos.at(), given.sin.at()),
           shape_of(turning), strides, places_of(turning, given),
           std::make_tuple(turning.interleaved, sign, dtype, turning.table_dtype, nullptr));
  };
  const auto of_x = std::tuple_cat(turning.q.strides(), turning.k.strides());
  const auto of_turned = std::tuple_cat(turning.q_turned.strides(), turning.k_turned.strides());
  turn_all(q_turned, k_turned, given.q, given.k, std::tuple_cat(of_turned, of_x), 1.f);
  turn_all(dq, dk, given.dq_turned, given.dk_turned, std::tuple_cat(of_x, of_turned), -1.f);
  Run run;
  keep_heads(run, "q_turned", dtype, turning.q_turned, q_turned);
  keep_heads(run, "dq", dtype, turning.q, dq);
  keep_heads(run, "k_turned", dtype, turning.k_turned, k_turned);
  keep_heads(run, "dk", dtype, turning.k, dk);
  return run;
}

Run run_normed(const Turning& turning, const std::vector<Values>& inputs) {
  const DType dtype = turning.dtype, weight_dtype = turning.weight_dtype;
  const auto [batch, heads, kv_heads, seq, dim, half, gap] = turning.shape;
  const int64_t q_parts = 3, k_parts = 2;
  const Given given(turning, inputs);
  const Array q_turned(dtype, turning.q_turned.count()), k_turned(dtype, turning.k_turned.count());
  const Wanted& wanted = turning.wanted;
  const Array dq(dtype, wanted.dq ? turning.q.count() : 0),
      dk(dtype, wanted.dk ? turning.k.count() : 0);
  const Array dq_weight(weight_dtype, wanted.dq_weight ? dim : 0),
      dk_weight(weight_dtype, wanted.dk_weight ? dim : 0);
  const Array q_rstd(DType::f32, batch * heads * seq), k_rstd(DType::f32, batch * kv_heads * seq);
  const Array q_sums(DType::f32, wanted.dq_weight ? q_parts * dim : 0),
      k_sums(DType::f32, wanted.dk_weight ? k_parts * dim : 0);
  const auto of_x = std::tuple_cat(turning.q.strides(), turning.k.strides());
  const auto of_turned = std::tuple_cat(turning.q_turned.strides(), turning.k_turned.strides());
  const auto weights = std::make_tuple(given.q.at(), given.k.at(), given.q_weight.at(),
                                       given.k_weight.at(), given.cos.at(), given.sin.at());
  const auto rstd = std::make_tuple(q_rstd.at<float>(), k_rstd.at<float>());
  const auto kinds = std::make_tuple(dtype, weight_dtype, turning.table_dtype, nullptr);
  launch("qk_norm_rotary_forward", qk_norm_rotary_forward,
         std::make_tuple(q_turned.at(), k_turned.at()), rstd, weights, shape_of(turning), of_turned,
         of_x, places_of(turning, given), std::make_tuple(turning.interleaved, kEps, kOffset),
         kinds);
  launch("qk_norm_rotary_backward", qk_norm_rotary_backward,
         std::make_tuple(dq.at(), dk.at(), dq_weight.at(), dk_weight.at(), q_sums.at<float>(),
                         k_sums.at<float>(), given.dq_turned.at(), given.dk_turned.at()),
         weights, rstd, shape_of(turning), of_x, of_turned, of_x, places_of(turning, given),
         std::make_tuple(q_parts, k_parts, turning.interleaved, kOffset), kinds);
  Run run;
  keep_heads(run, "q_turned", dtype, turning.q_turned, q_turned);
  keep(run, "q_rstd", DType::f32, 1, q_rstd);
  if (wanted.dq) keep_heads(run, "dq", dtype, turning.q, dq);
  if (wanted.dq_weight) keep(run, "dq_weight", weight_dtype, 1, dq_weight);
  keep_heads(run, "k_turned", dtype, turning.k_turned, k_turned);
  keep(run, "k_rstd", DType::f32, 1, k_rstd);
  if (wanted.dk) keep_heads(run, "dk", dtype, turning.k, dk);
  if (wanted.dk_weight) keep(run, "dk_weight", weight_dtype, 1, dk_weight);
  return run;
}

void test(const Shape& shape, bool is_normed, bool interleaved, DType dtype,
          const std::pair<Order, const char*>& order, unsigned chosen) {
  const Turning turning = turning_of(shape, is_normed, interleaved, order.first, dtype, chosen);
  const int64_t rows = shape.batch * shape.seq, angles = turning.count * shape.half;
  const int64_t q_count = rows * shape.heads * shape.dim;
  const int64_t k_count = rows * shape.kv_heads * shape.dim, width = is_normed ? shape.dim : 0;
  const std::vector<Values> inputs{normal(dtype, q_count, 1),
                                   normal(dtype, k_count, 2),
                                   normal(dtype, q_count, 3),
                                   normal(dtype, k_count, 4),
                                   normal(turning.weight_dtype, width, 5),
                                   normal(turning.weight_dtype, width, 6),
                                   normal(turning.table_dtype, angles, 7),
                                   normal(turning.table_dtype, angles, 8)};
  const std::string name = std::string(is_normed ? "qk_norm_rotary" : "rotary") +
                           (interleaved ? " interleaved" : "") + order.second;
  report(
      case_name(name.c_str(), dtype, {rows, shape.dim, shape.gap}),
      [&] { return is_normed ? run_normed(turning, inputs) : run_rotary(turning, inputs); },
      [&](const std::vector<Values>& given, bool single) {
        return single ? reference<float>(turning, given) : reference<double>(turning, given);
      },
      inputs);
}

void test(bool is_normed) {
  std::minstd_rand random(1);
  for (DType dtype : dtypes()) {
    for (const Shape& shape : kShapes) {
      for (bool interleaved : {false, true}) {
        for (const auto& order : kOrders) {
          const auto chosen = static_cast<unsigned>(random() >> 8);
          if (is_asked_for(shape.dim)) test(shape, is_normed, interleaved, dtype, order, chosen);
        }
      }
    }
  }
}

}  // namespace

void rotary() {
  test(false);
  must_refuse("rotary of no rows",
              rotary_forward(nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, 0, 1, 1, 1, 8, 4,
                             0, 8, 8, 0, 8, 8, 0, 8, 8, 0, 8, 8, 4, 4, nullptr, 0, 0, nullptr, 0, 0,
                             1, false, 1.f, DType::f32, DType::f32, nullptr));
}

void qk_norm_rotary() {
  test(true);
  must_refuse("qk_norm_rotary of no rows",
              qk_norm_rotary_forward(nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr,
                                     nullptr, nullptr, nullptr, 0, 1, 1, 1, 8, 4, 0, 8, 8, 0, 8, 8,
                                     0, 8, 8, 0, 8, 8, 4, 4, nullptr, 0, 0, nullptr, 0, 0, 1, false,
                                     kEps, kOffset, DType::f32, DType::f32, DType::f32, nullptr));
}

}  // namespace tilewise::selftest
