// One hidden layer, forward and gradients. Included inside the namespace of an instruction set.
//
// Rows (a cell of a sample) are taken in blocks, which stay in the cache from the linear map to the
// activation; between them lie a phase that batch norm needs for its statistics. Labels are grouped,
// so that each column of the weight is looked up once, and each sum over the cells of a label has
// one order. Blocks fall into slots, whose number depends on the shape alone: what is summed over
// rows is summed by slot, and slots in order, so that results are the same for any number of
// threads.

constexpr std::int64_t block_of_rows = 64;
constexpr std::int64_t most_slots = 16;
constexpr std::int64_t unit_block = 16;             // units whose weights one thread's turn takes
constexpr std::int64_t work_of_thread = 1 << 20;    // multiplications that a thread is worth

// ---------------------------------------------------------------------------------------------
// Activations: value, and the gradient by the input. ReLU and identity take their output for it.

struct IdentityUnit {
    V value(V a) const { return a; }
    V derive(V, V g) const { return g; }
};
struct ReluUnit {
    V value(V a) const { return max(zero(), a); }
    V derive(V a, V g) const { return select(less(zero(), a), g, zero()); }
};
struct LeakyReluUnit {
    V slope;
    V value(V a) const { return select(less(zero(), a), a, mul(a, slope)); }
    V derive(V a, V g) const { return select(less(zero(), a), g, mul(g, slope)); }
};
struct EluUnit {
    V alpha;
    V value(V a) const {
        V e, em1;
        exp_and_expm1(min(zero(), a), e, em1);
        return select(less(zero(), a), a, mul(alpha, em1));
    }
    V derive(V a, V g) const {
        return select(less(zero(), a), g, mul(g, mul(alpha, exp(min(zero(), a)))));
    }
};
struct SiluUnit {
    V sigmoid(V a) const { return div(set1(1.0f), add(set1(1.0f), exp(neg(a)))); }
    V value(V a) const { return div(a, add(set1(1.0f), exp(neg(a)))); }
    V derive(V a, V g) const {
        const V s = sigmoid(a);
        return mul(g, mul(s, fma(a, sub(set1(1.0f), s), set1(1.0f))));
    }
};
// a times the normal distribution function. exp(-a^2/2) and its ratio to the tail beyond |a|, a
// polynomial in w = 1 / (1 + |a|/4) (a minimax fit of this project, to 2e-8), make everything.
struct GeluUnit {
    struct Normal {
        V cumulative, density;
    };
    Normal normal(V a) const {
        const V t = abs(a);
        const V w = div(set1(1.0f), fma(t, set1(0.25f), set1(1.0f)));
        V p = set1(0.0203825179f);
        for (const float next : {-0.0835391879f, 0.100540631f, -0.0367137194f, 0.0666866079f,
                                 0.0578987263f, 0.0818310454f, 0.0934399739f, 0.0997378677f,
                                 0.0997355431f}) {
            p = fma(p, w, set1(next));
        }
        const V e = exp(mul(mul(t, t), set1(-0.5f)));
        const V tail = mul(e, mul(p, w));
        return {select(less(a, zero()), tail, sub(set1(1.0f), tail)), mul(e, set1(0.398942280f))};
    }
    V value(V a) const { return mul(a, normal(a).cumulative); }
    V derive(V a, V g) const {
        const Normal n = normal(a);
        return mul(g, fma(a, n.density, n.cumulative));
    }
};

template <class Body>
inline void with_activation(const CovariateLinear& in, Body body) {
    const V parameter = set1(static_cast<float>(in.activation_parameter));
    switch (in.activation) {
        case UnitActivation::relu: return body(ReluUnit{});
        case UnitActivation::leaky_relu: return body(LeakyReluUnit{parameter});
        case UnitActivation::elu: return body(EluUnit{parameter});
        case UnitActivation::gelu: return body(GeluUnit{});
        case UnitActivation::silu: return body(SiluUnit{});
        default: return body(IdentityUnit{});
    }
}

// ---------------------------------------------------------------------------------------------

// A part of the weight that is multiplied with a matrix: x, or a covariate's.
struct Product {
    const float* a;      // rows x depth
    float* d_a;
    std::int64_t depth;  // columns
    std::int64_t column; // the first one in the weight
    std::int64_t padded; // depth, in whole vectors
    float* by_unit;      // weight, in panels of units, column by column
    float* by_column;    // weight, in panels of columns, unit by unit
    float* d_weight;     // by slot: n_hidden x padded
};

// Labels, and the cells of each.
struct Lookup {
    const std::int64_t* labels;
    std::int64_t n_categories;
    std::int64_t column;
    std::int64_t n_found;    // labels that cells have
    std::int32_t* count;     // by category
    std::int32_t* found;     // by label found: the category, ascending
    std::int32_t* start;     // by label found, and one more: where in `order`
    std::int32_t* order;     // cells, label by label
    std::int32_t* place;     // by cell: which label found
    float* table;            // by label found: its column of the weight, or of the gradient
};

struct Layer {
    explicit Layer(CovariateLinear& arguments) : in(arguments) {}

    CovariateLinear& in;
    bool backward;
    int n_workers;
    std::int64_t n_rows, n_columns, units;  // units: n_hidden in whole vectors
    std::int64_t blocks_of_sample, n_blocks, n_slots;
    std::int64_t n_products, n_lookups;
    Product* products;  // the first is x's
    Lookup* lookups;
    float* real;        // by unit: 1, and 0 in the padding
    float* bias;        // by unit

    // By sample and unit: batch norm is (v - mean) scale + shift.
    float *mean, *scale, *shift;
    // Forward the mean of v and the squares about it, backward sums of gradients, and of their
    // products with what was normalised: by sample and unit, and by block and unit.
    double *sum, *square;
    float *block_sum, *block_square;
    float* d_linear;    // rows x units
    float* by_cell;     // cells x units: d_linear summed over the samples
    float* d_bias;      // by slot and unit
    float** scratch;    // by worker

    std::int64_t sample_of(std::int64_t block) const { return block / blocks_of_sample; }
    std::int64_t cell_of(std::int64_t block) const {
        return block % blocks_of_sample * block_of_rows;
    }
    std::int64_t rows_of(std::int64_t block) const {
        return least(block_of_rows, in.n_cells - cell_of(block));
    }
    std::int64_t row_of(std::int64_t block) const {
        return sample_of(block) * in.n_cells + cell_of(block);
    }
    // Statistics of a sample: running ones are the same for all.
    std::int64_t statistics_of(std::int64_t sample) const {
        return in.batch_norm == BatchNorm::batch ? sample * units : 0;
    }
    bool normalises_batch() const { return in.batch_norm != BatchNorm::none; }
};

inline void carve(Layer& c, Carver& memory) {
    const CovariateLinear& in = c.in;
    const std::int64_t n_statistics =
        in.batch_norm == BatchNorm::batch ? in.n_samples : std::int64_t{c.normalises_batch()};
    memory.take(c.products, 1 + in.n_covariates);
    memory.take(c.lookups, in.n_covariates);
    memory.take(c.real, c.units);
    memory.take(c.bias, c.units);
    for (float** p : {&c.mean, &c.scale, &c.shift}) memory.take(*p, n_statistics * c.units);
    const bool sums = in.batch_norm == BatchNorm::batch || (c.backward && c.normalises_batch());
    for (double** p : {&c.sum, &c.square}) memory.take(*p, sums ? in.n_samples * c.units : 0);
    for (float** p : {&c.block_sum, &c.block_square}) {
        memory.take(*p, sums ? c.n_blocks * c.units : 0);
    }
    memory.take(c.d_linear, c.backward ? c.n_rows * c.units : 0);
    const bool sums_cells = c.backward && in.n_samples > 1 && in.n_covariates > 0;
    memory.take(c.by_cell, sums_cells ? in.n_cells * c.units : 0);
    if (!sums_cells) c.by_cell = c.d_linear;
    memory.take(c.d_bias, in.d_bias != nullptr ? c.n_slots * c.units : 0);

    c.n_products = c.n_lookups = 0;
    std::int64_t column = 0, deepest = 0;
    for (std::int64_t k = -1; k < in.n_covariates; ++k) {
        const Covariate covariate = k < 0 ? Covariate{in.n_in, nullptr, in.x, in.d_x}
                                          : in.covariates[k];
        const std::int64_t n = covariate.n_categories;
        if (covariate.labels != nullptr) {
            const std::int64_t most = least(n, in.n_cells);
            Lookup l{};
            l.labels = covariate.labels;
            l.n_categories = n;
            l.column = column;
            memory.take(l.count, n);
            memory.take(l.found, most);
            memory.take(l.start, most + 1);
            memory.take(l.order, in.n_cells);
            memory.take(l.place, in.n_cells);
            memory.take(l.table, most * c.units);
            if (memory.base != nullptr) c.lookups[c.n_lookups] = l;
            ++c.n_lookups;
        } else {
            Product p{};
            p.a = covariate.matrix;
            p.d_a = covariate.d_matrix;
            p.depth = n;
            p.column = column;
            p.padded = round_up(n, lanes);
            memory.take(p.by_unit, c.backward ? 0 : n * c.units);
            memory.take(p.by_column, c.backward && p.d_a != nullptr ? in.n_hidden * p.padded : 0);
            memory.take(p.d_weight, in.d_weight != nullptr ? c.n_slots * in.n_hidden * p.padded : 0);
            if (memory.base != nullptr) c.products[c.n_products] = p;
            ++c.n_products;
            if (p.padded > deepest) deepest = p.padded;
        }
        column += n;
    }
    c.n_columns = column;
    memory.take(c.scratch, c.n_workers);
    const std::int64_t width = c.backward ? 2 * (deepest > c.units ? deepest : c.units) : c.units;
    for (int i = 0; i < c.n_workers; ++i) {
        float* scratch;
        memory.take(scratch, block_of_rows * width);
        if (memory.base != nullptr) c.scratch[i] = scratch;
    }
}

inline void plan(Layer& c, bool backward) {
    const CovariateLinear& in = c.in;
    c.backward = backward;
    c.n_rows = in.n_samples * in.n_cells;
    c.units = round_up(in.n_hidden, lanes);
    c.blocks_of_sample = (in.n_cells + block_of_rows - 1) / block_of_rows;
    c.n_blocks = in.n_samples * c.blocks_of_sample;
    c.n_slots = least(c.n_blocks, most_slots);
    const std::int64_t work = c.n_rows * c.units * (in.n_in + 16) / work_of_thread + 1;
    c.n_workers = static_cast<int>(least<std::int64_t>(in.n_threads < 1 ? 1 : in.n_threads, work));
}

// ---------------------------------------------------------------------------------------------
// Labels

// Groups the cells by label; false if a label is out of range.
inline bool group(const Layer& c, Lookup& l) {
    std::memset(l.count, 0, sizeof(std::int32_t) * l.n_categories);
    for (std::int64_t i = 0; i < c.in.n_cells; ++i) {
        const std::int64_t label = l.labels[i];
        if (label < 0 || label >= l.n_categories) return false;
        ++l.count[label];
    }
    std::int32_t position = 0;
    l.n_found = 0;
    for (std::int64_t k = 0; k < l.n_categories; ++k) {
        if (l.count[k] == 0) continue;
        l.found[l.n_found] = static_cast<std::int32_t>(k);
        l.start[l.n_found] = position;
        position += l.count[k];
        l.count[k] = static_cast<std::int32_t>(l.n_found++);
    }
    l.start[l.n_found] = position;
    for (std::int64_t i = 0; i < c.in.n_cells; ++i) l.place[i] = l.count[l.labels[i]];
    return true;
}

// The cells of each label in their order.
inline void sort_cells(const Layer& c, Lookup& l) {
    for (std::int64_t d = 0; d < l.n_found; ++d) l.count[d] = l.start[d];
    for (std::int64_t i = 0; i < c.in.n_cells; ++i) {
        l.order[l.count[l.place[i]]++] = static_cast<std::int32_t>(i);
    }
}

// The columns of the labels found, for a block of units: these are as many rows, read in order.
inline void look_up(const Layer& c, const Lookup& l, std::int64_t first_unit) {
    const std::int64_t n = least(unit_block, c.units - first_unit);
    for (std::int64_t d = 0; d < l.n_found; ++d) {
        const float* column = c.in.weight + l.column + l.found[d];
        float* out = l.table + d * c.units + first_unit;
        for (std::int64_t j = 0; j < n; ++j) {
            const std::int64_t unit = first_unit + j;
            out[j] = unit < c.in.n_hidden ? column[unit * c.n_columns] : 0.0f;
        }
    }
}

// ---------------------------------------------------------------------------------------------
// Products

// The weights of a block of units, in the panel that holds them.
inline void pack_by_unit(const Layer& c, const Product& p, std::int64_t first_unit) {
    const std::int64_t end = least(first_unit + unit_block, c.units);
    for (std::int64_t unit = first_unit; unit < end; ++unit) {
        const std::int64_t panel = unit / panel_width * panel_width;
        const std::int64_t width = least<std::int64_t>(panel_width, c.units - panel);
        const bool exists = unit < c.in.n_hidden;
        const float* weight = c.in.weight + unit * c.n_columns + p.column;
        float* out = p.by_unit + panel * p.depth + (unit - panel);
        for (std::int64_t k = 0; k < p.depth; ++k) out[k * width] = exists ? weight[k] : 0.0f;
    }
}

inline void pack_by_column(const Layer& c, const Product& p, std::int64_t first_unit) {
    const std::int64_t H = c.in.n_hidden, end = least(first_unit + unit_block, H);
    for (std::int64_t panel = 0; panel < p.padded; panel += panel_width) {
        const std::int64_t width = least<std::int64_t>(panel_width, p.padded - panel);
        const std::int64_t n = least(width, p.depth - panel);
        for (std::int64_t unit = first_unit; unit < end; ++unit) {
            const float* weight = c.in.weight + unit * c.n_columns + p.column + panel;
            float* out = p.by_column + panel * H + unit * width;
            std::memcpy(out, weight, sizeof(float) * n);
            for (std::int64_t k = n; k < width; ++k) out[k] = 0.0f;
        }
    }
}

// out (rows x units) += the rows of p's matrix times its weights.
inline void multiply(const Layer& c, const Product& p, std::int64_t row, std::int64_t rows,
                     float* out) {
    for (std::int64_t panel = 0; panel < c.units; panel += panel_width) {
        const std::int64_t width = least<std::int64_t>(panel_width, c.units - panel);
        multiply_panel(p.a + row * p.depth, p.depth, 1, p.by_unit + panel * p.depth, width,
                       out + panel, c.units, rows, p.depth, static_cast<int>(width / lanes), true,
                       nullptr);
    }
}

// From d (rows x units), the gradients of p's matrix and, added to those of the slot unless it is
// the slot's first, of its weights.
inline void multiply_gradients(const Layer& c, const Product& p, const float* d, std::int64_t row,
                               std::int64_t rows, std::int64_t slot, bool first, float* scratch) {
    const std::int64_t H = c.in.n_hidden;
    const bool aligned = p.depth == p.padded;
    const float* a = p.a + row * p.depth;
    float* product = scratch + block_of_rows * p.padded;
    if (c.in.d_weight != nullptr && !aligned) {
        for (std::int64_t i = 0; i < rows; ++i) {
            std::memcpy(scratch + i * p.padded, a + i * p.depth, sizeof(float) * p.depth);
            for (std::int64_t k = p.depth; k < p.padded; ++k) scratch[i * p.padded + k] = 0.0f;
        }
        a = scratch;
    }
    float* d_a = p.d_a == nullptr ? nullptr : aligned ? p.d_a + row * p.depth : product;
    for (std::int64_t panel = 0; panel < p.padded; panel += panel_width) {
        const std::int64_t width = least<std::int64_t>(panel_width, p.padded - panel);
        const int vectors = static_cast<int>(width / lanes);
        if (c.in.d_weight != nullptr) {
            multiply_panel(d, 1, c.units, a + panel, p.padded,
                           p.d_weight + slot * H * p.padded + panel, p.padded, H, rows, vectors,
                           !first, nullptr);
        }
        if (d_a != nullptr) {
            multiply_panel(d, c.units, 1, p.by_column + panel * H, width, d_a + panel, p.padded,
                           rows, H, vectors, false, nullptr);
        }
    }
    if (d_a == product) {
        for (std::int64_t i = 0; i < rows; ++i) {
            std::memcpy(p.d_a + (row + i) * p.depth, d_a + i * p.padded, sizeof(float) * p.depth);
        }
    }
}

// ---------------------------------------------------------------------------------------------
// Rows: a vector at a time, the last one in part

// Calls body(first unit, load, store), where load and store move a vector of a matrix's row.
template <class Body>
inline void each_vector(std::int64_t n_hidden, Body body) {
    std::int64_t j = 0;
    for (; j + lanes <= n_hidden; j += lanes) {
        body(j, [j](const float* row) { return load(row + j); },
             [j](float* row, V v) { store(row + j, v); });
    }
    if (const std::int64_t n = n_hidden - j; n > 0) {
        body(j, [j, n](const float* row) { return load_some(row + j, n, 0.0f); },
             [j, n](float* row, V v) { store_some(row + j, v, n); });
    }
}

struct LayerMoments {
    float mean, invstd;
};

// Mean and 1 / standard deviation over the units of a padded row.
inline LayerMoments layer_moments(const Layer& c, const float* row) {
    const std::int64_t units = c.units;
    const float* real = c.real;
    V total = zero();
    for (std::int64_t j = 0; j < units; j += lanes) total = add(total, load(row + j));
    const float mean = sum(total) / static_cast<float>(c.in.n_hidden);
    V squares = zero();
    for (std::int64_t j = 0; j < units; j += lanes) {
        const V d = mul(sub(load(row + j), set1(mean)), load(real + j));
        squares = fma(d, d, squares);
    }
    const double var = static_cast<double>(sum(squares)) / static_cast<double>(c.in.n_hidden);
    return {mean, static_cast<float>(1.0 / std::sqrt(var + c.in.layer_norm_eps))};
}

// Sums over a block's rows of what `value` gives for a row and a vector.
template <class Value>
inline V sum_rows(std::int64_t rows, Value value) {
    V even = zero(), odd = zero();
    std::int64_t i = 0;
    for (; i + 2 <= rows; i += 2) {
        even = add(even, value(i));
        odd = add(odd, value(i + 1));
    }
    if (i < rows) even = add(even, value(i));
    return add(even, odd);
}

// Batch norm of a sample's rows. Loops take a copy of it: a store of a vector could change a Layer,
// for all that the compiler knows.
struct Normalise {
    const float *mean, *scale, *shift;
    Normalise(const Layer& c, std::int64_t sample)
        : mean(c.mean + c.statistics_of(sample)), scale(c.scale + c.statistics_of(sample)),
          shift(c.shift + c.statistics_of(sample)) {}
    V operator()(std::int64_t j, V v) const {
        return fma(sub(v, load(mean + j)), load(scale + j), load(shift + j));
    }
};

// ---------------------------------------------------------------------------------------------
// Forward

inline void linear_block(const Layer& c, std::int64_t block, float* v) {
    const std::int64_t cell = c.cell_of(block), rows = c.rows_of(block), units = c.units;
    const float* bias = c.bias;
    if (c.n_lookups == 0) {
        for (std::int64_t i = 0; i < rows; ++i) {
            for (std::int64_t j = 0; j < units; j += lanes) store(v + i * units + j, load(bias + j));
        }
    }
    for (std::int64_t k = 0; k < c.n_lookups; ++k) {
        const std::int32_t* place = c.lookups[k].place + cell;
        const float* table = c.lookups[k].table;
        for (std::int64_t i = 0; i < rows; ++i) {
            const float* more = table + place[i] * units;
            float* row = v + i * units;
            const float* before = k == 0 ? bias : row;
            for (std::int64_t j = 0; j < units; j += lanes) {
                store(row + j, add(load(before + j), load(more + j)));
            }
        }
    }
    for (std::int64_t k = 0; k < c.n_products; ++k) {
        multiply(c, c.products[k], k == 0 ? c.row_of(block) : cell, rows, v);
    }
}

// Norms and activation of a block; v (rows x units) may be overwritten if there is a layer norm.
inline void finish_block(const Layer& c, std::int64_t block, float* v) {
    const CovariateLinear& in = c.in;
    const std::int64_t row = c.row_of(block), rows = c.rows_of(block), units = c.units;
    const std::int64_t H = in.n_hidden;
    const bool batch_norm = c.normalises_batch(), layer_norm = in.layer_norm != 0;
    const Normalise normalise(c, c.sample_of(block));
    float* all = in.out + row * H;
    with_activation(in, [=, &c](const auto unit) {
        for (std::int64_t i = 0; i < rows; ++i) {
            float *a = v + i * units, *out = all + i * H;
            if (!layer_norm) {
                each_vector(H, [=](std::int64_t j, auto, auto put) {
                    const V value = load(a + j);
                    put(out, unit.value(batch_norm ? normalise(j, value) : value));
                });
                continue;
            }
            for (std::int64_t j = 0; batch_norm && j < units; j += lanes) {
                store(a + j, normalise(j, load(a + j)));
            }
            const LayerMoments m = layer_moments(c, a);
            const V mean = set1(m.mean), invstd = set1(m.invstd);
            each_vector(H, [=](std::int64_t j, auto, auto put) {
                put(out, unit.value(mul(sub(load(a + j), mean), invstd)));
            });
        }
    });
}

inline void keep_block(const Layer& c, std::int64_t block, const float* v) {
    const std::int64_t H = c.in.n_hidden, row = c.row_of(block), rows = c.rows_of(block);
    for (std::int64_t i = 0; i < rows; ++i) {
        std::memcpy(c.in.linear + (row + i) * H, v + i * c.units, sizeof(float) * H);
    }
}

// The rows of `from` (rows x n_hidden) with padding.
inline void fetch_block(const Layer& c, const float* from, std::int64_t block, float* v) {
    const std::int64_t H = c.in.n_hidden, row = c.row_of(block), rows = c.rows_of(block);
    for (std::int64_t i = 0; i < rows; ++i) {
        std::memcpy(v + i * c.units, from + (row + i) * H, sizeof(float) * H);
        for (std::int64_t j = H; j < c.units; ++j) v[i * c.units + j] = 0.0f;
    }
}

// A block's mean, and its sum of squares about it.
inline void block_moments(const Layer& c, std::int64_t block, const float* v) {
    const std::int64_t rows = c.rows_of(block), units = c.units;
    for (std::int64_t j = 0; j < units; j += lanes) {
        const V total = sum_rows(rows, [=](std::int64_t i) { return load(v + i * units + j); });
        const V mean = mul(total, set1(1.0f / static_cast<float>(rows)));
        store(c.block_sum + block * units + j, mean);
        store(c.block_square + block * units + j, sum_rows(rows, [=](std::int64_t i) {
                  const V d = sub(load(v + i * units + j), mean);
                  return mul(d, d);
              }));
    }
}

// mean, scale and shift of a sample, from its mean and 1 / standard deviation.
inline void set_statistics(const Layer& c, std::int64_t sample, const float* mean,
                           const float* invstd) {
    const CovariateLinear& in = c.in;
    const std::int64_t at = sample * c.units;
    for (std::int64_t j = 0; j < c.units; ++j) {
        const bool exists = j < in.n_hidden;
        c.mean[at + j] = exists ? mean[j] : 0.0f;
        c.scale[at + j] = !exists                          ? 0.0f
                          : in.batch_norm_weight == nullptr ? invstd[j]
                                                            : invstd[j] * in.batch_norm_weight[j];
        c.shift[at + j] = exists && in.batch_norm_bias != nullptr ? in.batch_norm_bias[j] : 0.0f;
    }
}

inline void sample_moments(const Layer& c, std::int64_t sample) {
    const CovariateLinear& in = c.in;
    const std::int64_t units = c.units, first = sample * c.blocks_of_sample;
    const double n = static_cast<double>(in.n_cells);
    double *mean = c.sum + sample * units, *square = c.square + sample * units;
    std::memset(mean, 0, sizeof(double) * units);
    std::memset(square, 0, sizeof(double) * units);
    for (std::int64_t b = first; b < first + c.blocks_of_sample; ++b) {
        const double share = static_cast<double>(c.rows_of(b)) / n;
        for (std::int64_t j = 0; j < units; ++j) mean[j] += share * c.block_sum[b * units + j];
    }
    for (std::int64_t b = first; b < first + c.blocks_of_sample; ++b) {
        const double rows = static_cast<double>(c.rows_of(b));
        for (std::int64_t j = 0; j < units; ++j) {
            const double d = c.block_sum[b * units + j] - mean[j];
            square[j] += c.block_square[b * units + j] + rows * d * d;
        }
    }
    float *out = in.mean + sample * in.n_hidden, *invstd = in.invstd + sample * in.n_hidden;
    for (std::int64_t j = 0; j < in.n_hidden; ++j) {
        out[j] = static_cast<float>(mean[j]);
        invstd[j] = static_cast<float>(1.0 / std::sqrt(square[j] / n + in.batch_norm_eps));
    }
    set_statistics(c, sample, out, invstd);
}

inline void start_units(const Layer& c) {
    for (std::int64_t j = 0; j < c.units; ++j) {
        const bool exists = j < c.in.n_hidden;
        c.real[j] = exists ? 1.0f : 0.0f;
        c.bias[j] = exists && c.in.bias != nullptr ? c.in.bias[j] : 0.0f;
    }
}

inline Status covariate_linear(CovariateLinear& in) {
    Layer c(in);
    plan(c, false);
    Carver size{nullptr, 0};
    carve(c, size);
    Workspace workspace(size.used);
    if (workspace.memory == nullptr) return out_of_memory;
    Carver memory{static_cast<char*>(workspace.memory), 0};
    carve(c, memory);
    for (std::int64_t k = 0; k < c.n_lookups; ++k) {
        if (!group(c, c.lookups[k])) return bad_label;
    }
    start_units(c);
    if (in.batch_norm == BatchNorm::running) {
        for (std::int64_t j = 0; j < in.n_hidden; ++j) {
            in.mean[j] = in.running_mean[j];
            in.invstd[j] =
                static_cast<float>(1.0 / std::sqrt(in.running_var[j] + in.batch_norm_eps));
        }
        set_statistics(c, 0, in.mean, in.invstd);
    }

    const bool in_two = in.batch_norm == BatchNorm::batch;
    auto pack = [&c](std::int64_t i, int) {
        for (std::int64_t k = 0; k < c.n_products; ++k) {
            pack_by_unit(c, c.products[k], i * unit_block);
        }
        for (std::int64_t k = 0; k < c.n_lookups; ++k) look_up(c, c.lookups[k], i * unit_block);
    };
    auto first = [&c, in_two](std::int64_t block, int worker) {
        float* v = c.scratch[worker];
        linear_block(c, block, v);
        if (c.in.linear != nullptr) keep_block(c, block, v);
        if (in_two) block_moments(c, block, v);
        else finish_block(c, block, v);
    };
    auto moments = [&c](std::int64_t sample, int) { sample_moments(c, sample); };
    auto second = [&c](std::int64_t block, int worker) {
        float* v = c.scratch[worker];
        if (c.in.layer_norm || c.in.n_hidden != c.units) fetch_block(c, c.in.linear, block, v);
        else v = c.in.linear + c.row_of(block) * c.units;
        finish_block(c, block, v);
    };
    parallel_for((c.units + unit_block - 1) / unit_block, c.n_workers, pack);
    parallel_for(c.n_blocks, c.n_workers, first);
    if (in_two) {
        parallel_for(in.n_samples, c.n_workers, moments);
        parallel_for(c.n_blocks, c.n_workers, second);
        if (in.moved_mean != nullptr) update_running(in);
    }
    return ok;
}

// ---------------------------------------------------------------------------------------------
// Backward

// From the upstream gradient to that by what batch norm gave, in d_linear; and what batch norm needs
// of its sums. `a` is scratch.
inline void derive_block(const Layer& c, std::int64_t block, float* a) {
    const CovariateLinear& in = c.in;
    const std::int64_t row = c.row_of(block), rows = c.rows_of(block), units = c.units;
    const std::int64_t H = in.n_hidden;
    const Normalise normalise(c, c.sample_of(block));
    const float* real = c.real;
    const bool from_output =
        in.activation == UnitActivation::identity || in.activation == UnitActivation::relu;
    float* d = c.d_linear + row * units;
    if (in.layer_norm || !from_output) {
        fetch_block(c, in.linear, block, a);
        for (std::int64_t i = 0; c.normalises_batch() && i < rows; ++i) {
            for (std::int64_t j = 0; j < units; j += lanes) {
                store(a + i * units + j, normalise(j, load(a + i * units + j)));
            }
        }
    }
    for (std::int64_t i = 0; i < rows; ++i) {
        LayerMoments m{0.0f, 1.0f};
        float* a_row = a + i * units;
        float* d_row = d + i * units;
        if (in.layer_norm) {
            m = layer_moments(c, a_row);
            for (std::int64_t j = 0; j < units; j += lanes) {
                const V centred = mul(sub(load(a_row + j), set1(m.mean)), load(real + j));
                store(a_row + j, mul(centred, set1(m.invstd)));
            }
        }
        const float* grad = in.grad + (row + i) * H;
        const float* out = in.out + (row + i) * H;
        with_activation(in, [=](const auto unit) {
            each_vector(H, [=](std::int64_t j, auto get, auto) {
                store(d_row + j, unit.derive(from_output ? get(out) : load(a_row + j), get(grad)));
            });
        });
        if (in.layer_norm) {
            V total = zero(), slope = zero();
            for (std::int64_t j = 0; j < units; j += lanes) {
                total = add(total, load(d_row + j));
                slope = fma(load(d_row + j), load(a_row + j), slope);
            }
            const V mean = set1(sum(total) / static_cast<float>(H));
            const V by = set1(sum(slope) / static_cast<float>(H));
            for (std::int64_t j = 0; j < units; j += lanes) {
                const V g = fnma(load(a_row + j), by, sub(load(d_row + j), mean));
                store(d_row + j, mul(mul(g, set1(m.invstd)), load(real + j)));
            }
        }
    }
    if (!c.normalises_batch()) return;
    const float* v = in.linear + row * H;
    float *sums = c.block_sum + block * units, *squares = c.block_square + block * units;
    each_vector(H, [=](std::int64_t j, auto get, auto) {
        const V mean = load(normalise.mean + j);
        store(sums + j, sum_rows(rows, [=](std::int64_t i) { return load(d + i * units + j); }));
        store(squares + j, sum_rows(rows, [=](std::int64_t i) {
                  return mul(load(d + i * units + j), sub(get(v + i * H), mean));
              }));
    });
}

// The sums of a sample over its blocks: of the gradient, and of it times v - mean.
inline void sample_sums(const Layer& c, std::int64_t sample) {
    const std::int64_t units = c.units, first = sample * c.blocks_of_sample;
    double *sums = c.sum + sample * units, *squares = c.square + sample * units;
    std::memset(sums, 0, sizeof(double) * units);
    std::memset(squares, 0, sizeof(double) * units);
    for (std::int64_t b = first; b < first + c.blocks_of_sample; ++b) {
        for (std::int64_t j = 0; j < units; ++j) {
            sums[j] += c.block_sum[b * units + j];
            squares[j] += c.block_square[b * units + j];
        }
    }
}

inline void batch_norm_parameters(const Layer& c) {
    const CovariateLinear& in = c.in;
    for (std::int64_t j = 0; j < in.n_hidden; ++j) {
        double d_weight = 0.0, d_bias = 0.0;
        for (std::int64_t s = 0; s < in.n_samples; ++s) {
            const std::int64_t at = in.batch_norm == BatchNorm::batch ? s * in.n_hidden : 0;
            d_weight += c.square[s * c.units + j] * in.invstd[at + j];
            d_bias += c.sum[s * c.units + j];
        }
        if (in.d_batch_norm_weight != nullptr) {
            in.d_batch_norm_weight[j] = static_cast<float>(d_weight);
        }
        if (in.d_batch_norm_bias != nullptr) in.d_batch_norm_bias[j] = static_cast<float>(d_bias);
    }
}

// Takes the gradient through batch norm. The padding stays zero, because scale is.
inline void derive_batch_norm(const Layer& c, std::int64_t block) {
    const CovariateLinear& in = c.in;
    const std::int64_t row = c.row_of(block), rows = c.rows_of(block), units = c.units;
    const std::int64_t H = in.n_hidden, sample = c.sample_of(block);
    const std::int64_t at = c.statistics_of(sample);
    const bool batch = in.batch_norm == BatchNorm::batch;
    const double n = static_cast<double>(in.n_cells);
    for (std::int64_t j = 0; j < units; j += lanes) {
        float centre[lanes] = {}, slope[lanes] = {};
        for (std::int64_t k = j; batch && k < least<std::int64_t>(j + lanes, H); ++k) {
            const double invstd = in.invstd[sample * H + k];
            centre[k - j] = static_cast<float>(c.sum[sample * units + k] / n);
            slope[k - j] = static_cast<float>(c.square[sample * units + k] * invstd * invstd / n);
        }
        const V shift = load(centre), by = load(slope), mean = load(c.mean + at + j);
        const V scale = load(c.scale + at + j);
        const std::int64_t n_real = least<std::int64_t>(lanes, H - j);
        float* const d_linear = c.d_linear + row * units + j;
        const float* const linear = in.linear + row * H + j;
        for (std::int64_t i = 0; i < rows; ++i) {
            float* d = d_linear + i * units;
            V g = load(d);
            if (batch) {
                const float* v = linear + i * H;
                const V centred =
                    sub(n_real == lanes ? load(v) : load_some(v, n_real, 0.0f), mean);
                g = fnma(centred, by, sub(g, shift));
            }
            store(d, mul(g, scale));
        }
    }
}

inline void sum_samples(const Layer& c, std::int64_t block) {
    const std::int64_t start = c.cell_of(block) * c.units, n = c.rows_of(block) * c.units;
    for (std::int64_t j = start; j < start + n; j += lanes) {
        V total = zero();
        for (std::int64_t s = 0; s < c.in.n_samples; ++s) {
            total = add(total, load(c.d_linear + s * c.in.n_cells * c.units + j));
        }
        store(c.by_cell + j, total);
    }
}

inline void sum_bias(const Layer& c, std::int64_t block, std::int64_t slot, bool first) {
    const float* d = c.d_linear + c.row_of(block) * c.units;
    const std::int64_t rows = c.rows_of(block), units = c.units;
    float* out = c.d_bias + slot * units;
    for (std::int64_t j = 0; j < units; j += lanes) {
        const V total = sum_rows(rows, [=](std::int64_t i) { return load(d + i * units + j); });
        store(out + j, first ? total : add(load(out + j), total));
    }
}

// The sum of the gradients of a label's cells.
inline void sum_label(const Layer& c, const Lookup& l, std::int64_t d) {
    const std::int32_t *cells = l.order + l.start[d], rows = l.start[d + 1] - l.start[d];
    const std::int64_t units = c.units;
    const float* by_cell = c.by_cell;
    float* out = l.table + d * units;
    for (std::int64_t j = 0; j < units; j += lanes) {
        store(out + j, sum_rows(rows, [=](std::int64_t i) {
                  return load(by_cell + cells[i] * units + j);
              }));
    }
}

// The rows of the weight's gradient that belong to a block of units.
inline void write_weights(const Layer& c, std::int64_t first_unit) {
    const std::int64_t H = c.in.n_hidden, n = least(unit_block, H - first_unit);
    float* rows = c.in.d_weight + first_unit * c.n_columns;
    for (std::int64_t k = 0; k < c.n_products; ++k) {
        const Product& p = c.products[k];
        const std::int64_t n_slots = k == 0 ? c.n_slots : least(c.blocks_of_sample, most_slots);
        for (std::int64_t j = 0; j < n; ++j) {
            const float* from = p.d_weight + (first_unit + j) * p.padded;
            float* out = rows + j * c.n_columns + p.column;
            for (std::int64_t i = 0; i < p.depth; ++i) {
                float total = from[i];
                for (std::int64_t s = 1; s < n_slots; ++s) total += from[s * H * p.padded + i];
                out[i] = total;
            }
        }
    }
    for (std::int64_t k = 0; k < c.n_lookups; ++k) {
        const Lookup& l = c.lookups[k];
        for (std::int64_t j = 0; j < n; ++j) {
            std::memset(rows + j * c.n_columns + l.column, 0, sizeof(float) * l.n_categories);
        }
        for (std::int64_t d = 0; d < l.n_found; ++d) {
            const float* from = l.table + d * c.units + first_unit;
            float* out = rows + l.column + l.found[d];
            for (std::int64_t j = 0; j < n; ++j) out[j * c.n_columns] = from[j];
        }
    }
}

inline Status covariate_linear_backward(CovariateLinear& in) {
    Layer c(in);
    plan(c, true);
    Carver size{nullptr, 0};
    carve(c, size);
    Workspace workspace(size.used);
    if (workspace.memory == nullptr) return out_of_memory;
    Carver memory{static_cast<char*>(workspace.memory), 0};
    carve(c, memory);
    for (std::int64_t k = 0; k < c.n_lookups; ++k) {
        if (!group(c, c.lookups[k])) return bad_label;
    }
    start_units(c);
    if (c.normalises_batch()) {
        const std::int64_t n = in.batch_norm == BatchNorm::batch ? in.n_samples : 1;
        for (std::int64_t s = 0; s < n; ++s) {
            set_statistics(c, s, in.mean + s * in.n_hidden, in.invstd + s * in.n_hidden);
        }
    }

    const std::int64_t unit_blocks = (in.n_hidden + unit_block - 1) / unit_block;
    auto pack = [&c](std::int64_t i, int) {
        for (std::int64_t k = 0; k < c.n_products; ++k) {
            if (c.products[k].d_a != nullptr) pack_by_column(c, c.products[k], i * unit_block);
        }
    };
    auto derive = [&c](std::int64_t block, int worker) {
        derive_block(c, block, c.scratch[worker]);
    };
    auto sums = [&c](std::int64_t sample, int) { sample_sums(c, sample); };
    auto rows = [&c](std::int64_t slot, int worker) {
        const std::int64_t first = c.n_blocks * slot / c.n_slots;
        for (std::int64_t b = first; b < c.n_blocks * (slot + 1) / c.n_slots; ++b) {
            if (c.normalises_batch()) derive_batch_norm(c, b);
            else derive_block(c, b, c.scratch[worker]);
            multiply_gradients(c, c.products[0], c.d_linear + c.row_of(b) * c.units, c.row_of(b),
                               c.rows_of(b), slot, b == first, c.scratch[worker]);
            if (c.in.d_bias != nullptr) sum_bias(c, b, slot, b == first);
        }
    };
    auto cells = [&c](std::int64_t block, int) { sum_samples(c, block); };
    const std::int64_t cell_slots = least(c.blocks_of_sample, most_slots);
    auto matrices = [&c, cell_slots](std::int64_t slot, int worker) {
        const std::int64_t first = c.blocks_of_sample * slot / cell_slots;
        for (std::int64_t b = first; b < c.blocks_of_sample * (slot + 1) / cell_slots; ++b) {
            for (std::int64_t k = 1; k < c.n_products; ++k) {
                multiply_gradients(c, c.products[k], c.by_cell + c.cell_of(b) * c.units,
                                   c.cell_of(b), c.rows_of(b), slot, b == first,
                                   c.scratch[worker]);
            }
        }
    };
    auto weights = [&c](std::int64_t i, int) { write_weights(c, i * unit_block); };

    parallel_for(unit_blocks, c.n_workers, pack);
    if (c.normalises_batch()) {
        parallel_for(c.n_blocks, c.n_workers, derive);
        parallel_for(in.n_samples, c.n_workers, sums);
        batch_norm_parameters(c);
    }
    const bool labels_wanted = in.d_weight != nullptr && c.n_lookups > 0;
    const bool cells_wanted = labels_wanted || c.n_products > 1;
    if (cells_wanted || in.d_weight != nullptr || in.d_bias != nullptr || in.d_x != nullptr) {
        parallel_for(c.n_slots, c.n_workers, rows);
    }
    if (cells_wanted && c.by_cell != c.d_linear) {
        parallel_for(c.blocks_of_sample, c.n_workers, cells);
    }
    if (c.n_products > 1) parallel_for(cell_slots, c.n_workers, matrices);
    for (std::int64_t k = 0; labels_wanted && k < c.n_lookups; ++k) {
        Lookup& l = c.lookups[k];
        sort_cells(c, l);
        auto label = [&c, &l](std::int64_t d, int) { sum_label(c, l, d); };
        parallel_for(l.n_found, c.n_workers, label);
    }
    if (in.d_weight != nullptr) parallel_for(unit_blocks, c.n_workers, weights);
    for (std::int64_t j = 0; in.d_bias != nullptr && j < in.n_hidden; ++j) {
        double total = 0.0;
        for (std::int64_t s = 0; s < c.n_slots; ++s) total += c.d_bias[s * c.units + j];
        in.d_bias[j] = static_cast<float>(total);
    }
    return ok;
}
