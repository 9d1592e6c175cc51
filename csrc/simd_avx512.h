// Vectors of 16 floats, for AVX-512. Included inside the namespace of the instruction set.
//
// The three simd_*.h files define the same names; vector_math.h and the kernels are written in them.
// min and max return their second argument where either is NaN, as the instructions do.

using V = __m512;
using Mask = __mmask16;
constexpr int lanes = 16;
// Rows and vectors of the matrix product's block of registers.
constexpr int block_rows = 6;
constexpr int block_vectors = 4;

inline V load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, V v) { _mm512_storeu_ps(p, v); }
inline V set1(float x) { return _mm512_set1_ps(x); }
inline V zero() { return _mm512_setzero_ps(); }
inline V add(V a, V b) { return _mm512_add_ps(a, b); }
inline V sub(V a, V b) { return _mm512_sub_ps(a, b); }
inline V mul(V a, V b) { return _mm512_mul_ps(a, b); }
inline V div(V a, V b) { return _mm512_div_ps(a, b); }
inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }    // a b + c
inline V fnma(V a, V b, V c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b
inline V min(V a, V b) { return _mm512_min_ps(a, b); }
inline V max(V a, V b) { return _mm512_max_ps(a, b); }
inline V abs(V a) { return _mm512_abs_ps(a); }
inline V neg(V a) { return _mm512_sub_ps(zero(), a); }
inline V round(V a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Mask less(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
inline Mask equal(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
inline bool any(Mask m) { return m != 0; }
inline V select(Mask m, V yes, V no) { return _mm512_mask_blend_ps(m, no, yes); }
inline float sum(V a) { return _mm512_reduce_add_ps(a); }

// 1 / a to one unit in the last place: an estimate and one Newton step.
inline V reciprocal(V a) {
    const V y = _mm512_rcp14_ps(a);
    return fma(y, fnma(a, y, set1(1.0f)), y);
}

// a 2^n for whole n, through the denormals to 0 and up to infinity.
inline V scale_by_power(V a, V n) { return _mm512_scalef_ps(a, n); }

// t = m 2^e with m in [0.75, 1.5), for positive t.
inline void split(V t, V& m, V& e) {
    m = _mm512_getmant_ps(t, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src);
    e = _mm512_getexp_ps(t);
    e = _mm512_mask_add_ps(e, less(m, set1(1.0f)), e, set1(1.0f));
}

// The bits that are set stand for elements that are not zero. +0 and -0 are zero.
inline unsigned nonzero_bits(const float* p) {
    return _mm512_cmp_ps_mask(load(p), zero(), _CMP_NEQ_UQ);
}
inline unsigned nonzero_bits(const std::int32_t* p) {
    const __m512i v = _mm512_loadu_si512(p);
    return _mm512_test_epi32_mask(v, v);
}
inline unsigned nonzero_bits(const std::uint16_t* p) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm256_test_epi16_mask(v, v);
}
inline unsigned nonzero_bits(const std::uint8_t* p) {
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm_test_epi8_mask(v, v);
}
