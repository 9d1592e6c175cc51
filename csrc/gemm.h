// Products of small float32 matrices that lie in the cache. Included inside the namespace of an
// instruction set.

constexpr int panel_width = block_vectors * lanes;

// C[i][j] = bias[i] + sum over p of A[i row_stride + p step] B[p ldb + j], for R rows and N vectors;
// with `accumulate` the product is added to C instead, and bias is ignored.
template <int R, int N>
inline void multiply_block(const float* A, std::int64_t row_stride, std::int64_t step,
                           const float* B, std::int64_t ldb, float* C, std::int64_t ldc,
                           std::int64_t depth, bool accumulate, const float* bias) {
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
        V b[N];
#pragma GCC unroll 8
        for (int j = 0; j < N; ++j) b[j] = load(B + p * ldb + j * lanes);
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) {
            const V a = set1(A[i * row_stride + p * step]);
#pragma GCC unroll 8
            for (int j = 0; j < N; ++j) c[i][j] = fma(a, b[j], c[i][j]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < N; ++j) store(C + i * ldc + j * lanes, c[i][j]);
    }
}

template <int N>
inline void multiply_rows(const float* A, std::int64_t row_stride, std::int64_t step,
                          const float* B, std::int64_t ldb, float* C, std::int64_t ldc,
                          std::int64_t rows, std::int64_t depth, bool accumulate,
                          const float* bias) {
    std::int64_t i = 0;
#define DECODER_FAST_ROWS(R)                                                                  \
    multiply_block<R, N>(A + i * row_stride, row_stride, step, B, ldb, C + i * ldc, ldc, depth, \
                         accumulate, bias == nullptr ? nullptr : bias + i)
    for (; i + block_rows <= rows; i += block_rows) DECODER_FAST_ROWS(block_rows);
    for (; i + 2 <= rows; i += 2) DECODER_FAST_ROWS(2);
    if (i < rows) DECODER_FAST_ROWS(1);
#undef DECODER_FAST_ROWS
}

// The same for any number of rows, and one panel of `vectors` (1 to block_vectors) vectors.
inline void multiply_panel(const float* A, std::int64_t row_stride, std::int64_t step,
                           const float* B, std::int64_t ldb, float* C, std::int64_t ldc,
                           std::int64_t rows, std::int64_t depth, int vectors, bool accumulate,
                           const float* bias) {
    constexpr int most = block_vectors;
#define DECODER_FAST_VECTORS(N)                                                                  \
    multiply_rows<(N < most ? N : most)>(A, row_stride, step, B, ldb, C, ldc, rows, depth,       \
                                         accumulate, bias)
    switch (vectors) {
        case 1: return DECODER_FAST_VECTORS(1);
        case 2: return DECODER_FAST_VECTORS(2);
        case 3: return DECODER_FAST_VECTORS(3);
        default: return DECODER_FAST_VECTORS(4);
    }
#undef DECODER_FAST_VECTORS
}
