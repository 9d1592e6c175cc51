// Logits and library size to scale and rate: what goes in and what comes out.

#pragma once

#include <cstdint>

#include "common.h"

namespace decoder_fast {

// decoder_fast/cpp/softmax_library.py declares the same, field by field. Matrices are n_rows x
// n_genes, contiguous, row by row. The forward pass reads logits and writes scale and rate; the
// backward pass reads scale and the gradients by either or both outputs (null where there is none),
// and writes those that are wanted (null where not).
struct SoftmaxLibrary {
    std::int64_t n_rows;
    std::int64_t n_genes;
    std::int32_t activation;  // an Activation
    std::int32_t n_threads;

    const float* logits;
    const float* library;  // n_rows: the logarithm of the library size
    float* scale;
    float* rate;

    const float* grad_scale;
    const float* grad_rate;
    float* d_logits;
    float* d_library;  // n_rows
};

}  // namespace decoder_fast
