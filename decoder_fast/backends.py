"""What can run here, which implementation was chosen, and why not a faster one.

Three backends exist, fastest first: ``triton`` (kernels for GPUs), ``cpp`` (the native library
for CPUs) and ``torch`` (plain PyTorch, which runs everywhere and is what the others are measured
against). Every operation asks :func:`choose`, so the choice is made in one place and its reasons
can be read by people (:func:`decoder_fast.DecoderSCVI.explain`, ``decoder-fast doctor``).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from dataclasses import dataclass, field
from types import ModuleType

import torch

__all__ = ["BACKENDS", "OPERATIONS", "Choice", "choose", "implementation"]

#: The operations, by the one name that each has in every part of the project.
OPERATIONS = ("covariate_linear", "softmax_library", "count_nll", "csr_linear")

#: The backends, fastest first, and the package that holds one module an operation for each.
_PACKAGES = {"triton": "triton_kernels", "cpp": "cpp", "torch": "reference"}
BACKENDS = tuple(_PACKAGES)

#: Earlier GPUs lack the shared memory, tf32 and bfloat16 that the Triton kernels count on.
_LEAST_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Choice:
    """The backend that one operation takes, and the reason against each faster one.

    Attributes
    ----------
    operation
        Name of the operation, one of :data:`OPERATIONS`.
    backend
        The backend taken, one of :data:`BACKENDS`.
    reasons
        Why each faster backend was passed over: backend name to a sentence.
    """

    operation: str
    backend: str
    reasons: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.operation}: {self.backend}"]
        lines += [f"    not {name}: {reason}" for name, reason in self.reasons.items()]
        return "\n".join(lines)


@functools.cache
def _missing_triton() -> str | None:
    """Why Triton cannot run at all on this machine, or None."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (pip install triton; Linux with a GPU only)"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    try:
        from triton.runtime import driver

        driver.active.get_current_target()  # compiles what Triton talks to the GPU with
    except Exception as error:
        line = next(iter(str(error).splitlines()), "")
        return (
            f"triton does not start here ({type(error).__name__}: {line}); it needs a C compiler "
            "and Python's headers ('apt install gcc python3-dev', or "
            "'conda install -c conda-forge gcc_linux-64')"
        )
    return None


def _too_old(device: torch.device) -> str | None:
    """Why Triton's kernels do not run on one GPU, or None."""
    if torch.version.hip is not None:
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability >= _LEAST_CAPABILITY:
        return None
    return (
        "its kernels need an NVIDIA GPU of compute capability "
        f"{'.'.join(map(str, _LEAST_CAPABILITY))} or later (Ampere, 2020), and "
        f"{torch.cuda.get_device_name(device)} has {'.'.join(map(str, capability))}"
    )


def _interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on the CPU: to debug and test, slowly."""
    asked = os.environ.get("TRITON_INTERPRET") == "1"
    return asked and importlib.util.find_spec("triton") is not None


def _missing_native() -> str | None:
    """Why the native CPU library cannot be used, or None."""
    from . import native

    return native.reason()


def _triton_reason(
    operation: str,
    device: torch.device,
    dtype: torch.dtype,
    likelihood: str | None,
    interpreted: bool,
) -> str | None:
    if not (interpreted and device.type == "cpu"):
        if device.type != "cuda":
            return f"its kernels run on CUDA devices, and the tensors are on '{device}'"
        if (missing := _missing_triton()) is not None:
            return missing
        if (too_old := _too_old(device)) is not None:
            return too_old
    from .triton_kernels import OPERATIONS as kernels

    if operation not in kernels:
        return f"this version has no Triton kernel for {operation}"
    return _no_kernel(dtype, likelihood)


def _no_kernel(dtype: torch.dtype, likelihood: str | None) -> str | None:
    """Say what no kernel, for whatever device, computes; or None."""
    if dtype != torch.float32:
        return f"its kernels compute in float32, and the tensors are {dtype}"
    if likelihood == "normal":
        return "its kernels are for counts, and likelihood='normal' is not"
    return None


def _cpp_reason(
    operation: str,
    device: torch.device,
    dtype: torch.dtype,
    likelihood: str | None,
    interpreted: bool,
) -> str | None:
    if device.type != "cpu":
        return f"its kernels run on the CPU, and the tensors are on '{device}'"
    if (missing := _missing_native()) is not None:
        return missing
    from . import native

    if operation not in native.operations():
        return f"this version has no native CPU kernel for {operation}"
    return _no_kernel(dtype, likelihood)


_REASONS = {"triton": _triton_reason, "cpp": _cpp_reason}


@functools.lru_cache(maxsize=256)
def _choose(
    operation: str,
    requested: str,
    device: torch.device,
    dtype: torch.dtype,
    likelihood: str | None,
    interpreted: bool,
) -> Choice:
    if operation not in OPERATIONS:
        raise ValueError(f"unknown operation {operation!r}; expected one of {OPERATIONS}")
    if requested != "auto" and requested not in BACKENDS:
        raise ValueError(
            f"unknown backend {requested!r}; expected 'auto' or one of "
            + ", ".join(map(repr, BACKENDS))
        )
    reasons: dict[str, str] = {}
    for backend in BACKENDS:
        if requested not in ("auto", backend):
            continue
        reason = None
        if backend in _REASONS:
            reason = _REASONS[backend](operation, device, dtype, likelihood, interpreted)
        if reason is None:
            return Choice(operation, backend, reasons)
        reasons[backend] = reason
    raise RuntimeError(
        f"backend={requested!r} cannot run {operation} here: {reasons[requested]}. "
        "Use backend='auto' to take the fastest one that can."
    )


def choose(
    operation: str,
    requested: str = "auto",
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    likelihood: str | None = None,
) -> Choice:
    """Choose the backend for one operation.

    Parameters
    ----------
    operation
        One of :data:`OPERATIONS`.
    requested
        ``"auto"`` for the fastest backend that can run, or the name of one that must be taken.
    device
        Device of the operation's tensors.
    dtype
        Dtype that the operation computes in.
    likelihood
        Likelihood that ``count_nll`` computes.

    Returns
    -------
    Choice
        The backend taken and the reasons against the faster ones.

    Raises
    ------
    ValueError
        If ``operation`` or ``requested`` is unknown.
    RuntimeError
        If the requested backend cannot run here; the message says why.
    """
    interpreted = requested == "triton" and _interpreted()
    return _choose(operation, requested, device, dtype, likelihood, interpreted)


@functools.cache
def implementation(operation: str, backend: str) -> ModuleType:
    """Return the module with the ``forward`` and ``backward`` of one operation on one backend.

    Parameters
    ----------
    operation
        One of :data:`OPERATIONS`.
    backend
        One of :data:`BACKENDS`, as :func:`choose` returned it. Triton is imported here, on first
        use.

    Returns
    -------
    module
        It.
    """
    return importlib.import_module(f".{_PACKAGES[backend]}.{operation}", __package__)
