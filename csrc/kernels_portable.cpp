#include "includes.h"

#define DECODER_FAST_INSTRUCTION_SET portable
#define SIMD_HEADER "simd_portable.h"
#define DECODER_FAST_BF16 0
#include "kernels_of_instruction_set.h"
