"""A whole SCVI model, stock and fused: one training step, and one epoch of ``SCVI.train``."""

from __future__ import annotations

import copy
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from decoder_fast.training import quiet as without_advice

from .case import errors
from .shapes import Shape

#: Largest relative difference of the losses of an epoch from stock's: rounding adds up over steps.
EPOCH_TOLERANCE = 1e-4


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the trainer's advice off the screen, and its logs out of the current folder."""
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder, without_advice(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(here)


class Models:
    """The model of a shape on a simulated atlas: stock, stock compiled, and ours.

    Stock and stock compiled share their parameters; ours begins from the same.
    """

    def __init__(self, shape: Shape, cells: int, device: torch.device) -> None:
        import pandas as pd
        from scvi.model import SCVI

        from decoder_fast import fuse
        from decoder_fast.datasets import simulate_atlas

        self.shape, self.device = shape, device
        adata = simulate_atlas(cells, shape.genes, n_batches=1, seed=0)
        # More batches than cells, some of which stay empty: what counts is how many there are.
        codes = np.random.default_rng(0).integers(shape.batches, size=cells)
        names = [f"batch_{i}" for i in range(shape.batches)]
        adata.obs["batch"] = pd.Categorical.from_codes(codes, names)
        options: dict[str, Any] = {"activation_fn": nn.ReLU}
        if shape.activation == "leaky_relu":
            options["activation_fn"] = nn.LeakyReLU
        with quiet():
            SCVI.setup_anndata(adata, batch_key="batch")
            self.models: dict[str, Any] = {
                name: SCVI(
                    adata,
                    n_hidden=shape.hidden,
                    n_latent=shape.latent,
                    n_layers=shape.layers,
                    gene_likelihood=shape.likelihood,
                    use_batch_norm="both" if shape.norm == "batch" else "none",
                    use_layer_norm="both" if shape.norm == "layer" else "none",
                    deeply_inject_covariates=shape.inject_covariates,
                    extra_encoder_kwargs=options,
                    extra_decoder_kwargs=options,
                )
                for name in ("stock eager", "ours")
            }
        self.models["stock compiled"] = self.models["stock eager"]
        fuse(self.models["ours"])
        self.initial = copy.deepcopy(self.models["stock eager"].module.state_dict())

    def reset(self) -> None:
        """Go back to the parameters that all began with."""
        for model in self.models.values():
            model.module.load_state_dict(self.initial)

    def train(self, name: str, **options: Any) -> None:
        """Train for one epoch."""
        if name == "stock compiled":
            options["plan_kwargs"] = {"compile": True}
        self.models[name].train(
            max_epochs=1,
            batch_size=self.shape.cells,
            train_size=1.0,
            accelerator="gpu" if self.device.type == "cuda" else "cpu",
            enable_progress_bar=False,
            logger=False,
            **options,
        )

    def epoch_losses(self, name: str) -> np.ndarray:
        """The losses of an epoch from the initial parameters, with the same random numbers."""
        import scvi

        self.reset()
        scvi.settings.seed = 0
        self.train(name)
        metrics = self.models[name].trainer.callback_metrics
        return np.array([float(metrics[f"{name}_train"]) for name in ("elbo", "kl_local")])

    def step(self, name: str) -> Step:
        """Prepare one training step, as the trainer takes it."""
        from lightning.pytorch.callbacks import Callback

        class Caught(Callback):
            plan: Any
            trainer: Any
            raw: Any

            def on_train_start(self, trainer: Any, pl_module: Any) -> None:
                self.plan, self.trainer = pl_module, trainer
                self.raw = next(iter(trainer.train_dataloader))

        import scvi

        caught = Caught()
        scvi.settings.seed = 0
        self.train(name, callbacks=[caught], max_steps=1)
        self.reset()
        return Step(caught.plan, caught.trainer.strategy, caught.raw)


class Step:
    """One training step: mini-batch to the device, loss, gradients, optimizer."""

    def __init__(self, plan: Any, strategy: Any, raw: Any) -> None:
        self.plan, self.strategy, self.raw = plan, strategy, raw
        plan.module.train()
        self.optimizer = plan.configure_optimizers()["optimizer"]

    def loss(self) -> Tensor:
        """The loss of the mini-batch as the loader hands it over."""
        batch = self.strategy.batch_to_device(self.raw, dataloader_idx=0)
        return self.plan(batch, loss_kwargs={"kl_weight": self.plan.kl_weight})[2].loss

    def __call__(self) -> None:
        """Take the step."""
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()

    def results(self, *, float64: bool = False) -> list[Tensor | None]:
        """Loss and gradients; the same random numbers at every call and in every precision."""
        plan = self.plan
        module = copy.deepcopy(plan.module).double() if float64 else plan.module
        dropouts = [(part, part.p) for part in module.modules() if isinstance(part, nn.Dropout)]
        for part, _ in dropouts:
            part.p = 0.0

        def normal(size: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
            return torch.randn(size, device=device).to(dtype)

        try:
            batch = self.strategy.batch_to_device(self.raw, dataloader_idx=0)
            if float64:
                batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
            torch.manual_seed(0)
            with mock.patch("torch.distributions.normal._standard_normal", normal):
                loss = module(batch, loss_kwargs={"kl_weight": 1.0})[2].loss
            parameters = list(module.parameters())
            return [loss.detach(), *torch.autograd.grad(loss, parameters, allow_unused=True)]
        finally:
            for part, p in dropouts:
                part.p = p


def step_errors(steps: dict[str, Step]) -> dict[str, dict[str, float]]:
    """Errors of stock's and our loss and gradients, against stock in float64."""
    results = {name: steps[name].results() for name in ("stock eager", "ours")}
    truth = steps["stock eager"].results(float64=True)
    found = {}
    for name, got in results.items():
        if [g is None for g in got] != [t is None for t in truth]:
            found[name] = {"value": float("nan"), "gradient": float("nan")}
            continue
        pairs = [(g, t) for g, t in zip(got, truth, strict=True) if t is not None]
        found[name] = errors([g for g, _ in pairs], [t for _, t in pairs], 1)
    return found
