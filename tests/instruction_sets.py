"""Runs tests again with the native kernels of a slower instruction set."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from decoder_fast import native

OTHERS = ("avx2", "portable")


def rerun(instruction_set: str, file: str, tests: str) -> None:
    """Run the tests of ``file`` that ``-k tests`` selects, in a process of their own."""
    if (reason := native.reason()) is not None:
        pytest.skip(reason)
    environment = os.environ | {"DECODER_FAST_INSTRUCTION_SET": instruction_set}
    describe = "from decoder_fast import native; print(native.describe()['instruction set'])"

    def python(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    if python("-c", describe).stdout.strip() != instruction_set:
        pytest.skip(f"this processor or build cannot use {instruction_set}")
    tested = python("-m", "pytest", file, "-k", tests)
    assert tested.returncode == 0, tested.stdout[-5000:]
