#include "selftest/array.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>

namespace tilewise::selftest {
namespace {

int misaligned = -1;
int made = 0;

// Call body with a zero of the dtype's type.
template <typename Body>
auto with_type(DType dtype, Body body) {
  switch (dtype) {
    case DType::f16: return body(__half{});
    case DType::bf16: return body(__nv_bfloat16{});
    default: return body(float{});
  }
}

float widened(float value) { return value; }
float widened(__half value) { return __half2float(value); }
float widened(__nv_bfloat16 value) { return __bfloat162float(value); }

void narrow(float& to, float value) { to = value; }
void narrow(__half& to, float value) { to = __float2half_rn(value); }
void narrow(__nv_bfloat16& to, float value) { to = __float2bfloat16_rn(value); }

std::vector<unsigned char> encoded(DType dtype, const std::vector<double>& values) {
  return with_type(dtype, [&](auto element) {
    std::vector<unsigned char> bits(values.size() * sizeof element);
    for (size_t i = 0; i < values.size(); ++i) {
      narrow(element, static_cast<float>(values[i]));
      std::memcpy(bits.data() + i * sizeof element, &element, sizeof element);
    }
    return bits;
  });
}

std::vector<double> decoded(DType dtype, const std::vector<unsigned char>& bits) {
  return with_type(dtype, [&](auto element) {
    std::vector<double> values(bits.size() / sizeof element);
    for (size_t i = 0; i < values.size(); ++i) {
      std::memcpy(&element, bits.data() + i * sizeof element, sizeof element);
      values[i] = widened(element);
    }
    return values;
  });
}

std::vector<double> spread(const std::vector<double>& values, size_t rows, size_t stride) {
  if (values.empty()) return values;
  const size_t cols = values.size() / rows;
  std::vector<double> apart((rows - 1) * stride + cols, std::numeric_limits<double>::quiet_NaN());
  for (size_t i = 0; i < values.size(); ++i) apart[i / cols * stride + i % cols] = values[i];
  return apart;
}

}  // namespace

size_t bytes_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

double epsilon_of(DType dtype) {
  return dtype == DType::f32 ? 0x1p-23 : dtype == DType::f16 ? 0x1p-10 : 0x1p-7;
}

const char* name_of(DType dtype) {
  return dtype == DType::f32 ? "float32" : dtype == DType::f16 ? "float16" : "bfloat16";
}

double rounded(DType dtype, double value) {
  return with_type(dtype, [&](auto element) -> double {
    narrow(element, static_cast<float>(value));
    return widened(element);
  });
}

std::vector<double> rounded(DType dtype, std::vector<double> values) {
  for (double& value : values) value = rounded(dtype, value);
  return values;
}

void must_succeed(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::printf("{\"fatal\": \"%s: %s\"}\n", what, cudaGetErrorString(status));
  std::exit(3);
}

Array::Array(DType dtype, const std::vector<double>& values) : dtype_(dtype) {
  const std::vector<unsigned char> bits = encoded(dtype, values);
  upload(bits.data(), bits.size(), bytes_of(dtype));
}

Array::Array(DType dtype, const std::vector<double>& values, size_t rows, size_t stride)
    : Array(dtype, spread(values, rows, stride)) {}

Array::Array(DType dtype, size_t count) : dtype_(dtype) {
  const std::vector<unsigned char> bits(count * bytes_of(dtype), 0xFF);
  upload(bits.data(), bits.size(), bytes_of(dtype));
}

Array::~Array() { cudaFree(device_); }

void Array::upload(const void* bits, size_t bytes, size_t element) {
  if (bytes == 0) return;
  begin_ = made++ == misaligned ? element : 0;
  bytes_ = bytes;
  must_succeed(cudaMalloc(reinterpret_cast<void**>(&device_), begin_ + bytes), "cudaMalloc");
  must_succeed(cudaMemcpy(at(), bits, bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
}

std::vector<unsigned char> Array::bits() const {
  std::vector<unsigned char> host(bytes_);
  must_succeed(cudaMemcpy(host.data(), at(), bytes_, cudaMemcpyDeviceToHost), "cudaMemcpy");
  return host;
}

std::vector<double> Array::values() const { return decoded(dtype_, bits()); }

void misalign(int number) {
  misaligned = number;
  made = 0;
}

int arrays_made() { return made; }

}  // namespace tilewise::selftest
