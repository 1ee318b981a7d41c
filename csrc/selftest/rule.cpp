#include "selftest/rule.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>

#include "selftest/array.h"

namespace tilewise::selftest {
namespace {

constexpr size_t kBlockRows = 32;
constexpr int kNudges = 3;

Values errors(const Values& values, const Values& truth) {
  Values apart(values.size());
  for (size_t i = 0; i < values.size(); ++i) {
    apart[i] = std::abs(values[i] - truth[i]);
    if (!std::isnan(apart[i])) continue;
    const bool same = std::isnan(values[i]) && std::isnan(truth[i]);
    apart[i] = same ? 0 : std::numeric_limits<double>::infinity();
  }
  return apart;
}

double mean(const Values& values) {
  return total<double>(0, values.size(), [&](size_t i) { return values[i]; }) / values.size();
}

double maximum(const Values& values, size_t begin, size_t end) {
  double most = 0;
  for (size_t i = begin; i < end; ++i) most = std::max(most, std::abs(values[i]));
  return most;
}

// The one that comes nearest to failing.
bool is_worse(const Verdict& a, const Verdict& b) {
  return a.error * b.allowed > b.error * a.allowed;
}

Verdict judge_one(const Output& output, const Values& truth, const std::vector<Values>& runs) {
  const Values mine = errors(output.ours, truth);
  std::vector<Values> theirs;
  for (const Values& run : runs) theirs.push_back(errors(run, truth));

  double mean_allowed = 2 * mean(errors(rounded(output.dtype, truth), truth));
  for (const Values& run : theirs) mean_allowed = std::max(mean_allowed, 2 * mean(run));
  Verdict worst{0, 1};
  if (truth.size() >= 2 * kBlockRows) worst = {mean(mine), mean_allowed};

  const size_t block = kBlockRows * output.cols;
  for (size_t begin = 0; begin < truth.size(); begin += block) {
    const size_t end = std::min(begin + block, truth.size());
    double allowed = 0;
    for (const Values& run : theirs) allowed = std::max(allowed, 2 * maximum(run, begin, end));
    allowed += epsilon_of(output.dtype) * maximum(truth, begin, end);
    const Verdict here{maximum(mine, begin, end), allowed};
    if (is_worse(here, worst)) worst = here;
  }
  return worst;
}

// Each number moved, at random, to a neighbouring one in fp32, or left.
std::vector<Values> nudged(std::vector<Values> inputs, std::minstd_rand& random) {
  for (Values& input : inputs) {
    for (double& value : input) {
      const auto way = static_cast<float>(static_cast<int>(random() % 3) - 1);
      if (way != 0) value = std::nextafter(static_cast<float>(value), way * INFINITY);
    }
  }
  return inputs;
}

}  // namespace

std::vector<Verdict> judge(const std::vector<Output>& outputs, const Reference& reference,
                           const std::vector<Values>& inputs) {
  const std::vector<Values> truth = reference(inputs, false);
  std::vector<std::vector<Values>> runs{reference(inputs, true)};
  std::minstd_rand random(1);
  for (int i = 0; i < kNudges; ++i) runs.push_back(reference(nudged(inputs, random), true));
  std::vector<Verdict> verdicts;
  for (size_t o = 0; o < outputs.size(); ++o) {
    std::vector<Values> yardsticks;
    const bool is_single = outputs[o].dtype == DType::f32;  // where one run may be exact by luck
    for (const auto& run : runs) {
      if (is_single || yardsticks.empty()) yardsticks.push_back(rounded(outputs[o].dtype, run[o]));
    }
    verdicts.push_back(judge_one(outputs[o], truth[o], yardsticks));
  }
  return verdicts;
}

}  // namespace tilewise::selftest
