// A linear map of a matrix in compressed sparse rows: what goes in and what comes out.

#pragma once

#include <cstdint>

#include "common.h"

namespace decoder_fast {

// decoder_fast/cpp/csr_linear.py declares the same, field by field. Columns ascend within each row,
// without duplicates. The forward pass reads weight and writes out; the backward pass reads
// grad_out and writes d_weight. Rows of weight may lie apart; all else is contiguous.
struct CsrLinear {
    std::int64_t n_rows;
    std::int64_t n_columns;
    std::int64_t n_out;
    std::int64_t weight_stride;  // elements between rows of weight
    std::int32_t index_bytes;    // 4 or 8
    std::int32_t n_threads;

    const void* crow;     // n_rows + 1
    const void* col;   // as many as values
    const float* values;
    const float* weight;  // n_out x n_columns
    const float* bias;    // n_out, or null
    float* out;           // n_rows x n_out

    const float* grad_out;  // n_rows x n_out
    float* d_weight;        // n_out x n_columns
};

}  // namespace decoder_fast
