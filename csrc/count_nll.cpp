#include "count_nll.h"

#include "export.h"
#include "kernels.h"

// Returns a decoder_fast::Status. Shapes, types, labels and CSR indices are the caller's to check;
// counts are checked here, where they are read anyway.
DECODER_FAST_API std::int32_t decoder_fast_count_nll(decoder_fast::CountNll* arguments) {
    return decoder_fast::kernels().count_nll(*arguments);
}

// For the caller to see that both sides mean the same structure.
DECODER_FAST_API std::int64_t decoder_fast_count_nll_size() {
    return static_cast<std::int64_t>(sizeof(decoder_fast::CountNll));
}
