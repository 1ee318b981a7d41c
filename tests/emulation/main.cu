// program NAME bug|clean [ORDERS]: run one seeded kernel; NAME "every" runs all but those that
// spin. program conversions
#include <cstdlib>
#include <cstring>
#include <string>

#include "seeded.h"

int main(int count, char** words) {
  if (count == 2 && !std::strcmp(words[1], "conversions")) return seeded::conversions();
  if (count < 3) return 2;
  const int orders = count > 3 ? std::atoi(words[3]) : 1;
  const bool every = !std::strcmp(words[1], "every"), bug = !std::strcmp(words[2], "bug");
  bool right = true, known = false;
  for (const auto* room : {&seeded::kBarriers, &seeded::kWarps, &seeded::kMemory, &seeded::kBlocks,
                           &seeded::kWritten, &seeded::kSpins}) {
    for (const seeded::Seed& seed : *room) {
      if (every ? room == &seeded::kSpins : std::strcmp(words[1], seed.name) != 0) continue;
      known = true;
      for (int i = 0; i < orders; ++i) {
        if (orders > 1) setenv("TILEWISE_EMULATION_ORDER", std::to_string(i).c_str(), 1);
        if (!(bug ? seed.with_bug : seed.clean)()) {
          std::printf("%s: not right, in order %d\n", seed.name, i);
          right = false;
        }
      }
    }
  }
  return known ? !right : 2;
}
