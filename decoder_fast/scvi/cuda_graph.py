"""A whole training step as a CUDA graph: recorded once, replayed for every mini-batch alike.

Mini-batches of a hundred cells take a GPU less time than Python takes to ask for them. A replay
asks for forward, backward and optimizer at once. Lightning's loop stays what it is: in its place
stands, through hooks that Lightning offers, the replay for the forward pass of ``training_step``,
and nothing for the rest.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from dataclasses import fields
from typing import Any

import torch
from scvi import train
from torch import Tensor

from ..backends import choose
from .decoder import FusedDecoderSCVI
from .lazy import LazyCounts, real
from .module import canonical, is_compiled, is_csr

#: Steps run as usual before one is recorded: kernels get compiled, libraries get their memory.
WARM_UP = 3


def record(step: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """Record what a function launches on the current stream, without running it.

    Returns
    -------
    tuple
        What replays it, and the function's result: tensors that every replay fills anew.
    """
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    before = generator.clone_state()
    try:
        # Threads that load the next mini-batch may go on with their own calls meanwhile.
        with torch.cuda.graph(
            graph,
            pool=pool,
            stream=torch.cuda.current_stream(),
            capture_error_mode="thread_local",
        ):
            result = step()
    except Exception:
        # Left as they are in a recording, the one would refuse the next random numbers, the other
        # to give memory back.
        generator.graphsafe_set_state(before)
        with contextlib.suppress(Exception):
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)  # type: ignore[attr-defined]
        raise
    return graph.replay, result


@contextlib.contextmanager
def _unvalidated() -> Iterator[None]:
    """Have torch's distributions not check their parameters, which waits for the device."""
    before = torch.distributions.Distribution._validate_args
    torch.distributions.Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        torch.distributions.Distribution.set_default_validate_args(before)


def _detached(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _detached(item) for key, item in value.items()}
    return value.detach() if isinstance(value, Tensor) else value


class StepGraph:
    """Replays a training step for mini-batches of the shapes that it was recorded for.

    Parameters
    ----------
    loss
        Takes a mini-batch and the loss's options; returns a ``LossOutput``.
    optimizer
        Its learning rates are part of the recording: where one has changed, it is made anew.
    """

    def __init__(
        self, loss: Callable[[Any, dict[str, Any]], Any], optimizer: torch.optim.Optimizer
    ) -> None:
        self._loss = loss
        self._optimizer = optimizer
        # torch's advice against steps that are not recorded, of which there are a few.
        optimizer._warned_capturable_if_run_uncaptured = True
        self._seen: Counter[Hashable] = Counter()  # mini-batches, by shape
        self._recorded: tuple[Hashable, ...] | None = None
        self._replay: Callable[[], None] = lambda: None
        self._output: Any = None
        self._batch: dict[str, Tensor | None] = {}
        self._options: dict[str, Any] = {}
        self._failed = False

    def __call__(self, batch: dict[str, Tensor | None], options: dict[str, Any]) -> Any:
        """Take one step.

        Parameters
        ----------
        batch
            A mini-batch as scvi-tools' loaders make it: tensors, None for what there is not. What
            else a data module puts there is a constant of the recording.
        options
            Options of the loss. Numbers that are not whole may change from step to step.

        Returns
        -------
        LossOutput or None
            Filled anew by the next step. None where nothing was done: the step has to be run as
            usual.
        """
        if self._failed:
            return None
        shapes = tuple(
            (key, (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value)
            for key, value in batch.items()
        )
        constants = (
            *((key, v) for key, v in options.items() if not isinstance(v, (Tensor, float))),
            *(group["lr"] for group in self._optimizer.param_groups),
        )
        if self._recorded != (shapes, constants):
            first = self._recorded is None
            self._seen[shapes] += first
            rehearses = first and self._seen[shapes] == WARM_UP
            if self._seen[shapes] <= WARM_UP and not rehearses:
                return None  # so is the last, smaller mini-batch of every epoch
            try:
                self._keep(batch, options)
                if rehearses:
                    # On dense counts, as what is recorded: those in CSR call for other kernels, and
                    # in a recording none may be compiled.
                    return self._take(self._step)
                self._output = self._take(self._record)
            except Exception as error:
                self._failed = True
                self.release()
                warnings.warn(
                    f"cuda_graph=True: the training step cannot be recorded ({error}), so it runs "
                    "as usual",
                    stacklevel=2,
                )
                return None
            self._recorded = (shapes, constants)
        else:
            self._fill(batch, options)
        self._replay()
        return self._output

    def _fill(self, batch: dict[str, Tensor | None], options: dict[str, Any]) -> None:
        for key, value in batch.items():
            to = self._batch[key]
            if isinstance(value, Tensor) and to is not None:
                # Counts in CSR become dense on the device.
                to.copy_(real(LazyCounts.of(canonical(value)) if is_csr(value) else value))
        for key, value in options.items():
            if isinstance(value, float):
                self._options[key].fill_(value)  # a copy from the host would wait for the device
            elif isinstance(value, Tensor):
                self._options[key].copy_(value)

    def _keep(self, batch: dict[str, Tensor | None], options: dict[str, Any]) -> None:
        """Make our own copy of the mini-batch and the options, for the step to read."""
        self.release()
        self._batch = {
            key: torch.empty(value.shape, dtype=value.dtype, device=value.device)
            if isinstance(value, Tensor)
            else value
            for key, value in batch.items()
        }
        device = next(value.device for value in batch.values() if isinstance(value, Tensor))
        self._options = {
            key: torch.empty_like(value)
            if isinstance(value, Tensor)
            else torch.empty((), device=device)
            if isinstance(value, float)
            else value
            for key, value in options.items()
        }
        self._fill(batch, options)

    def _step(self) -> Any:
        output = self._loss(self._batch, self._options)
        output.loss.backward()
        self._optimizer.step()
        return output

    def _record(self) -> Any:
        self._replay, output = record(self._step)
        return output

    def _take(self, step: Callable[[], Any]) -> Any:
        """Have our step run, or recorded; return what it computes, detached."""
        # Gradients that the step makes itself, and that each replay writes over.
        self._optimizer.zero_grad()
        with _unvalidated():
            output = step()
        self._optimizer.zero_grad()
        for field in fields(output):
            object.__setattr__(output, field.name, _detached(getattr(output, field.name)))
        return output

    def release(self) -> None:
        """Give the memory of the recording back."""
        self._recorded, self._output, self._replay = None, None, lambda: None
        self._batch, self._options = {}, {}
        self._optimizer.zero_grad()


class GraphedPlan:
    """What makes a training plan replay its steps; comes before the plan among the bases."""

    module: Any
    trainer: Any
    _graph: StepGraph | None = None
    _in_training_step = False
    _replayed = False
    _weight: tuple[Any, Any] = None, None  # of the KL divergence; first, when it was made

    @property
    def kl_weight(self) -> Any:
        """The weight of the KL divergence, copied from the host, which waits, when it changes."""
        when = (
            self.current_epoch,  # type: ignore[attr-defined]
            self.n_steps_kl_warmup and self.global_step,  # type: ignore[attr-defined]
            self.device,  # type: ignore[attr-defined]
        )
        if self._weight[0] != when:
            self._weight = when, super().kl_weight  # type: ignore[misc]
        return self._weight[1]

    def on_train_start(self) -> None:
        """Decide whether steps can be recorded."""
        super().on_train_start()  # type: ignore[misc]
        if (reason := why_not(self)) is not None:
            warnings.warn(f"cuda_graph=True has no effect: {reason}", stacklevel=2)
            return
        optimizer = self.optimizers(use_pl_optimizer=False)  # type: ignore[attr-defined]
        self._graph = StepGraph(self._loss_output, optimizer)

    def on_train_end(self) -> None:
        """Give the memory of the recording back."""
        if self._graph is not None:
            self._graph.release()
            self._graph = None
        super().on_train_end()  # type: ignore[misc]

    def _loss_output(self, batch: Any, options: dict[str, Any]) -> Any:
        return super().forward(batch, loss_kwargs=options)[2]  # type: ignore[misc]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Take the step of the plan, in which ``forward`` may be a whole step's replay."""
        self._in_training_step = True
        try:
            return super().training_step(batch, batch_idx)  # type: ignore[misc]
        finally:
            self._in_training_step = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Replay the step where that can be, else compute the loss."""
        self._replayed = False
        if self._graph is not None and self._in_training_step:
            output = self._graph(args[0], kwargs["loss_kwargs"])
            if output is not None:
                self._replayed = True
                return None, None, output
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def backward(self, *args: Any, **kwargs: Any) -> None:
        """Compute gradients, unless the replay did."""
        if not self._replayed:
            super().backward(*args, **kwargs)  # type: ignore[misc]

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        """Step the optimizer, unless the replay did."""
        if self._graph is None:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)  # type: ignore[misc]
            return
        # Autograd ties a parameter to the stream that first used it: never the default one, which
        # cannot be recorded.
        with _side_stream(self.device):  # type: ignore[attr-defined]
            optimizer_closure()
            if not self._replayed:
                super().optimizer_step(epoch, batch_idx, optimizer, _done)  # type: ignore[misc]


def _done() -> None:
    """Stand for a closure that has run."""


_side_streams: dict[torch.device, torch.cuda.Stream] = {}


@contextlib.contextmanager
def _side_stream(device: torch.device) -> Iterator[None]:
    """Work on a stream of our own, after all that was asked for and before all that will be."""
    if device.type != "cuda":
        yield
        return
    if device not in _side_streams:
        _side_streams[device] = torch.cuda.Stream(device)
    side, outer = _side_streams[device], torch.cuda.current_stream(device)
    side.wait_stream(outer)
    with torch.cuda.stream(side):
        yield
    outer.wait_stream(side)


def supports_graphs(device: torch.device) -> bool:
    """Whether work on a device can be recorded."""
    return device.type == "cuda" and torch.version.hip is None


def why_not(plan: Any) -> str | None:
    """Say why the steps of a training plan cannot be recorded.

    Parameters
    ----------
    plan
        A training plan in training.

    Returns
    -------
    str or None
        The reason; None if they can.
    """
    trainer, kind = plan.trainer, type(plan)
    if not supports_graphs(plan.device):
        return f"CUDA graphs are for NVIDIA GPUs, and the model trains on '{plan.device}'"
    if trainer.world_size > 1:
        return f"the model trains on {trainer.world_size} devices, which wait for each other"
    for base in kind.__mro__[: kind.__mro__.index(train.TrainingPlan)]:
        own = vars(base).keys() & {"training_step", "forward", "backward", "optimizer_step"}
        if own and not issubclass(base, GraphedPlan):
            return f"{base.__name__} has a {min(own)} of its own, which may do more than one step"
    if getattr(plan.module, "gene_likelihood", None) == "normal":
        return "the likelihood 'normal' has no fused kernel, and in plain PyTorch its loss waits"
    for decoder in plan.module.modules():
        if not isinstance(decoder, FusedDecoderSCVI):
            continue
        reason = decoder._unfused_heads()
        if reason is None and plan.device.type == "cuda":
            dtype = decoder.px_r_decoder.weight.dtype
            reason = choose("count_nll", device=plan.device, dtype=dtype).reasons.get("triton")
        if reason is not None:
            return f"its loss runs in plain PyTorch, and waits there: {reason}"
    if is_compiled(plan.module):
        return "the module was compiled, and torch.compile(mode='reduce-overhead') makes its own"
    if trainer.precision != "32-true":
        return f"it needs precision 32-true, and the trainer has {trainer.precision}"
    if (n_batches := trainer.accumulate_grad_batches) != 1:
        return f"the trainer accumulates gradients of {n_batches} mini-batches"
    if trainer.gradient_clip_val:
        return "the trainer clips gradients between the backward pass and the optimizer"
    optimizer = plan.optimizers(use_pl_optimizer=False)
    if isinstance(optimizer, list) or not all(
        group.get("capturable") for group in optimizer.param_groups
    ):
        return "the optimizer does not keep its state on the GPU; your own needs capturable=True"
    return None
