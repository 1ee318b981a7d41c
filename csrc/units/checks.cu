// Runs the kernels of units/ and compares them with sums in fp64. No PyTorch: the same program is
// built by nvcc for a GPU, where all of it must pass as well, and is run by compute-sanitizer
// there.
//
//   units              every check with clean kernels, one line of JSON each
//   units NAME         those whose name contains NAME
//   units NAME FAULT   with a fault planted: the line says how it was noticed
//   units --list       the faults
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <sstream>
#include <string>
#include <vector>

#include "selftest/array.h"
#include "units/units.h"

namespace {

using namespace tilewise;
using namespace tilewise::units;
using namespace tilewise::selftest;

std::vector<std::string> fault_names() {
#define TILEWISE_TEXT(...) #__VA_ARGS__
#define TILEWISE_TEXT_OF(list) TILEWISE_TEXT(list)
  std::istringstream text(TILEWISE_TEXT_OF(TILEWISE_FAULTS));
  std::vector<std::string> names;
  for (std::string name; std::getline(text, name, ',');) {
    names.push_back(name.substr(name.find_first_not_of(' ')));
  }
  return names;
}

// Small whole numbers: every sum of their products is exact in fp32, in whatever order.
std::vector<double> drawn(size_t count) {
  static uint32_t state = 12345;
  std::vector<double> values(count);
  for (double& value : values) {
    state = state * 1664525 + 1013904223;
    value = static_cast<int>(state >> 24) % 17 - 8;
  }
  return values;
}

std::string wanted;
Fault fault = Fault::none;
int failed = 0, ran = 0;

std::string escaped(const std::string& text) {
  std::string safe;
  for (const char c : text) {
    if (c == '"' || c == '\\') safe += '\\';
    safe += c == '\n' ? ' ' : c;
  }
  return safe;
}

struct Result {
  cudaError_t status;
  std::vector<double> got, expected;
};

// Whole numbers come out exactly, or something is wrong.
void check(const std::string& name, const std::function<Result()>& run) {
  if (name.find(wanted) == std::string::npos) return;
  const Result result = run();
  size_t wrong = 0, first = 0;
  for (size_t i = result.got.size(); i-- > 0;) {
    if (result.got[i] == result.expected[i]) continue;
    ++wrong;
    first = i;
  }
  std::string told;
  if (result.status != cudaSuccess) {
    told = escaped(cudaGetErrorString(result.status));
    cudaGetLastError();
  } else if (wrong) {
    told = std::to_string(wrong) + " of " + std::to_string(result.got.size()) +
           " numbers are wrong, the first at " + std::to_string(first) + ": " +
           std::to_string(result.got[first]) + " instead of " +
           std::to_string(result.expected[first]);
  }
  std::printf("{\"check\": \"%s\", \"ok\": %s, \"told\": \"%s\"}\n", name.c_str(),
              told.empty() ? "true" : "false", told.c_str());
  std::fflush(stdout);
  ++ran;
  failed += !told.empty();
}

// --- The checks.

void check_copy(DType dtype, int swizzle, std::vector<int64_t> sizes, std::vector<int> at) {
  const int rank = static_cast<int>(sizes.size());
  std::string name = std::string("copy ") + name_of(dtype) + " swizzle " + std::to_string(swizzle);
  for (int i = 0; i < rank; ++i) {
    name += (i ? ", " : " at ") + std::to_string(at[i]) + " of " + std::to_string(sizes[i]);
  }
  check(name, [&] {
    int64_t count = 1;
    for (const int64_t size : sizes) count *= size;
    const int columns = (16 << swizzle) / (dtype == DType::f32 ? 4 : 2);
    const std::vector<double> values = drawn(count);
    const Array x(dtype, values), stored(dtype, std::vector<double>(count));
    const Array seen(dtype, kBoxRows * columns);
    Result result;
    result.status = copy_box(stored.at(), seen.at(), x.at(), rank, sizes.data(), at.data(), swizzle,
                             dtype, fault, nullptr);
    if (result.status != cudaSuccess) return result;
    constexpr int kBoxes[4][4] = {{64, 1, 1, 1}, {16, 4, 1, 1}, {8, 4, 2, 1}, {4, 4, 2, 2}};
    std::vector<double> box(kBoxRows * columns, 0.), copied(count, 0.);
    for (int row = 0; row < kBoxRows; ++row) {
      for (int column = 0; column < columns; ++column) {
        int64_t index = at[0] + column, stride = sizes[0];
        bool inside = 0 <= index && index < sizes[0];
        for (int i = 1, rest = row; i < rank; ++i) {
          const int64_t along = at[i] + rest % kBoxes[rank - 2][i - 1];
          rest /= kBoxes[rank - 2][i - 1];
          inside = inside && 0 <= along && along < sizes[i];
          index += along * stride;
          stride *= sizes[i];
        }
        if (!inside) continue;
        box[row * columns + column] = values[index];
        copied[index] = 2 * values[index];
      }
    }
    result.got = seen.values();
    result.expected = box;
    const std::vector<double> written = stored.values();
    result.got.insert(result.got.end(), written.begin(), written.end());
    result.expected.insert(result.expected.end(), copied.begin(), copied.end());
    return result;
  });
}

// What comes after a packed sequence is neither seen nor written.
void check_sequence(int rows, int first, int count, int row) {
  const std::string name = "copy of a sequence, rows " + std::to_string(first) + " to " +
                           std::to_string(first + count) + " of " + std::to_string(rows) +
                           ", from its row " + std::to_string(row);
  check(name, [&] {
    constexpr int kCols = 64;
    const std::vector<double> values = drawn(rows * kCols);
    const Array x(DType::bf16, values), seen(DType::bf16, kBoxRows * kCols);
    const Array stored(DType::bf16, std::vector<double>(rows * kCols));
    Result result;
    result.status =
        copy_sequence(stored.at(), seen.at(), x.at(), rows, first, count, row, nullptr);
    if (result.status != cudaSuccess) return result;
    std::vector<double> box(kBoxRows * kCols, 0.), copied(rows * kCols, 0.);
    for (int i = 0; i < std::min(count - row, kBoxRows) * kCols; ++i) {
      box[i] = values[(first + row) * kCols + i];
      copied[(first + row) * kCols + i] = 2 * box[i];
    }
    result.got = seen.values();
    result.expected = box;
    const std::vector<double> written = stored.values();
    result.got.insert(result.got.end(), written.begin(), written.end());
    result.expected.insert(result.expected.end(), copied.begin(), copied.end());
    return result;
  });
}

// A tensor that the copy engine cannot read has no map.
void check_refusal(const std::string& what, int64_t columns, int offset) {
  check("copy refuses " + what, [&] {
    const std::vector<int64_t> sizes{columns, 64};
    const int at[] = {0, 0};
    const Array x(DType::bf16, columns * 64 + 8), seen(DType::bf16, 64 * 64);
    const cudaError_t status = copy_box(x.at(), seen.at(), x.at<uint8_t>() + offset, 2,
                                        sizes.data(), at, 3, DType::bf16, Fault::none, nullptr);
    return Result{
        cudaSuccess, {static_cast<double>(status)}, {static_cast<double>(cudaErrorInvalidValue)}};
  });
}

// c = a b of the given values, [rows, depth] and [depth, cols], either possibly transposed.
std::vector<double> product(const std::vector<double>& a, const std::vector<double>& b,
                            int64_t rows, int64_t cols, int64_t depth, bool a_transposed,
                            bool b_transposed) {
  std::vector<double> c(rows * cols);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) {
      double sum = 0;
      for (int64_t k = 0; k < depth; ++k) {
        sum += (a_transposed ? a[k * rows + i] : a[i * depth + k]) *
               (b_transposed ? b[j * depth + k] : b[k * cols + j]);
      }
      c[i * cols + j] = sum;
    }
  }
  return c;
}

void check_wgmma(DType dtype, int64_t cols, bool a_registers, bool a_transposed, bool b_transposed,
                 int swizzle) {
  const std::string name =
      std::string("wgmma ") + name_of(dtype) + " " + std::to_string(cols) + " cols, a " +
      (a_registers ? "in registers" : "in shared memory") + (a_transposed ? " transposed" : "") +
      (b_transposed ? ", b transposed" : ", b") + ", swizzle " + std::to_string(swizzle);
  check(name, [&] {
    const std::vector<double> a_values = drawn(64 * 64), b_values = drawn(64 * cols);
    const Array a(dtype, a_values), b(dtype, b_values), c(DType::f32, 64 * cols);
    Result result;
    result.status = wgmma_tile(c.at<float>(), a.at(), b.at(), cols, a_registers, a_transposed,
                               b_transposed, swizzle, dtype, fault, nullptr);
    if (result.status != cudaSuccess) return result;
    result.got = c.values();
    result.expected = product(a_values, b_values, 64, cols, 64, a_transposed, b_transposed);
    return result;
  });
}

void check_mma(DType dtype, int64_t rows, int64_t cols, int64_t depth, bool b_transposed,
               int copy_bytes) {
  const std::string name = std::string("mma ") + name_of(dtype) + " " + std::to_string(rows) +
                           " x " + std::to_string(depth) + " x " + std::to_string(cols) +
                           (b_transposed ? " transposed" : "") + ", copies of " +
                           std::to_string(copy_bytes);
  check(name, [&] {
    const std::vector<double> a_values = drawn(rows * depth), b_values = drawn(depth * cols);
    const Array a(dtype, a_values), b(dtype, b_values), c(DType::f32, rows * cols);
    Result result;
    result.status = mma_tiles(c.at<float>(), a.at(), b.at(), rows, cols, depth, b_transposed,
                              copy_bytes, dtype, fault, nullptr);
    if (result.status != cudaSuccess) return result;
    result.got = c.values();
    result.expected = product(a_values, b_values, rows, cols, depth, false, b_transposed);
    return result;
  });
}

void check_tf32() {
  check("mma tf32", [] {
    const std::vector<double> a_values = drawn(16 * 8), b_values = drawn(8 * 8);
    const Array a(DType::f32, a_values), b(DType::f32, b_values), c(DType::f32, 16 * 8);
    Result result;
    result.status = mma_tf32_tile(c.at<float>(), a.at<float>(), b.at<float>(), nullptr);
    if (result.status != cudaSuccess) return result;
    result.got = c.values();
    result.expected = product(a_values, b_values, 16, 8, 8, false, false);
    return result;
  });
}

void check_cluster(int64_t blocks, int cluster) {
  check("cluster of " + std::to_string(cluster), [&] {
    constexpr int kThreads = 128;
    const std::vector<double> values = drawn(blocks * kThreads);
    const Array x(DType::f32, values), y(DType::f32, blocks * kThreads);
    Result result;
    result.status = cluster_exchange(y.at<float>(), x.at<float>(), blocks, cluster, fault, nullptr);
    if (result.status != cudaSuccess) return result;
    result.got = y.values();
    for (int64_t i = 0; i < blocks * kThreads; ++i) {
      const int64_t block = i / kThreads, first = block / cluster * cluster;
      const int64_t before = first + (block - first + cluster - 1) % cluster;
      double sum = 100. * values[before * kThreads + i % kThreads];
      for (int rank = 0; rank < cluster; ++rank) {
        sum += (rank + 1) * values[(first + rank) * kThreads + i % kThreads];
      }
      result.expected.push_back(sum);
    }
    return result;
  });
}

void check_rules() {
  check("rules", [] {
    const Array y(DType::f32, 2 * 128), tile(DType::bf16, 64 * 64);
    Result result;
    result.status = keep_rules(y.at<float>(), tile.at(), 2, fault, nullptr);
    if (result.status != cudaSuccess) return result;
    result.got = y.values();
    result.expected.assign(2 * 128, 1.);
    return result;
  });
}

void check_gemm(DType dtype, int64_t rows, int64_t cols, int64_t depth) {
  const std::string name = std::string("gemm ") + name_of(dtype) + " " + std::to_string(rows) +
                           " x " + std::to_string(depth) + " x " + std::to_string(cols);
  check(name, [&] {
    const std::vector<double> a_values = drawn(rows * depth), b_values = drawn(cols * depth);
    const Array a(dtype, a_values), b(dtype, b_values), c(dtype, rows * cols);
    Result result;
    result.status = gemm(c.at(), a.at(), b.at(), rows, cols, depth, dtype, fault, nullptr);
    if (result.status != cudaSuccess) return result;
    result.got = c.values();
    result.expected = product(a_values, b_values, rows, cols, depth, false, true);
    for (double& value : result.expected) value = rounded(dtype, value);
    return result;
  });
}

void check_all() {
  for (int swizzle = 0; swizzle < 4; ++swizzle) {
    check_copy(DType::bf16, swizzle, {136, 100}, {16, 8});
    check_copy(DType::bf16, swizzle, {136, 100}, {120, 70});  // beyond both ends
    check_copy(DType::bf16, swizzle, {136, 100}, {-4, -3});   // before both beginnings
  }
  check_copy(DType::f16, 3, {72, 64}, {8, 0});
  check_copy(DType::f32, 3, {36, 70}, {8, 10});
  check_copy(DType::bf16, 3, {72, 18, 5}, {8, 3, 2});
  check_copy(DType::bf16, 2, {40, 9, 5, 3}, {-8, 2, -1, 2});
  check_copy(DType::bf16, 1, {24, 5, 5, 3, 3}, {0, 1, 2, 0, 2});
  check_sequence(150, 20, 30, 0);   // ends in the box
  check_sequence(150, 20, 30, 16);
  check_sequence(150, 20, 90, 0);   // after it
  check_sequence(150, 90, 60, 40);  // with the tensor
  check_refusal("rows that are not 16-byte aligned", 68, 0);
  check_refusal("a tensor that is not 16-byte aligned", 64, 2);
  for (int swizzle = 0; swizzle < 4; ++swizzle) {
    for (const bool b_transposed : {true, false}) {
      check_wgmma(DType::bf16, 128, false, false, b_transposed, swizzle);
      check_wgmma(DType::bf16, 128, false, true, b_transposed, swizzle);
      check_wgmma(DType::bf16, 128, true, false, b_transposed, swizzle);
      check_wgmma(DType::f16, 128, swizzle % 2, false, b_transposed, swizzle);
    }
  }
  for (int64_t cols = 16; cols <= 256; cols += 16) {
    if (cols != 128) check_wgmma(DType::bf16, cols, false, false, true, 3);
  }
  check_mma(DType::bf16, 64, 64, 64, true, 16);
  check_mma(DType::bf16, 70, 72, 104, true, 16);
  check_mma(DType::bf16, 70, 72, 104, false, 16);
  check_mma(DType::f16, 33, 24, 40, true, 16);
  check_mma(DType::f16, 33, 24, 40, false, 16);
  check_mma(DType::bf16, 20, 30, 36, true, 8);
  check_mma(DType::bf16, 20, 30, 38, true, 4);
  check_tf32();
  check_cluster(4, 2);
  check_cluster(4, 4);
  check_rules();
  check_gemm(DType::bf16, 128, 128, 512);
  check_gemm(DType::bf16, 200, 136, 328);
  check_gemm(DType::f16, 100, 264, 72);
}

}  // namespace

int main(int count, char** words) {
  if (count > 1) wanted = words[1];
  const std::vector<std::string> faults = fault_names();
  if (wanted == "--list") {
    for (const std::string& name : faults) std::printf("%s\n", name.c_str());
    return 0;
  }
  if (count > 2) {
    const auto found = std::find(faults.begin(), faults.end(), words[2]);
    if (found == faults.end()) {
      std::fprintf(stderr, "units: FAULT must be one of --list, got %s\n", words[2]);
      return 2;
    }
    fault = static_cast<Fault>(found - faults.begin());
  }
  check_all();
  std::printf("{\"ran\": %d, \"failed\": %d}\n", ran, failed);
  return failed || !ran;
}
