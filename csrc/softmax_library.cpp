#include "softmax_library.h"

#include "export.h"
#include "kernels.h"

// Shapes are the caller's to check.
DECODER_FAST_API void decoder_fast_softmax_library(decoder_fast::SoftmaxLibrary* arguments) {
    decoder_fast::kernels().softmax_library(*arguments);
}

DECODER_FAST_API void decoder_fast_softmax_library_backward(
    decoder_fast::SoftmaxLibrary* arguments) {
    decoder_fast::kernels().softmax_library_backward(*arguments);
}

// For the caller to see that both sides mean the same structure.
DECODER_FAST_API std::int64_t decoder_fast_softmax_library_size() {
    return static_cast<std::int64_t>(sizeof(decoder_fast::SoftmaxLibrary));
}
