// The likelihood and its derivatives at counts that are not zero, in float64. Included inside the
// namespace of an instruction set; compilers vectorise the loops.
//
// Symbols as in decoder_fast/reference/log_prob.py, which states the formulas: theta_eps = theta +
// eps, t = theta + mu + eps.

// exp(89) and above is infinite in float32; nothing here overflows in float64 for what is not.

inline double log_of_positive(double x) {
    std::int64_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    // The exponent as a float64, by placing it in the low bits of 2^52.
    const std::int64_t exponent_bits = (bits >> 52) | 0x4330000000000000;
    double exponent;
    std::memcpy(&exponent, &exponent_bits, sizeof exponent);
    exponent -= 4503599627370496.0 + 1023.0;
    bits = (bits & 0x000fffffffffffff) | 0x3ff0000000000000;
    double m;
    std::memcpy(&m, &bits, sizeof m);
    const bool above = m > 1.4142135623730951;
    m = above ? 0.5 * m : m;
    exponent = above ? exponent + 1.0 : exponent;
    const double s = (m - 1.0) / (m + 1.0);  // |s| < 0.1716
    const double s2 = s * s;
    double p = 1.0 / 21;
    p = p * s2 + 1.0 / 19;
    p = p * s2 + 1.0 / 17;
    p = p * s2 + 1.0 / 15;
    p = p * s2 + 1.0 / 13;
    p = p * s2 + 1.0 / 11;
    p = p * s2 + 1.0 / 9;
    p = p * s2 + 1.0 / 7;
    p = p * s2 + 1.0 / 5;
    p = p * s2 + 1.0 / 3;
    const double log_m = 2.0 * s + 2.0 * s * s2 * p;
    // x - x: zero, but what is infinite or not a number must not be lost.
    return (exponent * 6.93147180369123816490e-01 +
            (exponent * 1.90821492927058770002e-10 + log_m)) +
           (x - x);
}

// lgamma(v) - ((v - 1/2) log(v) - v + log(2 pi)/2), to 1e-15 for v > 30.
inline double stirling(double v) {
    const double w = 1.0 / (v * v);
    return (1.0 / 12 - w * (1.0 / 360 - w * (1.0 / 1260 - w * (1.0 / 1680 - w / 1188)))) / v;
}

// digamma(v) - log(v), to 1e-15 for v > 30.
inline double digamma_tail(double v) {
    const double w = 1.0 / (v * v);
    return -0.5 / v - w * (1.0 / 12 - w * (1.0 / 120 - w * (1.0 / 252 - w * (1.0 / 240 - w / 132))));
}

constexpr double from_asymptotic = 30.0;
constexpr double half_log_2pi = 0.91893853320467274178;

inline double log_gamma(double v) {
    double product = 1.0;
    while (v <= from_asymptotic) {
        product *= v;
        v += 1.0;
    }
    return (v - 0.5) * std::log(v) - v + half_log_2pi + stirling(v) - std::log(product);
}

inline double digamma(double v) {
    double below = 0.0;
    while (v <= from_asymptotic) {
        below += 1.0 / v;
        v += 1.0;
    }
    return std::log(v) + digamma_tail(v) - below;
}

// For any count: lgamma(x + theta) - lgamma(theta) - lgamma(x + 1) - x log(t), and
// digamma(x + theta) - digamma(theta).
inline void gamma_terms(double x, double theta, double t, double& log_gammas, double& digammas) {
    if (theta > from_asymptotic) {
        const double n = x + theta;
        const double log_ratio = std::log1p(x / theta);
        log_gammas = (theta - 0.5) * log_ratio - x + x * std::log1p((x + (theta - t)) / t) +
                     (stirling(n) - stirling(theta)) - log_gamma(x + 1.0);
        digammas = log_ratio + (digamma_tail(n) - digamma_tail(theta));
    } else {
        log_gammas = log_gamma(x + theta) - log_gamma(theta) - x * std::log(t) - log_gamma(x + 1.0);
        digammas = digamma(x + theta) - digamma(theta);
    }
}

constexpr int nonzero_batch = 64;

// A batch of elements whose counts are positive.
struct NonzeroBatch {
    int n;
    double x[nonzero_batch];
    double mu[nonzero_batch];
    double theta[nonzero_batch];
    double log_prob[nonzero_batch];     // of the negative binomial; results from here on
    double d_log_mu[nonzero_batch];
    double d_log_theta[nonzero_batch];
};

constexpr double eps64 = 1e-8;
// Counts up to here are finite sums and products, which cost less than gamma functions.
constexpr int small_count = 8;

inline void negative_binomial_at_nonzero(NonzeroBatch& b) {
    // The gamma functions by finite products: log of the product over k < x of
    // (theta + k) (mu + eps) / ((k + 1) t), and its derivative by theta as a quotient.
    constexpr double inverse[small_count] = {1.0, 1.0 / 2, 1.0 / 3, 1.0 / 4,
                                             1.0 / 5, 1.0 / 6, 1.0 / 7, 1.0 / 8};
    for (int i = 0; i < b.n; ++i) {
        const double x = b.x[i];
        const double mu = b.mu[i];
        const double theta = b.theta[i];
        const double theta_eps = theta + eps64;
        const double mu_eps = mu + eps64;
        const double inv_t = 1.0 / (theta_eps + mu);
        const double inv_theta_eps = 1.0 / theta_eps;
        const double ratio = mu_eps * inv_t;
        double product = 1.0;      // of theta + k
        double derivative = 0.0;   // of the product, by theta
        double powers = 1.0;       // ratio^x / x!
        for (int k = 0; k < small_count; ++k) {
            const bool on = x > k;
            const double factor = theta + k;
            derivative = on ? derivative * factor + product : derivative;
            product = on ? product * factor : product;
            powers = on ? powers * (ratio * inverse[k]) : powers;
        }
        const double v = mu * inv_theta_eps;
        const double one_plus_v = 1.0 + v;
        const double log1p_v = log_of_positive(one_plus_v) +
                               (v - (one_plus_v - 1.0)) * (theta_eps * inv_t);
        const double q = mu * inv_t;
        b.log_prob[i] = log_of_positive(product * powers) - theta * log1p_v;
        b.d_log_mu[i] = mu / mu_eps * (theta * inv_t) * (x - mu_eps);
        b.d_log_theta[i] = theta * ((q - log1p_v) - eps64 * inv_theta_eps * q +
                                    derivative / product - x * inv_t);
    }
    for (int i = 0; i < b.n; ++i) {
        const double x = b.x[i];
        if (x <= small_count && x == std::floor(x)) continue;
        const double theta = b.theta[i];
        const double theta_eps = theta + eps64;
        const double t = theta_eps + b.mu[i];
        double log_gammas, digammas;
        gamma_terms(x, theta, t, log_gammas, digammas);
        const double log1p_v = std::log1p(b.mu[i] / theta_eps);
        const double q = b.mu[i] / t;
        b.log_prob[i] = x * std::log(b.mu[i] + eps64) - theta * log1p_v + log_gammas;
        b.d_log_theta[i] =
            theta * ((q - log1p_v) - eps64 / theta_eps * q + digammas - x / t);
    }
}
