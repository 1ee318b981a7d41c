// What -fsanitize=alignment,bounds reports, so that the plain build fails where a GPU would: a
// misaligned vector load, an index outside of an array. g++ and clang++ call these functions; with
// AddressSanitizer its own library has them.
#if !defined(TILEWISE_ADDRESS)
#include <cstdint>
#include <cstdio>

#include "emulation/machine.h"

namespace {

using tilewise::emulation::Place;

struct Location {
  const char* file;
  uint32_t line;
  uint32_t column;
};

struct TypeName {
  uint16_t kind;
  uint16_t details;
  char text[1];
};

struct TypeMismatch {
  Location location;
  const TypeName* type;
  unsigned char log_alignment;
  unsigned char kind;  // of the access
};

struct OutOfBounds {
  Location location;
  const TypeName* array;
  const TypeName* index;
};

Place place_of(const Location& location) {
  return {location.file, static_cast<int>(location.line), "device code"};
}

}  // namespace

extern "C" {

__attribute__((visibility("hidden"))) void __ubsan_handle_type_mismatch_v1(
    const TypeMismatch* found, uintptr_t address) {
  const auto alignment = static_cast<unsigned>(1) << found->log_alignment;
  tilewise::emulation::fail(place_of(found->location),
                            "misaligned address: %#zx must be a multiple of %u to access %s",
                            static_cast<size_t>(address), alignment, found->type->text);
}

__attribute__((visibility("hidden"))) void __ubsan_handle_out_of_bounds(const OutOfBounds* found,
                                                                        uintptr_t index) {
  tilewise::emulation::fail(place_of(found->location), "out of bounds: %s has no element %zd",
                            found->array->text, static_cast<ptrdiff_t>(index));
}
}
#endif
