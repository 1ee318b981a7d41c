// What went wrong, in words.
#include <cstring>
#include <map>

#include "emulation/machine.h"

namespace tilewise::emulation {
namespace {

std::string triple(uint3 v) {
  return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}

std::string hex(unsigned mask) {
  std::string digits(8, '0');
  for (int i = 7; i >= 0; --i, mask >>= 4) digits[i] = "0123456789abcdef"[mask & 15];
  return digits;
}

std::string describe(const Thread& thread) {
  if (thread.returned) return "returned";
  const Wait& wait = thread.wait;
  std::string text = std::string("wait in ") + wait.what;
  if (wait.id >= 0) text += " of barrier " + std::to_string(wait.id);
  if (wait.threads) text += " for " + std::to_string(wait.threads) + " threads";
  if (wait.mask) text += " with mask " + hex(wait.mask);
  return text + " at " + wait.place.file + ":" + std::to_string(wait.place.line) + " (" +
         wait.place.function + ")";
}

// "0-31, 64": ranks in order, neighbours joined.
std::string ranges(const std::vector<int>& ranks) {
  std::string text;
  for (size_t i = 0; i < ranks.size();) {
    size_t j = i;
    while (j + 1 < ranks.size() && ranks[j + 1] == ranks[j] + 1) ++j;
    text += (text.empty() ? "" : ", ") + std::to_string(ranks[i]);
    if (j > i) text += "-" + std::to_string(ranks[j]);
    i = j + 1;
  }
  return text;
}

}  // namespace

bool same(Place a, Place b) {
  return a.line == b.line && (a.file == b.file || !std::strcmp(a.file, b.file));
}

std::string whereabouts(const Thread* thread) {
  std::string text = "kernel " + kernel_name(machine.kernel);
  if (thread) {
    text += ", block " + triple(thread->block->index) + ", thread " + triple(thread->index);
  }
  return text;
}

std::string describe_deadlock() {
  std::string text = "deadlock: no thread can go on\n  in " + whereabouts(nullptr);
  for (const auto& block : machine.blocks) {
    if (!block->alive) continue;
    std::map<std::string, std::vector<int>> groups;
    for (const Thread& thread : block->threads) groups[describe(thread)].push_back(thread.rank);
    for (const auto& [what, ranks] : groups) {
      text += "\n  block " + triple(block->index) + ": " + std::to_string(ranks.size()) + " of " +
              std::to_string(block->threads.size()) + " threads " + what + ": " + ranges(ranks);
    }
  }
  return text;
}

}  // namespace tilewise::emulation
