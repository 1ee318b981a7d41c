// Read floats from the input; write each as __half and as __nv_bfloat16, then what these two are
// as floats again.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdio>

#include "seeded.h"

namespace seeded {

int conversions() {
  float value;
  while (std::fread(&value, sizeof value, 1, stdin) == 1) {
    const __half half = __float2half_rn(value);
    const __nv_bfloat16 bfloat = __float2bfloat16_rn(value);
    const float back[] = {__half2float(half), __bfloat162float(bfloat)};
    std::fwrite(&half, sizeof half, 1, stdout);
    std::fwrite(&bfloat, sizeof bfloat, 1, stdout);
    std::fwrite(back, sizeof back, 1, stdout);
  }
  return 0;
}

}  // namespace seeded
