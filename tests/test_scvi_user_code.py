"""What code of users may do with a fused model and its lazy tensors: stock's answer or an error."""

from __future__ import annotations

import abc
import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

scvi = pytest.importorskip("scvi", reason="the models are those of scvi-tools")

import lightning.pytorch as pl  # noqa: E402

from decoder_fast import fuse  # noqa: E402
from decoder_fast.datasets import simulate_atlas  # noqa: E402
from decoder_fast.scvi.lazy import LazyCounts, LazyOneHots, LazyTensor  # noqa: E402

SCVI = scvi.model.SCVI
N, G = 90, 40

pytestmark = [
    pytest.mark.usefixtures("quiet"),
    pytest.mark.filterwarnings("ignore"),  # of scvi-tools' advice on tiny data
]


@pytest.fixture(scope="module")
def atlas():
    return simulate_atlas(n_cells=N, n_genes=G, n_batches=3, n_cell_types=2, seed=0)


@pytest.fixture
def pair(atlas):
    """Twins, stock and fused, in evaluation mode."""
    models = []
    for change in (lambda model: model, fuse):
        adata = atlas.copy()
        SCVI.setup_anndata(adata, batch_key="batch")
        scvi.settings.seed = 0
        models.append(change(SCVI(adata, n_hidden=16)))
        models[-1].module.eval()
        models[-1].is_trained_ = True
    return models


def train(model, **options):
    scvi.settings.seed = 0
    model.is_trained_ = False  # else scvi-tools looks for the history of the training before
    quiet = {"accelerator": "cpu", "enable_progress_bar": False}
    model.train(max_epochs=2, batch_size=32, **quiet, **options)
    return model


def first_batch(model):
    return next(iter(model._make_data_loader(model.adata, batch_size=32)))


def both(pair, ask, **kwargs):
    answers = []
    for model in pair:
        torch.manual_seed(0)
        answers.append(ask(model))
    torch.testing.assert_close(answers[1], answers[0], **{"rtol": 1e-5, "atol": 1e-5, **kwargs})
    return answers


def scale_of(model):
    batch = torch.zeros(1, 1, dtype=torch.long)

    def scale(z: Tensor) -> Tensor:
        return model.module.generative(z=z, library=torch.ones(1, 1), batch_index=batch)["px"].scale

    return scale


# --- changes in place --------------------------------------------------------------------------


class Clip(pl.Callback):
    """Cap the counts before each step."""

    def on_train_batch_start(self, trainer, module, batch, index):
        batch["X"].clamp_(max=1)


@pytest.mark.parametrize("compiled", [False, True])
def test_counts_changed_before_a_step(pair, compiled):
    options = {"compile": True, "compile_kwargs": {"backend": "eager"}} if compiled else {}
    histories = [
        train(model, callbacks=[Clip()], plan_kwargs=options).history["elbo_train"].to_numpy()
        for model in pair
    ]
    unchanged = train(copy.deepcopy(pair[1])).history["elbo_train"].to_numpy()
    np.testing.assert_allclose(histories[1].astype(float), histories[0].astype(float), rtol=1e-4)
    assert abs(float(unchanged[0, 0]) / float(histories[0][0, 0]) - 1) > 0.05


def test_counts_masked_in_place(pair):
    def ask(model):
        tensors = first_batch(model)
        tensors["X"][:, :20] = 0
        return model.module.inference(tensors["X"], tensors["batch"])["qz"].loc

    both(pair, ask)


@pytest.mark.parametrize("inference", [False, True])
def test_parameters_changed_in_place(pair, inference):
    def ask(model):
        with torch.inference_mode(inference):
            tensors = first_batch(model)
            px = model.module(tensors, compute_loss=False)[1]["px"]
            px.mu[:, :20] = 1e-3
            first = px.log_prob(tensors["X"]).sum(-1)
            px = model.module(tensors, compute_loss=False)[1]["px"]
            px.zi_logits.clamp_(min=0.1)
            return first, px.log_prob(tensors["X"]).sum(-1)

    both(pair, ask, atol=1e-3)


def test_gradient_of_a_parameter(pair):
    def ask(model):
        tensors = first_batch(model)
        px = model.module(tensors, compute_loss=False)[1]["px"]
        px.mu.retain_grad()
        px.log_prob(tensors["X"]).sum(-1).sum().backward()
        return px.mu.grad

    both(pair, ask, rtol=1e-4)


def test_gradient_of_the_counts(pair):
    def to_latent(model):
        tensors = first_batch(model)
        tensors["X"].requires_grad_()
        model.module.inference(tensors["X"], tensors["batch"])["qz"].loc.sum().backward()
        return tensors["X"].grad

    def to_loss(model):
        tensors = first_batch(model)
        tensors["X"] = tensors["X"].clone().requires_grad_()
        model.module(tensors)[2].loss.backward()
        return tensors["X"].grad

    both(pair, to_latent)
    both(pair, to_loss)


def test_log_prob_of_booleans(pair):
    def ask(model):
        tensors = first_batch(model)
        px = model.module(tensors, compute_loss=False)[1]["px"]
        return px.log_prob(tensors["X"] > 0).sum(-1)

    both(pair, ask, atol=1e-3)


def test_one_hots_changed_in_place():
    labels = torch.tensor([0, 2, 1])
    with LazyOneHots():
        lazy = F.one_hot(labels, 3)
        lazy[:, 0] = 0
        out = F.linear(lazy.float(), torch.ones(1, 3))
    assert isinstance(lazy, LazyTensor)
    assert out.tolist() == [[0], [1], [1]]


def test_arguments_by_name(atlas):
    csr = torch.sparse_csr_tensor(
        *map(torch.as_tensor, (atlas.X.indptr, atlas.X.indices, atlas.X.data)), size=atlas.X.shape
    )
    lazy, dense = LazyCounts.of(csr), csr.to_dense()
    weight = torch.randn(3, G)
    torch.testing.assert_close(F.linear(input=lazy, weight=weight), F.linear(dense, weight))
    torch.testing.assert_close(torch.sum(input=lazy, dim=1), dense.sum(1))
    assert torch.equal(torch.cat(tensors=[lazy, dense], dim=1), torch.cat([dense, dense], 1))
    assert [t.shape[0] for t in torch.split(tensor=lazy, split_size_or_sections=50)] == [50, 40]


# --- derivatives -------------------------------------------------------------------------------


def test_second_derivatives_are_refused_however_they_are_asked_for(pair):
    ours = scale_of(pair[1])
    z = torch.ones(1, 10)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.functional.jvp(ours, z, z)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.functional.hessian(lambda z: ours(z)[0, 3], z)
    z.requires_grad_()
    y = ours(z)[0, 3]
    (d,) = torch.autograd.grad(y, z, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(
            y + d.pow(2).sum(), pair[1].module.decoder.px_scale_decoder[0].weight
        )
    # A first derivative is stock's, also where it could be differentiated again.
    both(pair, lambda m: torch.autograd.functional.jacobian(scale_of(m), torch.ones(1, 10)))
    torch.testing.assert_close(d, torch.autograd.grad(ours(z)[0, 3], z)[0])


# --- copies ------------------------------------------------------------------------------------


def test_pickle_of_a_trained_model(pair):
    def ask(model):
        again = pickle.loads(pickle.dumps(train(model)))  # with its trainer and training plan
        before = torch.tensor(again.history["elbo_train"].to_numpy(dtype=float))
        torch.manual_seed(0)
        assert (type(again.module) is type(model.module)) and again.module is not model.module
        expression = torch.tensor(again.get_normalized_expression(n_samples=2).to_numpy())
        train(again)
        return before, expression

    both(pair, ask, rtol=1e-4)


class AbstractPlan(scvi.train.TrainingPlan, abc.ABC):
    """Of a metaclass of its own."""


@pytest.mark.parametrize("stock_plan", [scvi.train.TrainingPlan, AbstractPlan])
def test_processes_that_are_spawned_get_the_training_plan(pair, monkeypatch, stock_plan):
    """The strategies ``ddp_spawn...`` pickle the model as it is while ``train`` runs."""
    monkeypatch.setattr(SCVI, "_training_plan_cls", stock_plan)
    pickled = []

    class Pickle(pl.Callback):
        def on_train_start(self, trainer, plan):
            model = pickle.loads(pickle.dumps(pair[1]))
            pickled.append((vars(model)["_training_plan_cls"], type(plan)))

    train(pair[1], callbacks=[Pickle()])
    ((kind, same),) = pickled
    assert kind is same and issubclass(kind, stock_plan) and kind is not stock_plan


@pytest.mark.parametrize("copied", [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy])
def test_copies_of_methods(pair, copied):
    def ask(model):
        method = copied(model.get_normalized_expression)
        torch.manual_seed(0)
        return torch.tensor(method(n_samples=2).to_numpy())

    both(pair, ask)
    again = copied(pair[1].train)
    assert again.__wrapped__.__self__ is not pair[1]
    train(again.__wrapped__.__self__)
    assert not hasattr(pair[1], "history_") or pair[1].history_ is None


# --- loaders, and models without a module ------------------------------------------------------


@pytest.mark.parametrize("option", ["iter_ndarray", "load_sparse_tensor"])
def test_loaders_that_are_asked_for_something_else(pair, option):
    stock, ours = (
        next(iter(m._make_data_loader(m.adata, batch_size=32, **{option: True})))["X"]
        for m in pair
    )
    assert type(stock) is type(ours)
    if option == "load_sparse_tensor":
        assert stock.layout == ours.layout == torch.sparse_csr


def test_a_model_without_a_module():
    with pytest.raises(ValueError, match="fuse it afterwards"):
        fuse(SCVI())


# --- inference mode, hooks, parts of the user's own ----------------------------------------------


@pytest.mark.parametrize("grad", [True, False])
def test_samples_outside_of_inference_mode(pair, grad):
    """scvi-tools samples in inference mode, whatever the parameters were made in."""

    def ask(model):
        batch = torch.zeros(4, 1, dtype=torch.long)
        with torch.set_grad_enabled(grad):
            px = model.module.generative(
                z=torch.ones(4, 10), library=torch.full((4, 1), 4.0), batch_index=batch
            )["px"]
        sample = px.sample()
        assert px.mu.requires_grad is grad
        if grad:
            px.mu.sum().backward()
        return sample

    both(pair, ask, atol=1.0)  # of a sample may be another by a rounding


def test_values_read_in_inference_mode_before_the_loss(pair):
    def ask(model):
        tensors = first_batch(model)
        with torch.inference_mode():
            total = tensors["X"].sum()
        _, outputs, losses = model.module(tensors)
        with torch.inference_mode():
            total = total + outputs["px"].mean.sum()
        losses.loss.backward()
        return total, model.module.decoder.px_scale_decoder[0].weight.grad.clone()

    both(pair, ask, rtol=1e-4, atol=1e-3)


def test_counts_in_float64(pair):
    def ask(model):
        tensors = first_batch(model)
        px = model.module(tensors)[1]["px"]
        return px.log_prob(tensors["X"].double()).sum(-1)

    assert both(pair, ask, rtol=1e-4)[1].dtype == torch.float64


@pytest.mark.parametrize("change", ["data", "numpy"])
def test_counts_changed_unseen_by_torch(pair, change):
    """No trace of it is left in the tensor's version."""

    def ask(model):
        tensors = first_batch(model)
        x = tensors["X"]
        if change == "data":
            x.data.clamp_(max=1)
        else:
            np.minimum(x.numpy(), 1, out=x.numpy())
        _, outputs, losses = model.module(tensors)
        return losses.loss, -outputs["px"].log_prob(x).sum(-1)

    both(pair, ask, rtol=1e-4)


@pytest.mark.parametrize("hook", ["full_backward_hook", "full_backward_pre_hook", "global"])
def test_backward_hooks_of_the_decoder(pair, hook):
    def ask(model):
        decoder, seen = model.module.decoder, []

        def note(module, *gradients):
            if module is decoder:
                seen.extend(g.clone() for g in gradients[-1] if g is not None)

        if hook == "global":
            handle = torch.nn.modules.module.register_module_full_backward_hook(note)
        else:
            handle = getattr(decoder, f"register_{hook}")(note)
        try:
            model.module(first_batch(model))[2].loss.backward()
        finally:
            handle.remove()
        assert seen
        return seen

    both(pair, ask, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("part", ["head", "batch norm"])
def test_forward_methods_of_the_users_own(pair, part):
    def ask(model):
        decoder = model.module.decoder
        if part == "head":
            head = decoder.px_dropout_decoder
            head.forward = lambda x: F.linear(x, head.weight, head.bias) + 3
        else:
            norm = decoder.px_decoder.fc_layers[0][1]
            norm.forward = lambda x: x + 1
        return model.module(first_batch(model))[2].loss

    with_it = both(pair, ask, rtol=1e-4)[0]
    part_of = {"head": "px_dropout_decoder", "batch norm": "px_decoder.fc_layers.0.1"}[part]
    stock = pair[0].module.decoder
    del stock.get_submodule(part_of.replace("fc_layers.0", "fc_layers.Layer 0")).forward
    torch.manual_seed(0)
    assert abs(pair[0].module(first_batch(pair[0]))[2].loss - with_it) > 1e-2 * with_it


def test_batch_norm_that_no_longer_tracks(pair):
    def ask(model):
        norm = model.module.decoder.px_decoder.fc_layers[0][1]
        norm.track_running_stats = False
        model.module.train()
        loss = model.module(first_batch(model))[2].loss
        return loss, norm.running_mean.clone(), norm.num_batches_tracked.clone()

    both(pair, ask, rtol=1e-4)


def test_a_log_of_the_users_own(atlas):
    """It is told of the metrics at every step."""
    calls = []

    class Plan(scvi.train.TrainingPlan):
        def log_dict(self, *args, **kwargs):
            calls.append(self.trainer.training)
            super().log_dict(*args, **kwargs)

    counted = []
    for change in (lambda model: model, fuse):
        adata = atlas.copy()
        SCVI.setup_anndata(adata, batch_key="batch")
        model = change(SCVI(adata))
        model._training_plan_cls = Plan
        calls.clear()
        train(model)
        counted.append(len(calls))
    assert counted[0] == counted[1] > 4


def keep_few_genes(batch):
    tensors = {key: torch.as_tensor(value) for key, value in batch.items()}
    tensors["X"][:, :30] = 0
    return tensors


def test_a_collate_function_of_the_users_own(pair):
    histories = [
        train(model, datasplitter_kwargs={"collate_fn": keep_few_genes}).history["elbo_train"]
        for model in pair
    ]
    stock, ours = (history.to_numpy().astype(float) for history in histories)
    np.testing.assert_allclose(ours, stock, rtol=1e-4)


def test_a_sampler_of_the_users_own(pair):
    sampler = torch.utils.data.SequentialSampler(range(20))
    both(pair, lambda m: m.get_elbo(data_loader_kwargs={"sampler": sampler}), rtol=1e-4)


@pytest.mark.parametrize("bias", [None, (1,), ()])
def test_linear_maps_of_counts_in_every_shape(pair, bias):
    def ask(model):
        x = first_batch(model)["X"]
        weight = torch.ones(G) if bias is None else torch.ones(3, G)
        return F.linear(x, weight, None if bias is None else torch.ones(bias))

    both(pair, ask)
