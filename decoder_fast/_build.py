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

#: Compiler flags, by setuptools' name for the kind of compiler. No ``-march``: kernels choose the
#: instruction set at run time, so a library built on one machine runs on another.
COMPILE_FLAGS = {
    # No contraction: what is fused is written so, and results do not depend on the compiler.
    "unix": ["-std=c++17", "-O3", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden"],
    "msvc": ["/std:c++17", "/O2", "/EHsc"],
}

#: Flags of the linker, likewise.
LINK_FLAGS: dict[str, list[str]] = {
    "unix": ["-pthread"] + (["-ldl"] if sys.platform == "linux" else []),
    "msvc": [],
}


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
