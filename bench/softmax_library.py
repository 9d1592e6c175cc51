"""``softmax_library`` against softmax and a product, as scvi-tools' decoder takes them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from decoder_fast.functional import softmax_library

from .timing import interleaved

SHAPES = ((128, 2_000), (1_024, 8_000), (128, 20_000))

Outputs = tuple[Tensor, Tensor]


def stock(logits: Tensor, library: Tensor) -> Outputs:
    """What scvi-tools computes: px_scale and px_rate."""
    scale = torch.softmax(logits, -1)
    return scale, torch.exp(library) * scale


def cases(quick: bool) -> tuple[tuple[int, int], ...]:
    """Cells and genes."""
    return SHAPES[:1] if quick else SHAPES


def measure(case: tuple[int, int], repeats: int) -> dict[str, object]:
    """Time forward and backward; correctness first."""
    torch.manual_seed(0)
    logits = torch.randn(case, requires_grad=True)
    library = torch.randn(case[0], 1) * 0.3 + 8
    upstream = torch.randn(case), torch.randn(case)
    torch._dynamo.reset()
    compiled = torch.compile(stock, fullgraph=True, dynamic=False)

    def step(function: Callable[[Tensor, Tensor], Outputs], dtype: torch.dtype) -> list[Tensor]:
        outputs = function(logits.to(dtype), library.to(dtype))
        gradient = torch.autograd.grad(outputs, logits, [u.to(dtype) for u in upstream])
        return [*outputs, *gradient]

    expected = step(stock, torch.float64)
    got = step(softmax_library, torch.float32)
    for g, e in zip(got, expected, strict=True):
        error = ((g - e).abs().max() / e.abs().max()).item()
        if not error <= 1e-5:
            raise AssertionError(f"{case}: softmax_library is off by {error:.1e}")
    seconds = interleaved(
        {
            "stock eager": lambda: step(stock, torch.float32),
            "stock compiled": lambda: step(compiled, torch.float32),
            "ours": lambda: step(softmax_library, torch.float32),
        },
        repeats=repeats,
    )
    return {
        "what": "px_scale and px_rate, forward + backward",
        "shape": f"{case[0]:,} x {case[1]:,}",
        **seconds,
    }
