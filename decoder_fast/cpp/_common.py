"""What ``csrc/common.h`` declares, and what the modules here share."""

from __future__ import annotations

#: Of the scale head: ``decoder_fast::Activation``.
ACTIVATIONS = {"softmax": 0, "softplus": 1}

#: What a kernel returns: ``decoder_fast::Status``.
OK, BAD_COUNT, BAD_LABEL, OUT_OF_MEMORY = range(4)


def check_memory(status: int, operation: str) -> None:
    """Raise what a kernel that got no memory has to say."""
    if status == OUT_OF_MEMORY:
        raise MemoryError(
            f"{operation}: no memory for the workspace of the native CPU kernel; use smaller "
            "mini-batches or fewer threads"
        )
