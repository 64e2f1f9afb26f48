"""What pyproject.toml cannot say: the compiled kernel, which is left out where it cannot be built."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "gconv.kernels._compiled",
            [
                "gconv/kernels/csrc/batch_norm.c",
                "gconv/kernels/csrc/separable_conv.c",
                "gconv/kernels/csrc/small_conv.c",
            ],
            depends=[
                f"gconv/kernels/csrc/{name}.h" for name in ("over_channels", "over_pixels", "undefine", "vectors")
            ],
            extra_compile_args=["-O3", "-fopenmp"],  # and not linked with OpenMP: PyTorch has loaded its own
            optional=True,
        )
    ]
)
