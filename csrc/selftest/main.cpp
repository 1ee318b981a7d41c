// selftest [--orders N] [--cols N] [--over N] [--aligned] [OP ...]: hold every launcher to fp64,
// without Python, in N orders, on rows of at most N columns, or of more than N, and on arrays that
// are misaligned in turn unless told otherwise. Compiled by nvcc it runs on a GPU, where
// compute-sanitizer can watch it; compiled against csrc/emulation/, on a CPU. One line of JSON for
// each case; 1 if any is wrong, 3 if a launch failed.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>

#include "selftest/selftest.h"

namespace tilewise::selftest {
namespace {

constexpr size_t kLittle = 8192;  // bytes of outputs

int orders = 4;
int64_t most_cols = INT64_MAX;
int64_t over_cols = 0;
int misaligned = 3;  // arrays of a case
int wrong = 0;
int cases = 0;

void say(const std::string& name, double ratio, const std::string& what) {
  ++cases;
  wrong += !what.empty();
  std::printf("{\"case\": \"%s\", \"ratio\": %.3f, \"ok\": %s%s}\n", name.c_str(), ratio,
              what.empty() ? "true" : "false",
              what.empty() ? "" : (", \"wrong\": \"" + what + "\"").c_str());
  std::fflush(stdout);
}

// On a GPU the order is its own; there the same thing is run again.
void choose_order(int i) {
  const std::string order = i == 0 ? "forward" : i == 1 ? "reverse" : std::to_string(i);
  setenv("TILEWISE_EMULATION_ORDER", order.c_str(), 1);
}

}  // namespace

bool is_asked_for(int64_t cols) { return over_cols < cols && cols <= most_cols; }

const std::vector<Size>& sizes() {
  static const std::vector<Size> kSizes = [] {
    std::vector<Size> kept;
    for (const Size& size :
         {Size{3, 8, 0}, Size{1, 1, 0}, Size{3, 127, 0}, Size{3, 131, 0}, Size{5, 64, 8},
          Size{40, 16, 3}, Size{5, 65, 1}, Size{9, 1024, 0}, Size{2, 2051, 5},
          // Lanes that hold five accesses, a block; clusters; more than a cluster of float32 holds.
          Size{3, 640, 0}, Size{2, 4096, 0}, Size{2, 16392, 0}, Size{2, 16411, 1},
          Size{1, 65544, 0}, Size{1, 131101, 0}}) {
      if (is_asked_for(size.cols)) kept.push_back(size);
    }
    return kept;
  }();
  return kSizes;
}

const std::vector<DType>& dtypes() {
  static const std::vector<DType> kDTypes{DType::f32, DType::f16, DType::bf16};
  return kDTypes;
}

std::string case_name(const char* op, DType dtype, const Size& size) {
  return std::string(op) + " " + name_of(dtype) + " " + std::to_string(size.rows) + " x " +
         std::to_string(size.cols) + (size.gap ? " apart" : "");
}

Values normal(DType dtype, int64_t count, int seed) {
  std::minstd_rand random(static_cast<unsigned>(seed));
  std::normal_distribution<double> distribution;
  Values values(static_cast<size_t>(count));
  for (double& value : values) value = rounded(dtype, distribution(random));
  return values;
}

void keep(Run& run, const std::string& name, DType dtype, int64_t cols, const Array& array) {
  const std::vector<unsigned char> bits = array.bits();
  run.bits.insert(run.bits.end(), bits.begin(), bits.end());
  run.outputs.push_back({name, dtype, static_cast<size_t>(cols), array.values()});
}

void report(const std::string& name, const std::function<Run()>& run, const Reference& reference,
            const std::vector<Values>& inputs) {
  std::string what;
  double ratio = 0;
  const auto hold = [&](const Run& held, const std::string& where) {
    const std::vector<Verdict> verdicts = judge(held.outputs, reference, inputs);
    for (size_t i = 0; i < verdicts.size(); ++i) {
      const Verdict& verdict = verdicts[i];
      ratio = std::max(ratio, verdict.error / std::max(verdict.allowed, 1e-300));
      if (!verdict.is_right()) what = held.outputs[i].name + " is not within the rule" + where;
    }
  };
  choose_order(0);
  misalign(-1);
  const Run first = run();
  hold(first, "");
  const int arrays = first.bits.size() <= kLittle ? arrays_made() : 0;
  for (int i = 1; i < orders; ++i) {
    choose_order(i);
    if (run().bits != first.bits) what = "other bits in run " + std::to_string(i);
  }
  choose_order(0);
  for (int i = 0; i < std::min(arrays, misaligned); ++i) {
    const int number = (cases * misaligned + i) % arrays;
    misalign(number);
    const Run again = run();
    if (again.bits != first.bits) {
      hold(again, " with array " + std::to_string(number) + " misaligned");
    }
  }
  misalign(-1);
  say(name, ratio, what);
}

void must_refuse(const std::string& name, cudaError_t status) {
  say(name, 0, status == cudaSuccess ? "must be refused, and was not" : "");
}

}  // namespace tilewise::selftest

int main(int count, char** words) {
  using namespace tilewise::selftest;
  const std::map<std::string, void (*)()> ops{
      {"attention", attention},
      {"attention_decode", attention_decode},
      {"cross_entropy", cross_entropy},
      {"dropout_add", dropout_add},
      {"embed", embed},
      {"gelu", gelu},
      {"glu", glu},
      {"layer_norm", layer_norm},
      {"linear_cross_entropy", linear_cross_entropy},
      {"linear_sample", linear_sample},
      {"multinomial", multinomial},
      {"qk_norm_rotary", qk_norm_rotary},
      {"rms_norm", rms_norm},
      {"rotary", rotary},
      {"sample", sample},
      {"scored_softmax", scored_softmax},
      {"softmax", softmax},
      {"verify_draft", verify_draft},
  };
  std::vector<std::string> chosen;
  for (int i = 1; i < count; ++i) {
    if (!std::strcmp(words[i], "--orders") && i + 1 < count) {
      orders = std::atoi(words[++i]);
    } else if (!std::strcmp(words[i], "--cols") && i + 1 < count) {
      most_cols = std::atoll(words[++i]);
    } else if (!std::strcmp(words[i], "--over") && i + 1 < count) {
      over_cols = std::atoll(words[++i]);
    } else if (!std::strcmp(words[i], "--aligned")) {
      misaligned = 0;
    } else if (ops.count(words[i])) {
      chosen.push_back(words[i]);
    } else {
      std::string known;
      for (const auto& [name, test] : ops) known += (known.empty() ? "" : ", ") + name;
      std::fprintf(stderr, "selftest: OP must be one of %s, got %s\n", known.c_str(), words[i]);
      return 2;
    }
  }
  for (const auto& [name, test] : ops) {
    if (chosen.empty() || std::count(chosen.begin(), chosen.end(), name)) test();
  }
  std::printf("{\"cases\": %d, \"wrong\": %d}\n", cases, wrong);
  return wrong ? 1 : 0;
}
