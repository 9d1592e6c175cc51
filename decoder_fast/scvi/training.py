"""``model.train`` of fused models: CSR mini-batches, torch's fused optimizer, CUDA graphs."""

from __future__ import annotations

import copyreg
import functools
import inspect
import types
import warnings
from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule
from scvi import train
from torchmetrics import Metric

from .cuda_graph import GraphedPlan, supports_graphs
from .data import FUSED_SPLITTERS, csr_batches, replaced
from .module import takes_csr


@functools.cache
def _pickled_by_making(metaclass: type) -> type:
    """Make the metaclass of training plans that pickle makes anew, as they have no name to find."""
    kind = type(f"Fused{metaclass.__name__}", (metaclass,), {})

    def reduce(plan: Any) -> tuple[Any, ...]:
        return _fused_training_plan, plan._made_of

    copyreg.pickle(kind, reduce)
    return kind


@functools.cache
def _fused_training_plan(stock_class: type, cuda_graph: bool) -> type:
    """Make the subclass of a training plan that costs less a step.

    Adam or AdamW is one operation: on the CPU torch's default takes a dozen passes over each
    parameter, at atlas size more than all else of a step. An optimizer of the user's own stays as
    it is. With ``cuda_graph`` the steps are recorded and replayed.
    """
    bases = (GraphedPlan, stock_class) if cuda_graph else (stock_class,)
    metaclass: Any = _pickled_by_making(type(stock_class))
    logs_itself = stock_class.log_dict is LightningModule.log_dict  # type: ignore[attr-defined]

    class FusedTrainingPlan(*bases, metaclass=metaclass):  # type: ignore[misc,metaclass]
        _made_of = stock_class, cuda_graph
        _logged: Any = None  # metrics that Lightning knows of in this epoch

        def on_train_epoch_start(self) -> None:
            self._logged = None
            super().on_train_epoch_start()

        def log_dict(self, dictionary: Any, *args: Any, **kwargs: Any) -> None:
            # Lightning asks a metric for its value at the end of an epoch. To be told of it at
            # every step changes nothing, and takes a tenth of a small one.
            once = (
                logs_itself
                and self.trainer.training
                and kwargs.get("on_step") is False
                and all(isinstance(value, Metric) for value in dictionary.values())
            )
            if once and dictionary is self._logged:
                return
            super().log_dict(dictionary, *args, **kwargs)
            if once:
                self._logged = dictionary

        def _optimizer_creator_fn(self, optimizer_cls: type) -> Any:
            # With gradient scaling Lightning refuses to clip gradients for fused optimizers.
            if self.device.type in ("cpu", "cuda") and self.trainer.precision == "32-true":
                options = {}
                if not hasattr(self, "fused_optimizer"):  # scvi-tools 1.5.1 has it, as an option
                    options["fused"] = True
                if cuda_graph and supports_graphs(self.device):
                    options["capturable"] = True
                optimizer_cls = functools.partial(optimizer_cls, **options)  # type: ignore[assignment]
            return super()._optimizer_creator_fn(optimizer_cls)

    FusedTrainingPlan.__doc__ = stock_class.__doc__
    FusedTrainingPlan.__name__ = FusedTrainingPlan.__qualname__ = f"Fused{stock_class.__name__}"
    return FusedTrainingPlan


_MORE_OF_TRAIN = """\
Of a fused model (decoder_fast):

load_sparse_tensor
    Hand over counts that AnnData holds in CSR as CSR. Here the default is ``True``.
cuda_graph
    On an NVIDIA GPU record a whole training step and replay it for every mini-batch of the same
    size. Where steps cannot be recorded, a warning says why and training goes on without.
"""


def _signature(train: Callable[..., Any]) -> inspect.Signature:
    """Return the signature of ``model.train``, as it is for a fused model."""
    signature = inspect.signature(train)
    parameters = [
        p.replace(default=True) if p.name == "load_sparse_tensor" else p
        for p in signature.parameters.values()
    ]
    graph = inspect.Parameter(
        "cuda_graph", inspect.Parameter.KEYWORD_ONLY, default=False, annotation="bool"
    )
    rest = [p for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD]
    parameters = [*parameters[: len(parameters) - len(rest)], graph, *rest]
    return signature.replace(parameters=parameters)


class FusedTrain:
    """``model.train`` of a fused model: that of its class, its parts replaced by fused ones."""

    __wrapped__: Callable[..., Any]

    def __init__(self, model: Any) -> None:
        functools.update_wrapper(self, types.MethodType(type(model).train, model))
        self.__signature__ = _signature(self.__wrapped__)
        self.__doc__ = f"{inspect.getdoc(self.__wrapped__) or ''}\n\n{_MORE_OF_TRAIN}"

    def __reduce__(self) -> Any:
        # A bound method is pickled by its name, and by that name the model has this.
        return type(self), (self.__wrapped__.__self__,)  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        return f"<fused {self.__wrapped__!r}>"

    def __call__(self, *args: Any, cuda_graph: bool = False, **kwargs: Any) -> Any:
        """Train the model; what the model's own ``train`` does not know is ``cuda_graph``."""
        stock = self.__wrapped__
        model: Any = stock.__self__  # type: ignore[attr-defined]
        parts: dict[str, Any] = {}
        plan = getattr(model, "_training_plan_cls", object)
        if issubclass(plan, train.TrainingPlan):
            parts["_training_plan_cls"] = _fused_training_plan(plan, cuda_graph)
        elif cuda_graph:
            warnings.warn(
                "cuda_graph=True has no effect: the training plan of "
                f"{type(model).__name__} is not a scvi.train.TrainingPlan",
                stacklevel=2,
            )
        splitter = FUSED_SPLITTERS.get(getattr(model, "_data_splitter_cls", object))
        datamodule = None
        if splitter is not None and takes_csr(model.module):
            said = {**inspect.signature(stock).bind(*args, **kwargs).arguments, **kwargs}
            options = dict(said.get("datasplitter_kwargs") or {})
            wanted = options.pop("load_sparse_tensor", said.get("load_sparse_tensor", True))
            # Not every model's train and data splitter know the option.
            kwargs.pop("load_sparse_tensor", None)
            if "datasplitter_kwargs" in kwargs:
                kwargs["datasplitter_kwargs"] = options
            if wanted:
                parts["_data_splitter_cls"] = splitter
                datamodule = said.get("datamodule")
        with replaced(model, **parts), csr_batches(datamodule):
            return stock(*args, **kwargs)
