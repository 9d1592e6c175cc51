"""One training step of SCVI at the size of an atlas: 11,108 batches in two hidden layers.

Everything of the step that grows with the number of batches: hidden layers, encoder, dispersion,
prior of the library size, optimizer. Without data loading: ``training`` has whole epochs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scvi.module
import scvi.nn
import torch

from decoder_fast import fuse
from decoder_fast.scvi.lazy import LazyCounts

from .case import Random, csr_of
from .fresh import fresh, peak_extra_bytes
from .shapes import SHAPES, Shape
from .timing import interleaved

CELLS = 256  # fewer than that model's mini-batches: stock's one-hots are to fit into small machines
NAMES = ("stock eager", "ours")


@dataclass(frozen=True)
class Case:
    """A way to set up SCVI."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    surgery: bool = False  # frozen but for the linear maps' covariates, as by load_query_data


CASES = (
    Case("SCVI's defaults"),
    Case("covariates in the encoder too", {"encode_covariates": True}),
    Case("learned library sizes", {"use_observed_lib_size": False}),
    Case("a dispersion a gene and batch", {"dispersion": "gene-batch"}),
    Case("surgery", surgery=True),
)


def cases(quick: bool) -> tuple[Case, ...]:
    """The ways; the first when in a hurry."""
    return CASES[:1] if quick else CASES


def _module(case: Case, shape: Shape) -> Any:
    options = dict(case.options)
    if not options.get("use_observed_lib_size", True):
        prior = np.ones((1, shape.batches))
        options |= {"library_log_means": 7 * prior, "library_log_vars": prior}
    torch.manual_seed(0)
    module = scvi.module.VAE(
        shape.genes,
        n_batch=shape.batches,
        n_labels=1,
        n_hidden=shape.hidden,
        n_latent=shape.latent,
        n_layers=shape.layers,
        gene_likelihood=shape.likelihood,
        **options,
    )
    if case.surgery:
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        for part in module.modules():
            if isinstance(part, scvi.nn.FCLayers):
                for layer in part.fc_layers:
                    layer[0].requires_grad_(True)
                part.set_online_update_hooks()
    return module


def step_of(case: Case, shape: Shape, name: str) -> Callable[[], float]:
    """A training step of stock or of ours, which returns the loss."""
    module = _module(case, shape)
    random = Random(torch.device("cpu"), 0)
    x = random.counts(CELLS, shape.genes)
    if name == "ours":
        fuse(module)
        x = LazyCounts.of(csr_of(x))
    tensors = {
        "X": x,
        "batch": random.labels(CELLS, shape.batches),
        "labels": torch.zeros(CELLS, 1, dtype=torch.int64),
    }
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-3, eps=0.01, weight_decay=1e-6)  # scvi-tools'

    def step() -> float:
        optimizer.zero_grad()
        loss = module(tensors)[2].loss
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def peak(case: Case, shape: Shape, threads: int, name: str) -> int | None:
    """Peak of the extra memory of a step, gradients included, parameters and optimizer not."""
    torch.set_num_threads(threads)
    step = step_of(case, shape, name)
    step()
    return peak_extra_bytes(step)


def measure(case: Case, repeats: int) -> dict[str, object]:
    """Compare the first losses, then time steps, then measure memory."""
    shape = SHAPES["census"]
    steps = {name: step_of(case, shape, name) for name in NAMES}
    losses = []
    for step in steps.values():
        torch.manual_seed(1)
        losses.append([step(), step()])
    if not np.allclose(*losses, rtol=1e-4):
        raise AssertionError(f"{case.name}: losses {losses[0]} and {losses[1]}")
    threads = torch.get_num_threads()
    return {
        "shape": f"census ({CELLS} x {shape.genes:,}, {shape.batches:,} batches), {case.name}",
        "what": "training step, forward + backward + Adam",
        **interleaved(steps, repeats=repeats),
        "peak extra bytes": {name: fresh(peak, case, shape, threads, name) for name in NAMES},
    }
