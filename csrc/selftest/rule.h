// Whether a kernel is right: the one rule of the project, as in python/tilewise/check.py.
#pragma once

#include <cstddef>
#include <functional>
#include <string>
#include <vector>

#include "launchers.h"

namespace tilewise::selftest {

using Values = std::vector<double>;

// One output of a kernel, beside what the reference computes for it.
struct Output {
  std::string name;
  DType dtype;
  size_t cols;  // of its rows: blocks of 32 rows are judged by themselves
  Values ours;
};

// The reference: inputs in, as many outputs as the kernel has out. `single`: in fp32 arithmetic.
using Reference =
    std::function<std::vector<Values>(const std::vector<Values>& inputs, bool single)>;

struct Verdict {
  double error;
  double allowed;
  bool is_right() const { return error <= allowed; }
};

// In every block of 32 rows, with maxima over it,
//   max|ours - truth| <= 2 max|yardstick - truth| + eps max|truth|
// and over all the mean error is at most twice the yardstick's, or the rounded truth's. In fp32 the
// yardstick is the worst of four runs, three of them on inputs a rounding away. NaN must be NaN.
std::vector<Verdict> judge(const std::vector<Output>& outputs, const Reference& reference,
                           const std::vector<Values>& inputs);

// The sum, in pairs, of `count` terms.
template <typename Real, typename Term>
Real total(size_t begin, size_t count, Term term) {
  if (count > 16) {
    const size_t half = count / 2;
    return total<Real>(begin, half, term) + total<Real>(begin + half, count - half, term);
  }
  Real sum = 0;
  for (size_t i = begin; i < begin + count; ++i) sum += term(i);
  return sum;
}

}  // namespace tilewise::selftest
