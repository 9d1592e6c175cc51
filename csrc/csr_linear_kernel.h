// A linear map of sparse rows, and the gradient by its weight. Included inside the namespace of an
// instruction set.
//
// The weight is walked once, tile by tile: some of its columns for some outputs, turned round so
// that a non-zero finds the outputs of its column side by side in the cache. Threads share out
// outputs and rows (backward: columns), so that results do not depend on their number.

constexpr int out_vectors = 4;                      // of one item's outputs
constexpr std::int64_t out_block = out_vectors * lanes;
constexpr std::int64_t tile_columns = 256;
constexpr std::int64_t most_rows = 1024;            // of one item
constexpr std::int64_t least_rows = 64;


// The tile's columns (start..start + n) for `units` outputs from `first` on, turned round.
inline void turn_in(const CsrLinear& in, std::int64_t first, std::int64_t units,
                    std::int64_t start, std::int64_t n, float* tile) {
    for (std::int64_t u = 0; u < units; ++u) {
        const float* row = in.weight + (first + u) * in.weight_stride + start;
        for (std::int64_t j = 0; j < n; ++j) tile[j * out_block + u] = row[j];
    }
}

inline void turn_out(const CsrLinear& in, std::int64_t first, std::int64_t units,
                     std::int64_t start, std::int64_t n, const float* tile) {
    for (std::int64_t u = 0; u < units; ++u) {
        float* row = in.d_weight + (first + u) * in.n_columns + start;
        for (std::int64_t j = 0; j < n; ++j) row[j] = tile[j * out_block + u];
    }
}

// Adds to out[0..out_block) what the row's non-zeros before column `end` contribute.
template <class Index>
inline std::int64_t gather(const CsrLinear& in, std::int64_t p, std::int64_t stop,
                           std::int64_t start, std::int64_t end, const float* tile, float* out) {
    const Index* col = static_cast<const Index*>(in.col);
    if (p >= stop || col[p] >= end) return p;
    V even[out_vectors], odd[out_vectors];
    for (int k = 0; k < out_vectors; ++k) {
        even[k] = odd[k] = zero();
    }
    for (;;) {
        const float* from = tile + (col[p] - start) * out_block;
        V value = set1(in.values[p]);
        for (int k = 0; k < out_vectors; ++k) even[k] = fma(value, load(from + k * lanes), even[k]);
        if (++p == stop || col[p] >= end) break;
        from = tile + (col[p] - start) * out_block;
        value = set1(in.values[p]);
        for (int k = 0; k < out_vectors; ++k) odd[k] = fma(value, load(from + k * lanes), odd[k]);
        if (++p == stop || col[p] >= end) break;
    }
    for (int k = 0; k < out_vectors; ++k) {
        store(out + k * lanes, add(load(out + k * lanes), add(even[k], odd[k])));
    }
    return p;
}

// Adds to the tile of gradients what the row's non-zeros before column `end` contribute.
template <class Index>
inline std::int64_t scatter(const CsrLinear& in, std::int64_t p, std::int64_t stop,
                            std::int64_t start, std::int64_t end, const float* gradient,
                            float* tile) {
    const Index* col = static_cast<const Index*>(in.col);
    if (p >= stop || col[p] >= end) return p;
    V g[out_vectors];
    for (int k = 0; k < out_vectors; ++k) g[k] = load(gradient + k * lanes);
    do {
        float* to = tile + (col[p] - start) * out_block;
        const V value = set1(in.values[p]);
        for (int k = 0; k < out_vectors; ++k) {
            store(to + k * lanes, fma(value, g[k], load(to + k * lanes)));
        }
    } while (++p < stop && col[p] < end);
    return p;
}

// One thread's memory.
struct CsrWorker {
    float* tile;           // tile_columns x out_block
    float* rows;           // rows x out_block: outputs, or their gradients
    std::int64_t* cursor;  // how far each row has been read
    void carve(Carver& memory, std::int64_t n_rows) {
        memory.take(tile, tile_columns * out_block);
        memory.take(rows, n_rows * out_block);
        memory.take(cursor, n_rows);
    }
};

template <class Index>
inline void csr_linear_item(const CsrLinear& in, const CsrWorker& w, std::int64_t first,
                            std::int64_t row, std::int64_t n_rows) {
    const Index* crow = static_cast<const Index*>(in.crow) + row;
    const std::int64_t units = least(out_block, in.n_out - first);
    for (std::int64_t u = 0; u < out_block; ++u) {
        w.rows[u] = u < units && in.bias != nullptr ? in.bias[first + u] : 0.0f;
        for (std::int64_t j = 0; u >= units && j < tile_columns; ++j) w.tile[j * out_block + u] = 0.0f;
    }
    for (std::int64_t i = 0; i < n_rows; ++i) {
        for (int k = 0; i > 0 && k < out_vectors; ++k) {
            store(w.rows + i * out_block + k * lanes, load(w.rows + k * lanes));
        }
        w.cursor[i] = crow[i];
    }
    for (std::int64_t start = 0; start < in.n_columns; start += tile_columns) {
        const std::int64_t end = least(start + tile_columns, in.n_columns);
        turn_in(in, first, units, start, end - start, w.tile);
        for (std::int64_t i = 0; i < n_rows; ++i) {
            w.cursor[i] = gather<Index>(in, w.cursor[i], crow[i + 1], start, end, w.tile,
                                        w.rows + i * out_block);
        }
    }
    for (std::int64_t i = 0; i < n_rows; ++i) {
        float* out = in.out + (row + i) * in.n_out + first;
        for (std::int64_t u = 0; u < units; ++u) out[u] = w.rows[i * out_block + u];
    }
}

// The columns from `begin` to `stop` of the gradient by the weight.
template <class Index>
inline void csr_linear_backward_item(const CsrLinear& in, const CsrWorker& w, std::int64_t first,
                                     std::int64_t begin, std::int64_t stop) {
    const Index* crow = static_cast<const Index*>(in.crow);
    const Index* col = static_cast<const Index*>(in.col);
    const std::int64_t units = least(out_block, in.n_out - first);
    for (std::int64_t i = 0; i < in.n_rows; ++i) {
        for (std::int64_t u = 0; u < out_block; ++u) {
            w.rows[i * out_block + u] = u < units ? in.grad_out[i * in.n_out + first + u] : 0.0f;
        }
        std::int64_t low = crow[i], high = crow[i + 1];
        while (low < high) {
            const std::int64_t middle = (low + high) / 2;
            if (col[middle] < begin) low = middle + 1;
            else high = middle;
        }
        w.cursor[i] = low;
    }
    for (std::int64_t start = begin; start < stop; start += tile_columns) {
        const std::int64_t end = least(start + tile_columns, stop);
        for (std::int64_t j = 0; j < (end - start) * out_block; j += lanes) store(w.tile + j, zero());
        for (std::int64_t i = 0; i < in.n_rows; ++i) {
            w.cursor[i] = scatter<Index>(in, w.cursor[i], crow[i + 1], start, end,
                                         w.rows + i * out_block, w.tile);
        }
        turn_out(in, first, units, start, end - start, w.tile);
    }
}

// Calls item(worker, first output, number) for all outputs, and for each for all numbers.
template <class Item>
inline Status for_outputs(const CsrLinear& in, std::int64_t n_rows, std::int64_t numbers, Item item) {
    Carver size{nullptr, 0};
    CsrWorker worker;
    worker.carve(size, n_rows);
    Workspace workspace(size.used * static_cast<std::size_t>(in.n_threads));
    if (workspace.memory == nullptr) return out_of_memory;
    auto body = [&](std::int64_t i, int thread) {
        Carver memory{static_cast<char*>(workspace.memory), size.used * static_cast<std::size_t>(thread)};
        CsrWorker w;
        w.carve(memory, n_rows);
        item(w, i / numbers * out_block, i % numbers);
    };
    parallel_for((in.n_out + out_block - 1) / out_block * numbers, in.n_threads, body);
    return ok;
}

inline std::int64_t share(std::int64_t n, const CsrLinear& in, std::int64_t smallest,
                          std::int64_t largest, std::int64_t unit) {
    const std::int64_t blocks = (in.n_out + out_block - 1) / out_block;
    const std::int64_t parts = (in.n_threads + blocks - 1) / blocks;
    const std::int64_t part = round_up((n + parts - 1) / parts, unit);
    return part < smallest ? smallest : part > largest ? largest : part;
}

inline Status csr_linear(const CsrLinear& in) {
    const std::int64_t part = share(in.n_rows, in, least_rows, most_rows, 1);
    return for_outputs(in, least(part, in.n_rows), (in.n_rows + part - 1) / part,
                       [&](const CsrWorker& w, std::int64_t first, std::int64_t number) {
                           const std::int64_t row = number * part;
                           const std::int64_t n = least(part, in.n_rows - row);
                           if (in.index_bytes == 4) csr_linear_item<std::int32_t>(in, w, first, row, n);
                           else csr_linear_item<std::int64_t>(in, w, first, row, n);
                       });
}

inline Status csr_linear_backward(const CsrLinear& in) {
    const std::int64_t part =
        share(in.n_columns, in, tile_columns, round_up(in.n_columns, tile_columns), tile_columns);
    return for_outputs(
        in, in.n_rows, (in.n_columns + part - 1) / part,
        [&](const CsrWorker& w, std::int64_t first, std::int64_t number) {
            const std::int64_t begin = number * part, stop = least(begin + part, in.n_columns);
            if (in.index_bytes == 4) csr_linear_backward_item<std::int32_t>(in, w, first, begin, stop);
            else csr_linear_backward_item<std::int64_t>(in, w, first, begin, stop);
        });
}
