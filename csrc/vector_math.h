// exp, log1p and their kin on vectors of floats. Included inside the namespace of an instruction set.
//
// Polynomials are minimax fits of this project. Stated and tested against float64, in units in the
// last place of the result: exp and expm1 within 2, log1p within 2.1.

constexpr float ln2_high = 0.693359375f;  // few bits, so that its multiples are exact
constexpr float ln2_low = -2.12194440e-4f;

// x = n ln 2 + r; returns 2^n, and y with exp(r) = 1 + y.
inline V exp_parts(V x, V& y) {
    x = min(set1(89.0f), max(set1(-110.0f), x));
    const V n = round(mul(x, set1(1.44269504f)));
    V r = fnma(n, set1(ln2_high), x);
    r = fnma(n, set1(ln2_low), r);
    V p = fma(set1(0.00139505998f), r, set1(0.00836895406f));
    p = fma(p, r, set1(0.041666206f));
    p = fma(p, r, set1(0.166665182f));
    p = fma(p, r, set1(0.5f));
    y = fma(mul(r, r), p, r);
    return n;
}

inline V exp(V x) {
    V y;
    const V n = exp_parts(x, y);
    return scale_by_power(add(set1(1.0f), y), n);
}

// exp(x) and exp(x) - 1, for x <= 0 and not below what a power of two can hold.
inline void exp_and_expm1(V x, V& e, V& em1) {
    V y;
    const V n = exp_parts(x, y);
    const V power = scale_by_power(set1(1.0f), n);
    em1 = fma(power, y, sub(power, set1(1.0f)));
    e = scale_by_power(add(set1(1.0f), y), n);
}

// For |z| <= 0.5: the Q of log(1 + z) = z - z^2/2 + z^3 Q(z).
inline V log1p_tail(V z) {
    V q = fma(set1(-0.0461665541f), z, set1(0.105826996f));
    q = fma(q, z, set1(-0.131868929f));
    q = fma(q, z, set1(0.144677162f));
    q = fma(q, z, set1(-0.166437432f));
    q = fma(q, z, set1(0.199910894f));
    q = fma(q, z, set1(-0.250001937f));
    return fma(q, z, set1(0.333334476f));
}

struct Log {
    V value;
    V z, q;        // where `small`: value = z - z^2/2 + z^3 q
    Mask is_small;
};

// log(t), given t - 1 more exactly than t itself holds it.
inline Log log_of(V t, V t_minus_1) {
    Log out;
    V m, e;
    split(t, m, e);
    out.is_small = equal(e, zero());
    out.z = select(out.is_small, t_minus_1, sub(m, set1(1.0f)));
    out.q = log1p_tail(out.z);
    V r = fma(out.z, out.q, set1(-0.5f));
    r = mul(mul(out.z, out.z), r);
    r = fma(e, set1(ln2_low), r);
    r = add(r, out.z);
    out.value = fma(e, set1(ln2_high), r);
    return out;
}

inline V log1p(V v) { return log_of(add(set1(1.0f), v), v).value; }
