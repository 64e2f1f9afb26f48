"""Exporting a network as one file that runs without this package."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from gconv.models.networks import Model
from gconv.system.files import atomic_path

from .export_formats import export_format
from .fuse import to_plain

TOLERANCE = 1e-5  # how far class scores may be off, relative to the largest


def export(net: Model, path: str | Path, format: str = "torch") -> float:
    """Write a network as one file that runs without this package, in single precision, for any batch size.

    The file holds the network of :func:`gconv.to_plain`: ordinary layers, batch norm folded. It is written only if what
    it holds gives the class scores of ``net``, for a batch and for a single image.

    ========= ================================== ===================================================================
    format    runs in                            loaded by
    ========= ================================== ===================================================================
    ``torch`` PyTorch, as an ordinary module     ``torch.load(path, weights_only=False)``
    ``pt2``   PyTorch, as a program of           ``torch.export.load(path).module()``
              ``torch.export``
    ``onnx``  anything that reads ONNX           ``onnxruntime.InferenceSession(path)``; ``images`` in, ``scores`` out
    ========= ================================== ===================================================================

    Choose ``torch`` to look at the layers or to build on them: the file holds ``nn.Conv2d`` and so on, under their
    names. It is a pickled module, that is, a program, which PyTorch must be told to trust. ``pt2`` and ``onnx`` need no
    such trust. They take images of the published size; ``torch`` takes every size that the network takes.

    Args:
        net: a network of :func:`gconv.create_model`, converted or not; it stays as it is.
        path: the file; one that is there is replaced.
        format: ``"torch"``, ``"pt2"`` or ``"onnx"`` (which needs the packages of ``gconv-separable[export]``).

    Returns:
        The largest difference of a class score that was seen, relative to the largest score.

    Raises:
        InputError: as :func:`gconv.to_plain`, or an unknown format, a package that is not installed, or a path that
            cannot be written.
        RuntimeError: the class scores are not those of ``net``; no file was written.
    """
    write, read = _CODECS[export_format(format).name]
    plain = to_plain(net).cpu().float().requires_grad_(False)
    images = torch.rand(3, *net.input_shape, generator=torch.Generator().manual_seed(0))
    data = write(plain, images)
    difference = _difference(net, read(data), images)
    if not difference <= TOLERANCE:  # so that NaN does not pass
        raise RuntimeError(f"{path} was not written: its class scores would be off by {difference:.1e} of the largest")
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)
    return difference


def _write_torch(plain: nn.Module, images: Tensor) -> bytes:
    buffer = io.BytesIO()
    torch.save(plain, buffer)
    return buffer.getvalue()


def _read_torch(data: bytes) -> Callable[[Tensor], Tensor]:
    # This executes what is in the data. It is only ever given the bytes that were just made.
    module: nn.Module = torch.load(io.BytesIO(data), weights_only=False)
    return module


def _write_pt2(plain: nn.Module, images: Tensor) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(_program(plain, images), buffer)
    return buffer.getvalue()


def _read_pt2(data: bytes) -> Callable[[Tensor], Tensor]:
    return torch.export.load(io.BytesIO(data)).module()


def _write_onnx(plain: nn.Module, images: Tensor) -> bytes:
    # The exporter remarks on packages that are not needed here and on its own use of PyTorch. Before version 0.7,
    # onnxscript prints what it did on stdout, which may be reserved for JSON.
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            written = torch.onnx.export(
                _program(plain, images),
                dynamo=True,
                dynamic_shapes=({0: "batch"},),
                input_names=["images"],
                output_names=["scores"],
                verbose=False,
            )
    finally:
        logger.setLevel(level)
    assert written is not None
    data: bytes = written.model_proto.SerializeToString()
    return data


def _read_onnx(data: bytes) -> Callable[[Tensor], Tensor]:
    import onnxruntime  # an optional dependency

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


_Write = Callable[[nn.Module, Tensor], bytes]
_Read = Callable[[bytes], Callable[[Tensor], Tensor]]
_CODECS: dict[str, tuple[_Write, _Read]] = {
    "torch": (_write_torch, _read_torch),
    "pt2": (_write_pt2, _read_pt2),
    "onnx": (_write_onnx, _read_onnx),
}
"""By format: how a plain network and an example of its input become the bytes of a file, and how these are run."""


def _program(plain: nn.Module, images: Tensor) -> ExportedProgram:
    """The program of ``torch.export``, for any number of images."""
    # Weights in another memory format would be saved with a warning.
    plain = plain.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    program = torch.export.export(plain, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names folders of this machine
    return program


def _difference(net: Model, exported: Callable[[Tensor], Tensor], images: Tensor) -> float:
    """How far off the class scores are at most, relative to the largest of ``net`` in double precision."""
    with torch.no_grad():
        scores = deepcopy(net).cpu().double().eval()(images.double())
        found = torch.cat([exported(images), exported(images[:1])])
        difference = (found - torch.cat([scores, scores[:1]])).abs().max().item()
        largest = scores.abs().max().item()
    return difference / largest if largest else difference
