#include <functional>

#include "sample_launchers.h"
#include "selftest/sampling.h"

namespace tilewise::selftest {
namespace {

int64_t wanted_of(const Size& size) {
  return std::min<int64_t>(size.cols, size.cols > kWideCols ? 2 : 6);
}

template <typename Real>
std::vector<Real> scores_of(const Size& size, const Places& places, const Values& x, int64_t row,
                            int64_t ahead) {
  std::vector<Real> scores;
  for (int64_t j = 0; j < size.cols; ++j) {
    const auto weight = static_cast<Real>(x[static_cast<size_t>(row * size.cols + j)]);
    scores.push_back(std::log(weight) + places.noise<Real>(row, ahead, j));
  }
  return scores;
}

// The scores that win: at one offset after the other, and the first in rank at one of them.
template <typename Real>
std::vector<Values> reference(const Size& size, const Places& places, const Values& x) {
  Values several, distinct;
  for (int64_t row = 0; row < size.rows; ++row) {
    for (int64_t n = 0; n < wanted_of(size); ++n) {
      std::vector<Real> scores = scores_of<Real>(size, places, x, row, n);
      std::sort(scores.begin(), scores.end(), std::greater<Real>());
      several.push_back(static_cast<double>(scores[0]));
      for (int64_t i = 0; n == 0 && i < wanted_of(size); ++i) {
        distinct.push_back(static_cast<double>(scores[static_cast<size_t>(i)]));
      }
    }
  }
  return {several, distinct};
}

// As of sample: the scores, by the definition, of what was drawn.
Run run(const Size& size, const Places& places, const Values& x, DType dtype) {
  const int64_t rows = size.rows, cols = size.cols, wanted = wanted_of(size), room_stride = 8;
  const int64_t stride = cols + size.gap, padded = (cols + 3) / 4 * 4;
  const bool is_held = sample_is_held(rows, cols);
  const Array given(dtype, x, rows, stride);
  const Array seeds(places.seeds), offsets(places.offsets);
  const Array logs(DType::f32, is_held ? 0 : rows * padded);
  const Array scores(DType::f32, is_held ? 0 : rows * padded);
  const std::vector<int64_t> nothing(static_cast<size_t>(rows * wanted), -7);
  const Array several(nothing), distinct(nothing);
  const Array room(std::vector<int64_t>(static_cast<size_t>(rows * room_stride)));
  const auto draws = arguments(places, seeds, offsets);
  const auto last = std::make_tuple(dtype, nullptr);
  const auto rows_of = [&](const Array& written) {
    return is_held ? std::make_tuple(static_cast<const void*>(given.at()), rows, cols, stride)
                   : std::make_tuple(static_cast<const void*>(written.at()), rows, cols, padded);
  };
  const auto type = std::make_tuple(is_held ? dtype : DType::f32, nullptr);
  for (bool has_noise : {false, true}) {
    if (is_held) break;
    launch("sample_scores", sample_scores,
           std::make_tuple((has_noise ? scores : logs).at<float>(),
                           static_cast<const void*>(given.at()), rows, cols, stride, has_noise),
           draws, last);
  }
  launch("sample_several", sample_several, std::make_tuple(several.at<int64_t>()), rows_of(logs),
         std::make_tuple(wanted, is_held), draws, type);
  launch("sample_distinct", sample_distinct,
         std::make_tuple(distinct.at<int64_t>(), room.at<int64_t>()), rows_of(scores),
         std::make_tuple(wanted, room_stride, is_held), draws, type);
  Run run;
  for (const Array* drawn : {&several, &distinct}) {
    const bool is_several = drawn == &several;
    Values found;
    const std::vector<int64_t> tokens = integers(*drawn);
    for (int64_t i = 0; i < rows * wanted; ++i) {
      const int64_t token = tokens[static_cast<size_t>(i)], row = i / wanted;
      const bool is_token = 0 <= token && token < cols;
      const auto noisy = scores_of<double>(size, places, x, row, is_several ? i - row * wanted : 0);
      found.push_back(is_token ? noisy[static_cast<size_t>(token)] : std::nan(""));
    }
    run.outputs.push_back(
        {is_several ? "several" : "distinct", DType::f32, static_cast<size_t>(wanted), found});
    const std::vector<unsigned char> bits = drawn->bits();
    run.bits.insert(run.bits.end(), bits.begin(), bits.end());
  }
  return run;
}

}  // namespace

void multinomial() {
  for (bool has_own_seeds : {false, true}) {
    for (DType dtype : dtypes()) {
      for (const Size& size : sizes()) {
        Values x = normal(dtype, size.rows * size.cols, 1);
        for (double& weight : x) weight = rounded(dtype, std::exp(weight));
        const Places places(size.rows, has_own_seeds);
        report(
            case_name("multinomial", dtype, size) + (has_own_seeds ? " seeds" : ""),
            [&] { return run(size, places, x, dtype); },
            [&](const std::vector<Values>& given, bool single) {
              return single ? reference<float>(size, places, given[0])
                            : reference<double>(size, places, given[0]);
            },
            {x});
      }
    }
  }
  const int64_t* none = nullptr;
  must_refuse("multinomial of no rows", sample_several(nullptr, nullptr, 0, 8, 8, 1, true, none,
                                                       none, 0, 0, 0, 0, DType::f32, nullptr));
}

}  // namespace tilewise::selftest
