"""``train(cuda_graph=True)``: what is replayed is the training as it would have been.

Without a GPU a stand-in takes the recorder's place: it computes the step once for its results'
addresses, undoes what that changed, and on replay computes from the same inputs into the same
results. That no step waits for the device is seen on meta tensors: they have no values.
"""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch

scvi = pytest.importorskip("scvi", reason="scvi-tools is what the bridge leads to")
lightning = pytest.importorskip("lightning", reason="it comes with scvi-tools")

from decoder_fast import backends, fuse  # noqa: E402
from decoder_fast.datasets import simulate_atlas  # noqa: E402
from decoder_fast.scvi import cuda_graph  # noqa: E402
from decoder_fast.scvi.decoder import FusedDecoderSCVI  # noqa: E402

SCVI = scvi.model.SCVI
N_CELLS, BATCH_SIZE = 200, 64  # three mini-batches of an epoch are whole, one is smaller
TRAIN = {
    "max_epochs": 6,
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "batch_size": BATCH_SIZE,
    "train_size": 1.0,
    # Learning rate and weight of the KL divergence change on the way.
    "plan_kwargs": {"n_epochs_kl_warmup": 4},
}
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch sees none")

pytestmark = [
    pytest.mark.usefixtures("quiet"),
    pytest.mark.filterwarnings("ignore:(?!cuda_graph)", "error:cuda_graph"),
]


@pytest.fixture(scope="module")
def atlas():
    return simulate_atlas(n_cells=N_CELLS, n_genes=70, n_batches=3, n_cell_types=3, seed=0)


def trained(atlas, options=None, model_options=None, **train):
    adata = atlas.copy()
    SCVI.setup_anndata(adata, batch_key="batch", labels_key="cell_type")
    scvi.settings.seed = 0
    model = fuse(SCVI(adata, **{"n_hidden": 32, **(model_options or {})}))
    plan = TRAIN["plan_kwargs"] | train.pop("plan_kwargs", {})
    model.train(**TRAIN | {"plan_kwargs": plan} | train, **(options or {}))
    return model


def tensors_of(value):
    if isinstance(value, dict):
        return [t for item in value.values() for t in tensors_of(item)]
    return [value] if isinstance(value, torch.Tensor) else []


class StandIn:
    """Takes the place of ``cuda_graph.record``."""

    def __init__(self):
        self.recordings = 0
        self.replays = 0

    def __call__(self, step):
        self.recordings += 1
        assert not torch.distributions.Distribution._validate_args  # it would wait
        graph = step.__self__
        optimizer, module = graph._optimizer, graph._loss.__self__.module
        before = copy.deepcopy((module.state_dict(), optimizer.state_dict()))
        random = torch.get_rng_state()
        result = step()
        torch.set_rng_state(random)
        module.load_state_dict(before[0])
        optimizer.load_state_dict(before[1])

        def replay():
            self.replays += 1
            kept = [p.grad for p in module.parameters()]
            optimizer.zero_grad()
            with torch.enable_grad(), cuda_graph._unvalidated():
                new = step()
            for p, grad in zip(module.parameters(), kept, strict=True):
                p.grad = grad
            for name, old in vars(result).items():
                for to, source in zip(
                    tensors_of(old), tensors_of(getattr(new, name)), strict=True
                ):
                    to.copy_(source.detach())

        return replay, result


class Adam(torch.optim.Adam):
    """Bears the name of a state on the GPU, which torch refuses on the CPU."""

    def __init__(self, *args, capturable=False, **options):
        super().__init__(*args, **options)
        for group in self.param_groups:
            group["capturable"] = capturable


@pytest.fixture
def recorder(monkeypatch):
    """Have steps recorded without a GPU."""
    stand_in = StandIn()
    monkeypatch.setattr(cuda_graph, "record", stand_in)
    monkeypatch.setattr(torch.optim, "Adam", Adam)
    for user in ("cuda_graph", "training"):
        monkeypatch.setattr(f"decoder_fast.scvi.{user}.supports_graphs", lambda device: True)
    return stand_in


def same(graphed, plain):
    for name, curve in plain.history.items():
        torch.testing.assert_close(
            torch.tensor(graphed.history[name].to_numpy(dtype=float)),
            torch.tensor(curve.to_numpy(dtype=float)),
            rtol=1e-6,
            atol=1e-6,
            msg=lambda text, name=name: f"{name}: {text}",
        )
    state = graphed.module.state_dict()
    for name, value in plain.module.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "model_options",
    [
        {},
        {"gene_likelihood": "nb", "dispersion": "gene-batch", "n_layers": 2},
        {"dispersion": "gene-cell", "use_observed_lib_size": False},
    ],
    ids=["zinb", "nb, gene-batch", "gene-cell, latent library"],
)
def test_a_replayed_training_is_the_same(atlas, recorder, model_options):
    graphed = trained(atlas, {"cuda_graph": True}, model_options)
    assert recorder.recordings == 1
    whole = TRAIN["max_epochs"] * (N_CELLS // BATCH_SIZE)
    assert recorder.replays == whole - cuda_graph.WARM_UP
    same(graphed, trained(atlas, None, model_options))
    assert all(p.grad is None for p in graphed.module.parameters())  # the recording's are gone


def test_validation_and_checks_between_steps(atlas, recorder):
    options = {"train_size": 0.8, "check_val_every_n_epoch": 1, "batch_size": 40}
    same(trained(atlas, {"cuda_graph": True}, **options), trained(atlas, **options))
    assert recorder.replays


class Losses(lightning.pytorch.Callback):
    """Keeps what each step returned."""

    def __init__(self):
        self.of_steps = []

    def on_train_batch_end(self, trainer, plan, outputs, batch, batch_idx):
        self.of_steps.append(outputs["loss"])


def test_losses_that_callbacks_keep(atlas, recorder):
    losses = Losses(), Losses()
    validates = torch.distributions.Distribution._validate_args
    trained(atlas, {"cuda_graph": True}, callbacks=[losses[0]])
    trained(atlas, callbacks=[losses[1]])
    torch.testing.assert_close(*(torch.stack(callback.of_steps) for callback in losses))
    assert torch.distributions.Distribution._validate_args == validates


def test_another_learning_rate_is_recorded_anew(atlas, recorder):
    options = {
        "train_size": 0.7,
        "check_val_every_n_epoch": 1,
        "plan_kwargs": {"reduce_lr_on_plateau": True, "lr_patience": 0, "lr_threshold": 1e9},
    }
    graphed = trained(atlas, {"cuda_graph": True}, **options)
    assert recorder.recordings > 2
    same(graphed, trained(atlas, **options))


def test_counts_in_another_form(atlas, recorder):
    dense = atlas.copy()
    dense.X = atlas.X.toarray()
    same(trained(dense, {"cuda_graph": True}), trained(dense))
    assert recorder.replays


class Owner:
    """A plan's part: sums what a linear layer makes of the counts."""

    def __init__(self):
        self.module = torch.nn.Linear(5, 1)
        self.calls = 0

    def loss(self, batch, options):
        self.calls += 1
        assert batch["X"].layout is torch.strided
        assert batch["labels"] is None and batch.get("n", 3) == 3
        loss = options["weight"] * self.module(batch["X"]).sum()
        return scvi.module.base.LossOutput(loss=loss, n_obs_minibatch=len(batch["X"]))


@pytest.mark.parametrize("layout", ["dense", "csr"])
def test_batches_of_a_data_module(recorder, layout, monkeypatch):
    """CSR tensors, parts that are missing or no tensors, and a weight that is a Python number."""
    torch.manual_seed(0)
    owner = Owner()
    plain = copy.deepcopy(owner)
    adam = [torch.optim.Adam(o.module.parameters(), lr=0.1) for o in (owner, plain)]
    graph = cuda_graph.StepGraph(owner.loss, adam[0])
    for i in range(cuda_graph.WARM_UP + 4):
        x = torch.poisson(torch.full((4, 5), 0.7))
        options = {"weight": 1.0 + i}
        handed = x.to_sparse_csr() if layout == "csr" else x
        with monkeypatch.context() as patch:
            if recorder.recordings:  # such a copy from the host would wait
                patch.setattr(torch, "tensor", None)
            output = graph({"X": handed, "labels": None, "n": 3}, dict(options))
        # The last step before the recording runs as it will: that compiles its kernels.
        assert (output is None) == (i < cuda_graph.WARM_UP - 1)
        assert owner.calls == max(0, i + 2 - cuda_graph.WARM_UP) + recorder.recordings
        expected = plain.loss({"X": x, "labels": None}, options)
        adam[1].zero_grad()
        expected.loss.backward()
        adam[1].step()
        if output is None:  # as usual then
            owner.module.load_state_dict(plain.module.state_dict())
            adam[0].load_state_dict(copy.deepcopy(adam[1].state_dict()))
        else:
            torch.testing.assert_close(output.loss, expected.loss.detach())
        for mine, theirs in zip(
            owner.module.parameters(), plain.module.parameters(), strict=True
        ):
            torch.testing.assert_close(mine, theirs)
    assert recorder.replays == 4


def test_a_recording_that_fails(atlas, recorder, monkeypatch):
    def fails(step):
        step()  # half of it is done
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(cuda_graph, "record", lambda step: fails(lambda: None))
    with pytest.warns(UserWarning, match="cannot be recorded .operation not permitted") as warned:
        graphed = trained(atlas, {"cuda_graph": True})
    assert sum("cannot be recorded" in str(w.message) for w in warned) == 1
    same(graphed, trained(atlas))


def test_a_recording_that_fails_leaves_generator_and_allocator_as_they_were(monkeypatch):
    class Generator:
        state = "usual"

        def clone_state(self):
            return self.state

        def graphsafe_set_state(self, state):
            self.state = state

    def fails():
        generator.state = "recording"
        raise RuntimeError("not permitted")

    generator = Generator()
    assert all(hasattr(torch.Generator, name) for name in vars(Generator) if name[0] in "cg")
    monkeypatch.setattr(torch.cuda, "default_generators", (None, generator))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
    ended = []
    end = "_cuda_endAllocateToPool"
    monkeypatch.setattr(torch._C, end, lambda *pool: ended.append(pool), raising=False)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: contextlib.nullcontext())
    with pytest.raises(RuntimeError, match="not permitted"):
        cuda_graph.record(fails)
    assert generator.state == "usual" and ended == [(1, (0, 7))]


def test_the_weight_is_copied_from_the_host_once_an_epoch(atlas, recorder, monkeypatch):
    made = []
    stock = scvi.train.TrainingPlan.kl_weight.fget
    counted = property(lambda plan: made.append(0) or stock(plan))
    monkeypatch.setattr(scvi.train.TrainingPlan, "kl_weight", counted)
    trained(atlas, {"cuda_graph": True})
    assert len(made) <= 1 + TRAIN["max_epochs"]


def test_a_weight_that_changes_at_every_step(atlas, recorder):
    options = {"plan_kwargs": {"n_epochs_kl_warmup": None, "n_steps_kl_warmup": 20}}
    same(trained(atlas, {"cuda_graph": True}, **options), trained(atlas, **options))
    assert recorder.replays


class OwnPlan(scvi.train.TrainingPlan):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("train", "reason"),
    [
        ({"gradient_clip_val": 1.0}, "clips gradients"),
        ({"accumulate_grad_batches": 2}, "accumulates gradients of 2 mini-batches"),
        ({"precision": "bf16-mixed"}, "precision 32-true, and the trainer has bf16-mixed"),
        ({"model_options": {"gene_likelihood": "normal"}}, "'normal' has no fused kernel"),
        ({"plan": OwnPlan}, "OwnPlan has a training_step of its own"),
        ({"plan_kwargs": {"compile": True}}, "the module was compiled"),
        (
            {
                "plan_kwargs": {
                    "optimizer": "Custom",
                    "optimizer_creator": lambda p: torch.optim.SGD(p, lr=1e-4),
                }
            },
            "does not keep its state on the GPU",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_reasons_against_it(atlas, recorder, monkeypatch, train, reason):
    train = dict(train)
    if "plan" in train:
        monkeypatch.setattr(SCVI, "_training_plan_cls", train.pop("plan"))
    if train.get("plan_kwargs", {}).get("compile"):
        monkeypatch.setattr(torch, "compile", lambda module, **_: Compiled(module))
    with pytest.warns(UserWarning, match=f"cuda_graph=True has no effect: .*{reason}"):
        trained(atlas, {"cuda_graph": True}, max_epochs=1, **train)
    assert recorder.recordings == 0


def test_a_loss_in_plain_pytorch_is_a_reason_against_it(atlas, recorder, monkeypatch):
    monkeypatch.setattr(FusedDecoderSCVI, "_unfused_heads", lambda self: "px_r_decoder has hooks")
    with pytest.warns(UserWarning, match="no effect: its loss runs in plain PyTorch.*has hooks"):
        trained(atlas, {"cuda_graph": True}, max_epochs=1)
    assert recorder.recordings == 0


class Compiled(torch.nn.Module):
    """What stands in for a compiled module."""

    def __init__(self, module):
        super().__init__()
        self._orig_mod = module

    def __getattr__(self, name):
        if name == "_orig_mod":
            return super().__getattr__(name)
        return getattr(self._orig_mod, name)

    def forward(self, *args, **kwargs):
        return self._orig_mod(*args, **kwargs)


def test_on_the_cpu_it_has_no_effect(atlas):
    with pytest.warns(UserWarning, match="has no effect: CUDA graphs are for NVIDIA GPUs.*'cpu'"):
        trained(atlas, {"cuda_graph": True}, max_epochs=1)


def test_another_kind_of_plan(atlas, monkeypatch):
    class Plan:
        def __init__(self, *args, **kwargs):
            raise RuntimeError("as far as this")

    monkeypatch.setattr(SCVI, "_training_plan_cls", Plan)
    with (
        pytest.warns(UserWarning, match="training plan of SCVI is not"),
        pytest.raises(RuntimeError, match="as far as this"),
    ):
        trained(atlas, {"cuda_graph": True})


@pytest.fixture
def on_meta(monkeypatch):
    """Take the Triton kernels' launchers for meta tensors, and launch nothing."""
    pytest.importorskip("triton", reason="the kernels of GPUs are Triton's")
    launched = []
    reason = backends._triton_reason
    monkeypatch.setitem(
        backends._REASONS,
        "triton",
        lambda operation, device, *args: (
            reason(operation, torch.device("cpu"), *args[:-1], True)
            if device.type == "meta"
            else reason(operation, device, *args)
        ),
    )
    for operation in ("covariate_linear", "softmax_library", "count_nll"):
        kernels = backends.implementation(operation, "triton")
        monkeypatch.setattr(
            kernels, "launch", lambda kernel, *_, **__: launched.append(kernel.__name__)
        )
    # On a GPU an assertion that nothing waits for; on meta tensors it would be a question.
    monkeypatch.setattr("decoder_fast.scvi.lazy.check_labels", lambda *_: None)
    for operation in ("covariate_linear", "count_nll"):
        monkeypatch.setattr(f"decoder_fast.ops.{operation}.check_labels", lambda *_: None)
        monkeypatch.setattr(
            f"decoder_fast.ops.{operation}.no_autocast", lambda _: contextlib.nullcontext()
        )
    backends._choose.cache_clear()
    yield launched
    backends._choose.cache_clear()


@pytest.mark.parametrize(
    "model_options",
    [
        {},
        {"gene_likelihood": "nb", "dispersion": "gene-batch", "n_layers": 2},
        {"dispersion": "gene-cell", "use_observed_lib_size": False},
        {"encode_covariates": True, "deeply_inject_covariates": True, "use_layer_norm": "both"},
        {"dispersion": "gene-label", "latent_distribution": "ln"},
    ],
    ids=["zinb", "nb, gene-batch", "gene-cell, latent library", "covariates", "gene-label"],
)
def test_no_step_waits_for_the_device(atlas, on_meta, model_options):
    adata = atlas.copy()
    SCVI.setup_anndata(adata, batch_key="batch", labels_key="cell_type")
    model = fuse(SCVI(adata, **{"n_hidden": 32, **model_options}))
    batch = {k: v.to("meta") for k, v in next(iter(model._make_data_loader(adata))).items()}
    module = model.module.to("meta").train()
    with cuda_graph._unvalidated():
        output = module(batch, loss_kwargs={"kl_weight": torch.ones((), device="meta")})[2]
        output.loss.backward()
    assert on_meta
    assert all(p.grad is not None for p in module.decoder.px_decoder.parameters())
    # It would have been seen: this waits.
    with pytest.raises((RuntimeError, NotImplementedError)):
        output.loss.item()


@on_gpu
@pytest.mark.parametrize("likelihood", ["zinb", "nb"])
def test_on_a_gpu(atlas, likelihood):
    options = {"accelerator": "gpu"}
    graphed = trained(
        atlas, {"cuda_graph": True}, {"gene_likelihood": likelihood}, max_epochs=20, **options
    )
    plain = trained(atlas, None, {"gene_likelihood": likelihood}, max_epochs=20, **options)
    ends = [m.history["elbo_train"].iloc[-1].item() for m in (graphed, plain)]
    assert abs(ends[0] / ends[1] - 1) < 0.02, ends
