// What the native library says about itself; decoder_fast/native.py reads it when loading.
//
// A plain C interface, without Python's or torch's headers: one build serves every version of both.

#include <cstdint>

#include "export.h"
#include "kernels.h"

namespace {

// Raise it together with ABI_VERSION in decoder_fast/native.py whenever the signature or the
// meaning of an exported function changes.
constexpr std::int32_t abi_version = 3;

// Names of the operations implemented here, separated by spaces.
constexpr const char* operations = "count_nll softmax_library covariate_linear csr_linear";

#if defined(__clang__)
constexpr const char* compiler = "clang " __clang_version__;
#elif defined(__GNUC__)
constexpr const char* compiler = "gcc " __VERSION__;
#else
constexpr const char* compiler = "unknown compiler";
#endif

}  // namespace

DECODER_FAST_API std::int32_t decoder_fast_abi_version() { return abi_version; }

DECODER_FAST_API const char* decoder_fast_operations() { return operations; }

DECODER_FAST_API const char* decoder_fast_compiler() { return compiler; }

DECODER_FAST_API const char* decoder_fast_instruction_set() {
    return decoder_fast::kernels().instruction_set;
}
