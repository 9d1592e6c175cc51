// Vectors of 8 floats, for AVX2 with FMA; see simd_avx512.h.

using V = __m256;
using Mask = __m256;
constexpr int lanes = 8;
constexpr int block_rows = 6;
constexpr int block_vectors = 2;

inline V load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, V v) { _mm256_storeu_ps(p, v); }
inline V set1(float x) { return _mm256_set1_ps(x); }
inline V zero() { return _mm256_setzero_ps(); }
inline V add(V a, V b) { return _mm256_add_ps(a, b); }
inline V sub(V a, V b) { return _mm256_sub_ps(a, b); }
inline V mul(V a, V b) { return _mm256_mul_ps(a, b); }
inline V div(V a, V b) { return _mm256_div_ps(a, b); }
inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
inline V fnma(V a, V b, V c) { return _mm256_fnmadd_ps(a, b, c); }
inline V min(V a, V b) { return _mm256_min_ps(a, b); }
inline V max(V a, V b) { return _mm256_max_ps(a, b); }
inline V abs(V a) { return _mm256_andnot_ps(set1(-0.0f), a); }
inline V neg(V a) { return _mm256_sub_ps(zero(), a); }
inline V round(V a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Mask less(V a, V b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
inline Mask equal(V a, V b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
inline bool any(Mask m) { return _mm256_movemask_ps(m) != 0; }
inline V select(Mask m, V yes, V no) { return _mm256_blendv_ps(no, yes, m); }
inline float sum(V a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
inline V reciprocal(V a) { return _mm256_div_ps(set1(1.0f), a); }

inline V scale_by_power(V a, V n) {
    // In two halves, because 2^n alone can be out of range where a 2^n is not.
    const __m256i i = _mm256_cvtps_epi32(n);
    const __m256i half = _mm256_srai_epi32(i, 1);
    const __m256i bias = _mm256_set1_epi32(127);
    const __m256i first = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
    const __m256i rest = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(i, half), bias), 23);
    return mul(mul(a, _mm256_castsi256_ps(first)), _mm256_castsi256_ps(rest));
}

inline void split(V t, V& m, V& e) {
    const __m256i bits = _mm256_castps_si256(t);
    const __m256i power =
        _mm256_srai_epi32(_mm256_sub_epi32(bits, _mm256_set1_epi32(0x3f400000)), 23);
    m = _mm256_castsi256_ps(_mm256_sub_epi32(bits, _mm256_slli_epi32(power, 23)));
    e = add(_mm256_cvtepi32_ps(power), sub(t, t));  // infinity and NaN must not be lost
}

inline unsigned nonzero_bits(const float* p) {
    return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(load(p), zero(), _CMP_NEQ_UQ)));
}
inline unsigned nonzero_bits_of(__m256i v) {
    const __m256i is_zero = _mm256_cmpeq_epi32(v, _mm256_setzero_si256());
    return static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(is_zero))) ^ 0xffu;
}
inline unsigned nonzero_bits(const std::int32_t* p) {
    return nonzero_bits_of(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline unsigned nonzero_bits(const std::uint16_t* p) {
    return nonzero_bits_of(
        _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline unsigned nonzero_bits(const std::uint8_t* p) {
    return nonzero_bits_of(
        _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
