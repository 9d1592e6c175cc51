#include "includes.h"

#if (defined(__GNUC__) || defined(__clang__)) && defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512cd,avx2,fma,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512cd,avx2,fma,bmi,bmi2")
#endif

#define DECODER_FAST_INSTRUCTION_SET avx512
#define SIMD_HEADER "simd_avx512.h"
#define DECODER_FAST_BF16 0
#include "kernels_of_instruction_set.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else

namespace decoder_fast {
const Kernels* const kernels_avx512 = nullptr;
}

#endif
