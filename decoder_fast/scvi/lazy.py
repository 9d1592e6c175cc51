"""Tensors that are computed when something looks at their values.

scvi-tools' models call the decoder, wrap its outputs in a distribution, and later ask that
distribution for ``log_prob(x).sum(-1)``. A :class:`LazyTensor` stands in for an output in between:
it has shape, dtype and device, and remembers what it would be computed from. Where only the summed
log-likelihood is asked for, the cells x genes values are never computed. Anything else that
touches a lazy tensor computes it first, so that code which knows nothing of it is right.

On the way in, :class:`LazyCounts` shows CSR counts to the encoder as the dense tensor that it
expects, and keeps the CSR at hand for the likelihood.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from ..ops._common import check_labels
from ..ops.csr_linear import csr_linear
from ..reference.csr_linear import dense

__all__ = [
    "LazyCheck",
    "LazyColumns",
    "LazyCounts",
    "LazyExp",
    "LazyExpanded",
    "LazyOneHots",
    "LazyRows",
    "LazyTensor",
]

_METADATA = frozenset(
    [
        getattr(Tensor, name).__get__
        for name in (
            *("shape", "dtype", "device", "layout", "ndim", "is_cuda", "is_mps"),
            *("is_sparse", "is_sparse_csr"),
        )
    ]
    + [Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.__len__]
)
#: Hand out the values' memory: who changes it then, does so unseen.
_UNSEEN = frozenset(
    [Tensor.data.__get__, Tensor.data.__set__, Tensor.numpy, Tensor.__array__]  # type: ignore[attr-defined]
)
_ALL = frozenset([torch.all, Tensor.all, torch._is_all_true])


class LazyTensor(Tensor):
    """A tensor of known shape, computed by :meth:`compute` when its values are first needed."""

    _value: Tensor | None
    _version_then: int  # of the values, when they were computed
    _grad_enabled: bool
    _inference: bool  # mode, in which it was made
    _handed_out: bool

    @staticmethod
    def __new__(
        cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, **fields: Any
    ) -> LazyTensor:
        """Create one; ``fields`` become attributes of the subclass."""
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)  # type: ignore[attr-defined]
        self._value = None
        self._grad_enabled = torch.is_grad_enabled()
        self._inference = torch.is_inference_mode_enabled()
        self._handed_out = False
        self.__dict__.update(fields)
        return self

    def __init__(self, *_: Any, **__: Any) -> None:  # __new__ has done it
        pass

    def compute(self) -> Tensor:
        """Compute the values."""
        raise NotImplementedError

    def intercept(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        """Answer ``func`` without the values, or return NotImplemented."""
        return NotImplemented

    def materialise(self) -> Tensor:
        """Return the values as a plain tensor, computed once."""
        if self._value is None:
            with torch.inference_mode(self._inference), torch.set_grad_enabled(self._grad_enabled):
                self._value = self.compute()
            self._version_then = version(self._value)
        return self._value

    def changed(self) -> bool:
        """Whether what holds of the source may not hold of the values that were handed out.

        They may have been changed in place, or their gradient be asked for.
        """
        value = self._value
        if value is None:
            return False
        if self._handed_out or value.is_inference():  # such have no version
            return True
        return (
            value._version != self._version_then
            or (value.requires_grad and value.is_leaf)
            or value.retains_grad
        )

    def samples(self, start: int, stop: int) -> Tensor:
        """Return a slice of the first dimension, lazily where its values can be computed alone."""
        return self.materialise()[start:stop]

    def rows(self, index: Tensor) -> Tensor:
        """Return rows of ``flatten(0, -2)``, lazily where their values can be computed alone."""
        return self.materialise().flatten(0, -2)[index]

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _UNSEEN:
            args[0]._handed_out = True
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        lazy = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, LazyTensor)]
        if any(leaf.changed() for leaf in lazy):
            args, kwargs = tree_map(_real_if_changed, (args, kwargs))
            lazy = [leaf for leaf in lazy if not leaf.changed()]
        for leaf in lazy:
            answer = leaf.intercept(func, args, kwargs)
            if answer is not NotImplemented:
                return answer
        args, kwargs = tree_map(real, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        # Reached only by calls that skip __torch_function__.
        args, kwargs = tree_map(real, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.materialise().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.materialise().__deepcopy__(memo)


def version(value: Tensor) -> int:
    """Return what changes when a tensor is changed in place; nothing does in inference mode."""
    return 0 if value.is_inference() else value._version


def real(value: Any) -> Any:
    """Return the values of a lazy tensor, and anything else as it is."""
    return value.materialise() if isinstance(value, LazyTensor) else value


def _real_if_changed(value: Any) -> Any:
    return real(value) if isinstance(value, LazyTensor) and value.changed() else value


def samples(value: Tensor, start: int, stop: int) -> Tensor:
    """Return a slice of the first dimension of a tensor; of a lazy one, lazily."""
    return value.samples(start, stop) if isinstance(value, LazyTensor) else value[start:stop]


def rows(value: Tensor, index: Tensor) -> Tensor:
    """Return rows of ``value.flatten(0, -2)``; of a lazy tensor, lazily."""
    return value.rows(index) if isinstance(value, LazyTensor) else value.flatten(0, -2)[index]


def summed_dim(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> int | None:
    """Return the one dimension that ``func`` sums over; None if it does anything else."""
    if func not in (torch.sum, Tensor.sum) or len(args) not in (1, 2) or set(kwargs) - {"dim"}:
        return None
    dim = args[1] if len(args) == 2 else kwargs.get("dim")
    if isinstance(dim, (list, tuple)) and len(dim) == 1:
        dim = dim[0]
    n_dims = args[0].dim()
    return dim % n_dims if isinstance(dim, int) and -n_dims <= dim < n_dims else None


class LazyCounts(LazyTensor):
    """A dense cells x genes tensor of counts, or of their logarithms, its ``csr`` still at hand.

    ``csr`` is ``torch.sparse_csr`` of a floating dtype, without duplicates.
    """

    csr: Tensor

    @classmethod
    def of(cls, csr: Tensor) -> LazyCounts:
        """Show CSR counts as dense ones."""
        return cls(csr.shape, csr.dtype, csr.device, csr=csr)

    def compute(self) -> Tensor:
        """Compute the values."""
        csr = self.csr
        return dense(csr.crow_indices(), csr.col_indices(), csr.values(), self.shape[1])

    def intercept(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        """Answer what the encoder and the library size ask for from the non-zeros."""
        if func in (torch.log1p, Tensor.log1p) and not kwargs:
            return self._with_values(self.csr.values().log1p())
        if func is torch.nn.functional.linear and args and args[0] is self:
            return self._linear(*args[1:], **kwargs)
        kept = {k: v for k, v in kwargs.items() if k != "keepdim"}
        if summed_dim(func, args, kept) == 1:
            # One after the other, where a dense sum is pairwise: in float64, to be as accurate.
            values, crow = self.csr.values().double(), self.csr.crow_indices().long()
            sums = torch.segment_reduce(values, "sum", offsets=crow).to(self.dtype)
            return sums[:, None] if kwargs.get("keepdim") else sums
        if func is Tensor.float and self.dtype == torch.float32:
            return self
        if func is Tensor.to and len(args) == 2 and isinstance(args[1], torch.device):
            moved = self.csr.to(*args[1:], **kwargs)
            return self if moved is self.csr else LazyCounts.of(moved)
        return concatenated(func, args, kwargs)

    def _with_values(self, values: Tensor) -> LazyCounts:
        csr = self.csr
        return LazyCounts.of(
            torch.sparse_csr_tensor(
                csr.crow_indices(),
                csr.col_indices(),
                values,
                size=csr.shape,
                check_invariants=False,  # as sound as those of the counts
            )
        )

    def _linear(self, weight: Tensor, bias: Tensor | None = None) -> Any:
        # A GPU multiplies the dense matrix sooner, and autocast chooses the dtype of such products.
        if self.device.type != "cpu" or torch.is_autocast_enabled(self.device.type):
            return NotImplemented
        if weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
            return NotImplemented
        return csr_linear(self.csr, weight, bias)


class LazyColumns(LazyTensor):
    """Matrices side by side, some of them lazy."""

    parts: list[Tensor]

    def compute(self) -> Tensor:
        """Compute the values."""
        return torch.cat([real(part) for part in self.parts], -1)

    def intercept(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        """Multiply each matrix by its columns of a weight."""
        if func is torch.nn.functional.linear and args and args[0] is self:
            return self._linear(*args[1:], **kwargs)
        return concatenated(func, args, kwargs)

    def _linear(self, weight: Tensor, bias: Tensor | None = None) -> Any:
        widths = [part.shape[1] for part in self.parts]
        if weight.dim() != 2 or weight.shape[1] != sum(widths):
            return NotImplemented
        linear = torch.nn.functional.linear
        out = bias
        for part, columns in zip(self.parts, weight.split(widths, 1), strict=True):
            product = real(linear(part.float() if not part.is_floating_point() else part, columns))
            out = product if out is None else out + product
        return out


def concatenated(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
    """Answer ``torch.cat`` of matrices along their columns lazily; NotImplemented for all else."""
    if func is not torch.cat or set(kwargs) - {"dim"} or not args or len(args) + len(kwargs) != 2:
        return NotImplemented
    parts, dim = args[0], args[1] if len(args) == 2 else kwargs["dim"]
    if dim not in (1, -1) or any(part.dim() != 2 for part in parts):
        return NotImplemented
    if len({part.shape[0] for part in parts}) > 1:
        return NotImplemented  # torch says what is wrong
    if len(parts) == 1:
        return parts[0]
    parts = [p for part in parts for p in getattr(part, "parts", [part])]
    dtype = functools.reduce(torch.promote_types, (part.dtype for part in parts))
    shape = (parts[0].shape[0], sum(part.shape[1] for part in parts))
    return LazyColumns(shape, dtype, parts[0].device, parts=parts)


class LazyExpanded(LazyTensor):
    """``source`` broadcast to a larger shape, ``source`` still at hand."""

    source: Tensor

    @classmethod
    def of(cls, source: Tensor, shape: torch.Size) -> Tensor:
        """Broadcast ``source``, unless it has that shape already."""
        if source.shape == shape:
            return source
        return cls(shape, source.dtype, source.device, source=source)

    def compute(self) -> Tensor:
        """Compute the values."""
        return real(self.source).expand(self.shape)

    def samples(self, start: int, stop: int) -> Tensor:
        """Return a slice of the first dimension, lazily."""
        source = self.source
        if source.dim() == self.dim() and source.shape[0] != 1:
            source = samples(source, start, stop)
        return LazyExpanded.of(source, torch.Size((stop - start, *self.shape[1:])))

    def intercept(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        """Stay lazy in broadcasts."""
        return broadcast(func, args)


def broadcast(func: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Answer ``torch.broadcast_tensors`` lazily; NotImplemented for any other function."""
    if func is not torch.broadcast_tensors:
        return NotImplemented
    shape = torch.broadcast_shapes(*(t.shape for t in args))
    return [LazyExpanded.of(t, shape) for t in args]


class LazyCheck(LazyTensor):
    """A comparison that distributions make to check a parameter, known to hold of all numbers."""

    comparison: Callable[[], Tensor]

    def compute(self) -> Tensor:
        """Compute the values."""
        return self.comparison()

    def intercept(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        """Answer whether it holds of all."""
        if func in _ALL and len(args) == 1 and not kwargs:
            return torch.ones((), dtype=torch.bool, device=self.device)
        return NotImplemented


class LazyOneHot(LazyTensor):
    """``one_hot(labels, n_cat)``, in any dtype."""

    labels: Tensor
    n_cat: int

    def compute(self) -> Tensor:
        """Compute the values."""
        return torch.nn.functional.one_hot(self.labels, self.n_cat).to(self.dtype)

    def intercept(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        """Stay lazy when cast to float, and turn a linear map into a lookup."""
        if func is Tensor.float:
            return LazyOneHot(
                self.shape, torch.float32, self.device, labels=self.labels, n_cat=self.n_cat
            )
        if func is torch.nn.functional.linear and len(args) == 2 and not kwargs:
            table = args[1]
            if args[0] is self and table.dim() == 2 and table.shape[1] == self.n_cat:
                shape = (*self.labels.shape, table.shape[0])
                return LazyRows(shape, table.dtype, table.device, table=table, labels=self.labels)
        return concatenated(func, args, kwargs)


class LazyRows(LazyTensor):
    """For each label its column of ``table`` (n, n_cat): ``linear(one_hot(labels), table)``."""

    table: Tensor
    labels: Tensor

    def compute(self) -> Tensor:
        """Compute the values."""
        check_labels(self.labels, self.table.shape[1], "label")
        return real(self.table).t()[self.labels]

    def intercept(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        """Stay lazy under exp."""
        return LazyExp.of(self) if func is torch.exp else NotImplemented


class LazyExp(LazyTensor):
    """``exp(source)``, ``source`` still at hand."""

    source: LazyTensor

    @classmethod
    def of(cls, source: LazyTensor) -> LazyExp:
        """Exponentiate."""
        return cls(source.shape, source.dtype, source.device, source=source)

    def compute(self) -> Tensor:
        """Compute the values."""
        return self.source.materialise().exp()

    def samples(self, start: int, stop: int) -> Tensor:
        """Return a slice of the first dimension, lazily."""
        part = self.source.samples(start, stop)
        return LazyExp.of(part) if isinstance(part, LazyTensor) else part.exp()

    def intercept(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        """Stay lazy in broadcasts."""
        return broadcast(func, args)


class LazyOneHots(TorchFunctionMode):
    """While active, ``one_hot(labels, n)`` is lazy, so that a linear map of it becomes a lookup."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Make one-hot matrices lazy, and pass every other function on."""
        if func is torch.nn.functional.one_hot and len(args) == 2 and not kwargs:
            labels, n_cat = args
            if type(labels) is Tensor and labels.dtype == torch.int64 and n_cat > 0:
                return LazyOneHot(
                    (*labels.shape, n_cat), torch.int64, labels.device, labels=labels, n_cat=n_cat
                )
        return func(*args, **(kwargs or {}))
