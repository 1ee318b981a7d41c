// What the test of an op is given, and what it reports to.
#pragma once

#include <string>
#include <tuple>
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
// Whether rows of so many columns are to be run; `sizes` has only those.
bool is_asked_for(int64_t cols);
std::string case_name(const char* op, DType dtype, const Size& size);

// Numbers of a standard normal distribution, rounded; the same ones at every call.
Values normal(DType dtype, int64_t count, int seed);

// What one run of the launchers of an op wrote.
struct Run {
  std::vector<Output> outputs;
  std::vector<unsigned char> bits;  // of them all
};
void keep(Run& run, const std::string& name, DType dtype, int64_t cols, const Array& array);

// Call a launcher with all arguments of these tuples, one after the other.
template <typename Launcher, typename... Tuples>
void launch(const char* name, Launcher launcher, const Tuples&... arguments) {
  must_succeed(std::apply(launcher, std::tuple_cat(arguments...)), name);
}

// Run it several times, in every order the emulator knows, hold the bits to be the same and the
// first run's values to the rule, and print a line. If there is little of it, it is run again with
// some of its arrays misaligned, others for each case: other bits are held to the rule too.
void report(const std::string& name, const std::function<Run()>& run, const Reference& reference,
            const std::vector<Values>& inputs);

// A launch of no rows is an error and touches nothing.
void must_refuse(const std::string& name, cudaError_t status);

void attention();
void attention_decode();
void cross_entropy();
void dropout_add();
void embed();
void gelu();
void glu();
void layer_norm();
void linear_cross_entropy();
void linear_sample();
void multinomial();
void qk_norm_rotary();
void rms_norm();
void rotary();
void sample();
void scored_softmax();
void softmax();
void verify_draft();

}  // namespace tilewise::selftest
