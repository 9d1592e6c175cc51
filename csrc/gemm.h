// Products of small float32 matrices that lie in the cache. Included inside the namespace of an
// instruction set.

constexpr int panel_width = block_vectors * lanes;

// How the factors of a product are stored. `depth` counts Elements.
struct Float32 {
    using Element = float;
    using Vector = V;
    static Vector load_vector(const Element* p) { return load(p); }
    static Vector broadcast(const Element* p) { return set1(*p); }
    static V multiply_add(Vector a, Vector b, V c) { return fma(a, b, c); }
};

// C[i][j] = bias[i] + sum over p of A[i row_stride + p step] B[p ldb + j], for R rows and N vectors;
// with `accumulate` the product is added to C instead, and bias is ignored.
template <class Format, int R, int N>
inline void multiply_block(const typename Format::Element* A, std::int64_t row_stride,
                           std::int64_t step, const typename Format::Element* B, std::int64_t ldb,
                           float* C, std::int64_t ldc, std::int64_t depth, bool accumulate,
                           const float* bias) {
    V c[R][N];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < N; ++j) {
            c[i][j] = accumulate ? load(C + i * ldc + j * lanes)
                                 : (bias != nullptr ? set1(bias[i]) : zero());
        }
    }
    // The next rows of A, where they lie one after another: they come from far away.
    if (step == 1) {
        for (int i = 0; i < R; ++i) {
            for (std::int64_t p = 0; p < depth; p += 16) {
                __builtin_prefetch(A + (R + i) * row_stride + p);
            }
        }
    }
    for (std::int64_t p = 0; p < depth; ++p) {
        typename Format::Vector b[N];
#pragma GCC unroll 8
        for (int j = 0; j < N; ++j) b[j] = Format::load_vector(B + p * ldb + j * lanes);
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) {
            const typename Format::Vector a = Format::broadcast(A + i * row_stride + p * step);
#pragma GCC unroll 8
            for (int j = 0; j < N; ++j) c[i][j] = Format::multiply_add(a, b[j], c[i][j]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < N; ++j) store(C + i * ldc + j * lanes, c[i][j]);
    }
}

template <class Format, int N>
inline void multiply_rows(const typename Format::Element* A, std::int64_t row_stride,
                          std::int64_t step, const typename Format::Element* B, std::int64_t ldb,
                          float* C, std::int64_t ldc, std::int64_t rows, std::int64_t depth,
                          bool accumulate, const float* bias) {
    std::int64_t i = 0;
#define DECODER_FAST_ROWS(R)                                                                   \
    multiply_block<Format, R, N>(A + i * row_stride, row_stride, step, B, ldb, C + i * ldc,    \
                                 ldc, depth, accumulate, bias == nullptr ? nullptr : bias + i)
    for (; i + block_rows <= rows; i += block_rows) DECODER_FAST_ROWS(block_rows);
    for (; i + 2 <= rows; i += 2) DECODER_FAST_ROWS(2);
    if (i < rows) DECODER_FAST_ROWS(1);
#undef DECODER_FAST_ROWS
}

// The same for any number of rows, and one panel of `vectors` (1 to block_vectors) vectors.
template <class Format = Float32>
inline void multiply_panel(const typename Format::Element* A, std::int64_t row_stride,
                           std::int64_t step, const typename Format::Element* B, std::int64_t ldb,
                           float* C, std::int64_t ldc, std::int64_t rows, std::int64_t depth,
                           int vectors, bool accumulate, const float* bias) {
    constexpr int most = block_vectors;
#define DECODER_FAST_VECTORS(N)                                                                \
    multiply_rows<Format, (N < most ? N : most)>(A, row_stride, step, B, ldb, C, ldc, rows,    \
                                                 depth, accumulate, bias)
    switch (vectors) {
        case 1: return DECODER_FAST_VECTORS(1);
        case 2: return DECODER_FAST_VECTORS(2);
        case 3: return DECODER_FAST_VECTORS(3);
        default: return DECODER_FAST_VECTORS(4);
    }
#undef DECODER_FAST_VECTORS
}
