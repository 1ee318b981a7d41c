// Bugs planted into the kernels of units/, each of which the emulation must report. A GPU never
// runs them: only their clean twin, Fault::none, is compiled for it.
#pragma once

#include "launchers.h"

namespace tilewise::units {

// In the order of the units, and here because their names are wanted too.
#define TILEWISE_FAULTS                                                                            \
  none, copy_not_awaited, copy_too_few_bytes, copy_too_many_bytes, copy_wrong_swizzle,             \
      copy_store_not_awaited, copy_store_not_fenced, copy_map_too_large, wgmma_not_awaited,        \
      wgmma_not_fenced, wgmma_sums_changed, wgmma_wrong_offset, wgmma_wrong_leading,               \
      wgmma_wrong_stride, wgmma_wrong_swizzle, mma_copy_not_awaited, mma_copy_awaited_late,        \
      mma_wrong_transpose, mma_buffer_overwritten, cluster_read_too_early, cluster_left_too_early, \
      cluster_inbox_not_awaited, cluster_barrier_too_early, gemm_full_not_awaited,                 \
      gemm_slot_released_early, gemm_empty_parity, gemm_full_parity, gemm_too_many_arrivals,       \
      gemm_wrong_bytes, gemm_barrier_not_initialised, gemm_wrong_half, gemm_store_not_fenced,      \
      gemm_store_too_early, gemm_registers_not_released, rules_barrier_misaligned,                 \
      rules_barrier_not_shared, rules_barrier_of_nobody, rules_barrier_used_twice,                 \
      rules_barrier_parity, rules_barrier_of_peer, rules_peer_outside,                             \
      rules_cluster_arrived_twice, rules_cluster_not_arrived, rules_registers_fewer,               \
      rules_registers_differ, rules_map_by_hand, rules_map_rank, rules_box_misaligned,             \
      rules_box_too_far, rules_store_not_committed, rules_copy_misaligned, rules_copy_too_long,    \
      rules_copy_not_shared, rules_matrix_misaligned, rules_wgmma_differ, rules_wgmma_misplaced,   \
      rules_wgmma_too_far, rules_wgmma_bits, rules_wgmma_reshaped, rules_wgmma_named_early,        \
      rules_wgmma_half_waits, rules_wgmma_never_waited, rules_wgmma_half_group

enum class Fault { TILEWISE_FAULTS };

template <Fault kFault>
struct Planted {
  static constexpr Fault value = kFault;
};

// Call body with the fault as a type: the clean twin, or one of kFaults.
template <Fault... kFaults, typename Body>
cudaError_t for_fault(Fault fault, Body body) {
  cudaError_t status = cudaErrorInvalidValue;
  if (fault == Fault::none) status = body(Planted<Fault::none>{});
#ifdef TILEWISE_EMULATION
  ((fault == kFaults ? void(status = body(Planted<kFaults>{})) : void()), ...);
#endif
  return status;
}

}  // namespace tilewise::units
