#include "includes.h"

#if DECODER_FAST_COMPILES_BF16

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512cd,avx2,fma,bmi,bmi2,lzcnt,popcnt,avx512bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512cd,avx2,fma,bmi,bmi2,lzcnt,popcnt,avx512bf16")
#endif

#define DECODER_FAST_INSTRUCTION_SET avx512_bf16
#define SIMD_HEADER "simd_avx512.h"
#define DECODER_FAST_BF16 1
#include "kernels_of_instruction_set.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace decoder_fast {
namespace {
const Kernels table = {
    "avx512_bf16",
    &avx512_bf16::count_nll,
    &avx512_bf16::softmax_library,
    &avx512_bf16::softmax_library_backward,
    &avx512_bf16::covariate_linear,
    &avx512_bf16::covariate_linear_backward,
};
}
const Kernels* const kernels_avx512_bf16 = &table;
}  // namespace decoder_fast

#else

namespace decoder_fast {
const Kernels* const kernels_avx512_bf16 = nullptr;
}

#endif
