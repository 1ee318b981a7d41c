// A place in the source of a kernel, as the default argument of whatever may wait or fail there.
#pragma once

namespace tilewise::emulation {

struct Place {
  const char* file;
  int line;
  const char* function;

  static constexpr Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE(),
                              const char* function = __builtin_FUNCTION()) {
    return {file, line, function};
  }
};

}  // namespace tilewise::emulation
