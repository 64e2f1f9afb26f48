"""What pyproject.toml cannot say: how the compiled kernels are built.

Where they cannot be built, they are left out, and PyTorch's operations do their work. Two things make a failure an
error: GCONV_REQUIRE_KERNEL=1 in the environment, and the command ``python setup.py build_ext --inplace``. A failed
build never leaves an older library behind.
"""

import os
import runpy
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

CSRC = Path("gconv/kernels/csrc")  # relative, as setuptools wants it
SOURCES = runpy.run_path("gconv/kernels/sources.py")
REQUIRED = os.environ.get("GCONV_REQUIRE_KERNEL") == "1" or "build_ext" in sys.argv


class BuildKernel(build_ext):
    """Builds a library for ctypes, which is the same for all versions of Python, so its name is without one."""

    def get_ext_filename(self, fullname: str) -> str:
        return f"{os.path.join(*fullname.split('.'))}.so"

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except Exception:
            name = self.get_ext_filename(ext.name)
            for old in (Path(name), Path(self.build_lib) / name):
                old.unlink(missing_ok=True)
            raise

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []  # it is no Python module


class WheelForAllPythons(bdist_wheel):
    """One file for a platform and every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    cmdclass={"build_ext": BuildKernel, "bdist_wheel": WheelForAllPythons},
    ext_modules=[
        Extension(
            "gconv.kernels._compiled",
            sorted(str(path) for path in CSRC.glob("*.c")),
            depends=sorted(str(path) for path in CSRC.glob("*.h")),
            define_macros=[("GCONV_SOURCES", f'"{SOURCES["digest"]()}"')],
            extra_compile_args=["-O3", "-fvisibility=hidden"],
            libraries=["m"],
            optional=not REQUIRED,
        )
    ],
)
