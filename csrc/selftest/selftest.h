// What the test of an op is given, and what it reports to.
#pragma once

#include <string>
#include <vector>

#include "selftest/array.h"
#include "selftest/rule.h"

namespace tilewise::selftest {

struct Size {
  int64_t rows, cols;
  int64_t gap;  // elements between the rows of the inputs
};

constexpr int64_t kWideCols = 4096;  // more than this many take a while on a CPU

// Short and long rows, odd ones that cannot be read 16 bytes at a time, rows apart.
const std::vector<Size>& sizes();
const std::vector<DType>& dtypes();
std::string case_name(const char* op, DType dtype, const Size& size);

// Numbers of a standard normal distribution, rounded; the same ones at every call.
Values normal(DType dtype, int64_t count, int seed);

// What one run of the launchers of an op wrote.
struct Run {
  std::vector<Output> outputs;
  std::vector<unsigned char> bits;  // of them all
};
void keep(Run& run, const std::string& name, DType dtype, int64_t cols, const Array& array);

// Run it several times, in every order the emulator knows, hold the bits to be the same and the
// first run's values to the rule, and print a line.
void report(const std::string& name, const std::function<Run()>& run, const Reference& reference,
            const std::vector<Values>& inputs);

// A launch of no rows is an error and touches nothing.
void must_refuse(const std::string& name, cudaError_t status);

void embed();
void rms_norm();
void layer_norm();
void softmax();
void scored_softmax();
void cross_entropy();
void linear_cross_entropy();

}  // namespace tilewise::selftest
