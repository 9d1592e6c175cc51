// Products of bfloat16 numbers, accumulated in float32, for AVX-512 with its BF16 instructions.

inline std::uint32_t bits_of(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

// Two numbers rounded to bfloat16, the first in the low half.
inline std::uint32_t pair(float low, float high) {
    const auto round_to_even = [](float x) -> std::uint32_t {
        const std::uint32_t bits = bits_of(x);
        if (x != x) return (bits >> 16) | 0x40;
        return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    };
    return round_to_even(low) | round_to_even(high) << 16;
}

// out[i] = pair(low[i], high[i]) for a vector.
inline void store_pairs(std::uint32_t* out, V low, V high) {
    const __m512i l = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(low)));
    const __m512i h = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(high)));
    _mm512_storeu_si512(out, _mm512_or_si512(l, _mm512_slli_epi32(h, 16)));
}

// out[i] = pair(row[2 i], row[2 i + 1]) for i < n.
inline void store_row_as_pairs(std::uint32_t* out, const float* row, std::int64_t n) {
    std::int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        const __m512bh both = _mm512_cvtne2ps_pbh(load(row + 2 * i + 16), load(row + 2 * i));
        _mm512_storeu_si512(out + i, reinterpret_cast<__m512i>(both));
    }
    for (; i < n; ++i) out[i] = pair(row[2 * i], row[2 * i + 1]);
}

// An Element is two numbers that follow each other in the direction of the sum.
struct BFloat16 {
    using Element = std::uint32_t;
    using Vector = __m512bh;
    static Vector load_vector(const Element* p) {
        return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p));
    }
    static Vector broadcast(const Element* p) {
        return reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(*p)));
    }
    static V multiply_add(Vector a, Vector b, V c) { return _mm512_dpbf16_ps(c, a, b); }
};
