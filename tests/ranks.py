"""What ``test_distributed.py`` computes in one process, and in two that divide the cells.

As a script it is one of them (``ranks.py decoder FOLDER RANK``), or the first of those that
Lightning starts (``ranks.py models FOLDER STRATEGY``). What a rank got lies in
``FOLDER/rank-<rank>.pt``; where Lightning forks, its own process saves for both.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed import get_world_size, is_initialized
from torch.distributed.nn.functional import all_reduce
from torch.nn.parallel import DistributedDataParallel

from decoder_fast import DecoderSCVI

# --- a synchronised batch norm for CPUs ----------------------------------------------------------

synchronised = []  # sizes of what it was called with


def sync_batch_norm(self, x):
    """``nn.SyncBatchNorm.forward``, which refuses CPU tensors, of equally many cells a rank."""
    synchronised.append(tuple(x.shape))
    if not self.training or not is_initialized():
        return F.batch_norm(
            *(x, self.running_mean, self.running_var, self.weight, self.bias),
            *(self.training, self.momentum, self.eps),
        )
    n = get_world_size() * len(x)
    mean = all_reduce(x.sum(0)) / n
    var = all_reduce((x - mean).square().sum(0)) / n
    with torch.no_grad():
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var * n / (n - 1), self.momentum)
    return (x - mean) / (var + self.eps).sqrt() * self.weight + self.bias


# --- DistributedDataParallel by hand, around a decoder -------------------------------------------

#: Options of the decoder, of its loss, and of DistributedDataParallel.
DECODERS = {
    "nb, unused heads found": ({}, {"likelihood": "nb"}, {"find_unused_parameters": True}),
    "zinb, gene-batch, CSR": (
        {},
        {"likelihood": "zinb", "dispersion": "gene-batch", "csr": True},
        {"find_unused_parameters": True},
    ),
    "every head used": (
        {},
        {"likelihood": "zinb", "dispersion": "gene-cell"},
        {"find_unused_parameters": False},
    ),
    "static graph": ({}, {"likelihood": "nb"}, {"static_graph": True}),
    "synchronised batch norm": (
        {"use_batch_norm": True},
        {"likelihood": "zinb"},
        {"find_unused_parameters": True},
    ),
}
STEPS = 3  # DistributedDataParallel notices at the second step what went wrong in the first


class Loss(nn.Module):
    """A decoder whose forward is its loss: what DistributedDataParallel wants to wrap."""

    def __init__(self, name):
        super().__init__()
        torch.manual_seed(0)
        options, self.loss, _ = DECODERS[name]
        self.decoder = DecoderSCVI(
            *(4, 30, [3, 1_000]), n_layers=2, n_hidden=16, use_layer_norm=True, **options
        )
        dispersion = self.loss.get("dispersion", "gene")
        if dispersion != "gene-cell":
            self.px_r = nn.Parameter(torch.randn(30, *(3,) * (dispersion == "gene-batch")))

    def forward(self, x, z, library, batch, donor):
        options = dict(self.loss)
        if options.pop("csr", False):
            x = x.to_sparse_csr()
        if options.get("dispersion") == "gene-batch":
            options["px_r_index"] = batch
        px_r = getattr(self, "px_r", None)
        loss = self.decoder.reconstruction_loss(x, z, library, batch, donor, px_r=px_r, **options)
        return loss.mean()


def cells(step):
    g = torch.Generator().manual_seed(step)
    return (
        torch.poisson(torch.full((24, 30), 0.7), generator=g),
        torch.randn(24, 4, generator=g),
        torch.randn(24, 1, generator=g) + 3,
        torch.randint(0, 3, (24, 1), generator=g),
        torch.randint(0, 1_000, (24, 1), generator=g),
    )


def decoder(name, rank=None):
    """Losses of a few steps, gradients of the last, buffers; of one rank's cells, or of all."""
    module = Loss(name)
    wrapped = module
    if rank is not None:
        if "synchronised" in name:
            nn.SyncBatchNorm.convert_sync_batchnorm(module)
        wrapped = DistributedDataParallel(module, **DECODERS[name][2])
    losses = []
    for step in range(STEPS):
        module.zero_grad(set_to_none=True)
        batch = cells(step)
        loss = wrapped(*(batch if rank is None else [t[rank::2] for t in batch]))
        loss.backward()
        losses.append(loss.item())
    return {
        "losses": losses,
        "gradients": {k: p.grad for k, p in module.named_parameters()},
        "buffers": dict(module.named_buffers()),
    }


# --- scvi-tools' models, trained by Lightning ----------------------------------------------------

#: Options of SCVI; in one rank and in two the gradients are those of all the cells.
JOINED = {
    "nb": {"gene_likelihood": "nb", "use_batch_norm": "none", "use_layer_norm": "both"},
    "zinb, gene-batch": {
        "dispersion": "gene-batch",
        "n_layers": 2,
        "encode_covariates": True,
        "use_batch_norm": "none",
    },
    "synchronised batch norm": {"gene_likelihood": "nb"},
}


def atlas():
    from decoder_fast.datasets import simulate_atlas

    return simulate_atlas(n_cells=202, n_genes=60, n_batches=3, n_cell_types=3, seed=0)


@contextlib.contextmanager
def without_noise():
    """Take the mean where models sample: each rank draws its own noise."""
    normal = torch.distributions.Normal
    sample = normal.rsample
    normal.rsample = lambda self, sample_shape=(): self.mean
    try:
        yield
    finally:
        normal.rsample = sample


def _trained(model, **options):
    before = {k: v.clone() for k, v in model.module.state_dict().items()}
    model.train(accelerator="cpu", enable_progress_bar=False, **options)
    unused = {k for k, p in model.module.named_parameters() if p.grad is None}
    after = {k: v.clone() for k, v in model.module.state_dict().items()}
    history = {k: v.to_numpy(float).ravel().tolist() for k, v in (model.history or {}).items()}
    return {"before": before, "after": after, "unused": unused, "history": history}


def joined(name, strategy=None):
    """Train a fused model on all cells at each step, divided among the ranks."""
    import scvi

    from decoder_fast import fuse

    adata = atlas()
    scvi.model.SCVI.setup_anndata(adata, batch_key="batch")
    scvi.settings.seed = 0
    model = fuse(scvi.model.SCVI(adata, n_hidden=16, dropout_rate=0.0, **JOINED[name]))
    options = {"max_epochs": 3, "train_size": 1.0, "batch_size": adata.n_obs}
    if strategy is not None:
        options |= {"strategy": strategy, "devices": 2, "batch_size": adata.n_obs // 2}
        options["sync_batchnorm"] = "synchronised" in name
    with without_noise():
        result = _trained(model, **options)
    z = torch.zeros(1, model.module.n_latent)
    return result | {
        "explain": str(model.module.decoder.explain(z)),
        "samples": model.get_normalized_expression(n_samples=2, library_size=1.0).shape,
        "synchronised": len(synchronised),
    }


def divided(fused, strategy):
    """Train with mini-batches of which the last is smaller, dropout, noise, batch norm."""
    import scvi

    import decoder_fast.nn as fast_nn
    from decoder_fast import fuse

    adata = atlas()
    scvi.model.SCVI.setup_anndata(adata, batch_key="batch")
    scvi.settings.seed = 0
    model = scvi.model.SCVI(adata, n_hidden=16)
    layouts, count_nll = set(), fast_nn.count_nll

    def recorded(x, *args, **kwargs):
        layouts.add(str(x.layout))
        return count_nll(x, *args, **kwargs)

    fast_nn.count_nll = recorded
    try:
        result = _trained(
            fuse(model) if fused else model,
            **{"max_epochs": 2, "batch_size": 32, "check_val_every_n_epoch": 1},
            **{"strategy": strategy, "devices": 2},
        )
    finally:
        fast_nn.count_nll = count_nll
    return result | {"layouts": layouts}


def main():
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    nn.SyncBatchNorm.forward = sync_batch_norm
    # It too refuses SyncBatchNorm on CPUs.
    DistributedDataParallel._passing_sync_batchnorm_handle = lambda *_: None
    what, folder, option = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    if what == "decoder":
        rank = int(option)
        store = torch.distributed.FileStore(str(folder / "store"), 2)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
        results = {name: decoder(name, rank) for name in DECODERS}
    else:
        results = {name: joined(name, option) for name in JOINED}
        results |= {fused: divided(fused, option) for fused in (False, True)}
        rank = int(os.environ.get("LOCAL_RANK", 0))
    torch.save(results, folder / f"rank-{rank}.pt")
    if is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
