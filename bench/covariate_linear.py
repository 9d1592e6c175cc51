"""``covariate_linear`` (hidden layers with covariates) against scvi-tools' one-hot products."""

from __future__ import annotations

from collections.abc import Iterator

import scvi.nn
import torch

from decoder_fast import FCLayers

from .shapes import SHAPES
from .timing import interleaved


def rows() -> Iterator[dict[str, object]]:
    """Time forward and backward; correctness first."""
    for name in ("tutorial", "hlca", "nsclc", "census"):
        shape = SHAPES[name]
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
        compiled = torch.compile(stock)
        z = torch.randn(shape.cells, shape.latent)
        batch = torch.randint(0, shape.batches, (shape.cells, 1))
        error = (stock(z, batch) - ours(z, batch)).abs().max().item()
        if error > 1e-4:
            raise AssertionError(f"{shape}: hidden units are off by {error:.1e}")

        def step(module: torch.nn.Module, z: torch.Tensor = z, batch: torch.Tensor = batch) -> None:
            module.zero_grad()
            module(z, batch).sum().backward()

        seconds = interleaved(
            {
                "stock eager": lambda: step(stock),
                "stock compiled": lambda: step(compiled),
                "ours": lambda: step(ours),
            }
        )
        yield {
            "shape": f"{name} ({shape.cells} x {shape.batches} batches, {shape.layers} layers)",
            "what": "hidden layers, forward + backward",
            **seconds,
        }
