// The count likelihood, forward and gradients. Included inside the namespace of an instruction set.
//
// Cells are taken in blocks of up to 256. Of a block, matrices lie gene by gene, a gene's cells
// across the lanes of vectors: what belongs to a gene is a broadcast, and its gradients are sums
// over lanes. A block passes three phases:
//   1. logits, and e = exp(logit - the tile's maximum) kept (softplus: its value);
//   2. the second head, the likelihood, the derivatives by log(mu), and all of their products;
//   3. the correction for softmax, and the products of the scale head's gradient.
// No product is taken twice. Genes fall into chunks, whose number depends on the genes alone:
// threads work on chunks, and sums over chunks are taken in order, so that results are the same for
// any number of threads.

constexpr float eps = 1e-8f;
constexpr std::int64_t most_cells = 256;    // of a block
constexpr std::int64_t most_tile = 192;     // genes of a tile: e and the products' operands stay
                                            // in the second-level cache
constexpr std::int64_t most_chunks = 32;
constexpr std::int64_t most_workspace = 1 << 26;  // bytes of e and d, if 64 cells fit at all

// The counts of a tile that are not zero, and what there is at their places before it is replaced.
struct Nonzeros {
    std::int64_t n;
    std::int32_t* gene;  // within the tile
    std::int32_t* cell;  // within the block
    double* x;
    float* e;
    float* dropout;
    float* r;
};

// One worker's own memory.
struct Worker {
    float* dropout;    // tile: dropout logits, then their gradient
    float* e;          // tile: in place of the block's, which is then not kept
    float* r;          // tile: log theta of each element, then its gradient
    float* weights;    // tile of weights with padded rows
    float* d_weights;
    // bfloat16 products: a tile of weights and of gradients, paired by unit or cell, and by gene.
    std::uint32_t *weight_by_unit, *weight_by_gene, *d_by_cell, *d_by_gene;
    float* ratio;      // by cell, for one tile: exp(tile maximum - maximum)
    float* factor;     // by cell, for one tile: e times it is mu
    float* slope;      // by cell, for one tile
    float* nll;        // by cell, of one tile
    float* u;          // by cell, of one tile
    // By cell, of one gene.
    float *a_row, *u_row, *d_log_theta_row, *pi_row, *minus_x_row, *survives_row;
    Nonzeros nonzeros;
    bool has_bad_count;
    double bad_count;
};

struct Call {
    explicit Call(CountNll& arguments) : in(arguments) {}

    CountNll& in;
    bool gradients;       // any is wanted
    bool shift_alone;  // nothing else is wanted
    bool by_element;      // theta differs by cell
    bool h_by_cell_wanted;
    bool fast_products;   // in bfloat16
    int n_workers;

    std::int64_t n_cells_padded;  // of a block, with padding
    std::int64_t ld;      // distance of genes in e and d; odd in cache lines, to use every set
    std::int64_t n_hidden_padded;
    std::int64_t chunk;   // genes of a chunk
    std::int64_t tile;    // genes of a tile
    std::int64_t tiles_a_chunk;
    std::int64_t n_chunks;

    // By gene.
    float *theta, *theta_eps, *inv_theta_eps, *eps_ratio, *d_log_theta;
    // By gene and cell.
    float *e, *d;
    // Hidden units of the block in panels: unit by unit, and cell by cell.
    float *h_by_unit, *h_by_cell;
    std::uint32_t *h_by_unit_pairs, *h_by_cell_pairs;
    // By tile and cell.
    float *tile_max, *tile_sum;
    // By cell.
    float *row_max, *row_factor, *row_weight, *row_slope;
    double *row_shift, *row_total;
    // By chunk and cell.
    double *chunk_nll, *chunk_u;
    float* chunk_d_hidden;
    std::int64_t* cursor;  // how far a row of CSR counts has been read
    Worker* workers;

    std::int64_t first_row;  // of the block
    std::int64_t n_rows;     // of the block
    bool first_block;

    std::int64_t unit_pairs() const { return (in.n_hidden + 1) / 2; }
    std::int64_t chunk_start(std::int64_t k) const { return least(k * chunk, in.n_genes); }
};

// ---------------------------------------------------------------------------------------------
// Sizes, and memory

inline void plan(Call& c) {
    const CountNll& in = c.in;
    c.gradients = in.d_hidden || in.d_scale_weight || in.d_scale_bias || in.d_dropout_weight ||
                  in.d_dropout_bias || in.d_r_weight || in.d_r_bias || in.d_px_r;
    c.shift_alone = !c.gradients && in.nll == nullptr && in.usum == nullptr;
    c.by_element = in.likelihood != poisson && (in.r_weight != nullptr || in.px_r_index != nullptr);
    c.h_by_cell_wanted = in.d_scale_weight || in.d_dropout_weight || in.d_r_weight;

    // At least 96 genes a chunk; their number does not depend on the threads.
    const std::int64_t n_chunks = least(most_chunks, (in.n_genes + 95) / 96);
    std::int64_t wanted = 1;
    while (2 * wanted <= n_chunks) wanted *= 2;
    c.chunk = round_up((in.n_genes + wanted - 1) / wanted, block_rows);
    c.n_chunks = (in.n_genes + c.chunk - 1) / c.chunk;
    c.tiles_a_chunk = (c.chunk + most_tile - 1) / most_tile;
    c.tile = round_up((c.chunk + c.tiles_a_chunk - 1) / c.tiles_a_chunk, block_rows);

    // Blocks of equal size, so that little of the last one is padding.
    const std::int64_t buffers = c.gradients ? 2 : 1;
    const std::int64_t fits = most_workspace / (buffers * 4 * in.n_genes) / 64 * 64;
    const std::int64_t most = fits < 64 ? 64 : least(fits, most_cells);
    const std::int64_t n_blocks = (in.n_rows + most - 1) / most;
    c.n_cells_padded = round_up((in.n_rows + n_blocks - 1) / n_blocks, 16);
    c.ld = c.n_cells_padded + (c.n_cells_padded % 32 == 0 ? 16 : 0);
    c.n_hidden_padded = round_up(in.n_hidden, 16);
}

inline void carve(Call& c, Carver& memory) {
    const CountNll& in = c.in;
    const std::int64_t cells = c.n_cells_padded, n_tiles = c.n_chunks * c.tiles_a_chunk;
    const std::int64_t genes = in.n_genes + 16;  // vectors may reach over the end
    for (float** p : {&c.theta, &c.theta_eps, &c.inv_theta_eps, &c.eps_ratio, &c.d_log_theta})
        memory.take(*p, genes);
    memory.take(c.e, c.shift_alone ? 0 : in.n_genes * c.ld);
    memory.take(c.d, c.gradients ? in.n_genes * c.ld : 0);
    const std::int64_t n_h_by_cell = c.h_by_cell_wanted ? c.n_hidden_padded * cells : 0;
    memory.take(c.h_by_unit, c.fast_products ? 0 : in.n_hidden * cells);
    memory.take(c.h_by_cell, c.fast_products ? 0 : n_h_by_cell);
    memory.take(c.h_by_unit_pairs, c.fast_products ? c.unit_pairs() * cells : 0);
    memory.take(c.h_by_cell_pairs, c.fast_products ? n_h_by_cell / 2 : 0);
    memory.take(c.tile_max, n_tiles * cells);
    memory.take(c.tile_sum, n_tiles * cells);
    for (float** p : {&c.row_max, &c.row_factor, &c.row_weight, &c.row_slope})
        memory.take(*p, cells);
    for (double** p : {&c.row_shift, &c.row_total}) memory.take(*p, cells);
    memory.take(c.chunk_nll, c.n_chunks * cells);
    memory.take(c.chunk_u, c.n_chunks * cells);
    memory.take(c.chunk_d_hidden, in.d_hidden ? c.n_chunks * cells * c.n_hidden_padded : 0);
    memory.take(c.cursor, in.dense == nullptr ? c.n_chunks * cells : 0);
    memory.take(c.workers, c.n_workers);
    const bool padded = in.n_hidden != c.n_hidden_padded;
    for (int i = 0; i < c.n_workers; ++i) {
        Worker w{};
        memory.take(w.dropout, in.likelihood == zinb ? c.tile * c.ld : 0);
        memory.take(w.r, c.by_element ? c.tile * c.ld : 0);
        memory.take(w.e, c.shift_alone ? c.tile * c.ld : 0);
        const std::int64_t gene_pairs = c.fast_products ? (c.tile + 1) / 2 : 0;
        memory.take(w.weight_by_unit, c.fast_products ? c.tile * c.unit_pairs() : 0);
        memory.take(w.weight_by_gene, gene_pairs * c.n_hidden_padded);
        memory.take(w.d_by_cell, gene_pairs * 2 * (cells / 2));
        memory.take(w.d_by_gene, gene_pairs * cells);
        memory.take(w.weights, padded ? c.tile * c.n_hidden_padded : 0);
        memory.take(w.d_weights, padded ? c.tile * c.n_hidden_padded : 0);
        for (float** p : {&w.ratio, &w.factor, &w.slope, &w.nll, &w.u, &w.a_row, &w.u_row,
                          &w.d_log_theta_row, &w.pi_row, &w.minus_x_row, &w.survives_row}) {
            memory.take(*p, cells);
        }
        const std::int64_t most = c.tile * cells;
        memory.take(w.nonzeros.gene, most);
        memory.take(w.nonzeros.cell, most);
        memory.take(w.nonzeros.x, most);
        memory.take(w.nonzeros.e, most);
        memory.take(w.nonzeros.dropout, in.likelihood == zinb ? most : 0);
        memory.take(w.nonzeros.r, c.by_element ? most : 0);
        if (c.workers != nullptr) c.workers[i] = w;
    }
}

// ---------------------------------------------------------------------------------------------
// Counts

// Of the counts that are refused the smallest is reported, and NaN before any.
inline bool worse(double count, double other) {
    return other == other && (count != count || count < other);
}

// Appends to a worker's list; a local copy of its pointers, for the compiler to keep in registers.
struct Appender {
    Appender(const Call& c, Worker& worker, std::int64_t first_gene)
        : w(worker), n(0), e(c.e + first_gene * c.ld), ld(c.ld), gene(worker.nonzeros.gene),
          cell(worker.nonzeros.cell), x(worker.nonzeros.x) {}

    void append(std::int64_t in_gene, std::int64_t in_cell, double count) {
        gene[n] = static_cast<std::int32_t>(in_gene);
        cell[n] = static_cast<std::int32_t>(in_cell);
        x[n] = count;
        __builtin_prefetch(e + in_gene * ld + in_cell, 1);  // wanted soon, and far away by now
        if (count > 1e-8 && count < HUGE_VAL) ++n;
        else if (!(count >= 0.0 && count < HUGE_VAL)) refuse(count);
    }

    void refuse(double count) {
        if (!w.has_bad_count || worse(count, w.bad_count)) w.bad_count = count;
        w.has_bad_count = true;
    }

    Worker& w;
    std::int64_t n;
    float* const e;
    const std::int64_t ld;
    std::int32_t* const gene;
    std::int32_t* const cell;
    double* const x;
};

// For types whose instruction set has no such instruction.
template <class T>
inline unsigned nonzero_bits(const T* p) {
    unsigned bits = 0;
    for (int i = 0; i < lanes; ++i) bits |= static_cast<unsigned>(p[i] != T(0)) << i;
    return bits;
}

template <class T>
inline void scan_dense(const Call& c, Worker& w, std::int64_t gene, std::int64_t n) {
    Appender list(c, w, gene);
    for (std::int64_t row = 0; row < c.n_rows; ++row) {
        const std::int64_t cell = (c.first_row + row) % c.in.n_cells;
        const T* x = static_cast<const T*>(c.in.dense) + cell * c.in.dense_stride + gene;
        std::int64_t i = 0;
        for (; i + lanes <= n; i += lanes) {
            // The next tile's counts of this cell; past the end of a row this does no harm.
            __builtin_prefetch(x + n + i);
            for (unsigned bits = nonzero_bits(x + i); bits != 0; bits &= bits - 1) {
                const std::int64_t at = i + __builtin_ctz(bits);
                list.append(at, row, static_cast<double>(x[at]));
            }
        }
        for (; i < n; ++i) {
            if (x[i] != T(0)) list.append(i, row, static_cast<double>(x[i]));
        }
    }
    w.nonzeros.n = list.n;
}

template <class T, class Index>
inline void scan_csr(const Call& c, Worker& w, std::int64_t* cursor, std::int64_t gene,
                     std::int64_t n) {
    const Index* crow = static_cast<const Index*>(c.in.crow);
    const Index* col = static_cast<const Index*>(c.in.col);
    const T* values = static_cast<const T*>(c.in.values);
    const std::int64_t end = gene + n;
    Appender list(c, w, gene);
    for (std::int64_t row = 0; row < c.n_rows; ++row) {
        const std::int64_t stop = crow[(c.first_row + row) % c.in.n_cells + 1];
        std::int64_t p = cursor[row];
        for (; p < stop && col[p] < end; ++p) {
            list.append(col[p] - gene, row, static_cast<double>(values[p]));
        }
        cursor[row] = p;
        // What the next tile reads of this row: as many rows are read in turn, no hardware sees it.
        __builtin_prefetch(col + p + 8);
        __builtin_prefetch(values + p + 8);
    }
    w.nonzeros.n = list.n;
}

// Finds where each chunk starts in a row of CSR counts.
template <class Index>
inline void find_chunks(const Call& c, std::int64_t row) {
    const std::int64_t cell = (c.first_row + row) % c.in.n_cells;
    const Index* col = static_cast<const Index*>(c.in.col);
    const std::int64_t stop = static_cast<const Index*>(c.in.crow)[cell + 1];
    std::int64_t p = static_cast<const Index*>(c.in.crow)[cell];
    for (std::int64_t k = 0; k < c.n_chunks; ++k) {
        const std::int64_t start = c.chunk_start(k);
        while (p < stop && col[p] < start) ++p;
        c.cursor[k * c.n_cells_padded + row] = p;
    }
}

template <class T>
inline void scan_of(const Call& c, Worker& w, std::int64_t* cursor, std::int64_t gene,
                    std::int64_t n) {
    if (c.in.dense != nullptr) scan_dense<T>(c, w, gene, n);
    else if (c.in.index_type == type_int32) scan_csr<T, std::int32_t>(c, w, cursor, gene, n);
    else scan_csr<T, std::int64_t>(c, w, cursor, gene, n);
}

// Lists the counts of a tile that are not zero; tiles of a chunk must come in order.
inline void scan(const Call& c, Worker& w, std::int64_t chunk, std::int64_t gene, std::int64_t n) {
    std::int64_t* cursor = c.cursor + chunk * c.n_cells_padded;
    switch (c.in.counts_type) {
        case type_float32: return scan_of<float>(c, w, cursor, gene, n);
        case type_float64: return scan_of<double>(c, w, cursor, gene, n);
        case type_int8: return scan_of<std::int8_t>(c, w, cursor, gene, n);
        case type_uint8: return scan_of<std::uint8_t>(c, w, cursor, gene, n);
        case type_int16: return scan_of<std::int16_t>(c, w, cursor, gene, n);
        case type_uint16: return scan_of<std::uint16_t>(c, w, cursor, gene, n);
        case type_int32: return scan_of<std::int32_t>(c, w, cursor, gene, n);
        default: return scan_of<std::int64_t>(c, w, cursor, gene, n);
    }
}

// ---------------------------------------------------------------------------------------------
// Products with the heads

#if DECODER_FAST_BF16
inline void head_in_bf16(const Call& c, Worker& w, const float* weight, const float* bias,
                         std::int64_t gene, std::int64_t n, float* out) {
    const std::int64_t H = c.in.n_hidden, pairs = c.unit_pairs();
    for (std::int64_t i = 0; i < n; ++i) {
        const float* row = weight + (gene + i) * H;
        store_row_as_pairs(w.weight_by_unit + i * pairs, row, H / 2);
        if (H % 2 != 0) w.weight_by_unit[(i + 1) * pairs - 1] = pair(row[H - 1], 0.0f);
    }
    for (std::int64_t cell = 0; cell < c.n_cells_padded; cell += panel_width) {
        const std::int64_t width = least<std::int64_t>(panel_width, c.n_cells_padded - cell);
        multiply_panel<BFloat16>(w.weight_by_unit, pairs, 1, c.h_by_unit_pairs + cell * pairs, width,
                                 out + cell, c.ld, n, pairs, static_cast<int>(width / lanes), false,
                                 bias == nullptr ? nullptr : bias + gene);
    }
}
#endif

// out (n x cells) = weight h^T + bias.
inline void head(const Call& c, Worker& w, const float* weight, const float* bias, std::int64_t gene,
                 std::int64_t n, float* out) {
    const std::int64_t H = c.in.n_hidden;
    (void)w;
#if DECODER_FAST_BF16
    if (c.fast_products) return head_in_bf16(c, w, weight, bias, gene, n, out);
#endif
    for (std::int64_t cell = 0; cell < c.n_cells_padded; cell += panel_width) {
        const std::int64_t width = least<std::int64_t>(panel_width, c.n_cells_padded - cell);
        multiply_panel(weight + gene * H, H, 1, c.h_by_unit + cell * H, width, out + cell, c.ld, n,
                       H, static_cast<int>(width / lanes), false,
                       bias == nullptr ? nullptr : bias + gene);
    }
}

// Carries a head's gradient d (n x cells) to its weight and, by chunk, to the hidden units: added to
// what is there, unless it is the first.
inline void head_gradients(const Call& c, Worker& w, const float* d, const float* weight,
                           float* d_weight, std::int64_t gene, std::int64_t n, float* d_hidden,
                           bool first) {
    const std::int64_t H = c.in.n_hidden, padded = c.n_hidden_padded, cells = c.n_cells_padded;
    const bool aligned = H == padded;
    const float* rows = weight + gene * H;
    if (!aligned && d_hidden != nullptr) {
        for (std::int64_t i = 0; i < n; ++i) {
            std::memcpy(w.weights + i * padded, rows + i * H, sizeof(float) * H);
            for (std::int64_t k = H; k < padded; ++k) w.weights[i * padded + k] = 0.0f;
        }
        rows = w.weights;
    }
    float* out = aligned ? d_weight + gene * H : w.d_weights;
    const bool add_to_out = aligned && !c.first_block;
#if DECODER_FAST_BF16
    const std::int64_t gene_pairs = (n + 1) / 2;
    if (c.fast_products) {
        if (d_weight != nullptr) {
            for (std::int64_t i = 0; i < n; ++i) {
                store_row_as_pairs(w.d_by_cell + i * (cells / 2), d + i * c.ld, cells / 2);
            }
        }
        for (std::int64_t i = 0; i < gene_pairs && d_hidden != nullptr; ++i) {
            const bool both = 2 * i + 1 < n;
            const float* d_row = d + 2 * i * c.ld;
            for (std::int64_t j = 0; j < cells; j += lanes) {
                store_pairs(w.d_by_gene + i * cells + j, load(d_row + j),
                            both ? load(d_row + c.ld + j) : zero());
            }
            const float* row = rows + 2 * i * padded;
            for (std::int64_t k = 0; k < padded; k += lanes) {
                store_pairs(w.weight_by_gene + i * padded + k, load(row + k),
                            both ? load(row + padded + k) : zero());
            }
        }
    }
#endif
    for (std::int64_t k = 0; k < padded; k += panel_width) {
        const std::int64_t width = least<std::int64_t>(panel_width, padded - k);
        const int vectors = static_cast<int>(width / lanes);
#if DECODER_FAST_BF16
        if (c.fast_products) {
            if (d_weight != nullptr) {
                multiply_panel<BFloat16>(w.d_by_cell, cells / 2, 1,
                                         c.h_by_cell_pairs + k * (cells / 2), width, out + k,
                                         padded, n, cells / 2, vectors, add_to_out, nullptr);
            }
            if (d_hidden != nullptr) {
                multiply_panel<BFloat16>(w.d_by_gene, 1, cells, w.weight_by_gene + k, padded,
                                         d_hidden + k, padded, cells, gene_pairs, vectors, !first,
                                         nullptr);
            }
            continue;
        }
#endif
        if (d_weight != nullptr) {
            // By halves of a block: that much of h stays in the first-level cache.
            for (std::int64_t j = 0; j < cells; j += 128) {
                multiply_panel(d + j, c.ld, 1, c.h_by_cell + k * cells + j * width, width, out + k,
                               padded, n, least<std::int64_t>(128, cells - j), vectors,
                               add_to_out || j > 0, nullptr);
            }
        }
        if (d_hidden != nullptr) {
            multiply_panel(d, 1, c.ld, rows + k, padded, d_hidden + k, padded, cells, n, vectors,
                           !first, nullptr);
        }
    }
    if (!aligned && d_weight != nullptr) {
        for (std::int64_t i = 0; i < n; ++i) {
            float* to = d_weight + (gene + i) * H;
            const float* more = w.d_weights + i * padded;
            for (std::int64_t k = 0; k < H; ++k) to[k] = c.first_block ? more[k] : to[k] + more[k];
        }
    }
}

// ---------------------------------------------------------------------------------------------
// Phase 0: hidden units into panels, and what belongs to each cell

#if DECODER_FAST_BF16
inline void pack_in_bf16(const Call& c, std::int64_t first_cell) {
    const CountNll& in = c.in;
    const std::int64_t H = in.n_hidden, cells = c.n_cells_padded;
    const std::int64_t panel = first_cell / panel_width * panel_width;
    const std::int64_t width = least<std::int64_t>(panel_width, cells - panel);
    const auto value = [&](std::int64_t cell, std::int64_t k) {
        return cell < c.n_rows && k < H ? in.hidden[(c.first_row + cell) * H + k] : 0.0f;
    };
    for (std::int64_t cell = first_cell; cell < first_cell + 16; ++cell) {
        std::uint32_t* out = c.h_by_unit_pairs + panel * c.unit_pairs() + (cell - panel);
        for (std::int64_t k = 0; k < H; k += 2) {
            out[k / 2 * width] = pair(value(cell, k), value(cell, k + 1));
        }
    }
    for (std::int64_t cell = first_cell; cell < first_cell + 16 && c.h_by_cell_wanted; cell += 2) {
        for (std::int64_t k = 0; k < c.n_hidden_padded; ++k) {
            const std::int64_t start = k / panel_width * panel_width;
            const std::int64_t n = least<std::int64_t>(panel_width, c.n_hidden_padded - start);
            c.h_by_cell_pairs[start * (cells / 2) + cell / 2 * n + k - start] =
                pair(value(cell, k), value(cell + 1, k));
        }
    }
}
#endif

inline void pack(const Call& c, std::int64_t first_cell) {
    const CountNll& in = c.in;
    const std::int64_t H = in.n_hidden, cells = c.n_cells_padded;
    for (std::int64_t cell = first_cell; cell < first_cell + 16; ++cell) {
        const float upstream = in.upstream == nullptr ? static_cast<float>(in.upstream_of_all)
                                                      : in.upstream[c.first_row + cell % c.n_rows];
        c.row_weight[cell] = cell < c.n_rows ? -upstream : 0.0f;
        c.row_slope[cell] = 0.0f;
        if (in.dense != nullptr || cell >= c.n_rows) continue;
        if (in.index_type == type_int32) find_chunks<std::int32_t>(c, cell);
        else find_chunks<std::int64_t>(c, cell);
    }
#if DECODER_FAST_BF16
    if (c.fast_products) return pack_in_bf16(c, first_cell);
#endif
    for (std::int64_t cell = first_cell; cell < first_cell + 16; ++cell) {
        const bool real = cell < c.n_rows;
        const float* h = in.hidden + (c.first_row + cell) * H;
        const std::int64_t panel = cell / panel_width * panel_width;
        const std::int64_t width = least<std::int64_t>(panel_width, cells - panel);
        float* out = c.h_by_unit + panel * H + (cell - panel);
        for (std::int64_t k = 0; k < H; ++k) out[k * width] = real ? h[k] : 0.0f;
        if (!c.h_by_cell_wanted) continue;
        for (std::int64_t k = 0; k < c.n_hidden_padded; k += panel_width) {
            const std::int64_t n = least<std::int64_t>(panel_width, c.n_hidden_padded - k);
            float* row = c.h_by_cell + k * cells + cell * n;
            for (std::int64_t j = 0; j < n; ++j) row[j] = real && k + j < H ? h[k + j] : 0.0f;
        }
    }
}

inline void gene_constants(const Call& c, std::int64_t chunk) {
    if (c.in.px_r == nullptr || c.by_element) return;
    const std::int64_t end = c.chunk_start(chunk + 1);
    for (std::int64_t g = c.chunk_start(chunk); g < end; g += lanes) {
        float r[lanes];
        const std::int64_t n = least<std::int64_t>(lanes, end - g);
        for (int i = 0; i < lanes; ++i) r[i] = i < n ? c.in.px_r[g + i] : 0.0f;
        const V theta = exp(load(r));
        const V theta_eps = add(theta, set1(eps));
        const V inverse = div(set1(1.0f), theta_eps);
        float out[4][lanes];
        store(out[0], theta);
        store(out[1], theta_eps);
        store(out[2], inverse);
        store(out[3], mul(set1(eps), inverse));
        for (std::int64_t i = 0; i < n; ++i) {
            c.theta[g + i] = out[0][i];
            c.theta_eps[g + i] = out[1][i];
            c.inv_theta_eps[g + i] = out[2][i];
            c.eps_ratio[g + i] = out[3][i];
        }
    }
}

// ---------------------------------------------------------------------------------------------
// Phase 1: e, and what the log-sum-exp needs

inline void phase1(const Call& c, std::int64_t chunk, Worker& w) {
    const std::int64_t cells = c.n_cells_padded;
    for (std::int64_t t = 0; t < c.tiles_a_chunk; ++t) {
        const std::int64_t end = c.chunk_start(chunk + 1);
        const std::int64_t gene = c.chunk_start(chunk) + t * c.tile;
        const std::int64_t n = least(c.tile, end - gene);
        float* tile_max = c.tile_max + (chunk * c.tiles_a_chunk + t) * cells;
        float* tile_sum = c.tile_sum + (chunk * c.tiles_a_chunk + t) * cells;
        if (n <= 0) {
            for (std::int64_t i = 0; i < cells; ++i) {
                tile_max[i] = -3e38f;
                tile_sum[i] = 0.0f;
            }
            continue;
        }
        float* e = c.shift_alone ? w.e : c.e + gene * c.ld;
        head(c, w, c.in.scale_weight, c.in.scale_bias, gene, n, e);
        if (c.in.activation == softplus) {
            for (std::int64_t i = 0; i < n; ++i) {
                for (std::int64_t j = 0; j < cells; j += lanes) {
                    const V a = load(e + i * c.ld + j);
                    const V more = log1p(exp(neg(abs(a))));
                    store(e + i * c.ld + j, add(max(zero(), a), more));
                }
            }
            continue;
        }
        constexpr int N = block_vectors;
        for (std::int64_t j = 0; j < cells; j += N * lanes) {
            const int vectors = static_cast<int>(least<std::int64_t>(N, (cells - j) / lanes));
            V largest[N], total[N];
            for (int k = 0; k < vectors; ++k) {
                largest[k] = set1(-3e38f);
                total[k] = zero();
            }
            for (std::int64_t i = 0; i < n; ++i) {
                for (int k = 0; k < vectors; ++k) {
                    largest[k] = max(load(e + i * c.ld + j + k * lanes), largest[k]);
                }
            }
            for (std::int64_t i = 0; i < n; ++i) {
                for (int k = 0; k < vectors; ++k) {
                    float* at = e + i * c.ld + j + k * lanes;
                    const V value = exp(sub(load(at), largest[k]));
                    store(at, value);
                    total[k] = add(total[k], value);
                }
            }
            for (int k = 0; k < vectors; ++k) {
                store(tile_max + j + k * lanes, largest[k]);
                store(tile_sum + j + k * lanes, total[k]);
            }
        }
    }
}

// Between the phases: the log-sum-exp of each cell, from its tiles in order.
inline void combine_logits(const Call& c) {
    const CountNll& in = c.in;
    const std::int64_t cells = c.n_cells_padded, n_tiles = c.n_chunks * c.tiles_a_chunk;
    for (std::int64_t i = 0; i < cells; ++i) {
        c.row_max[i] = 0.0f;
        c.row_total[i] = 1.0;
    }
    if (in.activation == softmax) {
        for (std::int64_t j = 0; j < cells; j += lanes) {
            V largest = set1(-3e38f);
            for (std::int64_t t = 0; t < n_tiles; ++t) {
                largest = max(load(c.tile_max + t * cells + j), largest);
            }
            store(c.row_max + j, largest);
            double total[lanes] = {};
            for (std::int64_t t = 0; t < n_tiles; ++t) {
                float part[lanes];
                const V scaled = exp(sub(load(c.tile_max + t * cells + j), largest));
                store(part, mul(scaled, load(c.tile_sum + t * cells + j)));
                for (int i = 0; i < lanes; ++i) total[i] += part[i];
            }
            for (int i = 0; i < lanes; ++i) c.row_total[j + i] = total[i];
        }
    }
    for (std::int64_t i = 0; i < cells; ++i) {
        const bool real = i < c.n_rows;
        const double library = real ? in.library[c.first_row + i] : 0.0;
        const double lse = c.row_max[i] + std::log(c.row_total[i]);
        c.row_shift[i] = library - lse;
        c.row_factor[i] = real ? static_cast<float>(std::exp(library) / c.row_total[i]) : 0.0f;
        if (real && in.shift != nullptr) {
            in.shift[c.first_row + i] = static_cast<float>(c.row_shift[i]);
        }
    }
}

// exp(tile maximum - maximum) by cell; 1 under softplus.
inline void tile_ratio(const Call& c, std::int64_t tile, float* ratio) {
    const std::int64_t cells = c.n_cells_padded;
    for (std::int64_t j = 0; j < cells; j += lanes) {
        store(ratio + j, c.in.activation == softplus
                             ? set1(1.0f)
                             : exp(sub(load(c.tile_max + tile * cells + j), load(c.row_max + j))));
    }
}

// ---------------------------------------------------------------------------------------------
// Phase 2: the likelihood. Elements are treated as if every count were zero; where it is not, e is
// set to 0 for the time, which makes all of an element's terms exactly zero.

// A row of the tile is passed three times for zinb: one long chain of dependent operations would
// leave the processor waiting, short ones overlap.
template <int likelihood, bool by_element, bool gradients>
inline void at_zero(const Call& c, Worker& w, std::int64_t gene, std::int64_t n) {
    const std::int64_t cells = c.n_cells_padded;
    const V one = set1(1.0f);
    for (std::int64_t i = 0; i < n; ++i) {
        const std::int64_t g = gene + i;
        const float* e = c.e + g * c.ld;
        float* d = gradients ? c.d + g * c.ld : w.u_row;
        float* r = w.r + i * c.ld;
        V theta = zero(), theta_eps = zero(), inv_theta_eps = zero(), eps_ratio = zero();
        if (likelihood != poisson && !by_element) {
            theta = set1(c.theta[g]);
            theta_eps = set1(c.theta_eps[g]);
            inv_theta_eps = set1(c.inv_theta_eps[g]);
            eps_ratio = set1(c.eps_ratio[g]);
        }
        V d_theta = zero();
        for (std::int64_t j = 0; j < cells; j += lanes) {
            const V mu = mul(load(e + j), load(w.factor + j));
            if (likelihood == poisson) {
                store(w.nll + j, add(load(w.nll + j), mu));
                store(w.u + j, sub(load(w.u + j), mu));
                if (gradients) store(d + j, neg(mu));
                continue;
            }
            if (by_element) {
                theta = exp(load(r + j));
                theta_eps = add(theta, set1(eps));
                inv_theta_eps = reciprocal(theta_eps);
                eps_ratio = mul(set1(eps), inv_theta_eps);
            }
            const V inv_t = reciprocal(add(theta_eps, mu));
            const V v = mul(mu, inv_theta_eps);
            const V q = mul(mu, inv_t);
            const Log log1p_v = log_of(add(one, v), v);
            const V a = mul(theta, log1p_v.value);
            const V u = neg(mul(theta, q));  // the derivative by log(mu)
            if (likelihood == nb) {
                store(w.nll + j, add(load(w.nll + j), a));
                store(w.u + j, add(load(w.u + j), u));
            } else {
                store(w.a_row + j, a);
            }
            if (gradients || likelihood == zinb) store(d + j, u);
            if (gradients) {
                // q - log1p(v): for small v as v^2 (1/2 - 1/(1 + v) - v Q(v)), without cancellation.
                const V inv_one_plus_v = mul(theta_eps, inv_t);
                const V series = mul(mul(v, v), fnma(v, log1p_v.q, sub(set1(0.5f), inv_one_plus_v)));
                V d_log_theta = select(log1p_v.is_small, series, sub(q, log1p_v.value));
                d_log_theta = fnma(eps_ratio, q, d_log_theta);
                if (by_element) d_log_theta = mul(theta, d_log_theta);
                if (likelihood == zinb) {
                    store(w.d_log_theta_row + j, d_log_theta);
                } else {
                    d_log_theta = mul(d_log_theta, load(c.row_weight + j));
                    if (by_element) store(r + j, d_log_theta);
                    else d_theta = add(d_theta, d_log_theta);
                }
            }
        }
        if (likelihood == zinb) {
            // log(pi + (1 - pi) exp(-a)) with pi = sigmoid(dropout), as log(1 - x)
            // with x = (1 - pi) (1 - exp(-a)).
            float* dropout = w.dropout + i * c.ld;
            for (std::int64_t j = 0; j < cells; j += lanes) {
                const V logit = load(dropout + j);
                V exp_a, expm1_a;
                exp_and_expm1(neg(load(w.a_row + j)), exp_a, expm1_a);
                const V odds = exp(neg(abs(logit)));
                const V larger = reciprocal(add(one, odds));
                const V smaller = mul(odds, larger);
                const Mask negative = less(logit, zero());
                const V not_pi = select(negative, larger, smaller);
                store(w.pi_row + j, select(negative, smaller, larger));
                store(w.minus_x_row + j, mul(not_pi, expm1_a));
                store(w.survives_row + j, mul(not_pi, exp_a));
            }
            V d_dropout = zero();
            for (std::int64_t j = 0; j < cells; j += lanes) {
                const V pi = load(w.pi_row + j);
                const V minus_x = load(w.minus_x_row + j);
                const V survives = load(w.survives_row + j);
                const V p0 = add(survives, pi);
                V log_p0 = log_of(p0, minus_x).value;
                const V inv_p0 = reciprocal(p0);
                V from_counts = mul(survives, inv_p0);  // probability that a zero is no dropout
                V d_logit = neg(mul(mul(pi, minus_x), inv_p0));
                const Mask tiny = less(p0, set1(1e-30f));
                if (any(tiny)) {
                    // Both terms vanish in float32: compare them as logarithms.
                    const V a = load(w.a_row + j), logit = load(dropout + j);
                    const V s = sub(neg(a), logit);
                    const V es = exp(neg(abs(s)));
                    const V hi = reciprocal(add(one, es));
                    const V lo = mul(es, hi);
                    const Mask below = less(s, zero());
                    log_p0 = select(tiny, add(max(logit, neg(a)), log1p(es)), log_p0);
                    from_counts = select(tiny, select(below, lo, hi), from_counts);
                    d_logit = select(tiny, select(below, hi, lo), d_logit);
                }
                const V u = mul(load(d + j), from_counts);
                store(w.nll + j, sub(load(w.nll + j), log_p0));
                store(w.u + j, add(load(w.u + j), u));
                if (gradients) {
                    const V weight = load(c.row_weight + j);
                    d_logit = mul(d_logit, weight);
                    store(d + j, u);
                    store(dropout + j, d_logit);
                    d_dropout = add(d_dropout, d_logit);
                    const V d_log_theta =
                        mul(mul(weight, from_counts), load(w.d_log_theta_row + j));
                    if (by_element) store(r + j, d_log_theta);
                    else d_theta = add(d_theta, d_log_theta);
                }
            }
            if (gradients && c.in.d_dropout_bias != nullptr) {
                c.in.d_dropout_bias[g] += sum(d_dropout);
            }
        }
        if (gradients && likelihood != poisson && !by_element) {
            c.d_log_theta[g] += c.theta[g] * sum(d_theta);
        }
    }
}

// The logarithm of a mean that is too small for float32, from the logit itself.
inline double exact_log_mu(const Call& c, std::int64_t gene, std::int64_t cell) {
    const std::int64_t H = c.in.n_hidden;
    const float* h = c.in.hidden + (c.first_row + cell) * H;
    const float* weight = c.in.scale_weight + gene * H;
    double logit = c.in.scale_bias == nullptr ? 0.0 : c.in.scale_bias[gene];
    for (std::int64_t k = 0; k < H; ++k) logit += static_cast<double>(weight[k]) * h[k];
    // log(softplus(a)) is a itself where softplus vanishes.
    if (c.in.activation == softplus && logit > -30.0) {
        logit = std::log((logit > 0.0 ? logit : 0.0) + std::log1p(std::exp(-std::fabs(logit))));
    }
    return logit + c.row_shift[cell];
}

inline double log_factorial(double x) {
    constexpr double small[] = {0.0,
                                0.0,
                                0.69314718055994530942,
                                1.7917594692280550008,
                                3.1780538303479456197,
                                4.7874917427820459943,
                                6.5792512120101009951,
                                8.5251613610654143002,
                                10.604602902745250228};
    if (x <= 8.0 && x == std::floor(x)) return small[static_cast<int>(x)];
    return log_gamma(x + 1.0);
}

template <int likelihood, bool by_element, bool gradients>
inline void at_nonzero(const Call& c, Worker& w, std::int64_t gene, double* nll, double* u) {
    const Nonzeros& z = w.nonzeros;
    NonzeroBatch b;
    for (std::int64_t first = 0; first < z.n; first += nonzero_batch) {
        b.n = static_cast<int>(least<std::int64_t>(nonzero_batch, z.n - first));
        const std::int32_t* gene_of = z.gene + first;
        const std::int32_t* cell_of = z.cell + first;
        for (int i = 0; i < b.n; ++i) {
            b.x[i] = z.x[first + i];
            b.mu[i] = static_cast<double>(z.e[first + i]) * w.factor[cell_of[i]];
        }
        if (likelihood == poisson) {
            for (int i = 0; i < b.n; ++i) {
                const double log_mu = b.mu[i] < 1e-30
                                          ? exact_log_mu(c, gene + gene_of[i], cell_of[i])
                                          : std::log(b.mu[i]);
                b.log_prob[i] = b.x[i] * log_mu - b.mu[i] - log_factorial(b.x[i]);
                b.d_log_mu[i] = b.x[i] - b.mu[i];
            }
        } else {
            float log_theta[nonzero_batch] = {};
            for (int i = 0; i < b.n; ++i) {
                if (by_element) log_theta[i] = z.r[first + i];
                else b.theta[i] = c.theta[gene + gene_of[i]];
            }
            if (by_element) {
                for (int i = 0; i < nonzero_batch; i += lanes) {
                    store(log_theta + i, exp(load(log_theta + i)));
                }
                for (int i = 0; i < b.n; ++i) b.theta[i] = log_theta[i];
            }
            // Beyond 1e30 nothing changes but that powers overflow.
            for (int i = 0; i < b.n; ++i) b.theta[i] = b.theta[i] > 1e30 ? 1e30 : b.theta[i];
            negative_binomial_at_nonzero(b);
        }
        if (likelihood == zinb) {
            // log(1 - pi), and its derivative by the dropout logit.
            float logit[nonzero_batch] = {}, log_not_pi[nonzero_batch], pi[nonzero_batch];
            for (int i = 0; i < b.n; ++i) logit[i] = z.dropout[first + i];
            for (int i = 0; i < nonzero_batch; i += lanes) {
                const V x = load(logit + i);
                const V odds = exp(neg(abs(x)));
                const V larger = reciprocal(add(set1(1.0f), odds));
                store(log_not_pi + i, neg(add(max(zero(), x), log1p(odds))));
                store(pi + i, select(less(x, zero()), mul(odds, larger), larger));
            }
            for (int i = 0; i < b.n; ++i) {
                b.log_prob[i] += log_not_pi[i];
                if (gradients) {
                    const float d = -pi[i] * c.row_weight[cell_of[i]];
                    w.dropout[gene_of[i] * c.ld + cell_of[i]] = d;
                    if (c.in.d_dropout_bias != nullptr) {
                        c.in.d_dropout_bias[gene + gene_of[i]] += d;
                    }
                }
            }
        }
        for (int i = 0; i < b.n; ++i) {
            nll[cell_of[i]] -= b.log_prob[i];
            u[cell_of[i]] += b.d_log_mu[i];
            if (!gradients) continue;
            c.d[(gene + gene_of[i]) * c.ld + cell_of[i]] = static_cast<float>(b.d_log_mu[i]);
            if (likelihood == poisson) continue;
            const float d = static_cast<float>(b.d_log_theta[i] * c.row_weight[cell_of[i]]);
            if (by_element) w.r[gene_of[i] * c.ld + cell_of[i]] = d;
            else c.d_log_theta[gene + gene_of[i]] += d;
        }
    }
}

template <int likelihood, bool by_element, bool gradients>
inline void likelihood_of_tile(const Call& c, Worker& w, std::int64_t gene, std::int64_t n,
                               double* nll, double* u) {
    Nonzeros& z = w.nonzeros;
    for (std::int64_t k = 0; k < z.n; ++k) {
        float& e = c.e[(gene + z.gene[k]) * c.ld + z.cell[k]];
        z.e[k] = e;
        e = 0.0f;
        const std::int64_t at = z.gene[k] * c.ld + z.cell[k];
        if (likelihood == zinb) z.dropout[k] = w.dropout[at];
        if (by_element) z.r[k] = w.r[at];
    }
    at_zero<likelihood, by_element, gradients>(c, w, gene, n);
    for (std::int64_t k = 0; k < z.n; ++k) {
        c.e[(gene + z.gene[k]) * c.ld + z.cell[k]] = z.e[k];
    }
    at_nonzero<likelihood, by_element, gradients>(c, w, gene, nll, u);
}

using LikelihoodOfTile = void (*)(const Call&, Worker&, std::int64_t, std::int64_t, double*,
                                  double*);

inline LikelihoodOfTile choose_likelihood(const Call& c) {
#define DECODER_FAST_LIKELIHOOD(L, E) \
    (c.gradients ? &likelihood_of_tile<L, E, true> : &likelihood_of_tile<L, E, false>)
    if (c.in.likelihood == poisson) return DECODER_FAST_LIKELIHOOD(poisson, false);
    if (c.in.likelihood == nb) {
        return c.by_element ? DECODER_FAST_LIKELIHOOD(nb, true) : DECODER_FAST_LIKELIHOOD(nb, false);
    }
    return c.by_element ? DECODER_FAST_LIKELIHOOD(zinb, true) : DECODER_FAST_LIKELIHOOD(zinb, false);
#undef DECODER_FAST_LIKELIHOOD
}

// Log theta of each element of a tile.
inline void log_theta(const Call& c, Worker& w, std::int64_t gene, std::int64_t n) {
    const CountNll& in = c.in;
    if (in.r_weight != nullptr) return head(c, w, in.r_weight, in.r_bias, gene, n, w.r);
    for (std::int64_t i = 0; i < n; ++i) {
        const float* row = in.px_r + (gene + i) * in.n_px_r;
        for (std::int64_t j = 0; j < c.n_cells_padded; ++j) {
            const std::int64_t cell = (c.first_row + j) % in.n_cells;
            w.r[i * c.ld + j] = row[j < c.n_rows ? in.px_r_index[cell] : 0];
        }
    }
}

inline float row_sum(const float* row, std::int64_t n) {
    V total = zero();
    for (std::int64_t j = 0; j < n; j += lanes) total = add(total, load(row + j));
    return sum(total);
}

inline void log_theta_gradients(const Call& c, Worker& w, std::int64_t gene, std::int64_t n,
                                float* d_hidden, bool first) {
    const CountNll& in = c.in;
    if (in.r_weight != nullptr) {
        if (in.d_r_bias != nullptr) {
            for (std::int64_t i = 0; i < n; ++i) {
                in.d_r_bias[gene + i] += row_sum(w.r + i * c.ld, c.n_cells_padded);
            }
        }
        head_gradients(c, w, w.r, in.r_weight, in.d_r_weight, gene, n, d_hidden, first);
    } else if (in.d_px_r != nullptr) {
        for (std::int64_t i = 0; i < n; ++i) {
            float* row = in.d_px_r + (gene + i) * in.n_px_r;
            for (std::int64_t j = 0; j < c.n_rows; ++j) {
                row[in.px_r_index[(c.first_row + j) % in.n_cells]] += w.r[i * c.ld + j];
            }
        }
    }
}

inline void phase2(const Call& c, std::int64_t chunk, Worker& w) {
    const CountNll& in = c.in;
    const std::int64_t cells = c.n_cells_padded;
    const LikelihoodOfTile likelihood_of_tile = choose_likelihood(c);
    double* nll = c.chunk_nll + chunk * cells;
    double* u = c.chunk_u + chunk * cells;
    float* d_hidden =
        in.d_hidden == nullptr ? nullptr : c.chunk_d_hidden + chunk * cells * c.n_hidden_padded;
    std::memset(nll, 0, sizeof(double) * cells);
    std::memset(u, 0, sizeof(double) * cells);
    const std::int64_t start = c.chunk_start(chunk), end = c.chunk_start(chunk + 1);
    for (std::int64_t t = 0; t < c.tiles_a_chunk; ++t) {
        const std::int64_t gene = start + t * c.tile, n = least(c.tile, end - gene);
        if (n <= 0) break;
        scan(c, w, chunk, gene, n);
        if (in.likelihood == zinb) head(c, w, in.dropout_weight, in.dropout_bias, gene, n, w.dropout);
        if (c.by_element) log_theta(c, w, gene, n);
        tile_ratio(c, chunk * c.tiles_a_chunk + t, w.ratio);
        for (std::int64_t j = 0; j < cells; j += lanes) {
            store(w.factor + j, mul(load(w.ratio + j), load(c.row_factor + j)));
            store(w.nll + j, zero());
            store(w.u + j, zero());
        }
        likelihood_of_tile(c, w, gene, n, nll, u);
        for (std::int64_t j = 0; j < cells; ++j) {
            nll[j] += w.nll[j];
            u[j] += w.u[j];
        }
        if (!c.gradients) continue;
        if (in.likelihood == zinb) {
            head_gradients(c, w, w.dropout, in.dropout_weight, in.d_dropout_weight, gene, n,
                           d_hidden, t == 0);
        }
        if (c.by_element) {
            log_theta_gradients(c, w, gene, n, d_hidden, t == 0 && in.likelihood != zinb);
        }
    }
}

// Between the phases: the sums over genes that the softmax's derivative needs.
inline void combine_derivatives(const Call& c) {
    const CountNll& in = c.in;
    const std::int64_t cells = c.n_cells_padded;
    for (std::int64_t j = 0; j < c.n_rows; ++j) {
        double nll = 0.0, u = 0.0;
        for (std::int64_t k = 0; k < c.n_chunks; ++k) {
            nll += c.chunk_nll[k * cells + j];
            u += c.chunk_u[k * cells + j];
        }
        if (in.nll != nullptr) in.nll[c.first_row + j] = static_cast<float>(nll);
        if (in.usum != nullptr) in.usum[c.first_row + j] = static_cast<float>(u);
        c.row_slope[j] = static_cast<float>(u * c.row_weight[j] / c.row_total[j]);
    }
}

// ---------------------------------------------------------------------------------------------
// Phase 3: the scale head's gradients

inline void prefetch_row(const float* from, std::int64_t start, std::int64_t n) {
    for (std::int64_t k = 0; k < n; k += 16) __builtin_prefetch(from + start + k, 0, 2);
}

inline void phase3(const Call& c, std::int64_t chunk, Worker& w) {
    const CountNll& in = c.in;
    const std::int64_t cells = c.n_cells_padded;
    float* d_hidden =
        in.d_hidden == nullptr ? nullptr : c.chunk_d_hidden + chunk * cells * c.n_hidden_padded;
    const bool first_head = in.likelihood != zinb && !(c.by_element && in.r_weight != nullptr);
    const std::int64_t start = c.chunk_start(chunk), end = c.chunk_start(chunk + 1);
    for (std::int64_t t = 0; t < c.tiles_a_chunk; ++t) {
        const std::int64_t gene = start + t * c.tile, n = least(c.tile, end - gene);
        if (n <= 0) break;
        tile_ratio(c, chunk * c.tiles_a_chunk + t, w.ratio);
        for (std::int64_t j = 0; j < cells; j += lanes) {
            store(w.slope + j, mul(load(w.ratio + j), load(c.row_slope + j)));
        }
        for (std::int64_t i = 0; i < n; ++i) {
            const float* e = c.e + (gene + i) * c.ld;
            float* d = c.d + (gene + i) * c.ld;
            prefetch_row(in.scale_weight, (gene + i) * in.n_hidden, in.n_hidden);
            V total = zero();
            for (std::int64_t j = 0; j < cells; j += lanes) {
                V value = mul(load(d + j), load(c.row_weight + j));
                const V scale = load(e + j);
                if (in.activation == softmax) {
                    value = fnma(scale, load(w.slope + j), value);
                } else {
                    // sigmoid(a) / softplus(a) from softplus(a), which tends to 1 as it vanishes.
                    V exp_scale, expm1_scale;
                    exp_and_expm1(neg(scale), exp_scale, expm1_scale);
                    const V relative = select(equal(scale, zero()), set1(1.0f),
                                              div(neg(expm1_scale), scale));
                    value = mul(value, relative);
                }
                store(d + j, value);
                total = add(total, value);
            }
            if (in.d_scale_bias != nullptr) in.d_scale_bias[gene + i] += sum(total);
        }
        head_gradients(c, w, c.d + gene * c.ld, in.scale_weight, in.d_scale_weight, gene, n,
                       d_hidden, first_head && t == 0);
    }
}

// Sums a cell's gradient by its hidden units over the chunks, in order.
inline void finish_cell(const Call& c, std::int64_t cell) {
    const std::int64_t padded = c.n_hidden_padded;
    float* out = c.in.d_hidden + (c.first_row + cell) * c.in.n_hidden;
    for (std::int64_t k = 0; k < padded; k += lanes) {
        V total = zero();
        for (std::int64_t chunk = 0; chunk < c.n_chunks; ++chunk) {
            const std::int64_t row = chunk * c.n_cells_padded + cell;
            total = add(total, load(c.chunk_d_hidden + row * padded + k));
        }
        float part[lanes];
        store(part, total);
        for (std::int64_t i = 0; i < lanes && k + i < c.in.n_hidden; ++i) out[k + i] = part[i];
    }
}

// ---------------------------------------------------------------------------------------------

inline void start_genes(const Call& c, std::int64_t chunk) {
    const std::int64_t start = c.chunk_start(chunk), n = c.chunk_start(chunk + 1) - start;
    gene_constants(c, chunk);
    for (float* out : {c.d_log_theta, c.in.d_scale_bias, c.in.d_dropout_bias, c.in.d_r_bias}) {
        if (out != nullptr) std::memset(out + start, 0, sizeof(float) * n);
    }
    if (c.in.d_px_r != nullptr) {
        std::memset(c.in.d_px_r + start * c.in.n_px_r, 0, sizeof(float) * n * c.in.n_px_r);
    }
}

inline Status count_nll(CountNll& in) {
    Call c(in);
    c.workers = nullptr;
    c.fast_products = DECODER_FAST_BF16 && in.fast_products != 0;
    plan(c);
    const int n_threads = in.n_threads < 1 ? 1 : in.n_threads;
    c.n_workers = static_cast<int>(least<std::int64_t>(n_threads, c.n_chunks));
    Carver size{nullptr, 0};
    carve(c, size);
    Workspace workspace(size.used);
    if (workspace.memory == nullptr) return out_of_memory;
    Carver memory{static_cast<char*>(workspace.memory), 0};
    carve(c, memory);

    auto start = [&c](std::int64_t chunk, int) { start_genes(c, chunk); };
    auto pack_cells = [&c](std::int64_t i, int) { pack(c, 16 * i); };
    auto first = [&c](std::int64_t chunk, int worker) { phase1(c, chunk, c.workers[worker]); };
    auto second = [&c](std::int64_t chunk, int worker) { phase2(c, chunk, c.workers[worker]); };
    auto third = [&c](std::int64_t chunk, int worker) { phase3(c, chunk, c.workers[worker]); };
    auto finish = [&c](std::int64_t cell, int) { finish_cell(c, cell); };

    parallel_for(c.n_chunks, n_threads, start);
    for (c.first_row = 0; c.first_row < in.n_rows; c.first_row += c.n_cells_padded) {
        c.n_rows = least(c.n_cells_padded, in.n_rows - c.first_row);
        c.first_block = c.first_row == 0;
        parallel_for(c.n_cells_padded / 16, n_threads, pack_cells);
        parallel_for(c.n_chunks, c.n_workers, first);
        combine_logits(c);
        if (c.shift_alone) continue;
        parallel_for(c.n_chunks, c.n_workers, second);
        bool refused = false;
        for (int i = 0; i < c.n_workers; ++i) {
            const Worker& w = c.workers[i];
            if (!w.has_bad_count) continue;
            if (!refused || worse(w.bad_count, in.found)) in.found = w.bad_count;
            refused = true;
        }
        if (refused) return bad_count;
        combine_derivatives(c);
        if (in.d_hidden != nullptr || in.d_scale_weight != nullptr || in.d_scale_bias != nullptr) {
            parallel_for(c.n_chunks, c.n_workers, third);
        }
        if (in.d_hidden != nullptr) parallel_for(c.n_rows, n_threads, finish);
    }
    if (in.d_px_r != nullptr && !c.by_element) {
        std::memcpy(in.d_px_r, c.d_log_theta, sizeof(float) * in.n_genes);
    }
    return ok;
}
