// An array of the device, exactly as long as it is, so that a tool sees every access outside of it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "launchers.h"

namespace tilewise::selftest {

size_t bytes_of(DType dtype);
double epsilon_of(DType dtype);
const char* name_of(DType dtype);

// The value nearest to this one that the dtype has.
double rounded(DType dtype, double value);
std::vector<double> rounded(DType dtype, std::vector<double> values);

class Array {
 public:
  // No array at all: a null pointer.
  Array() = default;
  // With these values, rounded.
  Array(DType dtype, const std::vector<double>& values);
  // Rows of it, `stride` elements apart; what lies between them is NaN.
  Array(DType dtype, const std::vector<double>& values, size_t rows, size_t stride);
  // Of integers, whose values nobody asks for.
  template <typename Integer>
  explicit Array(const std::vector<Integer>& integers) {
    upload(integers.data(), integers.size() * sizeof(Integer), sizeof(Integer));
  }
  // To be written: NaN until then.
  Array(DType dtype, size_t count);
  ~Array();
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;

  template <typename T = void>
  T* at() const {
    return reinterpret_cast<T*>(device_ + begin_);
  }
  std::vector<double> values() const;
  std::vector<unsigned char> bits() const;

 private:
  void upload(const void* bits, size_t bytes, size_t element);

  DType dtype_ = DType::f32;
  size_t bytes_ = 0, begin_ = 0;
  unsigned char* device_ = nullptr;
};

// Of the arrays that are made from now on, have the one with this number, from 0, begin one element
// late, where 16 bytes cannot be read at once; with -1, none.
void misalign(int number);
// How many were made since.
int arrays_made();

// End the program, unless the status is one of success.
void must_succeed(cudaError_t status, const char* what);

}  // namespace tilewise::selftest
