#include "kernels.h"

#include <cstdlib>
#include <cstring>

namespace decoder_fast {
namespace {

const Kernels& choose() {
    const Kernels* fastest_first[] = {nullptr, nullptr, nullptr, kernels_portable};
#if (defined(__GNUC__) || defined(__clang__)) && defined(__x86_64__)
    __builtin_cpu_init();
    // The vector parts of x86-64-v4 and x86-64-v3.
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512cd")) {
        fastest_first[1] = kernels_avx512;
#if DECODER_FAST_COMPILES_BF16
        if (__builtin_cpu_supports("avx512bf16")) fastest_first[0] = kernels_avx512_bf16;
#endif
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2")) {
        fastest_first[2] = kernels_avx2;
    }
#endif
    const char* named = std::getenv("DECODER_FAST_INSTRUCTION_SET");
    const Kernels* chosen = nullptr;
    for (const Kernels* candidate : fastest_first) {
        if (candidate == nullptr) continue;
        if (chosen == nullptr) chosen = candidate;
        if (named != nullptr && std::strcmp(named, candidate->instruction_set) == 0) {
            chosen = candidate;
        }
    }
    return *chosen;
}

}  // namespace

const Kernels& kernels() {
    static const Kernels& chosen = choose();
    return chosen;
}

}  // namespace decoder_fast
