// The name of a kernel, from the symbol table of the file it is in: kernels are rarely exported.
#include "emulation/symbol.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <fcntl.h>
#include <link.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "emulation/machine.h"

namespace tilewise::emulation {
namespace {

// The function at `offset` of a 64-bit ELF file, or an empty string.
std::string function_at(const char* file, size_t bytes, uintptr_t offset) {
  const auto header = reinterpret_cast<const ElfW(Ehdr)*>(file);
  if (bytes < sizeof *header || std::memcmp(header->e_ident, ELFMAG, SELFMAG) != 0) return "";
  const auto sections = reinterpret_cast<const ElfW(Shdr)*>(file + header->e_shoff);
  for (int i = 0; i < header->e_shnum; ++i) {
    if (sections[i].sh_type != SHT_SYMTAB) continue;
    const char* names = file + sections[sections[i].sh_link].sh_offset;
    const auto symbols = reinterpret_cast<const ElfW(Sym)*>(file + sections[i].sh_offset);
    for (size_t s = 0; s < sections[i].sh_size / sizeof *symbols; ++s) {
      const uintptr_t begin = symbols[s].st_value, size = symbols[s].st_size;
      if ((symbols[s].st_info & 15) != STT_FUNC || !begin) continue;
      if (offset == begin || (begin < offset && offset < begin + size)) {
        return names + symbols[s].st_name;
      }
    }
  }
  return "";
}

std::string readable(const std::string& symbol) {
  int status = 0;
  char* demangled = abi::__cxa_demangle(symbol.c_str(), nullptr, nullptr, &status);
  std::string name = demangled ? demangled : symbol;
  std::free(demangled);
  return name;
}

}  // namespace

Symbol symbol_of(const void* address) {
  Dl_info info;
  if (!dladdr(address, &info) || !info.dli_fname) return {};
  Symbol symbol;
  // A program is named as it was called, not by where it is.
  char* place = realpath(access(info.dli_fname, R_OK) ? "/proc/self/exe" : info.dli_fname, nullptr);
  if (!place) return {};
  symbol.file = place;
  std::free(place);
  const int file = open(symbol.file.c_str(), O_RDONLY | O_CLOEXEC);
  struct stat state;
  if (file < 0) return {};
  const auto bytes = fstat(file, &state) == 0 ? static_cast<size_t>(state.st_size) : 0;
  void* content = mmap(nullptr, bytes, PROT_READ, MAP_PRIVATE, file, 0);
  close(file);
  if (content == MAP_FAILED) return {};
  const auto begin = static_cast<const char*>(content);
  symbol.offset = reinterpret_cast<uintptr_t>(address);
  const bool is_fixed = reinterpret_cast<const ElfW(Ehdr)*>(begin)->e_type == ET_EXEC;
  if (!is_fixed) symbol.offset -= reinterpret_cast<uintptr_t>(info.dli_fbase);
  symbol.name = readable(function_at(begin, bytes, symbol.offset));
  munmap(content, bytes);
  return symbol;
}

std::string kernel_name(const void* kernel) {
  const std::string name = symbol_of(kernel).name;
  if (!name.empty()) return name;
  char text[32];
  std::snprintf(text, sizeof text, "%p", kernel);
  return text;
}

}  // namespace tilewise::emulation
