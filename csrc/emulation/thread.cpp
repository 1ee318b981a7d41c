// What a thread may know about itself.
#include "emulation/machine.h"

namespace tilewise::emulation {

int thread_rank() { return machine.current->rank; }
int lane() { return machine.current->rank % kLanes; }

unsigned active_lanes() {
  const Thread& me = *machine.current;
  return me.block->warps[me.rank / kLanes].alive;
}

unsigned cluster_rank() { return machine.current->block->cluster_rank; }
unsigned cluster_blocks() { return static_cast<unsigned>(machine.blocks.size()); }
dim3 cluster_shape() { return machine.shape.cluster; }

}  // namespace tilewise::emulation
