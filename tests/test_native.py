"""The native library: compiled on first use, checked when loaded, its absence a readable reason."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from decoder_fast import _build, backends, native

needs_compiler = pytest.mark.skipif(
    os.name != "posix" or not any(map(shutil.which, native._COMPILERS)),
    reason="needs a POSIX system with a C++ compiler on PATH",
)


#: The library of the installed package, and where one compiled on first use is kept.
BUILT = native._BUILT
CACHE = os.environ.get("XDG_CACHE_HOME", "")

#: In place of the kernels, which take a minute to compile.
NO_KERNELS = """
#include "kernels.h"
namespace decoder_fast {
const Kernels& kernels() {
    static const Kernels none{"portable"};
    return none;
}
}
"""


@pytest.fixture(autouse=True)
def uninstalled(monkeypatch, tmp_path):
    """A package whose library was never built, with an empty cache, in a fresh process."""
    monkeypatch.setattr(native, "_BUILT", tmp_path / "package" / _build.LIBRARY)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("DECODER_FAST_BUILD", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    for cached in (native._state, backends._choose):
        cached.cache_clear()
    yield
    for cached in (native._state, backends._choose):
        cached.cache_clear()


@pytest.fixture
def sources(monkeypatch, tmp_path) -> Path:
    """A copy of csrc to be changed, without its kernels."""
    copy = shutil.copytree(native._CSRC, tmp_path / "csrc")
    for file in copy.glob("*.cpp"):
        if file.name != "library.cpp":
            file.unlink()
    (copy / "kernels.cpp").write_text(NO_KERNELS)
    monkeypatch.setattr(native, "_CSRC", copy)
    return copy


@pytest.fixture
def installed(monkeypatch, uninstalled) -> None:
    """The library that the package really has."""
    monkeypatch.setattr(native, "_BUILT", BUILT)
    monkeypatch.setenv("XDG_CACHE_HOME", CACHE)


def cached_files(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def assert_unavailable(*parts: str) -> None:
    """Every function tells the same reason, which holds all the parts, and none crashes."""
    reason = native.reason()
    assert reason is not None
    assert [part for part in parts if part not in reason] == [], reason
    assert native.operations() == frozenset()
    for function in (native.load, native.describe):
        with pytest.raises(RuntimeError) as caught:
            function()
        assert str(caught.value) == reason
    cpu = torch.device("cpu")
    assert backends.choose("count_nll", device=cpu).reasons["cpp"] == reason
    with pytest.raises(RuntimeError) as caught:
        backends.choose("count_nll", "cpp", device=cpu)
    assert reason in str(caught.value)


def test_a_triton_that_does_not_start(monkeypatch):
    """Without a C compiler, say: a reason, where stock scvi-tools trains all the same."""
    pytest.importorskip("triton", reason="triton is not installed")
    from triton.runtime import driver

    class Driver:
        def get_current_target(self):
            raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(type(driver), "active", property(lambda self: Driver()))
    backends._missing_triton.cache_clear()
    backends._choose.cache_clear()
    try:
        choice = backends.choose("count_nll", device=torch.device("cuda"))
    finally:
        backends._missing_triton.cache_clear()
        backends._choose.cache_clear()
    assert choice.backend == "torch"
    reason = choice.reasons["triton"]
    assert "does not start here (RuntimeError: Failed to find C compiler.); it needs" in reason


@pytest.mark.parametrize(
    ("capability", "hip", "old"),
    [((7, 5), None, True), ((8, 0), None, False), ((12, 0), None, False), ((7, 0), "6.4", False)],
)
def test_gpus_that_are_too_old(monkeypatch, capability, hip, old):
    monkeypatch.setattr(backends, "_missing_triton", lambda: None)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    backends._choose.cache_clear()
    choice = backends.choose("count_nll", device=torch.device("cuda"))
    backends._choose.cache_clear()
    assert (choice.backend == "torch") == old
    assert ("capability 8.0 or later (Ampere, 2020), and Tesla T4 has 7.5" in str(choice)) == old


@needs_compiler
def test_is_compiled_once_on_first_use(tmp_path):
    assert cached_files(tmp_path) == []
    assert native.reason() is None
    (library,) = cached_files(tmp_path)
    assert native.describe()["path"] == str(library)
    assert isinstance(native.load(), ctypes.CDLL)

    compiled = library.stat().st_mtime_ns
    native._state.cache_clear()
    assert native.reason() is None
    assert cached_files(tmp_path) == [library]
    assert library.stat().st_mtime_ns == compiled


@needs_compiler
def test_changed_sources_are_compiled_anew(tmp_path, sources):
    first = native._compile()
    (sources / "library.cpp").write_text((sources / "library.cpp").read_text() + "\n// changed\n")
    second = native._compile()
    assert first != second
    assert sorted(cached_files(tmp_path)) == sorted([first, second])


@needs_compiler
@pytest.mark.usefixtures("sources")
def test_processes_that_start_together_share_one_library(tmp_path):
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: native._compile(), range(4)))
    assert cached_files(tmp_path) == list(paths)
    assert native.reason() is None


@needs_compiler
@pytest.mark.usefixtures("installed")
def test_describes_itself():
    described = native.describe()
    assert described["abi version"] == str(native.ABI_VERSION)
    assert described["compiler"].startswith(("gcc ", "clang "))
    assert native.operations() <= set(backends.OPERATIONS)


@needs_compiler
@pytest.mark.usefixtures("installed")
@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs Linux's /proc/cpuinfo")
@pytest.mark.skipif(
    "DECODER_FAST_INSTRUCTION_SET" in os.environ,
    reason="DECODER_FAST_INSTRUCTION_SET names another than the processor's fastest",
)
def test_instruction_set_is_the_cpus():
    flags = set(Path("/proc/cpuinfo").read_text().split())
    expected = "portable"
    if flags >= {"avx2", "fma"}:
        expected = "avx2"
    if flags >= {"avx512f", "avx512bw", "avx512dq", "avx512vl"}:
        expected = "avx512_bf16" if "avx512_bf16" in flags else "avx512"
    assert native.describe()["instruction set"] == expected


def test_no_compiler_on_path(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "")
    assert_unavailable("no C++ compiler was found", "c++, g++, clang++", "apt install g++")
    assert cached_files(tmp_path) == []


def test_compiler_named_by_cxx_is_missing(monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/c++ -O0")
    assert_unavailable("no C++ compiler was found", "CXX names /nowhere/c++")


def test_compiler_does_not_run(monkeypatch):
    monkeypatch.setenv("CXX", shutil.which("false") or pytest.skip("needs the command 'false'"))
    assert_unavailable("the C++ compiler does not run", "status 1", "install one")


def test_building_is_forbidden(monkeypatch, tmp_path):
    monkeypatch.setenv("DECODER_FAST_BUILD", "0")
    assert_unavailable("DECODER_FAST_BUILD=0 forbids", "unset it")
    assert cached_files(tmp_path) == []


def test_sources_are_missing(monkeypatch):
    monkeypatch.setattr(native, "_CSRC", None)
    assert_unavailable("sources are missing", "reinstall")


@needs_compiler
def test_sources_do_not_compile(tmp_path, sources):
    (sources / "library.cpp").write_text("int main( {")
    assert_unavailable("did not compile", "library.cpp", "error")
    assert cached_files(tmp_path) == []


@needs_compiler
def test_cache_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "a file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a file"))
    assert_unavailable("cannot be written", str(tmp_path / "a file"), "XDG_CACHE_HOME")


def test_library_is_broken():
    native._BUILT.parent.mkdir()
    native._BUILT.write_bytes(b"not a library")
    assert_unavailable("does not load", str(native._BUILT), "reinstall")


def build_in_package(source: str, sources: Path) -> None:
    """Put a library made of one source file where installing the package would have put it."""
    (sources / "library.cpp").write_text(source)
    native._BUILT.parent.mkdir()
    shutil.copy(native._compile(), native._BUILT)


@needs_compiler
def test_library_is_someone_elses(sources):
    build_in_package('extern "C" int answer() { return 42; }', sources)
    assert_unavailable("is not decoder_fast's library", "decoder_fast_abi_version", "reinstall")


@needs_compiler
def test_library_of_another_abi_version(sources):
    source = (sources / "library.cpp").read_text()
    ours, theirs = f"abi_version = {native.ABI_VERSION};", "abi_version = 999;"
    assert ours in source
    build_in_package(source.replace(ours, theirs), sources)
    assert_unavailable("ABI version 999", f"expects {native.ABI_VERSION}", "reinstall")


@needs_compiler
def test_names_of_operations_are_read(sources):
    source = (sources / "library.cpp").read_text()
    changed = re.sub('operations = "[^"]*";', 'operations = "count_nll covariate_linear";', source)
    assert changed.count('operations = "count_nll covariate_linear";') == 1
    build_in_package(changed, sources)
    assert native.operations() == {"count_nll", "covariate_linear"}
    chosen = backends.choose("count_nll", "cpp", device=torch.device("cpu"))
    assert chosen.backend == "cpp"


def test_build_recipe_needs_the_standard_library_only():
    """setup.py runs it before anything is installed."""
    import ast

    tree = ast.parse(Path(_build.__file__).read_text())
    imported = {
        name
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported <= sys.stdlib_module_names


def test_structures_that_disagree_are_refused():
    """A field that only one side has would shift all that follow."""
    if (reason := native.reason()) is not None:
        pytest.skip(reason)

    class Short(ctypes.Structure):
        _fields_ = (("n_rows", ctypes.c_int64),)

    with pytest.raises(RuntimeError, match=r"csrc/csr_linear\.h and .* disagree"):
        native.functions("csr_linear", [Short], {})
