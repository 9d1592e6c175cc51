#include "covariate_linear.h"

#include "export.h"
#include "kernels.h"

// 1 / invstd^2 - eps is the variance, of which running statistics keep the unbiased estimate.
void decoder_fast::update_running(const CovariateLinear& in) {
    const double n = static_cast<double>(in.n_cells), unbiased = n / (n - 1.0);
    for (std::int64_t j = 0; j < in.n_hidden; ++j) {
        double mean = in.moved_mean[j], var = in.moved_var[j];
        for (std::int64_t i = j; i < in.n_samples * in.n_hidden; i += in.n_hidden) {
            const double std = 1.0 / in.invstd[i], found = std * std - in.batch_norm_eps;
            mean += in.momentum * (in.mean[i] - mean);
            var += in.momentum * ((found < 0.0 ? 0.0 : found) * unbiased - var);
        }
        in.moved_mean[j] = static_cast<float>(mean);
        in.moved_var[j] = static_cast<float>(var);
    }
}

// Return a decoder_fast::Status. Shapes are the caller's to check; labels are checked here.
DECODER_FAST_API std::int32_t decoder_fast_covariate_linear(
    decoder_fast::CovariateLinear* arguments) {
    return decoder_fast::kernels().covariate_linear(*arguments);
}

DECODER_FAST_API std::int32_t decoder_fast_covariate_linear_backward(
    decoder_fast::CovariateLinear* arguments) {
    return decoder_fast::kernels().covariate_linear_backward(*arguments);
}

DECODER_FAST_API void decoder_fast_update_running(decoder_fast::CovariateLinear* arguments) {
    decoder_fast::update_running(*arguments);
}

// For the caller to see that both sides mean the same structures.
DECODER_FAST_API std::int64_t decoder_fast_covariate_linear_size() {
    return static_cast<std::int64_t>(sizeof(decoder_fast::CovariateLinear) +
                                     sizeof(decoder_fast::Covariate));
}
