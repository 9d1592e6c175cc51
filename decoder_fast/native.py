"""The native CPU library: found, or compiled once, on first use; its absence is a reason to read.

The library is usually built when the package is installed. Where it was not (no compiler at that
time, or a checkout that was never installed) the C++ sources that come with the package are
compiled on first use into ``$XDG_CACHE_HOME/decoder_fast`` (``~/.cache/decoder_fast``); the
environment variable ``DECODER_FAST_BUILD=0`` forbids that, ``CXX`` and ``CXXFLAGS`` choose the
compiler and add flags. Importing this module loads and compiles nothing; :func:`reason` and
:func:`operations` answer where there is no library, all else raises.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import _build

__all__ = ["ABI_VERSION", "describe", "functions", "load", "operations", "reason"]

#: The version of the C interface that this module speaks; ``csrc/library.cpp`` has the same number.
ABI_VERSION = 3

_PACKAGE = Path(__file__).resolve().parent
_BUILT = _PACKAGE / _build.LIBRARY
#: Inside the package once installed, beside it in a checkout.
_CSRC = next((p for p in (_PACKAGE / "csrc", _PACKAGE.parent / "csrc") if p.is_dir()), None)

_COMPILERS = ("c++", "g++", "clang++")
_GET_COMPILER = (
    "install one ('apt install g++', 'xcode-select --install' or "
    "'conda install -c conda-forge cxx-compiler'); it is used on the next start"
)


class _Unavailable(Exception):
    """The native library cannot be used; the message is the reason."""


@dataclass(frozen=True)
class _State:
    library: ctypes.CDLL | None = None
    path: Path | None = None
    reason: str | None = None


def _open(path: Path, remedy: str) -> ctypes.CDLL:
    """Load a library file and check that it speaks this module's ABI version."""
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise _Unavailable(f"the native library {path} does not load ({error}); {remedy}") from None
    try:
        library.decoder_fast_abi_version.restype = ctypes.c_int32
        for name in ("operations", "compiler", "instruction_set"):
            getattr(library, f"decoder_fast_{name}").restype = ctypes.c_char_p
    except AttributeError as error:
        raise _Unavailable(f"{path} is not decoder_fast's library ({error}); {remedy}") from None
    if (found := library.decoder_fast_abi_version()) != ABI_VERSION:
        raise _Unavailable(
            f"the native library {path} has ABI version {found}, but this version of decoder_fast "
            f"expects {ABI_VERSION}: the library is of another build; {remedy}"
        )
    return library


def _compiler() -> tuple[list[str], str]:
    """Find the C++ compiler: its command, and what it says of its version."""
    if named := shlex.split(os.environ.get("CXX", "")):
        found, looked_for = shutil.which(named[0]), f"the environment variable CXX names {named[0]}"
    else:
        found = next(filter(None, map(shutil.which, _COMPILERS)), None)
        looked_for = f"looked for {', '.join(_COMPILERS)} on PATH"
    if found is None:
        raise _Unavailable(
            "the native library was not built when the package was installed, and no C++ compiler "
            f"was found to build it now ({looked_for}); {_GET_COMPILER}"
        )
    command = [found, *named[1:]]
    try:
        version = _run([*command, "--version"])
    except _Unavailable as error:
        raise _Unavailable(f"the C++ compiler does not run: {error}; {_GET_COMPILER}") from None
    return command, version


def _run(command: list[str]) -> str:
    """Run a command and return what it printed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    except (OSError, subprocess.SubprocessError) as error:
        raise _Unavailable(f"'{shlex.join(command)}' failed ({error})") from None
    if done.returncode != 0:
        said = "\n".join(done.stderr.strip().splitlines()[-10:])
        raise _Unavailable(f"'{shlex.join(command)}' failed with status {done.returncode}:\n{said}")
    return done.stdout


def _cache() -> Path:
    """Return the folder of libraries compiled on first use."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "decoder_fast"


def _compile() -> Path:
    """Compile the library into the cache, unless it is there, and return its path."""
    if os.environ.get("DECODER_FAST_BUILD") == "0":
        raise _Unavailable(
            "the native library was not built when the package was installed, and the environment "
            "variable DECODER_FAST_BUILD=0 forbids to build it now; unset it, or reinstall the "
            "package where there is a C++ compiler"
        )
    if os.name != "posix" or _CSRC is None:
        missing = "its C++ sources are missing" if _CSRC is None else "this is not a POSIX system"
        raise _Unavailable(
            "the native library was not built when the package was installed, and cannot be built "
            f"now: {missing}; reinstall the package where there is a C++ compiler"
        )
    compiler, version = _compiler()
    flags = [*_build.COMPILE_FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]

    key = hashlib.sha256(repr((compiler, version, flags, sysconfig.get_platform())).encode())
    for file in sorted(path for path in _CSRC.iterdir() if path.is_file()):
        key.update(f"{file.name}\0{file.stat().st_size}\0".encode() + file.read_bytes())
    target = _cache() / key.hexdigest()[:20] / _build.LIBRARY
    if target.is_file():
        return target

    try:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Renaming is atomic: processes that start together never see half a library.
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            output = Path(folder) / _build.LIBRARY
            sources = _build.sources(_CSRC)
            objects = [Path(folder) / f"{source.stem}.o" for source in sources]
            commands = [
                [*compiler, *flags, "-c", "-o", str(to), str(source)]
                for source, to in zip(sources, objects, strict=True)
            ]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(_run, commands))
            link = [*_build.LINK_FLAGS, "-shared", "-o", str(output)]
            _run([*compiler, *flags, *map(str, objects), *link])
            os.replace(output, target)
    except OSError as error:
        raise _Unavailable(
            f"the native library cannot be written to {target.parent} ({error}); let the "
            "environment variable XDG_CACHE_HOME name a folder that can be written"
        ) from None
    except _Unavailable as error:
        raise _Unavailable(f"the native library did not compile: {error}") from None
    return target


@functools.cache
def _state() -> _State:
    """Find, or compile, and load the library: once a process, whatever comes of it."""
    try:
        if _BUILT.is_file():
            remedy = "reinstall decoder-fast, or delete the file to have it compiled on next use"
            return _State(_open(_BUILT, remedy), _BUILT)
        path = _compile()
        remedy = "delete the file to have it compiled again on next use"
        return _State(_open(path, remedy), path)
    except _Unavailable as error:
        return _State(reason=str(error))


def reason() -> str | None:
    """Say why the native library cannot be used.

    The first call of a process loads the library, and compiles it where that was never done.

    Returns
    -------
    str or None
        None if the library is loaded; else what is missing and how to get it.
    """
    return _state().reason


def load() -> ctypes.CDLL:
    """Return the loaded native library.

    Returns
    -------
    ctypes.CDLL
        The library; argument types of its kernels are for the caller to declare.

    Raises
    ------
    RuntimeError
        If it cannot be used; the message is :func:`reason`.
    """
    state = _state()
    if state.library is None:
        raise RuntimeError(state.reason)
    return state.library


def functions(
    operation: str, structures: Sequence[type[ctypes.Structure]], results: dict[str, Any]
) -> list[Callable[..., Any]]:
    """Return an operation's functions, each of which takes a pointer to the first structure.

    Parameters
    ----------
    operation
        Name of the operation.
    structures
        What ``csrc/<operation>.h`` declares, field by field: the argument first.
    results
        Name of each function, without the library's prefix, and its ctypes result type.

    Returns
    -------
    list of callable
        The functions, in the order of ``results``.

    Raises
    ------
    RuntimeError
        If there is no library, or both sides mean structures of different sizes.
    """
    library = load()
    size = library[f"decoder_fast_{operation}_size"]
    size.restype = ctypes.c_int64
    if size() != sum(map(ctypes.sizeof, structures)):
        raise RuntimeError(
            f"csrc/{operation}.h and decoder_fast/cpp/{operation}.py disagree: the library is of "
            "another version; reinstall decoder-fast"
        )
    found: list[Callable[..., Any]] = []
    for name, result in results.items():
        function = library[f"decoder_fast_{name}"]
        function.argtypes, function.restype = [ctypes.POINTER(structures[0])], result
        found.append(function)
    return found


def operations() -> frozenset[str]:
    """Name the operations that the loaded library implements.

    Returns
    -------
    frozenset of str
        Names out of :data:`decoder_fast.backends.OPERATIONS`; empty if there is no library.
    """
    library = _state().library
    return frozenset(library.decoder_fast_operations().decode().split() if library else ())


def describe() -> dict[str, str]:
    """Describe the loaded library.

    Returns
    -------
    dict
        The library's ``"path"``, its ``"abi version"``, the ``"instruction set"`` that its kernels
        use on this machine (``"avx512_bf16"``, ``"avx512"``, ``"avx2"`` or ``"portable"``) and the
        ``"compiler"`` that built it.

    Raises
    ------
    RuntimeError
        If it cannot be used; the message is :func:`reason`.
    """
    library = load()
    return {
        "path": str(_state().path),
        "abi version": str(library.decoder_fast_abi_version()),
        "instruction set": library.decoder_fast_instruction_set().decode(),
        "compiler": library.decoder_fast_compiler().decode(),
    }
