#include <algorithm>
#include <cmath>
#include <numeric>
#include <tuple>

#include "selftest/dropout.h"
#include "selftest/selftest.h"

namespace tilewise::selftest {
namespace {

constexpr float kEps = 0.1f;
constexpr int64_t kTokens = 5, kPositions = 3, kSegments = 2, kPadding = 2;

using Ids = std::vector<int64_t>;

// Three tables: ids for each row, ids that rows take in turn, and the first row for all.
struct Named {
  Ids tokens, positions;
  size_t position(size_t row) const {
    return static_cast<size_t>(positions[row % positions.size()]);
  }
};

Named named(int64_t rows) {
  Named ids;
  for (int64_t row = 0; row < rows; ++row)
    ids.tokens.push_back(row * row % kTokens * (row % 7) % 5);
  ids.positions.resize(static_cast<size_t>(rows % 2 ? rows : rows / 2));
  for (size_t turn = 0; turn < ids.positions.size(); ++turn) {
    ids.positions[turn] = static_cast<int64_t>(turn * 2 % kPositions);
  }
  return ids;
}

// dy, tokens, positions, segments, weight, bias -> y, mean, rstd, the gradients of the last five.
template <typename Real>
std::vector<Values> reference(const Size& size, const Named& ids, const Values& all_kept,
                              const std::vector<Values>& inputs) {
  const auto rows = static_cast<size_t>(size.rows), cols = static_cast<size_t>(size.cols);
  const Values &dy = inputs[0], &weight = inputs[4], &bias = inputs[5];
  const bool normed = !weight.empty();
  const auto n = static_cast<Real>(cols);
  Values y(rows * cols), mean(rows), rstd(rows), dweight(cols), dbias(cols);
  std::vector<std::vector<Real>> sums;
  for (size_t i = 1; i < 4; ++i) sums.emplace_back(inputs[i].size());
  std::vector<Real> weight_sums(cols), bias_sums(cols), x(cols), d(cols);
  for (size_t row = 0; row < rows; ++row) {
    const auto token = static_cast<size_t>(ids.tokens[row]);
    const size_t position = ids.position(row);
    for (size_t i = 0; i < cols; ++i) {
      x[i] = Real(inputs[1][token * cols + i]) + Real(inputs[2][position * cols + i]) +
             Real(inputs[3][i]);
    }
    const auto w = [&](size_t i) { return normed ? Real(weight[i]) : Real(1); };
    Real m = 0, r = 1;
    if (normed) {
      m = total<Real>(0, cols, [&](size_t i) { return x[i]; }) / n;
      r = 1 /
          std::sqrt(total<Real>(0, cols, [&](size_t i) { return (x[i] - m) * (x[i] - m); }) / n +
                    static_cast<Real>(kEps));
    }
    mean[row] = m;
    rstd[row] = r;
    for (size_t i = 0; i < cols; ++i) {
      const auto kept = static_cast<Real>(all_kept[row * cols + i]);
      y[row * cols + i] = kept * ((x[i] - m) * r * w(i) + (bias.empty() ? Real(0) : Real(bias[i])));
      d[i] = kept * Real(dy[row * cols + i]);
    }
    const auto g = [&](size_t i) { return d[i] * w(i); };
    const auto xhat = [&](size_t i) { return (x[i] - m) * r; };
    const Real g_mean = normed ? total<Real>(0, cols, g) / n : Real(0);
    const Real dot =
        normed ? total<Real>(0, cols, [&](size_t i) { return g(i) * xhat(i); }) / n : Real(0);
    for (size_t i = 0; i < cols; ++i) {
      weight_sums[i] += d[i] * xhat(i);
      bias_sums[i] += d[i];
      const Real dx = r * (g(i) - g_mean - (normed ? xhat(i) * dot : Real(0)));
      if (token != kPadding) sums[0][token * cols + i] += dx;
      sums[1][position * cols + i] += dx;
      sums[2][i] += dx;
    }
  }
  std::vector<Values> outputs{y};
  if (normed) outputs.insert(outputs.end(), {mean, rstd});
  for (const auto& sum : sums) outputs.emplace_back(sum.begin(), sum.end());
  if (normed) {
    outputs.emplace_back(weight_sums.begin(), weight_sums.end());
    outputs.emplace_back(bias_sums.begin(), bias_sums.end());
  }
  return outputs;
}

Run run(const Size& size, const Named& ids, const Dropout& dropout,
        const std::vector<Values>& inputs, DType dtype, DType weight_dtype) {
  const int64_t rows = size.rows, cols = size.cols, stride = cols + size.gap;
  const bool normed = !inputs[4].empty();
  const int64_t parts = std::min<int64_t>(rows, 4), statistics = normed ? rows : 0;
  const auto period = static_cast<int64_t>(ids.positions.size());
  const Array dy(dtype, inputs[0], rows, stride), tokens(dtype, inputs[1], kTokens, stride);
  const Array positions(dtype, inputs[2], kPositions, stride);
  const Array segments(dtype, inputs[3], kSegments, stride);
  const Array weight(weight_dtype, inputs[4]), bias(weight_dtype, inputs[5]);
  const Array token_ids(ids.tokens), position_ids(ids.positions);
  const Array seeds(dropout.seeds), offsets(dropout.offsets);
  const Array y(dtype, rows * cols), mean(DType::f32, statistics), rstd(DType::f32, statistics);

  const auto where = std::make_tuple(token_ids.at<int64_t>(), tokens.at(), kTokens, stride, rows,
                                     position_ids.at<int64_t>(), positions.at(), kPositions, stride,
                                     period, nullptr, segments.at(), kSegments, stride, int64_t{1});
  const auto draw = std::tuple_cat(arguments(dropout, seeds, offsets), std::make_tuple(rows, cols));
  const auto kind = std::make_tuple(dtype, weight_dtype, nullptr);
  launch("embed_forward", embed_forward,
         std::make_tuple(y.at(), mean.at<float>(), rstd.at<float>()), where,
         std::make_tuple(weight.at(), bias.at()), draw, std::make_tuple(kEps), kind);
  Run run;
  keep(run, "y", dtype, cols, y);
  if (normed) {
    keep(run, "mean", DType::f32, 1, mean);
    keep(run, "rstd", DType::f32, 1, rstd);
  }

  const Array dweight(weight_dtype, normed ? cols : 0), dbias(weight_dtype, normed ? cols : 0);
  const Array sums(DType::f32, normed ? 2 * parts * cols : 0), dx(DType::f32, rows * cols);
  const bool passed_on = !normed && dropout.threshold == 0;
  if (!passed_on) {
    launch("embed_rows_backward", embed_rows_backward,
           std::make_tuple(dx.at<float>(), dweight.at(), dbias.at(), sums.at<float>(),
                           normed ? sums.at<float>() + parts * cols : nullptr, dy.at()),
           where, std::make_tuple(weight.at(), mean.at<float>(), rstd.at<float>()), draw,
           std::make_tuple(stride, normed ? parts : rows), kind);
  }
  const auto walk = [&](const char* name, int64_t count, const Ids& keys, int64_t turns,
                        int64_t padding) {
    Ids order(keys.size());
    std::iota(order.begin(), order.end(), int64_t{0});
    const auto key = [&](int64_t at) { return keys[static_cast<size_t>(at)]; };
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return key(a) < key(b); });
    Ids sorted;
    for (int64_t at : order) sorted.push_back(key(at));
    const int64_t chunk_rows = rows > 8 ? 3 : 2, chunks = (rows + chunk_rows - 1) / chunk_rows;
    const Array sorted_keys(sorted), places(order);
    const Array table(dtype, Values(static_cast<size_t>(count * cols)));
    const Array left(DType::f32, 2 * chunks * cols);
    launch(name, embed_table_backward,
           std::make_tuple(table.at(), left.at<float>(), passed_on ? dy.at() : dx.at(),
                           sorted_keys.at<int64_t>(), places.at<int64_t>(), turns, count, padding,
                           chunk_rows, chunks),
           where,
           std::make_tuple(rows, cols, passed_on ? stride : cols, dtype,
                           passed_on ? dtype : DType::f32, nullptr));
    keep(run, name, dtype, cols, table);
  };
  walk("dtokens", kTokens, ids.tokens, rows, kPadding);
  walk("dpositions", kPositions, ids.positions, period, -1);
  walk("dsegments", kSegments, {}, 1, -1);
  if (normed) {
    keep(run, "dweight", weight_dtype, 1, dweight);
    keep(run, "dbias", weight_dtype, 1, dbias);
  }
  return run;
}

}  // namespace

void embed() {
  for (DType dtype : dtypes()) {
    int turn = 0;
    for (const Size& size : sizes()) {
      const Dropout dropout = dropout_of(kSeeds[turn % 4], size.rows);
      const Values kept = factors(dropout, size.rows, size.cols);
      const int kind = turn++ % 3;  // a norm like the tables, one in fp32, none
      const DType weight_dtype = kind == 1 ? DType::f32 : dtype;
      const Named ids = named(size.rows);
      const int64_t widths = kind == 2 ? 0 : size.cols;
      const std::vector<Values> inputs{
          normal(dtype, size.rows * size.cols, 1),  normal(dtype, kTokens * size.cols, 2),
          normal(dtype, kPositions * size.cols, 3), normal(dtype, kSegments * size.cols, 4),
          normal(weight_dtype, widths, 5),          normal(weight_dtype, widths, 6)};
      report(
          case_name("embed", dtype, size),
          [&] { return run(size, ids, dropout, inputs, dtype, weight_dtype); },
          [&](const std::vector<Values>& given, bool single) {
            return single ? reference<float>(size, ids, kept, given)
                          : reference<double>(size, ids, kept, given);
          },
          inputs);
    }
  }
  must_refuse("embed of no rows",
              embed_forward(nullptr, nullptr, nullptr, nullptr, nullptr, 1, 8, 1, nullptr, nullptr,
                            0, 0, 1, nullptr, nullptr, 0, 0, 1, nullptr, nullptr, 0, 1.f, nullptr,
                            nullptr, 0, 0, 0, 0, 0, 8, kEps, DType::f32, DType::f32, nullptr));
}

}  // namespace tilewise::selftest
