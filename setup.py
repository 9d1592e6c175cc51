"""What pyproject.toml cannot say: the native library and where some of the packages come from."""

import os
import runpy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

BUILD = runpy.run_path("decoder_fast/_build.py")
CSRC = Path("csrc")


class BuildLibrary(build_ext):
    """Builds a plain C library: no Python tag in its name, no PyInit function to export."""

    def get_ext_filename(self, fullname):
        return str(Path(*fullname.split(".")).with_name(BUILD["LIBRARY"]))

    def get_export_symbols(self, ext):
        return []

    def build_extension(self, ext):
        ext.extra_compile_args = BUILD["COMPILE_FLAGS"]
        ext.extra_link_args = BUILD["LINK_FLAGS"]
        compile_in_turn = self.compiler.compile

        def compile_side_by_side(sources, **options):
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                compiled = pool.map(lambda source: compile_in_turn([source], **options), sources)
                return [name for names in compiled for name in names]

        self.compiler.compile = compile_side_by_side
        super().build_extension(ext)


class Wheel(bdist_wheel):
    """A wheel that depends on the platform, but on no version of Python."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    packages=[
        *find_packages(include=["decoder_fast", "decoder_fast.*"]),
        "decoder_fast.triton_kernels",
        "decoder_fast.csrc",
        "decoder_fast.bench",
    ],
    # Triton itself ships a top-level package triton_kernels: ours must not be installed as one.
    package_dir={
        "decoder_fast.triton_kernels": "triton_kernels",
        "decoder_fast.csrc": "csrc",
        "decoder_fast.bench": "bench",
    },
    # The sources travel along, to be compiled on first use where the library was not built.
    package_data={
        "decoder_fast": ["py.typed"],
        "decoder_fast.csrc": ["*.cpp", "*.h"],
    },
    ext_modules=[
        Extension(
            "decoder_fast._native",
            sources=[path.as_posix() for path in BUILD["sources"](CSRC)],
            depends=["decoder_fast/_build.py", *(p.as_posix() for p in CSRC.glob("*.h"))],
            language="c++",
            optional=True,  # without a compiler the package installs all the same
        )
    ],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel},
)
