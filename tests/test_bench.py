"""The benchmarks: that they compare with what scvi-tools computes, and run on a GPU's day."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import stock as plain
from decoder_fast import DecoderSCVI

ROOT = Path(__file__).parent.parent


def test_without_a_gpu_it_says_what_to_do():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "no GPU" in done.stderr and "--device cpu --quick" in done.stderr


def test_the_rehearsal_measures_everything(tmp_path, monkeypatch):
    """Every line of the GPU script but those that CUDA itself runs, on tiny shapes."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = [sys.executable, "-m", "bench.gpu", "--device", "cpu", "--quick", "--out", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (file,) = tmp_path.glob("*.json")
    result = json.loads(file.read_text())
    parts = {row["part"] for row in result["rows"]}
    measured = {"count_nll", "softmax_library", "covariate_linear", "decoder and likelihood"}
    assert measured | {"training step"} <= parts
    assert set(result["peaks"]) == {"copy", "fp32", "tf32", "bf16"}
    for row in result["rows"]:
        assert row["wrong"] == []
        for times in row["times"].values():
            assert times["both" if "both" in times else "forward"] > 0
    text = file.with_suffix(".md").read_text()
    assert all(f"## {part}" in text for part in parts)


@pytest.mark.parametrize("likelihood", ["nb", "zinb", "poisson"])
def test_the_plain_formulas_are_those_of_scvi_tools(likelihood):
    pytest.importorskip("scvi", reason="scvi-tools is not installed")
    torch.manual_seed(0)
    x = torch.poisson(torch.rand(20, 30) * 3)
    rate, theta, dropout = torch.rand(20, 30) * 5 + 0.01, torch.rand(30) + 0.1, torch.randn(20, 30)
    args = (likelihood, x, rate, theta, dropout)
    torch.testing.assert_close(plain.loss(*args), plain.checked_loss(*args))


@pytest.mark.parametrize("samples", [(), (2,)])
@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("inject_covariates", [True, False])
def test_the_plain_decoder_is_that_of_scvi_tools(samples, norm, inject_covariates):
    nn = pytest.importorskip("scvi.nn", reason="scvi-tools is not installed")
    options = {
        "n_cat_list": [3],
        "n_layers": 2,
        "n_hidden": 16,
        "inject_covariates": inject_covariates,
        "use_batch_norm": norm == "batch",
        "use_layer_norm": norm == "layer",
    }
    stock, ours = nn.DecoderSCVI(5, 30, **options), DecoderSCVI(5, 30, **options)
    ours.load_state_dict(stock.state_dict())
    z, library = torch.randn(*samples, 12, 5), torch.randn(12, 1)
    batch = torch.randint(3, (12, 1))
    _, _, rate, dropout = stock("gene", z, library, batch)
    torch.testing.assert_close(plain.decode(ours, z, library, batch), (rate, dropout))
