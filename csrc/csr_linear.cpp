#include "csr_linear.h"

#include "export.h"
#include "kernels.h"

// Shapes and indices are the caller's to check. Return a decoder_fast::Status.
DECODER_FAST_API std::int32_t decoder_fast_csr_linear(decoder_fast::CsrLinear* arguments) {
    return decoder_fast::kernels().csr_linear(*arguments);
}

DECODER_FAST_API std::int32_t decoder_fast_csr_linear_backward(decoder_fast::CsrLinear* arguments) {
    return decoder_fast::kernels().csr_linear_backward(*arguments);
}

// For the caller to see that both sides mean the same structure.
DECODER_FAST_API std::int64_t decoder_fast_csr_linear_size() {
    return static_cast<std::int64_t>(sizeof(decoder_fast::CsrLinear));
}
