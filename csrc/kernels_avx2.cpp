#include "includes.h"

#if (defined(__GNUC__) || defined(__clang__)) && defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi,bmi2,lzcnt,popcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,bmi2,lzcnt,popcnt")
#endif

#define DECODER_FAST_INSTRUCTION_SET avx2
#define SIMD_HEADER "simd_avx2.h"
#define DECODER_FAST_BF16 0
#include "kernels_of_instruction_set.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace decoder_fast {
namespace {
const Kernels table = {
    "avx2",
    &avx2::count_nll,
    &avx2::softmax_library,
    &avx2::softmax_library_backward,
    &avx2::covariate_linear,
    &avx2::covariate_linear_backward,
};
}
const Kernels* const kernels_avx2 = &table;
}  // namespace decoder_fast

#else

namespace decoder_fast {
const Kernels* const kernels_avx2 = nullptr;
}

#endif
