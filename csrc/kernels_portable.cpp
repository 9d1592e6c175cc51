#include "includes.h"

#define DECODER_FAST_INSTRUCTION_SET portable
#define SIMD_HEADER "simd_portable.h"
#define DECODER_FAST_BF16 0
#include "kernels_of_instruction_set.h"

namespace decoder_fast {
namespace {
const Kernels table = {
    "portable",
    &portable::count_nll,
    &portable::softmax_library,
    &portable::softmax_library_backward,
    &portable::covariate_linear,
    &portable::covariate_linear_backward,
};
}
const Kernels* const kernels_portable = &table;
}  // namespace decoder_fast
