// Vectors of 4 floats in GCC's and clang's vector types, for any processor (SSE2, NEON, ...); see
// simd_avx512.h.

typedef float V __attribute__((vector_size(16)));
typedef std::int32_t Mask __attribute__((vector_size(16)));  // all bits of a lane, or none
constexpr int lanes = 4;
constexpr int block_rows = 6;
constexpr int block_vectors = 2;

inline V load(const float* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline void store(float* p, V v) { std::memcpy(p, &v, sizeof v); }
inline V set1(float x) { return V{x, x, x, x}; }
inline V zero() { return V{0.0f, 0.0f, 0.0f, 0.0f}; }
inline Mask bits_of_vector(V v) { return reinterpret_cast<Mask>(v); }
inline V vector_of_bits(Mask m) { return reinterpret_cast<V>(m); }
inline V add(V a, V b) { return a + b; }
inline V sub(V a, V b) { return a - b; }
inline V mul(V a, V b) { return a * b; }
inline V div(V a, V b) { return a / b; }
inline V fma(V a, V b, V c) { return a * b + c; }
inline V fnma(V a, V b, V c) { return c - a * b; }
inline Mask less(V a, V b) { return a < b; }
inline Mask equal(V a, V b) { return a == b; }
inline bool any(Mask m) { return (m[0] | m[1] | m[2] | m[3]) != 0; }
inline V select(Mask m, V yes, V no) {
    return vector_of_bits((m & bits_of_vector(yes)) | (~m & bits_of_vector(no)));
}
inline V min(V a, V b) { return select(a < b, a, b); }
inline V max(V a, V b) { return select(a > b, a, b); }
inline V abs(V a) {
    return vector_of_bits(bits_of_vector(a) & Mask{0x7fffffff, 0x7fffffff, 0x7fffffff, 0x7fffffff});
}
inline V neg(V a) { return zero() - a; }
inline float sum(V a) { return (a[0] + a[2]) + (a[1] + a[3]); }
inline V reciprocal(V a) { return set1(1.0f) / a; }

// To the nearest whole number, ties to even, for |a| < 2^22: what is beyond is none of exp's.
inline V round(V a) {
    const V shift = set1(12582912.0f);  // 1.5 * 2^23
    return (a + shift) - shift;
}

inline V scale_by_power(V a, V n) {
    // In two halves, because 2^n alone can be out of range where a 2^n is not. NaN has no whole
    // part: a holds it already.
    const V known = select(n == n, n, zero());
    const Mask whole = bits_of_vector(known + set1(12582912.0f)) - 0x4b400000;
    const Mask half = whole >> 1;
    return (a * vector_of_bits((half + 127) << 23)) * vector_of_bits((whole - half + 127) << 23);
}

inline void split(V t, V& m, V& e) {
    const Mask bits = bits_of_vector(t);
    const Mask power = (bits - 0x3f400000) >> 23;
    m = vector_of_bits(bits - power * (1 << 23));
    const V whole = {static_cast<float>(power[0]), static_cast<float>(power[1]),
                     static_cast<float>(power[2]), static_cast<float>(power[3])};
    e = whole + (t - t);  // infinity and NaN must not be lost
}
