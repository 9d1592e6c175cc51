"""The operations under pytest-benchmark: ``pytest bench --benchmark-only``.

The shapes are those of :mod:`bench.shapes`, scaled to this machine as ``decoder-fast bench`` scales
them. What is not as right as stock fails, and is not timed.
"""

from __future__ import annotations

import functools

import pytest
import torch

from .case import Case, errors, is_right
from .shapes import SHAPES
from .suite import OPERATIONS, Options, memory, scale

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@functools.lru_cache(maxsize=1)  # the alternatives of one case follow one another
def case(operation: str, name: str) -> tuple[Case, dict[str, float]]:
    """An operation's case at a shape, and stock's errors."""
    shape, _ = scale(SHAPES[name], Options(shapes=(name,), device=DEVICE), memory(DEVICE))
    _, make, _ = OPERATIONS[operation]
    made = make(shape, DEVICE)
    return made, errors(made.both(made.eager), made.truth(), len(made.forward(made.eager)))


@pytest.mark.parametrize("alternative", ["stock eager", "stock compiled", "ours"])
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("name", SHAPES)
def test_forward_and_backward(benchmark, operation, name, alternative):
    """Forward and backward; the forward pass alone of shapes that are for evaluation."""
    benchmark.group = f"{operation}, {name}"
    made, stock_error = case(operation, name)
    if alternative == "ours":
        function = made.ours[OPERATIONS[operation][2]]
        got = made.both(function)
        assert is_right(errors(got, made.truth(), len(made.forward(function))), stock_error)
    elif alternative == "stock compiled":
        torch._dynamo.reset()
        function = torch.compile(made.graph, fullgraph=True, dynamic=False)
    else:
        function = made.eager

    def run() -> None:
        made.both(function)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    run()  # which compiles
    benchmark(run)
