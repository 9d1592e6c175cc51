"""Counts as the likelihood reads them: the non-zeros of a block of cells and genes."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .log_prob import EPS

BAD_COUNT = (
    "x holds a negative or NaN count, but counts must be non-negative numbers: "
    "pass raw counts (not scaled or log-normalised data)"
)
INFINITE_COUNT = "x holds an infinite count, but counts must be finite"


class Counts:
    """Cells x genes counts, dense or in compressed sparse rows.

    Parameters
    ----------
    dense
        ``(N, G)`` counts of any real dtype, or None.
    crow, col, values
        The parts of a canonical ``torch.sparse_csr`` matrix (see :func:`canonical_csr`), or None.
    n_genes
        Number of genes ``G``.
    signed
        Whether negative values are legal (they are under the normal likelihood).
    """

    def __init__(
        self,
        dense: Tensor | None,
        crow: Tensor | None,
        col: Tensor | None,
        values: Tensor | None,
        n_genes: int,
        *,
        signed: bool,
    ) -> None:
        self.dense = dense
        self.n_genes = n_genes
        self.signed = signed
        if dense is None:
            assert crow is not None and col is not None and values is not None
            self.crow = crow
            self.col = col
            self.values = values

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What holds the counts: the dense tensor, or row pointers, columns and values."""
        return (self.crow, self.col, self.values) if self.dense is None else (self.dense,)

    def require_counts(self, bad: Tensor) -> None:
        """Raise ValueError where ``bad`` is 2 (negative or NaN) or 1 (infinite); as kernels report.

        On a GPU it is an assertion on the device, so that nothing waits for it.
        """
        _require((bad < 2).all(), BAD_COUNT)
        _require((bad < 1).all(), INFINITE_COUNT)

    def require_indices(self, bad: Tensor) -> None:
        """Raise ValueError where ``bad`` is not 0: CSR indices do not fit, as kernels report."""
        n_cells = self.crow.numel() - 1
        _require((bad == 0).all(), _bad_indices(n_cells, self.n_genes))

    @functools.cached_property
    def _key(self) -> Tensor:
        """Position of each value in the dense matrix: ascending."""
        rows = torch.arange(self.crow.numel() - 1, device=self.crow.device)
        row = torch.repeat_interleave(
            rows, self.crow.long().diff(), output_size=self.col.numel()
        )
        return row * self.n_genes + self.col

    def block(self, n0: int, n1: int, g0: int, g1: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return row, column (both from the block's corner) and value of the block's non-zeros.

        Raises
        ------
        ValueError
            If a count is negative or not a number.
        """
        if self.dense is not None:
            tile = _comparable(self.dense[n0:n1, g0:g1])
            row, col = torch.nonzero(tile, as_tuple=True)
            values = tile[row, col]
        else:
            device = self._key.device
            first = torch.arange(n0, n1, device=device) * self.n_genes
            low = torch.searchsorted(self._key, first + g0)
            size = torch.searchsorted(self._key, first + g1) - low
            total = int(size.sum())
            row = torch.repeat_interleave(
                torch.arange(n1 - n0, device=device), size, output_size=total
            )
            start = low - (size.cumsum(0) - size)
            position = torch.arange(total, device=device) + start[row]
            col = self.col[position].long() - g0
            values = _comparable(self.values)[position]
        return self._checked(row, col, values)

    def _checked(self, row: Tensor, col: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if values.numel() == 0:
            return row, col, values
        if self.signed:
            if values.is_floating_point():
                _require(~values.isnan().any(), "x holds NaN: remove or impute those cells")
            return row, col, values
        smallest, largest = torch.aminmax(values)
        # NaN compares false, so one comparison refuses both.
        _require(smallest >= 0, BAD_COUNT, found=smallest)
        if values.is_floating_point():
            _require(largest < torch.inf, INFINITE_COUNT)
        if values.device.type != "cpu" or smallest <= EPS:
            # CSR may store zeros, and scvi-tools takes anything below 1e-8 for one.
            kept = values > EPS
            row, col, values = row[kept], col[kept], values[kept]
        return row, col, values


def _comparable(counts: Tensor) -> Tensor:
    """Widen the integers that torch can store but not compute with."""
    return counts.long() if counts.dtype in (torch.uint16, torch.uint32, torch.uint64) else counts


def _require(condition: Tensor, message: str, found: Tensor | None = None) -> None:
    """Raise ValueError unless ``condition``; on a GPU, assert there without waiting for it."""
    if condition.device.type == "cpu":
        if not bool(condition):
            raise ValueError(message if found is None else f"{message} (found {found.item():g})")
    else:
        assert_on_device(condition, message)


def assert_on_device(condition: Tensor, message: str) -> None:
    """Assert there, without waiting for it: CUDA refuses messages of 255 characters or more."""
    torch._assert_async(condition, message[:254])


def _bad_indices(n_cells: int, n_genes: int) -> str:
    return (
        f"the CSR counts' indices do not fit {n_cells} cells x {n_genes} genes: row pointers "
        f"must ascend from 0 to the number of values, columns lie in 0..{n_genes - 1}; "
        "torch.sparse_csr_tensor(..., check_invariants=True) finds the fault"
    )


def _sizes_fit(x: Tensor) -> bool:
    sizes = (x.crow_indices().numel() - 1, x.values().shape)
    return sizes == (x.shape[0], x.col_indices().shape)


def csr_parts(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Take a ``torch.sparse_csr`` matrix apart, for kernels that bear any order of its columns.

    Nothing waits for the device: kernels hold the indices against the shape themselves.

    Raises
    ------
    ValueError
        If the numbers of row pointers, columns and values do not fit one another.
    """
    if not _sizes_fit(x):
        raise ValueError(_bad_indices(*x.shape))
    return x.crow_indices(), x.col_indices(), x.values().detach()


def canonical_csr(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Take a ``torch.sparse_csr`` matrix apart, checked and in canonical order.

    Columns that are out of order within a row are sorted and duplicates are summed, as
    ``x.to_dense()`` would. Sorted matrices without duplicates are not copied.

    Parameters
    ----------
    x
        ``(N, G)`` matrix with layout ``torch.sparse_csr``.

    Returns
    -------
    tuple of Tensor
        ``crow`` (N + 1,), ``col`` (nnz,), ``values`` (nnz,).

    Raises
    ------
    ValueError
        If the indices do not fit the matrix's shape.
    """
    n_cells, n_genes = x.shape
    # Detached: as a view of a sparse tensor, torch.compile would stumble over the values.
    crow, col, values = x.crow_indices(), x.col_indices(), _comparable(x.values().detach())
    nnz = col.numel()
    sizes = crow.diff()
    fits = _sizes_fit(x)
    if fits:
        ok = (crow[0] == 0) & (crow[-1] == nnz) & (sizes >= 0).all()
        if nnz:
            ok = ok & (col.min() >= 0) & (col.max() < n_genes)
        if x.device.type == "cpu":
            fits = bool(ok)
        else:
            assert_on_device(ok, _bad_indices(n_cells, n_genes))
    if not fits:
        raise ValueError(_bad_indices(n_cells, n_genes))
    if nnz < 2:
        return crow, col, values
    ascending = col.diff() > 0
    row_starts = crow[1:-1]
    row_starts = row_starts[(row_starts > 0) & (row_starts < nnz)].long()
    ascending[row_starts - 1] = True
    if not bool(ascending.all()):
        rows = torch.repeat_interleave(
            torch.arange(n_cells, device=x.device), sizes.long(), output_size=nnz
        )
        coo = torch.sparse_coo_tensor(
            torch.stack([rows, col.long()]), values, (n_cells, n_genes), check_invariants=False
        ).coalesce()
        row, col = coo.indices()
        values = coo.values()
        crow = torch.searchsorted(row, torch.arange(n_cells + 1, device=x.device))
    return crow, col, values
