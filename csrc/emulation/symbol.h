// What the symbol table of a file says about an address of the code in it.
#pragma once

#include <cstdint>
#include <string>

namespace tilewise::emulation {

struct Symbol {
  std::string file;      // empty: in none
  uintptr_t offset = 0;  // of the address in it
  std::string name;      // of the function it is in, readable; empty if unknown
};

Symbol symbol_of(const void* address);

}  // namespace tilewise::emulation
