"""What pyproject.toml cannot say: the compiled kernel, which is left out where it cannot be built."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "gconv._compiled",
            ["gconv/csrc/full.c", "gconv/csrc/norm.c", "gconv/csrc/separable.c"],
            depends=["gconv/csrc/planes.h", "gconv/csrc/rows.h", "gconv/csrc/undefine.h", "gconv/csrc/vectors.h"],
            extra_compile_args=["-O3", "-fopenmp"],  # and not linked with OpenMP: PyTorch has loaded its own
            optional=True,
        )
    ]
)
