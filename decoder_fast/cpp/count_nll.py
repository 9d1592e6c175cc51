"""``count_nll`` on CPUs: hands the tensors to the kernel in ``csrc``."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable
from ctypes import c_double, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from .. import native
from ..reference import counts as messages
from ..reference.count_nll import Inputs
from ..reference.counts import Counts
from ._common import ACTIVATIONS, BAD_COUNT, check_memory

_LIKELIHOODS = {"nb": 0, "zinb": 1, "poisson": 2}
_NUMBER_TYPES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.int8: 2,
    torch.uint8: 3,
    torch.int16: 4,
    torch.uint16: 5,
    torch.int32: 6,
    torch.int64: 7,
}

#: Inputs with a gradient of the same shape, which the kernel calls ``d_<name>``.
_GRADIENTS = (
    "hidden",
    "scale_weight",
    "scale_bias",
    "dropout_weight",
    "dropout_bias",
    "r_weight",
    "r_bias",
    "px_r",
)


class _CountNLL(ctypes.Structure):
    """``decoder_fast::CountNll`` of ``csrc/count_nll.h``, field by field."""

    _fields_ = tuple(
        (name, kind)
        for kind, names in (
            (c_int64, "n_rows n_cells n_genes n_hidden n_px_r"),
            (c_int32, "likelihood activation n_threads fast_products"),
            (c_void_p, "hidden library scale_weight scale_bias dropout_weight dropout_bias"),
            (c_void_p, "r_weight r_bias px_r px_r_index dense"),
            (c_int64, "dense_stride"),
            (c_void_p, "crow col values"),
            (c_int32, "counts_type index_type"),
            (c_void_p, "upstream"),
            (c_double, "upstream_of_all"),
            (c_void_p, "nll shift usum"),
            (c_void_p, " ".join(f"d_{name}" for name in _GRADIENTS)),
            (c_double, "found"),
        )
        for name in names.split()
    )


@functools.cache
def _kernel() -> Callable[..., int]:
    (kernel,) = native.functions("count_nll", [_CountNLL], {"count_nll": c_int32})
    return kernel


def _countable(counts: Tensor) -> Tensor:
    """Convert the dtypes that the kernel does not read."""
    if counts.dtype in _NUMBER_TYPES:
        return counts
    return counts.to(torch.float32 if counts.is_floating_point() else torch.int64)


def _run(
    inputs: Inputs,
    upstream: Tensor | float,
    values: dict[str, Tensor],
    gradients: dict[str, Tensor],
) -> None:
    """Call the kernel, which fills ``values`` (nll and the like) and ``gradients``."""
    n_cells, n_hidden = inputs.hidden.shape[-2:]
    counts = inputs.counts
    keep: list[Tensor] = []  # alive until the kernel has returned

    def pointer(tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        keep.append(tensor.contiguous())
        return keep[-1].data_ptr()

    arguments = _CountNLL(
        n_rows=inputs.library.numel(),
        n_cells=n_cells,
        n_genes=inputs.scale_weight.shape[0],
        n_hidden=n_hidden,
        n_px_r=1 if inputs.px_r_index is None else inputs.px_r.shape[1],  # type: ignore[union-attr]
        likelihood=_LIKELIHOODS[inputs.likelihood],
        activation=ACTIVATIONS[inputs.scale_activation],
        n_threads=torch.get_num_threads(),
        # What set_float32_matmul_precision("medium") sets; itself it may refuse to be asked.
        fast_products=torch.backends.mkldnn.matmul.fp32_precision == "bf16",  # type: ignore[attr-defined]
        px_r_index=pointer(inputs.px_r_index),
    )
    if isinstance(upstream, Tensor):
        arguments.upstream = pointer(upstream)
    else:
        arguments.upstream_of_all = upstream
    for name in ("library", *_GRADIENTS):
        setattr(arguments, name, pointer(getattr(inputs, name)))
    if counts.dense is not None:
        dense = _countable(counts.dense)
        if dense.stride(1) != 1:
            dense = dense.contiguous()
        keep.append(dense)
        arguments.dense = dense.data_ptr()
        arguments.dense_stride = dense.stride(0)
        arguments.counts_type = _NUMBER_TYPES[dense.dtype]
    else:
        csr_values = _countable(counts.values)
        crow, col = counts.crow, counts.col
        if crow.dtype != col.dtype:
            crow, col = crow.long(), col.long()
        arguments.crow, arguments.col = pointer(crow), pointer(col)
        arguments.values = pointer(csr_values)
        arguments.counts_type = _NUMBER_TYPES[csr_values.dtype]
        arguments.index_type = _NUMBER_TYPES[crow.dtype]
    for name, tensor in values.items():
        setattr(arguments, name, tensor.data_ptr())
    for name, tensor in gradients.items():
        setattr(arguments, f"d_{name}", tensor.data_ptr())

    status = _kernel()(arguments)
    check_memory(status, "count_nll")
    if status == BAD_COUNT:
        if arguments.found == math.inf:
            raise ValueError(messages.INFINITE_COUNT)
        raise ValueError(f"{messages.BAD_COUNT} (found {arguments.found:g})")


def _empty_values(inputs: Inputs) -> dict[str, Tensor]:
    empty, shape = inputs.hidden.new_empty, inputs.hidden.shape[:-1]
    return {name: empty(shape) for name in ("nll", "shift", "usum")}


def _empty_gradients(inputs: Inputs, wanted: frozenset[str]) -> dict[str, Tensor]:
    empty = inputs.hidden.new_empty
    return {
        name: empty(tensor.shape)
        for name in _GRADIENTS
        if name in wanted and (tensor := getattr(inputs, name)) is not None
    }


def forward(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what :func:`decoder_fast.reference.count_nll.forward` computes."""
    values = _empty_values(inputs)
    _run(inputs, 0.0, values, {})
    return values["nll"], values["shift"], values["usum"]


def forward_and_backward(
    inputs: Inputs, upstream: float, wanted: frozenset[str]
) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Tensor]]:
    """Compute forward, and the gradients for an upstream gradient that is one number, at once.

    In this order no product of the heads is taken twice. ``hidden`` may be (N, H) here, with
    ``library`` (N,).
    """
    values = _empty_values(inputs)
    gradients = _empty_gradients(inputs, wanted)
    _run(inputs, upstream, values, gradients)
    if "library" in wanted:
        gradients["library"] = -upstream * values["usum"]
    return (values["nll"], values["shift"], values["usum"]), gradients


def backward(
    inputs: Inputs, grad: Tensor, shift: Tensor, usum: Tensor, wanted: frozenset[str]
) -> dict[str, Tensor]:
    """Compute what :func:`decoder_fast.reference.count_nll.backward` computes."""
    gradients = _empty_gradients(inputs, wanted)
    if gradients:
        _run(inputs, grad, {}, gradients)
    if "library" in wanted:
        gradients["library"] = -grad * usum
    return gradients


def log_sum_exp(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute what :func:`decoder_fast.reference.softmax_library.log_sum_exp` computes."""
    n_rows, n_hidden = hidden.shape
    # Of one cell without counts, in as many samples: the kernel stops where nothing else is wanted.
    index = torch.zeros(2, dtype=torch.int64)
    counts = Counts(None, index, index[:0], hidden[:0, 0], weight.shape[0], signed=False)
    inputs = Inputs(
        hidden.view(n_rows, 1, n_hidden),
        hidden.new_zeros(n_rows, 1),
        weight,
        bias,
        *(None,) * 6,
        counts,
        "poisson",
        "softmax",
    )
    out = hidden.new_empty(n_rows)
    _run(inputs, 0.0, {"shift": out}, {})
    return out.neg_()
