// The native count likelihood: what goes in and what comes out.

#pragma once

#include <cstdint>

#include "common.h"

namespace decoder_fast {

enum Likelihood : std::int32_t { nb = 0, zinb = 1, poisson = 2 };
enum NumberType : std::int32_t {
    type_float32 = 0,
    type_float64 = 1,
    type_int8 = 2,
    type_uint8 = 3,
    type_int16 = 4,
    type_uint16 = 5,
    type_int32 = 6,
    type_int64 = 7
};

// decoder_fast/cpp/count_nll.py declares the same, field by field. Matrices are contiguous, row
// by row. Pointers to outputs that are not wanted, and to inputs that do not exist, are null.
struct CountNll {
    std::int64_t n_rows;   // Monte-Carlo samples x cells; row i has the counts of cell i % n_cells
    std::int64_t n_cells;
    std::int64_t n_genes;
    std::int64_t n_hidden;
    std::int64_t n_px_r;   // columns of px_r: 1, or the categories that px_r_index looks up
    std::int32_t likelihood;
    std::int32_t activation;
    std::int32_t n_threads;
    std::int32_t fast_products;  // bfloat16 products where the processor has them

    const float* hidden;          // n_rows x n_hidden
    const float* library;         // n_rows
    const float* scale_weight;    // n_genes x n_hidden
    const float* scale_bias;      // n_genes
    const float* dropout_weight;  // n_genes x n_hidden; zinb alone
    const float* dropout_bias;    // n_genes
    const float* r_weight;        // n_genes x n_hidden; in place of px_r
    const float* r_bias;          // n_genes
    const float* px_r;            // n_genes x n_px_r
    const std::int64_t* px_r_index;  // n_cells

    const void* dense;   // n_cells x n_genes, or null:
    std::int64_t dense_stride;  // elements from cell to cell
    const void* crow;    // n_cells + 1
    const void* col;  // ascending within a row, without duplicates
    const void* values;
    std::int32_t counts_type;  // NumberType of dense or values
    std::int32_t index_type;   // type_int32 or type_int64, of crow and col

    const float* upstream;  // n_rows: gradient by each negative log-likelihood, or null:
    double upstream_of_all;  // the same number for every row
    float* nll;             // n_rows
    float* shift;           // n_rows: library, under softmax less log-sum-exp of the logits
    float* usum;            // n_rows: sum over genes of the log-likelihood's derivative by log(mu)
    float* d_hidden;        // gradients, in the shapes of what they belong to
    float* d_scale_weight;
    float* d_scale_bias;
    float* d_dropout_weight;
    float* d_dropout_bias;
    float* d_r_weight;
    float* d_r_bias;
    float* d_px_r;

    double found;  // under bad_count: the count that is negative, infinite or not a number
};

}  // namespace decoder_fast
