// Logits and library size to scale and rate, a row at a time. Included inside the namespace of an
// instruction set.
//
// A row is read from memory once and its results written once; what is in between stays in the
// cache. Threads share out whole rows, so that results do not depend on their number.

constexpr std::int64_t sum_block = 64 * lanes;     // elements summed in float32 at most
constexpr std::int64_t least_elements = 1 << 14;   // of one thread's turn

// The first n (fewer than a vector's) elements; the others are `fill`.
inline V load_some(const float* p, std::int64_t n, float fill) {
    float part[lanes];
    for (int i = 0; i < lanes; ++i) part[i] = i < n ? p[i] : fill;
    return load(part);
}
inline void store_some(float* p, V v, std::int64_t n) {
    float part[lanes];
    store(part, v);
    for (std::int64_t i = 0; i < n; ++i) p[i] = part[i];
}

inline float largest_of(const float* a, std::int64_t n) {
    V most[4];
    for (V& m : most) m = set1(-HUGE_VALF);
    std::int64_t j = 0;
    for (; j + 4 * lanes <= n; j += 4 * lanes) {
        for (int k = 0; k < 4; ++k) most[k] = max(most[k], load(a + j + k * lanes));
    }
    for (; j + lanes <= n; j += lanes) most[0] = max(most[0], load(a + j));
    if (j < n) most[1] = max(most[1], load_some(a + j, n - j, -HUGE_VALF));
    float part[lanes];
    store(part, max(max(most[0], most[1]), max(most[2], most[3])));
    float largest = part[0];
    for (int i = 1; i < lanes; ++i) largest = part[i] > largest ? part[i] : largest;
    return largest;
}

// out = exp(a - shift); returns the sum.
inline double exponentials(const float* a, float shift, std::int64_t n, float* out) {
    const V s = set1(shift);
    double total = 0.0;
    for (std::int64_t start = 0; start < n; start += sum_block) {
        const std::int64_t end = least(start + sum_block, n);
        V part = zero();
        std::int64_t j = start;
        for (; j + lanes <= end; j += lanes) {
            const V e = exp(sub(load(a + j), s));
            store(out + j, e);
            part = add(part, e);
        }
        if (j < end) {
            const V e = exp(sub(load_some(a + j, end - j, -HUGE_VALF), s));
            store_some(out + j, e, end - j);
            part = add(part, e);
        }
        total += sum(part);
    }
    return total;
}

struct Softplus {
    V operator()(V a) const { return add(max(zero(), a), log1p(exp(neg(abs(a))))); }
};
struct Times {
    V factor;
    V operator()(V a) const { return mul(a, factor); }
};

// scale = f(in) and rate = size scale, where in may be scale.
template <class F>
inline void scale_and_rate(const float* in, float size, std::int64_t n, float* scale, float* rate,
                           F f) {
    const V by = set1(size);
    std::int64_t j = 0;
    for (; j + lanes <= n; j += lanes) {
        const V v = f(load(in + j));
        store(scale + j, v);
        store(rate + j, mul(v, by));
    }
    if (j < n) {
        const V v = f(load_some(in + j, n - j, 0.0f));
        store_some(scale + j, v, n - j);
        store_some(rate + j, mul(v, by), n - j);
    }
}

inline void softmax_library_row(const SoftmaxLibrary& in, std::int64_t row) {
    const std::int64_t n = in.n_genes, at = row * n;
    const float* a = in.logits + at;
    float *scale = in.scale + at, *rate = in.rate + at;
    const float size = static_cast<float>(std::exp(static_cast<double>(in.library[row])));
    if (in.activation == softplus) {
        scale_and_rate(a, size, n, scale, rate, Softplus{});
        return;
    }
    const double total = exponentials(a, largest_of(a, n), n, scale);
    const float inverse = static_cast<float>(1.0 / total);
    scale_and_rate(scale, size, n, scale, rate, Times{set1(inverse)});
}

// The sum over a row of a b.
inline double dot(const float* a, const float* b, std::int64_t n) {
    double total = 0.0;
    for (std::int64_t start = 0; start < n; start += sum_block) {
        const std::int64_t end = least(start + sum_block, n);
        V part[4] = {zero(), zero(), zero(), zero()};
        std::int64_t j = start;
        for (; j + 4 * lanes <= end; j += 4 * lanes) {
            for (int k = 0; k < 4; ++k) {
                part[k] = fma(load(a + j + k * lanes), load(b + j + k * lanes), part[k]);
            }
        }
        for (; j + lanes <= end; j += lanes) part[0] = fma(load(a + j), load(b + j), part[0]);
        if (j < end) {
            part[1] = fma(load_some(a + j, end - j, 0.0f), load_some(b + j, end - j, 0.0f), part[1]);
        }
        total += sum(add(add(part[0], part[1]), add(part[2], part[3])));
    }
    return total;
}

// d_logits from `gradient`, which takes a place and gives the gradient by the scale there.
template <class Gradient>
inline void logits_gradient(const SoftmaxLibrary& in, std::int64_t row, float total,
                            Gradient gradient) {
    const std::int64_t n = in.n_genes, at = row * n;
    const float* scale = in.scale + at;
    float* out = in.d_logits + at;
    const bool is_softplus = in.activation == softplus;
    const V mean = set1(total);
    const auto value = [=](V s, V g) {
        if (!is_softplus) return mul(s, sub(g, mean));
        V e, em1;  // sigmoid(a) = 1 - exp(-softplus(a))
        exp_and_expm1(neg(s), e, em1);
        return mul(g, neg(em1));
    };
    std::int64_t j = 0;
    for (; j + lanes <= n; j += lanes) {
        store(out + j, value(load(scale + j), gradient([=](const float* p) { return load(p + j); })));
    }
    if (j < n) {
        const auto load_end = [=](const float* p) { return load_some(p + j, n - j, 0.0f); };
        store_some(out + j, value(load_end(scale), gradient(load_end)), n - j);
    }
}

inline void softmax_library_backward_row(const SoftmaxLibrary& in, std::int64_t row) {
    const std::int64_t n = in.n_genes, at = row * n;
    const float* scale = in.scale + at;
    const float* grad_scale = in.grad_scale == nullptr ? nullptr : in.grad_scale + at;
    const float* grad_rate = in.grad_rate == nullptr ? nullptr : in.grad_rate + at;
    const double size = std::exp(static_cast<double>(in.library[row]));
    const bool is_softmax = in.activation == softmax && in.d_logits != nullptr;

    double by_rate = 0.0, total = 0.0;
    if (grad_rate != nullptr && (is_softmax || in.d_library != nullptr)) {
        by_rate = size * dot(grad_rate, scale, n);
    }
    if (in.d_library != nullptr) in.d_library[row] = static_cast<float>(by_rate);
    if (in.d_logits == nullptr) return;
    if (is_softmax) total = by_rate + (grad_scale == nullptr ? 0.0 : dot(grad_scale, scale, n));

    const V by = set1(static_cast<float>(size));
    const float mean = static_cast<float>(total);
    if (grad_rate == nullptr) {
        logits_gradient(in, row, mean, [=](auto at_place) { return at_place(grad_scale); });
    } else if (grad_scale == nullptr) {
        logits_gradient(in, row, mean, [=](auto at_place) { return mul(at_place(grad_rate), by); });
    } else {
        logits_gradient(in, row, mean, [=](auto at_place) {
            return fma(at_place(grad_rate), by, at_place(grad_scale));
        });
    }
}

// Takes rows in groups that are worth a thread's while.
template <class Body>
inline void for_rows(std::int64_t n_rows, std::int64_t n_columns, int n_threads, Body body) {
    const std::int64_t group = (least_elements + n_columns - 1) / n_columns;
    auto item = [=](std::int64_t i, int) {
        const std::int64_t end = least((i + 1) * group, n_rows);
        for (std::int64_t row = i * group; row < end; ++row) body(row);
    };
    parallel_for((n_rows + group - 1) / group, n_threads, item);
}

inline void softmax_library(const SoftmaxLibrary& in) {
    for_rows(in.n_rows, in.n_genes, in.n_threads,
             [&in](std::int64_t row) { softmax_library_row(in, row); });
}

inline void softmax_library_backward(const SoftmaxLibrary& in) {
    for_rows(in.n_rows, in.n_genes, in.n_threads,
             [&in](std::int64_t row) { softmax_library_backward_row(in, row); });
}
