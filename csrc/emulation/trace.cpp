// The lines come from addr2line, which every compiler here has beside it; without it a report has
// the name of the function and the address.
#include "emulation/trace.h"

#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "emulation/machine.h"
#include "emulation/symbol.h"

namespace tilewise::emulation {
namespace {

constexpr int kMaxLines = 6;

// This folder: what happens in its files is none of the kernel's business.
std::string own_folder() {
  const std::string file = __FILE__;
  return file.substr(0, file.rfind('/') + 1);
}

std::string quoted(const std::string& word) {
  std::string text = "'";
  for (const char c : word) text += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return text + "'";
}

struct Line {
  std::string function, place;  // "file:line", or empty
};

// The line of an address, and of the calls that were inlined around it, innermost first.
std::vector<Line> lines_at(const Symbol& symbol) {
  char offset[32];
  std::snprintf(offset, sizeof offset, "%#zx", static_cast<size_t>(symbol.offset));
  const std::string command =
      "addr2line -f -C -i -e " + quoted(symbol.file) + " " + offset + " 2>/dev/null";
  std::vector<Line> lines;
  std::FILE* told = popen(command.c_str(), "r");
  if (!told) return lines;
  char text[4096];
  const auto next = [&] {
    if (!std::fgets(text, sizeof text, told)) return false;
    text[std::strcspn(text, "\n")] = '\0';
    return true;
  };
  while (next()) {
    Line line{text, ""};
    if (!next()) break;
    line.place = text;
    line.place.erase(std::min(line.place.find(" ("), line.place.size()));  // a discriminator
    if (line.place.compare(0, 2, "??") != 0) lines.push_back(line);
  }
  pclose(told);
  return lines;
}

}  // namespace

Trace trace_from(const void* address, const void* frame) {
  Trace trace;
  trace.at[trace.count++] = address;
#if defined(__x86_64__) || defined(__aarch64__)
  // A frame begins with the caller's, and the address to return to.
  const char* begin = machine.current->fiber.stack;
  const char* end = begin + kStackBytes - 64 - 2 * sizeof(void*);
  const auto* at = static_cast<const char*>(frame);
  while (trace.count < Trace::kDepth && at >= begin && at < end &&
         reinterpret_cast<uintptr_t>(at) % sizeof(void*) == 0) {
    const auto* words = reinterpret_cast<const char* const*>(at);
    if (!words[1]) break;
    trace.at[trace.count++] = words[1] - 1;  // in the call, not after it
    if (words[0] <= at) break;
    at = words[0];
  }
#else
  static_cast<void>(frame);
#endif
  return trace;
}

std::string describe(const Trace& trace) {
  const std::string own = own_folder();
  std::string text;
  int lines = 0;
  for (int i = 0; i < trace.count && lines < kMaxLines; ++i) {
    const Symbol symbol = symbol_of(trace.at[i]);
    if (symbol.file.empty()) continue;
    for (const Line& line : lines_at(symbol)) {
      if (line.place.compare(0, own.size(), own) == 0 || lines == kMaxLines) continue;
      text += "\n  at " + line.place + " (" + line.function + ")";
      ++lines;
    }
    if (symbol.name == symbol_of(machine.kernel).name) break;  // whoever calls it is no kernel
  }
  if (!text.empty()) return text;
  char address[32];
  std::snprintf(address, sizeof address, "%p", trace.at[0]);
  const std::string name = symbol_of(trace.at[0]).name;
  return std::string("\n  at ") + address + " (" + (name.empty() ? "unknown" : name) + ")";
}

}  // namespace tilewise::emulation
