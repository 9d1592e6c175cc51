// One hidden layer: what goes in and what comes out.

#pragma once

#include <cstdint>

#include "common.h"

namespace decoder_fast {

enum class UnitActivation : std::int32_t { identity, relu, leaky_relu, elu, gelu, silu };
// Batch norm: none, with the statistics of each sample's cells, or with running statistics.
enum class BatchNorm : std::int32_t { none, batch, running };

// Either labels or a matrix; both are shared by the samples.
struct Covariate {
    std::int64_t n_categories;
    const std::int64_t* labels;  // n_cells
    const float* matrix;         // n_cells x n_categories
    float* d_matrix;
};

// decoder_fast/cpp/covariate_linear.py declares the same, field by field. Matrices are contiguous,
// row by row. Pointers to outputs that are not wanted, and to inputs that do not exist, are null.
struct CovariateLinear {
    std::int64_t n_samples;
    std::int64_t n_cells;
    std::int64_t n_in;
    std::int64_t n_hidden;
    std::int64_t n_covariates;
    UnitActivation activation;
    BatchNorm batch_norm;
    std::int32_t layer_norm;
    std::int32_t n_threads;
    double activation_parameter;
    double batch_norm_eps;
    double layer_norm_eps;
    double momentum;

    const Covariate* covariates;
    const float* x;       // n_samples x n_cells x n_in
    const float* weight;  // n_hidden x (n_in + all categories)
    const float* bias;    // n_hidden
    const float* batch_norm_weight;
    const float* batch_norm_bias;
    const float* running_mean;
    const float* running_var;
    float* moved_mean;  // running statistics that a forward pass moves
    float* moved_var;

    // Written by the forward pass and read by the backward pass.
    float* out;     // n_samples x n_cells x n_hidden
    float* linear;  // the same: what the norms and the activation got; null if out tells enough
    float* mean;    // n_samples x n_hidden of the batch; 1 x n_hidden of running statistics
    float* invstd;

    const float* grad;  // as out
    float* d_x;         // gradients, in the shapes of what they belong to
    float* d_weight;
    float* d_bias;
    float* d_batch_norm_weight;
    float* d_batch_norm_bias;
};

// Moves running statistics (n_hidden) once for each sample of a batch's statistics. Reads the sizes,
// batch_norm_eps, momentum, mean and invstd.
void update_running(const CovariateLinear& in);

}  // namespace decoder_fast
