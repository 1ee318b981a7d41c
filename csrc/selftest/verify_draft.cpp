#include <tuple>

#include "sample_launchers.h"
#include "selftest/sampling.h"

namespace tilewise::selftest {
namespace {

constexpr int64_t kDraft = 2;
constexpr int64_t kAcceptance = int64_t{1} << 32, kReplacement = int64_t{1} << 33;  // columns

// A row of probabilities after all filters.
template <typename Real>
std::vector<Real> probabilities_of(const Size& size, const Options& options, const Values& x,
                                   int64_t row) {
  std::vector<Real> p = gaps_of<Real>(size, options, x, row);
  for (Real& gap : p) gap = std::exp(gap);
  const Real sum = total<Real>(0, p.size(), [&](size_t j) { return p[j]; });
  for (Real& mass : p) mass /= sum;
  return p;
}

// Those that were drafted: in turn the likeliest, one of the others, and none.
std::vector<int64_t> drafted(const Size& size, const Values& x) {
  std::vector<int64_t> tokens;
  for (int64_t i = 0; i < size.rows; ++i) {
    for (int64_t place = 0; place < kDraft; ++place) {
      const auto row = x.begin() + (i * (kDraft + 1) + place) * size.cols;
      const int64_t likeliest = std::max_element(row, row + size.cols) - row;
      const int64_t kind = (i + 2 * place) % 4;
      tokens.push_back(kind == 3 ? -1 : kind == 2 ? (likeliest + 1) % size.cols : likeliest);
    }
  }
  return tokens;
}

// How the tokens after those that stand are scored; how many stand is the first.
template <typename Real>
std::vector<Real> scores_of(const Size& size, const Options& options, const Places& places,
                            const std::vector<Values>& given, int64_t i) {
  const std::vector<int64_t> drafts = drafted(size, given[2]);
  int64_t count = 0;
  std::vector<Real> p, scores;
  const double* q = nullptr;
  for (;; ++count) {
    p = probabilities_of<Real>(size, options, given[0], i * (kDraft + 1) + count);
    q = nullptr;
    if (count == kDraft) break;
    const int64_t number = i * kDraft + count, token = drafts[static_cast<size_t>(number)];
    if (token < 0) break;
    q = &given[1][static_cast<size_t>(number * size.cols)];
    const bool has_own = !places.seeds.empty();
    const int64_t own = has_own ? i : 0;
    const uint32_t word = word_of(kSeed + own, kOffset - own + count, has_own ? 0 : i, kAcceptance);
    if (!((word + 0.5) / 0x1p32 * q[token] < static_cast<double>(p[static_cast<size_t>(token)]))) {
      break;
    }
  }
  scores.push_back(static_cast<Real>(count));
  for (int64_t j = 0; j < size.cols; ++j) {
    const Real rest = p[static_cast<size_t>(j)] - static_cast<Real>(q ? q[j] : 0);
    const Real noise = places.noise<Real>(i, count, kReplacement + j);
    scores.push_back(rest > 0 ? std::log(rest) + noise : Real(-kInfinity));
  }
  return scores;
}

template <typename Real>
std::vector<Values> reference(const Size& size, const Options& options, const Places& places,
                              const std::vector<Values>& given) {
  Values accepted, best;
  for (int64_t i = 0; i < size.rows; ++i) {
    const std::vector<Real> scores = scores_of<Real>(size, options, places, given, i);
    accepted.push_back(static_cast<double>(scores[0]));
    best.push_back(static_cast<double>(*std::max_element(scores.begin() + 1, scores.end())));
  }
  return {accepted, best};
}

Run run(const Size& size, const Options& options, const Places& places,
        const std::vector<Values>& given, DType dtype) {
  const int64_t batch = size.rows, vocab = size.cols, stride = vocab + size.gap;
  const std::vector<int64_t> drafts = drafted(size, given[2]);
  const Array x(dtype, given[0], batch * (kDraft + 1), stride), q(DType::f32, given[1]);
  const Array draft_tokens(drafts), seeds(places.seeds), offsets(places.offsets);
  const Array accepted(std::vector<int64_t>(static_cast<size_t>(batch), -7));
  const Array tokens(std::vector<int64_t>(static_cast<size_t>(batch * (kDraft + 1)), -7));
  const Array stands(DType::f32, batch * kDraft);
  const float* none = nullptr;
  launch("sample_verify", sample_verify,
         std::make_tuple(accepted.at<int64_t>(), tokens.at<int64_t>(), stands.at<int32_t>(),
                         draft_tokens.at<int64_t>(), q.at<float>(), x.at(), batch, kDraft, vocab,
                         stride, nullptr, none, none, none, none, none, none),
         std::make_tuple(nullptr, int64_t{0}, none, int64_t{0}, nullptr, int64_t{0}, options.top_k,
                         options.temperature, options.top_p, options.min_p, options.repetition,
                         options.presence, options.frequency),
         arguments(places, seeds, offsets), std::make_tuple(dtype, nullptr));
  Run run;
  Values counts, found;
  const std::vector<int64_t> stood = integers(accepted), written = integers(tokens);
  for (int64_t i = 0; i < batch; ++i) {
    const auto scores = scores_of<double>(size, options, places, given, i);
    const int64_t count = stood[static_cast<size_t>(i)];
    bool is_right = 0 <= count && count <= kDraft;
    for (int64_t place = 0; is_right && place <= kDraft; ++place) {
      const int64_t token = written[static_cast<size_t>(i * (kDraft + 1) + place)];
      is_right = place < count    ? token == drafts[static_cast<size_t>(i * kDraft + place)]
                 : place == count ? 0 <= token && token < vocab
                                  : token == -1;
    }
    const auto at = static_cast<size_t>(i * (kDraft + 1) + count);
    counts.push_back(static_cast<double>(count));
    found.push_back(is_right ? scores[static_cast<size_t>(written[at]) + 1] : std::nan(""));
  }
  run.bits = accepted.bits();
  const std::vector<unsigned char> bits = tokens.bits();
  run.bits.insert(run.bits.end(), bits.begin(), bits.end());
  run.outputs.push_back({"accepted", DType::f32, 1, counts});
  run.outputs.push_back({"tokens", DType::f32, 1, found});
  return run;
}

// What drafts were drawn from: near to the target.
Values near(const Size& size, const Values& x) {
  Values q;
  const Values apart = normal(DType::f32, size.rows * kDraft * size.cols, 2);
  for (int64_t i = 0; i < size.rows * kDraft; ++i) {
    const int64_t row = i / kDraft * (kDraft + 1) + i % kDraft;
    double sum = 0;
    for (int64_t j = 0; j < size.cols; ++j) {
      q.push_back(std::exp(x[static_cast<size_t>(row * size.cols + j)] +
                           apart[static_cast<size_t>(i * size.cols + j)] / 2));
      sum += q.back();
    }
    for (int64_t j = 0; j < size.cols; ++j) {
      double& mass = q[static_cast<size_t>(i * size.cols + j)];
      mass = rounded(DType::f32, mass / sum);
    }
  }
  return q;
}

}  // namespace

void verify_draft() {
  for (bool all : {false, true}) {
    for (DType dtype : dtypes()) {
      for (const Size& size : sizes()) {
        Options options;
        if (all) {
          options.top_k = size.cols / 2 + 1;
          options.top_p = 0.875f;
          options.min_p = 0.0625f;
        }
        const Places places(size.rows, all);
        const Values x = normal(dtype, size.rows * (kDraft + 1) * size.cols, 1);
        const std::vector<Values> given{x, near(size, x)};
        // The tokens are those of x, whatever is done to it.
        const auto with_x = [&](std::vector<Values> inputs) {
          inputs.push_back(x);
          return inputs;
        };
        report(
            case_name("verify_draft", dtype, size) + (all ? " filtered" : ""),
            [&] { return run(size, options, places, with_x(given), dtype); },
            [&](const std::vector<Values>& inputs, bool single) {
              return single ? reference<float>(size, options, places, with_x(inputs))
                            : reference<double>(size, options, places, with_x(inputs));
            },
            given);
      }
    }
  }
  const float* none = nullptr;
  must_refuse(
      "verify_draft of no rows",
      sample_verify(nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, 0, 2, 8, 8, nullptr, none,
                    none, none, none, none, none, nullptr, 0, nullptr, 0, nullptr, 0, 0, 1, 1, 0, 1,
                    0, 0, nullptr, nullptr, 0, 0, 0, 0, DType::f32, nullptr));
}

}  // namespace tilewise::selftest
