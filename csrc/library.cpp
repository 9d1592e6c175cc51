// What the native library says about itself; decoder_fast/native.py reads it when loading.
//
// A plain C interface, without Python's or torch's headers: one build serves every version of both.

#include <cstdint>

#if defined(_WIN32)
#define DECODER_FAST_API extern "C" __declspec(dllexport)
#else
#define DECODER_FAST_API extern "C" __attribute__((visibility("default")))
#endif

namespace {

// Raise it together with ABI_VERSION in decoder_fast/native.py whenever the signature or the
// meaning of an exported function changes.
constexpr std::int32_t abi_version = 1;

// Names of the operations implemented here, separated by spaces.
constexpr const char* operations = "";

#if defined(__clang__)
constexpr const char* compiler = "clang " __clang_version__;
#elif defined(__GNUC__)
constexpr const char* compiler = "gcc " __VERSION__;
#elif defined(_MSC_VER)
constexpr const char* compiler = "msvc";
#else
constexpr const char* compiler = "unknown compiler";
#endif

const char* detect_instruction_set() {
#if (defined(__GNUC__) || defined(__clang__)) && defined(__x86_64__)
    __builtin_cpu_init();
    // The vector parts of x86-64-v4 and x86-64-v3.
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        return "avx512";
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        return "avx2";
    }
#endif
    return "portable";
}

}  // namespace

DECODER_FAST_API std::int32_t decoder_fast_abi_version() { return abi_version; }

DECODER_FAST_API const char* decoder_fast_operations() { return operations; }

DECODER_FAST_API const char* decoder_fast_compiler() { return compiler; }

DECODER_FAST_API const char* decoder_fast_instruction_set() {
    static const char* const detected = detect_instruction_set();
    return detected;
}
