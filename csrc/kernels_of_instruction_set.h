// Everything that is compiled for one instruction set. The file that includes this has defined
// DECODER_FAST_INSTRUCTION_SET, SIMD_HEADER and DECODER_FAST_BF16 (1 if it has products of bfloat16),
// and told the compiler which instructions it may use.
//
// Nothing here may call a function template or inline function of the standard library: the linker
// keeps one copy of such a function, which could be one that only this instruction set can run.

namespace decoder_fast {
namespace DECODER_FAST_INSTRUCTION_SET {
namespace {

#include SIMD_HEADER

#include "vector_math.h"

#include "carver.h"

#include "gemm.h"

#if DECODER_FAST_BF16
#include "bf16_avx512.h"
#endif

#include "count_nll_nonzero.h"

#include "count_nll_kernel.h"

#include "softmax_library_kernel.h"

#include "covariate_linear_kernel.h"

#include "csr_linear_kernel.h"

}  // namespace
}  // namespace DECODER_FAST_INSTRUCTION_SET
}  // namespace decoder_fast

// In two steps, so that the macro's value is used and not its name.
#define DECODER_FAST_TABLE_OF(name)                                              \
    namespace decoder_fast {                                                     \
    namespace {                                                                  \
    const Kernels table = {#name,                                                \
                           &name::count_nll,                                     \
                           &name::softmax_library,                               \
                           &name::softmax_library_backward,                      \
                           &name::covariate_linear,                              \
                           &name::covariate_linear_backward,                     \
                           &name::csr_linear,                                    \
                           &name::csr_linear_backward};                          \
    }                                                                            \
    const Kernels* const kernels_##name = &table;                                \
    }
#define DECODER_FAST_TABLE(name) DECODER_FAST_TABLE_OF(name)
DECODER_FAST_TABLE(DECODER_FAST_INSTRUCTION_SET)
