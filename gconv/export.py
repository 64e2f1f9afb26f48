"""``python -m gconv.export``: write a network as a file that runs without this package; :func:`export` from Python."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from gconv.system.cli import Parser, loading, main_args, run
from gconv.system.errors import InputError, one_of

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.export import ExportedProgram

    from gconv.models.networks import Model

PROG = "python -m gconv.export"
TOLERANCE = 1e-5  # how far class scores may be off, relative to the largest


def export(net: Model, path: str | Path, format: str = "torch") -> float:
    """Write a network as one file that runs without this package, in single precision, for any batch size.

    It is the network of :func:`gconv.to_plain`: ordinary layers, batch norm folded. The file is written only if what it
    holds gives the class scores of ``net``, for a batch and for a single image.

    ========= ================================== ===================================================================
    format    runs in                            loaded by
    ========= ================================== ===================================================================
    ``torch`` PyTorch, as an ordinary module     ``torch.load(path, weights_only=False)``
    ``pt2``   PyTorch, as a program of           ``torch.export.load(path).module()``
              ``torch.export``
    ``onnx``  anything that reads ONNX           ``onnxruntime.InferenceSession(path)``; ``images`` in, ``scores`` out
    ========= ================================== ===================================================================

    ``torch`` is for whoever wants to look at the layers or build on them: the ``nn.Conv2d`` are there, under their
    names. Like every pickled module it is a program, which PyTorch has to be told to trust; TorchScript would not need
    that, but is deprecated. Nor do ``pt2`` and ``onnx``. These take images of the published size; ``torch`` takes those
    that the network takes.

    Args:
        net: a network of :func:`gconv.create_model`, converted or not; it stays as it is.
        path: the file; one that is there is replaced.
        format: ``"torch"``, ``"pt2"`` or ``"onnx"`` (which needs the packages of ``gconv-separable[export]``).

    Returns:
        The largest difference that was seen of a class score, relative to the largest score.

    Raises:
        InputError: as :func:`gconv.to_plain`, or an unknown format, a package that is missing, or a path that cannot be
            written.
        RuntimeError: the class scores are not those of ``net``; no file was written.
    """
    kind = _format(format)
    import torch

    from gconv.deploy.fuse import to_plain
    from gconv.system.files import atomic_path

    plain = to_plain(net).cpu().float().requires_grad_(False)
    images = torch.rand(3, *net.input_shape, generator=torch.Generator().manual_seed(0))
    data = kind.write(plain, images)
    difference = _difference(net, kind.read(data), images)
    if not difference <= TOLERANCE:  # so that NaN does not pass
        raise RuntimeError(f"{path} was not written: its class scores would be off by {difference:.1e} of the largest")
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)
    return difference


class _Format(NamedTuple):
    """How a plain network and an example of its input become the bytes of a file, and how these are run."""

    suffix: str
    write: Callable[[nn.Module, Tensor], bytes]
    read: Callable[[bytes], Callable[[Tensor], Tensor]]
    packages: tuple[str, ...] = ()


def _write_torch(plain: nn.Module, images: Tensor) -> bytes:
    import io

    import torch

    buffer = io.BytesIO()
    torch.save(plain, buffer)
    return buffer.getvalue()


def _read_torch(data: bytes) -> Callable[[Tensor], Tensor]:
    import io

    import torch

    # Executes what is in the data, which is why nothing but the bytes that were just made is ever given to it.
    module: nn.Module = torch.load(io.BytesIO(data), weights_only=False)
    return module


def _write_pt2(plain: nn.Module, images: Tensor) -> bytes:
    import io

    import torch

    buffer = io.BytesIO()
    torch.export.save(_program(plain, images), buffer)
    return buffer.getvalue()


def _read_pt2(data: bytes) -> Callable[[Tensor], Tensor]:
    import io

    import torch

    return torch.export.load(io.BytesIO(data)).module()


def _write_onnx(plain: nn.Module, images: Tensor) -> bytes:
    import logging
    import warnings

    import torch

    # The exporter remarks on packages that are not needed here and on its own use of PyTorch.
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
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
    import onnxruntime
    import torch

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


_FORMATS = {
    "torch": _Format(".pt", _write_torch, _read_torch),
    "pt2": _Format(".pt2", _write_pt2, _read_pt2),
    "onnx": _Format(".onnx", _write_onnx, _read_onnx, ("onnx", "onnxruntime", "onnxscript")),
}


def _format(name: str) -> _Format:
    """The format of that name, if the packages that it needs are there."""
    if not isinstance(name, str) or name.lower() not in _FORMATS:
        raise one_of("format", name, _FORMATS)
    format = _FORMATS[name.lower()]
    missing = [package for package in format.packages if find_spec(package) is None]
    if missing:
        what = f"format {name} needs {', '.join(missing)}, not installed here"
        raise InputError(f"{what}; pip install 'gconv-separable[export]'")
    return format


def _program(plain: nn.Module, images: Tensor) -> ExportedProgram:
    """The program of ``torch.export``, for any number of images."""
    import torch

    # Weights in another memory format would be saved with a warning.
    plain = plain.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    program = torch.export.export(plain, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names folders of this machine
    return program


def _difference(net: Model, exported: Callable[[Tensor], Tensor], images: Tensor) -> float:
    """How far off the class scores are at most, relative to the largest of ``net`` in double precision."""
    from copy import deepcopy

    import torch

    with torch.no_grad():
        scores = deepcopy(net).cpu().double().eval()(images.double())
        found = torch.cat([exported(images), exported(images[:1])])
        difference = (found - torch.cat([scores, scores[:1]])).abs().max().item()
        largest = scores.abs().max().item()
    return difference / largest if largest else difference


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    p = Parser(
        PROG,
        "Write the network in CKPT as one file that runs without this package, for any batch size, with batch norm\n"
        "folded into the convolutions. It is written only if its class scores are those of the network.\n\n"
        "  torch   ordinary PyTorch layers; torch.load(FILE, weights_only=False)\n"
        "  pt2     a program of torch.export; torch.export.load(FILE).module()\n"
        "  onnx    for onnxruntime and others; needs pip install 'gconv-separable[export]'",
        "  python -m gconv.export checkpoints/p4cnn-rotdigits.pt\n"
        "  python -m gconv.export checkpoints/p4cnn-rotdigits.pt --format onnx --out digits.onnx\n"
        "  python -m gconv.export small/converted.pt --format pt2 --json",
    )
    p.add_argument("checkpoint", metavar="CKPT", help="a network saved by gconv.save, gconv.train or decompose")
    p.add_argument("--format", default="torch", help="torch (default), pt2 or onnx")
    p.add_argument("--out", metavar="FILE", help="default: CKPT's name with -exported, and .pt, .pt2 or .onnx")
    p.add_argument("--force", action="store_true", help="replace --out if it exists")
    p.add_argument("--json", action="store_true", help="print what was written as JSON on stdout")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code (:func:`gconv.system.cli.run`)."""
    args = parser().parse_args(main_args(argv))
    return run(PROG, lambda: _command(args))


def _command(args: argparse.Namespace) -> None:
    # What the user typed is checked before anything slow is imported or read.
    suffix = _format(args.format).suffix
    from gconv.system.files import check_output

    out = check_output(args.out or f"{Path(args.checkpoint).stem}-exported{suffix}", force=args.force)

    with loading():
        from gconv.models.checkpoint import load

    net = load(args.checkpoint)
    if out.exists() and out.samefile(args.checkpoint):
        raise InputError(f"{out} is the checkpoint itself; choose another --out")
    difference = export(net, out, args.format)
    size = out.stat().st_size
    if args.json:
        document = {"file": str(out), "format": args.format.lower(), "bytes": size, "max_difference": difference}
        json.dump(document, sys.stdout, indent=2, allow_nan=False)
        print()
    else:
        print(f"written: {out} ({size:,} bytes); its class scores differ by {difference:.1e} of the largest at most")


if __name__ == "__main__":
    sys.exit(main())
