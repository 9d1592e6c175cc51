"""How the native library is built: read by ``setup.py`` and by :mod:`decoder_fast.native`.

``setup.py`` runs this file by its path, before torch need be installed: it imports only the
standard library.
"""

from __future__ import annotations

import sys
from pathlib import Path

__all__ = ["COMPILE_FLAGS", "LIBRARY", "LINK_FLAGS", "sources"]

#: File name of the library, beside the package's modules. It carries no Python tag: the library
#: knows nothing of Python, so one build serves every version.
LIBRARY = "_native.dll" if sys.platform == "win32" else "_native.so"

#: Flags of GCC and clang, in whose vectors the kernels are written; MSVC has none. No ``-march``:
#: kernels choose the instruction set at run time, so that a library runs on other machines too. No
#: contraction: what is fused is written so, and results do not depend on the compiler.
COMPILE_FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden"]

#: Flags of the linker.
LINK_FLAGS = ["-pthread"] + (["-ldl"] if sys.platform == "linux" else [])


def sources(folder: Path) -> list[Path]:
    """List the C++ files to compile, sorted so that builds are reproducible.

    Parameters
    ----------
    folder
        The folder ``csrc``.

    Returns
    -------
    list of Path
        Every ``.cpp`` file directly in ``folder``.
    """
    return sorted(folder.glob("*.cpp"))
