"""``covariate_linear`` (hidden layers with covariates) against scvi-tools' one-hot products."""

from __future__ import annotations

import scvi.nn
import torch

from decoder_fast import FCLayers

from .shapes import SHAPES, Shape
from .timing import interleaved


def cases(quick: bool) -> list[Shape]:
    """The models; the small ones when in a hurry."""
    names = ("tutorial", "hlca") if quick else ("tutorial", "hlca", "nsclc", "census")
    return [SHAPES[name] for name in names]


def measure(shape: Shape, repeats: int) -> dict[str, object]:
    """Time forward and backward; correctness first."""
    options = {
        "n_in": shape.latent,
        "n_out": shape.hidden,
        "n_cat_list": [shape.batches],
        "n_layers": shape.layers,
        "n_hidden": shape.hidden,
        "dropout_rate": 0.0,
        "use_batch_norm": shape.norm == "batch",
        "use_layer_norm": shape.norm == "layer",
    }
    torch.manual_seed(0)
    stock = scvi.nn.FCLayers(**options)
    ours = FCLayers(**options)
    ours.load_state_dict(stock.state_dict())
    torch._dynamo.reset()
    compiled = torch.compile(stock)
    z = torch.randn(shape.cells, shape.latent)
    batch = torch.randint(0, shape.batches, (shape.cells, 1))
    error = (stock(z, batch) - ours(z, batch)).abs().max().item()
    if not error <= 1e-4:
        raise AssertionError(f"{shape.name}: hidden units are off by {error:.1e}")

    def step(module: torch.nn.Module) -> None:
        module.zero_grad()
        module(z, batch).sum().backward()

    seconds = interleaved(
        {
            "stock eager": lambda: step(stock),
            "stock compiled": lambda: step(compiled),
            "ours": lambda: step(ours),
        },
        repeats=repeats,
    )
    return {
        "shape": f"{shape.name} ({shape.cells} x {shape.batches} batches, {shape.layers} layers)",
        "what": "hidden layers, forward + backward",
        **seconds,
    }
