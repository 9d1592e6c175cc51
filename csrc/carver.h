// What kernels plan their memory with. Included inside the namespace of an instruction set.

inline std::int64_t round_up(std::int64_t n, std::int64_t unit) {
    return (n + unit - 1) / unit * unit;
}
template <class T>
inline T least(T a, T b) {
    return a < b ? a : b;
}

// Takes pieces from one buffer. A kernel carves twice: first without a buffer, to learn its size.
struct Carver {
    char* base;
    std::size_t used;
    template <class T>
    void take(T*& pointer, std::int64_t n) {
        pointer = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
        used += static_cast<std::size_t>(round_up(n * static_cast<std::int64_t>(sizeof(T)), 64));
    }
};
