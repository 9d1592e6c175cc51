// Vectors of 8 floats in plain C++, for any processor; see simd_avx512.h. Compilers turn the loops
// into what the target's baseline has (SSE2, NEON).

struct V {
    float at[8];
};
struct Mask {
    bool at[8];
};
constexpr int lanes = 8;
constexpr int block_rows = 4;
constexpr int block_vectors = 1;

#define DECODER_FAST_LANES for (int i = 0; i < lanes; ++i)
inline V load(const float* p) { V r; DECODER_FAST_LANES r.at[i] = p[i]; return r; }
inline void store(float* p, V v) { DECODER_FAST_LANES p[i] = v.at[i]; }
inline V set1(float x) { V r; DECODER_FAST_LANES r.at[i] = x; return r; }
inline V zero() { return set1(0.0f); }
inline V add(V a, V b) { DECODER_FAST_LANES a.at[i] += b.at[i]; return a; }
inline V sub(V a, V b) { DECODER_FAST_LANES a.at[i] -= b.at[i]; return a; }
inline V mul(V a, V b) { DECODER_FAST_LANES a.at[i] *= b.at[i]; return a; }
inline V div(V a, V b) { DECODER_FAST_LANES a.at[i] /= b.at[i]; return a; }
inline V fma(V a, V b, V c) { DECODER_FAST_LANES c.at[i] += a.at[i] * b.at[i]; return c; }
inline V fnma(V a, V b, V c) { DECODER_FAST_LANES c.at[i] -= a.at[i] * b.at[i]; return c; }
inline V min(V a, V b) { DECODER_FAST_LANES b.at[i] = a.at[i] < b.at[i] ? a.at[i] : b.at[i]; return b; }
inline V max(V a, V b) { DECODER_FAST_LANES b.at[i] = a.at[i] > b.at[i] ? a.at[i] : b.at[i]; return b; }
inline V abs(V a) { DECODER_FAST_LANES a.at[i] = std::fabs(a.at[i]); return a; }
inline V neg(V a) { DECODER_FAST_LANES a.at[i] = -a.at[i]; return a; }
inline V round(V a) { DECODER_FAST_LANES a.at[i] = std::nearbyint(a.at[i]); return a; }
inline Mask less(V a, V b) { Mask r; DECODER_FAST_LANES r.at[i] = a.at[i] < b.at[i]; return r; }
inline Mask equal(V a, V b) { Mask r; DECODER_FAST_LANES r.at[i] = a.at[i] == b.at[i]; return r; }
inline bool any(Mask m) { bool r = false; DECODER_FAST_LANES r |= m.at[i]; return r; }
inline V select(Mask m, V yes, V no) { DECODER_FAST_LANES no.at[i] = m.at[i] ? yes.at[i] : no.at[i]; return no; }
inline float sum(V a) { float r = 0.0f; DECODER_FAST_LANES r += a.at[i]; return r; }
inline V reciprocal(V a) { DECODER_FAST_LANES a.at[i] = 1.0f / a.at[i]; return a; }

inline float power_of_two(std::int32_t n) {
    const std::uint32_t bits = static_cast<std::uint32_t>(n + 127) << 23;
    float r;
    std::memcpy(&r, &bits, sizeof r);
    return r;
}
inline V scale_by_power(V a, V n) {
    DECODER_FAST_LANES {
        // NaN has no whole part: a holds it already.
        const std::int32_t whole = n.at[i] == n.at[i] ? static_cast<std::int32_t>(n.at[i]) : 0;
        const std::int32_t half = whole >> 1;
        a.at[i] = a.at[i] * power_of_two(half) * power_of_two(whole - half);
    }
    return a;
}
inline void split(V t, V& m, V& e) {
    DECODER_FAST_LANES {
        std::int32_t bits;
        std::memcpy(&bits, &t.at[i], sizeof bits);
        const std::int32_t power = (bits - 0x3f400000) >> 23;
        bits -= power * (1 << 23);
        std::memcpy(&m.at[i], &bits, sizeof bits);
        e.at[i] = static_cast<float>(power) + (t.at[i] - t.at[i]);
    }
}
#undef DECODER_FAST_LANES
