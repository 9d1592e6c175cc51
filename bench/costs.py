"""What each operation costs at the shapes of real models, and the least time that it could take.

A model and no measurement: nothing runs. *Needed* is what no implementation can do without: each
input read and each output written once (counts, weights and hidden units once more for the backward
pass), one product for each output of a head and two for its gradients, an exponential or a
logarithm where the formulas have one. The *floor* on an H200 is the larger of the times that needed
bytes and needed products take at the rates below; special functions are counted, and are not in it.

*Moved* is what passes through memory as written, each tensor counted once for each operation or
kernel that takes or makes it: for ours from the launches recorded on meta tensors, for stock from
scvi-tools' own code, run on meta tensors too. Caches make both less.
"""

from __future__ import annotations

import json
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from decoder_fast.backends import implementation

from .shapes import SHAPES, Shape

FILE = Path(__file__).parent / "results" / "costs.json"
#: What an H200 does: bytes a second of a copy, operations a second of products.
BYTES_A_SECOND = 4.3e12
FLOPS_A_SECOND = {"tf32": 400e12, "fp32": 67e12}
HEADS = {"nb": 1, "zinb": 2, "poisson": 1}
#: Exponentials and logarithms of an element, forward and backward together.
SPECIAL = {"nb": 2, "zinb": 5, "poisson": 1}
#: Bytes of a float32, and of an int64 label.
_F, _LABEL = 4, 8

Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Needed:
    """Bytes, floating-point operations of products, exponentials and logarithms."""

    bytes: int
    flops: int = 0
    special: int = 0

    def __add__(self, other: Needed) -> Needed:
        return Needed(
            self.bytes + other.bytes, self.flops + other.flops, self.special + other.special
        )

    def floor(self, products: str) -> float:
        """Seconds that an H200 takes at least, with its products in ``"tf32"`` or ``"fp32"``."""
        return max(self.bytes / BYTES_A_SECOND, self.flops / FLOPS_A_SECOND[products])


def covariate_linear(shape: Shape) -> Needed:
    """All hidden layers, forward and backward (forward alone in evaluation)."""
    total = Needed(0)
    for n_in, n_cat in shape.layer_inputs():
        out, h = shape.rows * shape.hidden, shape.hidden
        columns = n_in + min(n_cat, shape.cells)  # those of categories that occur
        layer_in = shape.rows * n_in * _F + (shape.cells * _LABEL if n_cat else 0)
        product = 2 * out * n_in
        total += Needed(layer_in + (columns + 1) * h * _F + out * _F, product)
        if shape.training:
            # The gradient and the output again; the gradient of every weight, of x, of the bias.
            written = (n_in + n_cat + 1) * h * _F + shape.rows * n_in * _F
            total += Needed(layer_in + n_in * h * _F + 2 * out * _F + written, 2 * product)
    return total


def softmax_library(shape: Shape) -> Needed:
    """Logits to scale and rate, and both their gradients to that of the logits."""
    elements = shape.rows * shape.genes
    forward = Needed((3 * elements + shape.rows) * _F, special=elements)
    return forward + Needed(4 * elements * _F) if shape.training else forward


def count_nll(shape: Shape) -> Needed:
    """Heads and likelihood, dense counts and dispersion by gene."""
    elements, heads = shape.rows * shape.genes, HEADS[shape.likelihood]
    hidden = shape.rows * shape.hidden
    dispersion = shape.genes if shape.likelihood != "poisson" else 0
    parameters = heads * shape.genes * (shape.hidden + 1) + dispersion
    read = (shape.cells * shape.genes + hidden + shape.rows + parameters) * _F
    product = 2 * hidden * shape.genes * heads
    total = Needed(read + shape.rows * _F, product)
    if shape.training:
        total += Needed(read + (hidden + parameters) * _F, 2 * product)
    return total + Needed(0, special=SPECIAL[shape.likelihood] * elements)


NEEDED: dict[str, Callable[[Shape], Needed]] = {
    "covariate_linear": covariate_linear,
    "softmax_library": softmax_library,
    "count_nll": count_nll,
}


# What is moved
# -------------


def _bytes(arguments: Any) -> int:
    """Bytes of all tensors; of an expanded one as many as are stored."""
    return sum(
        min(leaf.nbytes, leaf.untyped_storage().nbytes())
        for leaf in torch.utils._pytree.tree_leaves(arguments)
        if isinstance(leaf, Tensor)
    )


class Traffic(TorchDispatchMode):
    """Adds up the bytes of the tensors that operations take and make."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if not function.is_view and name not in ("empty", "empty_like", "new_empty", "detach"):
            self.bytes += _bytes((args, kwargs, out))
        return out


def _stock_layers(shape: Shape) -> Callable[[], Outputs]:
    import scvi.nn

    layers = scvi.nn.FCLayers(
        n_in=shape.latent,
        n_out=shape.hidden,
        n_cat_list=[shape.batches],
        n_layers=shape.layers,
        n_hidden=shape.hidden,
        dropout_rate=0.0,
        use_batch_norm=shape.norm == "batch",
        use_layer_norm=shape.norm == "layer",
        inject_covariates=shape.inject_covariates,
        activation_fn=torch.nn.ReLU if shape.activation == "relu" else torch.nn.LeakyReLU,
    )
    layers = layers.to("meta").train(shape.training)
    z = _meta(shape, shape.latent)
    batch = torch.zeros(shape.cells, 1, dtype=torch.int64, device="meta")
    return lambda: (layers(z, batch),)


def _meta(shape: Shape, width: int) -> Tensor:
    size = (shape.samples,) if shape.samples > 1 else ()
    return torch.empty(*size, shape.cells, width, device="meta", requires_grad=shape.training)


def _stock_softmax(shape: Shape) -> Callable[[], Outputs]:
    logits, library = _meta(shape, shape.genes), _meta(shape, 1).detach()

    def run() -> Outputs:
        scale = torch.softmax(logits, -1)
        return scale, torch.exp(library) * scale

    return run


def _stock_likelihood(shape: Shape) -> Callable[[], Outputs]:
    from scvi import distributions

    hidden, library = _meta(shape, shape.hidden), _meta(shape, 1).detach()
    scale_head, dropout_head = (
        torch.nn.Linear(shape.hidden, shape.genes, device="meta") for _ in range(2)
    )
    px_r = torch.empty(shape.genes, device="meta", requires_grad=True)
    x = torch.empty(shape.cells, shape.genes, device="meta")

    def run() -> Outputs:
        scale = torch.softmax(scale_head(hidden), -1)
        rate = torch.exp(library) * scale
        dropout = dropout_head(hidden)  # computed whatever the likelihood
        theta = torch.exp(px_r)
        if shape.likelihood == "poisson":
            px = distributions.Poisson(rate=rate, scale=scale)
        elif shape.likelihood == "nb":
            px = distributions.NegativeBinomial(mu=rate, theta=theta, scale=scale)
        else:
            px = distributions.ZeroInflatedNegativeBinomial(
                mu=rate, theta=theta, zi_logits=dropout, scale=scale
            )
        return (-px.log_prob(x).sum(-1),)

    return run


STOCK = {
    "covariate_linear": _stock_layers,
    "softmax_library": _stock_softmax,
    "count_nll": _stock_likelihood,
}


@contextmanager
def _checks_pass() -> Iterator[None]:
    """Let scvi-tools' checks of values pass, of which meta tensors have none."""
    with mock.patch.object(Tensor, "__bool__", return_value=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def moved_by_stock(operation: str, shape: Shape) -> int:
    """Bytes that pass through memory in scvi-tools' code, forward and backward."""
    run = STOCK[operation](shape)
    with _checks_pass(), Traffic() as traffic, torch.set_grad_enabled(shape.training):
        outputs = run()
        if shape.training:
            torch.autograd.backward(outputs, [torch.empty_like(out) for out in outputs])
    return traffic.bytes


def _ours(operation: str, shape: Shape) -> None:
    from . import aot  # which needs Triton

    if operation == "covariate_linear":
        for n_in, n_cat in shape.layer_inputs():
            inputs = aot.layer(
                shape,
                n_in,
                n_cat,
                norm=shape.norm,
                training=shape.training,
                activation=shape.activation,
            )
            aot.run_layer(inputs, backward=shape.training)
    elif operation == "softmax_library":
        aot.run_softmax(shape, backward=shape.training)
    else:
        aot.run_counts(shape, shape.likelihood, "gene", "dense", backward=shape.training)


def moved_by_ours(operation: str, shape: Shape, precision: str) -> int:
    """Bytes that pass through memory in our kernels and what runs between them."""
    from .aot import precision as taken_in

    launched = 0

    def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        nonlocal launched
        if 0 not in grid:
            launched += _bytes(args)

    module = implementation(operation, "triton")
    with mock.patch.object(module, "launch", launch), taken_in(precision):
        with Traffic() as traffic, torch.no_grad():
            _ours(operation, shape)
    return launched + traffic.bytes


def table() -> list[dict[str, Any]]:
    """A row for each operation and shape."""
    rows = []
    for operation, needed in NEEDED.items():
        for shape in SHAPES.values():
            cost = needed(shape)
            rows.append(
                {
                    "operation": operation,
                    "shape": shape.name,
                    "needed bytes": cost.bytes,
                    "needed flops": cost.flops,
                    "special functions": cost.special,
                    "floor, tf32": cost.floor("tf32"),
                    "floor, fp32": cost.floor("fp32"),
                    "moved, tf32": moved_by_ours(operation, shape, "high"),
                    "moved, fp32": moved_by_ours(operation, shape, "highest"),
                    "moved, stock": moved_by_stock(operation, shape),
                }
            )
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table for people."""
    about = " ".join((__doc__ or "").split("\n\n", 1)[1].split())
    header = [
        *("operation", "shape", "needed MB", "needed GFLOP", "special functions, millions"),
        *("floor, tf32, µs", "floor, fp32, µs", "moved MB, tf32", "moved MB, fp32"),
        *("moved MB, stock", "stock / ours"),
    ]
    lines = [header, ["---"] * len(header)]
    for row in rows:
        lines.append(
            [
                f"`{row['operation']}`",
                row["shape"],
                f"{row['needed bytes'] / 1e6:,.1f}",
                f"{row['needed flops'] / 1e9:,.2f}",
                f"{row['special functions'] / 1e6:,.1f}",
                f"{row['floor, tf32'] * 1e6:,.1f}",
                f"{row['floor, fp32'] * 1e6:,.1f}",
                *(f"{row[f'moved, {of}'] / 1e6:,.1f}" for of in ("tf32", "fp32", "stock")),
                f"{row['moved, stock'] / row['moved, tf32']:.1f}",
            ]
        )
    rates = (
        f"Rates: {BYTES_A_SECOND / 1e12:g} TB/s; products {FLOPS_A_SECOND['tf32'] / 1e12:g} "
        f"TFLOP/s in tf32, {FLOPS_A_SECOND['fp32'] / 1e12:g} TFLOP/s in float32."
    )
    parts = [
        "# A model of what the operations cost",
        textwrap.fill(f"{about} {rates} Written by `make aot`.", 100),
        "\n".join(f"| {' | '.join(line)} |" for line in lines),
    ]
    return "\n\n".join(parts) + "\n"


def make() -> None:
    """Write the table."""
    rows = table()
    lines = ",\n".join(json.dumps(row) for row in rows)
    FILE.write_text(f"[\n{lines}\n]\n")
    FILE.with_suffix(".md").write_text(markdown(rows))
    print(f"written: {FILE}, {FILE.with_suffix('.md')}")


def check() -> list[str]:
    """Say what the committed table has otherwise."""
    committed = json.loads(FILE.read_text()) if FILE.exists() else []
    rows = table()
    wrong = [
        f"{row['operation']} at {row['shape']} costs {row}, but {FILE.name} says {old}"
        for row, old in zip(rows, committed, strict=False)
        if row != old
    ]
    if len(rows) != len(committed):
        wrong.append(f"{FILE.name} has {len(committed)} rows, expected {len(rows)}")
    return wrong
