"""The formats that networks are exported to. It imports nothing slow: a command checks its options with it."""

from __future__ import annotations

from importlib.util import find_spec
from typing import NamedTuple

from gconv.system.errors import InputError, one_of


class ExportFormat(NamedTuple):
    """A format of :func:`gconv.export`.

    Attributes:
        name: what users write.
        suffix: of its files.
        packages: what it needs beside PyTorch.
    """

    name: str
    suffix: str
    packages: tuple[str, ...] = ()

    @property
    def missing_packages(self) -> list[str]:
        """Those of its packages that are not installed."""
        return [package for package in self.packages if find_spec(package) is None]


FORMATS = {
    format.name: format
    for format in (
        ExportFormat("torch", ".pt"),
        ExportFormat("pt2", ".pt2"),
        ExportFormat("onnx", ".onnx", ("onnx", "onnxruntime", "onnxscript")),
    )
}


def export_format(name: str) -> ExportFormat:
    """The format of that name, in any case.

    Raises:
        InputError: there is no such format, or a package that it needs is not installed.
    """
    if not isinstance(name, str) or name.lower() not in FORMATS:
        raise one_of("format", name, FORMATS)
    format = FORMATS[name.lower()]
    if missing := format.missing_packages:
        what = f"format {format.name} needs {', '.join(missing)}, not installed here"
        raise InputError(f"{what}. Try: pip install 'gconv-separable[export]'")
    return format
