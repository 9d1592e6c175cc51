// The kernels, once for each instruction set, and the choice between them.

#pragma once

#include "count_nll.h"
#include "covariate_linear.h"
#include "csr_linear.h"
#include "softmax_library.h"

// GCC knows AVX-512's BF16 instructions from version 10 on, clang from version 9.
#if defined(__x86_64__) && ((defined(__clang__) && __clang_major__ >= 9) || \
                            (!defined(__clang__) && defined(__GNUC__) && __GNUC__ >= 10))
#define DECODER_FAST_COMPILES_BF16 1
#else
#define DECODER_FAST_COMPILES_BF16 0
#endif

namespace decoder_fast {

struct Kernels {
    const char* instruction_set;
    Status (*count_nll)(CountNll&);
    void (*softmax_library)(const SoftmaxLibrary&);
    void (*softmax_library_backward)(const SoftmaxLibrary&);
    Status (*covariate_linear)(CovariateLinear&);
    Status (*covariate_linear_backward)(CovariateLinear&);
    Status (*csr_linear)(const CsrLinear&);
    Status (*csr_linear_backward)(const CsrLinear&);
};

// Each is null where the compiler or the target has no such instruction set.
extern const Kernels* const kernels_avx512_bf16;
extern const Kernels* const kernels_avx512;
extern const Kernels* const kernels_avx2;
extern const Kernels* const kernels_portable;

// The fastest that this processor can run; the environment variable
// DECODER_FAST_INSTRUCTION_SET=avx512_bf16|avx512|avx2|portable can choose a slower one.
const Kernels& kernels();

}  // namespace decoder_fast
