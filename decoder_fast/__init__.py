"""A faster drop-in for :class:`scvi.nn.DecoderSCVI`, its count likelihood included."""

from __future__ import annotations

from pathlib import Path as _Path
from typing import TYPE_CHECKING
from typing import Any as _Any

from ._version import __version__

_package = _Path(__file__).resolve().parent
if not (_package / "triton_kernels").is_dir() and (_package.parent / "triton_kernels").is_dir():
    # In a checkout the kernels lie beside the package, not inside it.
    __path__.append(str(_package.parent))

from . import functional
from .nn import DecoderSCVI, FCLayers

if TYPE_CHECKING:
    from .scvi import fuse, fused, unfuse

__all__ = ["DecoderSCVI", "FCLayers", "__version__", "functional", "fuse", "fused", "unfuse"]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> _Any:
    # The bridge imports scvi-tools, which takes seconds and is optional.
    if name in ("fuse", "fused", "unfuse"):
        from . import scvi

        return getattr(scvi, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
