"""Many devices: two processes that divide the cells get what one gets from all of them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
import torch
from torch import nn

from decoder_fast import DecoderSCVI, FCLayers

TIMEOUT = 180  # seconds; they take about 20
DOCUMENTED = "ddp_find_unused_parameters_true"  # what scvi-tools documents
FORKING = "ddp_notebook_find_unused_parameters_true"  # and for notebooks

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="torch is built without gloo",
)


class Job:
    """Processes of ``ranks.py``, and what their ranks saved."""

    def __init__(self, folder: Path, *commands: tuple[object, ...]) -> None:
        self.folder = folder
        self.log = folder / "log"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
        with self.log.open("w") as log:
            self.processes = [
                subprocess.Popen(
                    [sys.executable, ranks.__file__, *map(str, command)],
                    **{"stdout": log, "stderr": log, "env": environment, "cwd": folder},
                    start_new_session=True,
                )
                for command in commands
            ]

    def results(self) -> list[dict]:
        """Wait; fail with what they printed if one failed, or if they hang."""
        try:
            codes = [process.wait(timeout=TIMEOUT) for process in self.processes]
        except subprocess.TimeoutExpired:
            self.end(signal.SIGABRT)  # each says where it hangs
            self.end()
            pytest.fail(f"two ranks hang for {TIMEOUT} s, and printed:\n{self.log.read_text()}")
        self.end()
        assert codes == [0] * len(codes), self.log.read_text()
        files = sorted(self.folder.glob("rank-*.pt"))
        return [torch.load(file, weights_only=False) for file in files]

    def end(self, how: signal.Signals = signal.SIGKILL) -> None:
        """End the processes, and all that they have started."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, how)
            process.wait()


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """All jobs at once: they mostly wait for imports."""

    def job(*commands):
        folder = tmp_path_factory.mktemp("ranks")
        return Job(folder, *((what, folder, option) for what, option in commands))

    jobs = {"decoder": job(("decoder", 0), ("decoder", 1))}
    try:
        import scvi  # noqa: F401
    except ImportError:
        pass
    else:
        jobs |= {strategy: job(("models", strategy)) for strategy in (DOCUMENTED, FORKING)}
    yield jobs
    for running in jobs.values():
        running.end()


@pytest.fixture(scope="module")
def decoders(jobs):
    return jobs["decoder"].results()


@pytest.fixture(scope="module")
def models(jobs):
    pytest.importorskip("scvi", reason="scvi-tools is what the bridge leads to")
    results = {strategy: jobs[strategy].results() for strategy in (DOCUMENTED, FORKING)}
    assert len(results[DOCUMENTED]) == 2 and len(results[FORKING]) == 1
    return results


def assert_near(a, b, tolerance=1e-5):
    """Equal, relative to the norm of a whole tensor or to 1: the smallest are rounding alone."""
    assert a.keys() == b.keys()
    for name in a:
        if a[name] is None:
            assert b[name] is None, name
        else:
            x, y = a[name].double(), b[name].double()
            assert (x - y).norm() <= tolerance * x.norm().clamp(min=1), name


# --- DistributedDataParallel by hand -------------------------------------------------------------


@pytest.mark.parametrize("name", ranks.DECODERS)
def test_gradients_of_a_decoder(decoders, name):
    expected = ranks.decoder(name)
    first, second = (rank[name] for rank in decoders)
    mean = [(a + b) / 2 for a, b in zip(first["losses"], second["losses"], strict=True)]
    assert mean == pytest.approx(expected["losses"], rel=1e-6)
    for rank in (first, second):
        assert_near(expected["gradients"], rank["gradients"])
        assert_near(expected["buffers"], rank["buffers"])
    unused = {k for k, grad in first["gradients"].items() if grad is None}
    heads = {"decoder.px_r_decoder": "gene-cell", "decoder.px_dropout_decoder": "zinb"}
    said = ranks.DECODERS[name][1].values()
    assert unused == {
        f"{head}.{kind}"
        for head, user in heads.items()
        for kind in ("weight", "bias")
        if user not in said
    }


# --- scvi-tools' models --------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", [DOCUMENTED, FORKING])
@pytest.mark.parametrize("name", ranks.JOINED)
def test_two_ranks_train_as_one_on_all_cells(models, quiet, name, strategy):
    expected = ranks.joined(name)
    for rank in models[strategy]:
        got = rank[name]
        assert_near(expected["before"], got["before"], 0)
        assert_near(expected["after"], got["after"], 1e-4)  # Adam divides by small numbers
        assert got["samples"] == expected["samples"]
    history = models[strategy][0][name]["history"]
    for loss in ("elbo_train", "reconstruction_loss_train", "kl_local_train"):
        assert history[loss] == pytest.approx(expected["history"][loss], rel=1e-4)


@pytest.mark.parametrize("strategy", [DOCUMENTED, FORKING])
def test_heads_without_gradients_stay_as_they_are(models, strategy):
    """Zeros for a gradient would let Adam's weight decay move them."""
    for rank in models[strategy]:
        for name, heads in {"nb": ("r", "dropout"), "zinb, gene-batch": ("r",)}.items():
            result = rank[name]
            for head in heads:
                key = f"decoder.px_{head}_decoder.weight"
                assert torch.equal(result["before"][key], result["after"][key])
                assert strategy == FORKING or key in result["unused"]
            key = "decoder.px_scale_decoder.0.weight"
            assert not torch.equal(result["before"][key], result["after"][key])


@pytest.mark.parametrize("strategy", [DOCUMENTED, FORKING])
def test_mini_batches_divided_as_stock_divides_them(models, strategy):
    """Noise, dropout, each rank's own batch norm, a smaller last mini-batch, validation."""
    stock, ours = (models[strategy][0][fused] for fused in (False, True))
    assert_near(stock["after"], ours["after"], 1e-4)
    assert stock["history"].keys() == ours["history"].keys()
    for name in ("elbo_train", "elbo_validation"):
        assert ours["history"][name] == pytest.approx(stock["history"][name], rel=1e-4)


def test_ranks_agree(models):
    first, second = models[DOCUMENTED]
    for name in ranks.JOINED:
        assert_near(first[name]["after"], second[name]["after"], 0)
    for rank in (first, second):
        assert rank[True]["layouts"] == {"torch.sparse_csr"}  # as with one device
        assert rank[False]["layouts"] == set()


# --- synchronised batch norm ---------------------------------------------------------------------


def test_synchronised_statistics_are_the_modules_own(decoders, models):
    """Encoder and decoder, in each step of each rank; that the result is right, others test."""
    for rank in models[DOCUMENTED]:
        assert rank["nb"]["synchronised"] == 0
        # 3 epochs; what comes afterwards is no training.
        assert rank["synchronised batch norm"]["synchronised"] == 3 * 2
        # Lightning has taken it back after training, and left a batch norm of a class of its own.
        assert "SyncBatchNorm" not in rank["synchronised batch norm"]["explain"]
        assert "eager" not in rank["synchronised batch norm"]["explain"]


def layers_pair(**options):
    torch.manual_seed(0)
    plain = FCLayers(4, 8, n_cat_list=[5, 3], n_cont=2, n_layers=2, n_hidden=8, **options)
    synchronised = FCLayers(4, 8, n_cat_list=[5, 3], n_cont=2, n_layers=2, n_hidden=8, **options)
    synchronised.load_state_dict(plain.state_dict())
    return plain, nn.SyncBatchNorm.convert_sync_batchnorm(synchronised)


@pytest.mark.parametrize("shape", [(12, 4), (3, 12, 4)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_sync_batch_norm_falls_back_with_a_reason(monkeypatch, shape, training):
    """Where there is one process, it is batch norm; and covariates are looked up even so."""
    plain, synchronised = (layers.train(training) for layers in layers_pair(dropout_rate=0.0))
    assert plain.unfused_reason() is None
    assert "SyncBatchNorm" in synchronised.unfused_reason()
    x, cont = torch.randn(*shape), torch.randn(12, 2)
    cats = torch.randint(0, 5, (12, 1)), torch.softmax(torch.randn(12, 3), -1)
    called = []
    forward = nn.SyncBatchNorm.forward
    monkeypatch.setattr(
        nn.SyncBatchNorm, "forward", lambda self, x: (called.append(self), forward(self, x))[1]
    )
    monkeypatch.setattr(nn.functional, "one_hot", None)
    outputs = []
    for layers in (plain, synchronised):
        out = layers(x, *cats, cont=cont)
        (out * torch.linspace(-1, 1, 8)).sum().backward()
        outputs.append(out)
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    assert len(called) == 2 * (len(x) if x.dim() == 3 else 1)
    assert_near(dict(plain.named_buffers()), dict(synchronised.named_buffers()))
    assert_near(
        {k: p.grad for k, p in plain.named_parameters()},
        {k: p.grad for k, p in synchronised.named_parameters()},
    )


def test_explain_names_sync_batch_norm():
    decoder = nn.SyncBatchNorm.convert_sync_batchnorm(DecoderSCVI(4, 6, use_batch_norm=True))
    hidden, *others = decoder.explain(torch.zeros(3, 4))
    assert hidden[1].backend == "eager" and "SyncBatchNorm" in str(hidden[1])
    assert all(choice.backend != "eager" for _, choice in others)


def test_a_batch_norm_of_another_class_is_fused():
    """What Lightning's ``sync_batchnorm`` leaves behind; those for images are refused."""
    plain, other = layers_pair()
    for sequence in other.fc_layers:
        sequence[1].__class__ = type("Renamed", (nn.modules.batchnorm._BatchNorm,), {})
    assert other.unfused_reason() is None
    x, cats = torch.randn(12, 4), (torch.randint(0, 5, (12, 1)), torch.zeros(12, 1).long())
    torch.manual_seed(1)
    expected = plain(x, *cats, cont=torch.zeros(12, 2))
    torch.manual_seed(1)
    assert torch.equal(other(x, *cats, cont=torch.zeros(12, 2)), expected)
    plain.fc_layers[1][1] = nn.BatchNorm2d(8)
    assert "BatchNorm2d" in plain.unfused_reason()
