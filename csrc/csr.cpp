// Whether CSR indices fit their matrix.

#include <cstdint>

#include "export.h"

namespace {

enum Form : std::int32_t { canonical = 0, out_of_order = 1, does_not_fit = 2 };

template <class Index>
std::int32_t form(const Index* crow, const Index* col, std::int64_t n_rows,
                  std::int64_t n_columns, std::int64_t n_values) {
    if (crow[0] != 0 || crow[n_rows] != n_values) return does_not_fit;
    for (std::int64_t i = 0; i < n_rows; ++i) {
        if (crow[i] > crow[i + 1] || crow[i + 1] > n_values) return does_not_fit;
    }
    bool ascending = true;
    for (std::int64_t i = 0; i < n_rows; ++i) {
        const std::int64_t start = crow[i], stop = crow[i + 1];
        if (start == stop) continue;
        // Counted, not stopped at, so that compilers make vectors of it.
        std::int64_t descents = 0;
        for (std::int64_t p = start + 1; p < stop; ++p) descents += col[p] <= col[p - 1];
        if (descents == 0) {
            if (col[start] < 0 || col[stop - 1] >= n_columns) return does_not_fit;
            continue;
        }
        ascending = false;
        for (std::int64_t p = start; p < stop; ++p) {
            if (col[p] < 0 || col[p] >= n_columns) return does_not_fit;
        }
    }
    return ascending ? canonical : out_of_order;
}

}  // namespace

// canonical: rows and columns fit the matrix, and columns ascend within each row, without
// duplicates. crow has n_rows + 1 elements, col has n_values.
DECODER_FAST_API std::int32_t decoder_fast_csr_form(const void* crow, const void* col,
                                                    std::int32_t index_bytes, std::int64_t n_rows,
                                                    std::int64_t n_columns, std::int64_t n_values) {
    if (index_bytes == 4) {
        return form(static_cast<const std::int32_t*>(crow),
                    static_cast<const std::int32_t*>(col), n_rows, n_columns, n_values);
    }
    return form(static_cast<const std::int64_t*>(crow), static_cast<const std::int64_t*>(col),
                n_rows, n_columns, n_values);
}
