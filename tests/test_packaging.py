"""What is shipped: wheel, sdist and editable copy, with a compiler and without.

Everything is built offline, from a copy of the checkout, and looked at from outside of it.
"""

from __future__ import annotations

import email
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from decoder_fast import __version__, _build, native

CHECKOUT = Path(__file__).resolve().parent.parent
WORKS = (
    (CHECKOUT / "setup.py").is_file()
    and shutil.which("c++") is not None
    and sys.platform.startswith(("linux", "darwin"))
)
pytestmark = pytest.mark.skipif(
    not WORKS, reason="needs a checkout, a C++ compiler named c++, and Linux or macOS"
)

#: Printed by an interpreter outside the checkout that has imported the installed package.
LOOK = """
import importlib.util, json, sys
import torch
before = set(sys.modules)
import decoder_fast
new = {name.split(".")[0] for name in set(sys.modules) - before}
loaded = "decoder_fast.native" in sys.modules and (
    sys.modules["decoder_fast.native"]._state.cache_info().currsize > 0
)
top_level = importlib.util.find_spec("triton_kernels")
import decoder_fast.native as native
import decoder_fast.triton_kernels as kernels
print(json.dumps({
    "package": decoder_fast.__file__,
    "version": decoder_fast.__version__,
    "imported": sorted(new),
    "loaded on import": loaded,
    "kernels": kernels.__file__,
    "top-level triton_kernels": top_level and top_level.origin,
    "library": native.describe()["path"] if native.reason() is None else None,
    "reason": native.reason(),
}))
"""


def run(*command, cwd, **environment) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip(*arguments, cwd, **environment) -> None:
    offline = ("--no-index", "--no-deps", "--disable-pip-version-check", "--quiet")
    run("-m", "pip", *arguments, *offline, cwd=cwd, **environment)


def wheel(source: Path, into: Path, **environment) -> Path:
    """Build a wheel from a checkout or an sdist."""
    pip("wheel", source, "--no-build-isolation", "-w", into, cwd=into.parent, **environment)
    (built,) = into.glob("*.whl")
    return built


def look(installed: Path, *, command: str = LOOK, **environment) -> dict:
    """Import the package from a folder it was installed into, from outside the checkout."""
    cache = installed.parent / f"cache of {installed.name}"
    cache.mkdir(exist_ok=True)
    environment = {"PYTHONPATH": str(installed), "XDG_CACHE_HOME": str(cache), **environment}
    answer = json.loads(run("-c", command, cwd=installed.parent, **environment))
    answer["cached"] = [str(path) for path in cache.rglob("*") if path.is_file()]
    return answer


def names(archive: Path) -> set[str]:
    with zipfile.ZipFile(archive) as opened:
        return set(opened.namelist())


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy as a bare clone has it: building leaves nothing in the real one."""
    copy = tmp_path_factory.mktemp("clone") / "decoder_fast"
    leave = shutil.ignore_patterns(
        ".?*", "build", "dist", "*.egg-info", "*.so", "__pycache__", "bench-output", "demo-output"
    )
    return shutil.copytree(CHECKOUT, copy, ignore=leave)


@pytest.fixture(scope="module")
def sdist(checkout) -> Path:
    into = checkout.parent / "sdist"
    code = "import setuptools.build_meta as b, sys; b.build_sdist(sys.argv[1])"
    run("-c", code, into, cwd=checkout)
    (built,) = into.glob("*.tar.gz")
    return built


@pytest.fixture(scope="module")
def built(checkout, sdist) -> Path:
    """The wheel, built from the sdist: so the sdist is complete."""
    return wheel(sdist, checkout.parent / "wheel")


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("installed") / "site"
    pip("install", built, "--target", folder, cwd=folder.parent)
    return folder


@pytest.fixture(scope="module")
def metadata(built):
    with zipfile.ZipFile(built) as opened:
        (name,) = (n for n in opened.namelist() if n.endswith(".dist-info/METADATA"))
        return email.message_from_string(opened.read(name).decode())


def test_sdist_holds_the_sources(sdist):
    with tarfile.open(sdist) as opened:
        held = {name.partition("/")[2] for name in opened.getnames()}
    assert held >= {
        "LICENSE",
        "csrc/library.cpp",
        "decoder_fast/_build.py",
        "decoder_fast/py.typed",
        "pyproject.toml",
        "setup.py",
        "tests/test_packaging.py",
        "triton_kernels/__init__.py",
    }
    assert not [name for name in held if name.endswith((".so", ".pyc"))]


def test_wheel_depends_on_the_platform_but_on_no_python(built):
    assert built.name.startswith(f"decoder_fast-{__version__}-py3-none-")
    assert not built.name.endswith("-any.whl")
    with zipfile.ZipFile(built) as opened:
        (name,) = (n for n in opened.namelist() if n.endswith(".dist-info/WHEEL"))
        described = email.message_from_string(opened.read(name).decode())
    assert described["Root-Is-Purelib"] == "false"
    assert all(tag.startswith("py3-none-") for tag in described.get_all("Tag"))


def test_wheel_holds_everything_under_one_package(built):
    held = names(built)
    assert held >= {
        f"decoder_fast/{_build.LIBRARY}",
        "decoder_fast/bench/suite.py",
        "decoder_fast/csrc/library.cpp",
        "decoder_fast/py.typed",
        "decoder_fast/triton_kernels/__init__.py",
    }
    assert {name.split("/")[0] for name in held} == {
        "decoder_fast",
        f"decoder_fast-{__version__}.dist-info",
    }
    tracked = {
        path.relative_to(CHECKOUT).as_posix()
        for folder in ("decoder_fast", "triton_kernels", "csrc", "bench")
        for path in (CHECKOUT / folder).rglob("*")
        if path.suffix in {".py", ".cpp", ".h"}
    }
    shipped = {
        name if name.startswith("decoder_fast/") else f"decoder_fast/{name}" for name in tracked
    }
    assert shipped - held == set()
    assert not [name for name in held if name.startswith("decoder_fast/bench/results")]


def test_metadata(built, metadata):
    assert metadata["Name"] == "decoder-fast"
    assert metadata["Version"] == __version__
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "BSD-3-Clause"
    assert metadata.get_all("License-File") == ["LICENSE"]
    required = metadata.get_all("Requires-Dist")
    assert [line for line in required if "extra ==" not in line] == ["torch>=2.11", "numpy"]
    assert set(metadata.get_all("Provides-Extra")) == {"scvi", "test", "bench"}
    assert 'scvi-tools>=1.4.2; extra == "scvi"' in required
    with zipfile.ZipFile(built) as opened:
        (name,) = (n for n in opened.namelist() if n.endswith("entry_points.txt"))
        assert "decoder-fast = decoder_fast.cli:main" in opened.read(name).decode()


def test_build_never_asks_for_torch():
    """An isolated build would fetch gigabytes."""
    import tomllib

    build = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["build-system"]
    assert [line.partition(">")[0] for line in build["requires"]] == ["setuptools", "wheel"]


def test_installed_wheel(installed):
    seen = look(installed)
    assert seen["package"] == str(installed / "decoder_fast" / "__init__.py")
    assert seen["version"] == __version__
    assert seen["kernels"] == str(installed / "decoder_fast" / "triton_kernels" / "__init__.py")
    assert seen["library"] == str(installed / "decoder_fast" / _build.LIBRARY)
    assert seen["cached"] == []
    assert_light(seen)
    assert_no_top_level_kernels(seen)


def assert_light(seen: dict) -> None:
    """Importing the package brings in torch and numpy, nothing heavy, and builds nothing."""
    heavy = {"anndata", "lightning", "matplotlib", "pandas", "scanpy", "scvi", "triton"}
    assert heavy & set(seen["imported"]) == set()
    assert not seen["loaded on import"]


def assert_no_top_level_kernels(seen: dict) -> None:
    """``import triton_kernels`` is Triton's own package, or none."""
    origin = seen["top-level triton_kernels"]
    ours = (CHECKOUT / "triton_kernels" / "__init__.py").read_text()
    assert origin is None or Path(origin).read_text() != ours, origin


def test_installed_wheel_measures(installed, tmp_path):
    """``decoder-fast bench`` from the wheel, outside of any checkout."""
    printed = run(
        *("-m", "decoder_fast.cli", "bench", "--quick", "--no-compile", "--shapes", "tutorial"),
        *("--parts", "operations", "--threads", "1", "--out", tmp_path / "out"),
        cwd=tmp_path,
        PYTHONPATH=str(installed),
    )
    assert "heads + likelihood" in printed
    assert (tmp_path / "out" / "benchmark.csv").stat().st_size > 0
    assert not (installed / "bench").exists()


def test_installed_wheel_compiles_what_is_missing(installed, tmp_path):
    site = shutil.copytree(installed, tmp_path / "site")
    (site / "decoder_fast" / _build.LIBRARY).unlink()
    seen = look(site)
    assert [seen["library"]] == seen["cached"]
    assert not seen["loaded on import"]


def test_checkout_as_current_folder_finds_its_kernels(checkout):
    """A checkout shadows an installed wheel wherever Python looks into the current folder."""
    seen = look(checkout, PYTHONPATH="", command=f"import os; os.chdir({str(checkout)!r})\n{LOOK}")
    assert seen["package"] == str(checkout / "decoder_fast" / "__init__.py")
    assert seen["kernels"] == str(checkout / "triton_kernels" / "__init__.py")


def test_installs_and_works_without_a_compiler(checkout, tmp_path):
    none = {"CC": "/nowhere/cc", "CXX": "/nowhere/c++", "PATH": ""}
    source = shutil.copytree(checkout, tmp_path / "source")
    built = wheel(source, tmp_path / "wheel", **none)
    assert f"decoder_fast/{_build.LIBRARY}" not in names(built)
    pip("install", built, "--target", tmp_path / "site", cwd=tmp_path, **none)
    seen = look(tmp_path / "site", **none)
    assert "no C++ compiler was found" in seen["reason"]
    assert seen["version"] == __version__


def test_editable_copy(checkout, tmp_path):
    """An editable installation, in an environment that sees this one's torch and setuptools."""
    source = shutil.copytree(checkout, tmp_path / "source")
    environment = tmp_path / "environment"
    run("-m", "venv", "--without-pip", environment, cwd=tmp_path)
    python = environment / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(environment)}))
    # The path alone: this environment's own editable installations do not come along.
    (site / "outer.pth").write_text(sysconfig.get_path("purelib"))
    arguments = ("--ignore-installed", "--no-build-isolation", "--editable", source)
    run("-m", "pip", "--python", python, "install", *arguments, "--no-index", "--no-deps",
        cwd=tmp_path)  # fmt: skip

    answer = subprocess.run(
        [python, "-c", LOOK],
        cwd=tmp_path,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=True,
    )
    seen = json.loads(answer.stdout)
    assert seen["package"] == str(source / "decoder_fast" / "__init__.py")
    assert seen["kernels"] == str(source / "triton_kernels" / "__init__.py")
    assert seen["library"] == str(source / "decoder_fast" / _build.LIBRARY)
    assert not (tmp_path / "cache").exists()
    assert_light(seen)
    assert_no_top_level_kernels(seen)
    assert (environment / "bin" / "decoder-fast").is_file()


def test_abi_version_is_one_number():
    source = (CHECKOUT / "csrc" / "library.cpp").read_text()
    assert f"abi_version = {native.ABI_VERSION};" in source
