"""``python -m tests.gconv.kernels.harness``: the kernels without Python, under sanitizers or on an emulated processor.

Random layers are written to a file, with the outputs and gradients that the definitions give in double precision.
``harness.c`` is compiled together with the kernels and runs them on that file.
"""

from __future__ import annotations

import argparse
import random
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gconv import GROUPS, SeparableGConv2d, gconv2d, group
from gconv.kernels.dispatch import Sizes
from gconv.kernels.separable_conv import layer_on, new_kernel
from gconv.kernels.sources import FOLDER

LANES = 1, 4, 8, 16
LAYERS, NORMS, CONVOLUTIONS = 150, 30, 30
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-sanitize=alignment"
# Vectors are read from addresses that floats have, which their type says.


def put(file: BinaryIO, *values: int | Tensor | None) -> None:
    for value in values:
        if isinstance(value, int):
            file.write(np.int32(value).tobytes())
        elif value is not None:
            kind = np.float32 if value.is_floating_point() else np.int32
            file.write(value.detach().numpy().astype(kind).tobytes())


def positions(x: Tensor) -> Tensor:
    """A map ``[N, C, S, H, W]`` as ``[N, H, W, S, C]``, as the kernels read it."""
    return x.permute(0, 3, 4, 2, 1).contiguous()


def write_layer(file: BinaryIO, draw: random.Random) -> None:
    """A case of :mod:`gconv.kernels.separable_conv`."""
    name, form = draw.choice(GROUPS), draw.choice(("gc", "gc_in"))
    order, k, lanes = group(name).order, draw.randint(1, 5), draw.choice(LANES)
    o, i = draw.randint(1, 20), draw.randint(2, 20)
    whole = form == "gc_in" and lanes > 1 and o * order >= k * k and draw.random() < 0.4
    layer = SeparableGConv2d(
        i,
        o,
        k,
        stride=1 if lanes == 1 else draw.randint(1, 3),
        padding=draw.randint(0, k - 1),
        bias=draw.random() < 0.7,
        group=name,
        form=form,
        rank=k * k if whole else draw.randint(1, min(3, (i if form == "gc" else o) * order, k * k)),
    ).double()
    sizes = Sizes(order, i, o, layer.rank, layer.form.spatial_first, k, *layer.sampling, whole)
    kernel = new_kernel(layer.group, sizes, whole or draw.random() < 0.5, layer.bias is not None, 0, lanes)
    x = torch.randn(draw.randint(1, 4), i, order, draw.randint(k, 24), draw.randint(k, 40), dtype=torch.float64)
    x = x.float().double().requires_grad_()
    for parameter in layer.parameters():
        parameter.data = parameter.data.float().double()
    if whole:
        layer.spatial.data = torch.eye(k * k).double().view(1, k * k, k, k).repeat(i, 1, 1, 1)
    y = gconv2d(x, layer.weight, layer.bias, layer.group, layer.sampling)
    gy, residual = torch.randn_like(y).float().double(), torch.randn_like(y).float().double()
    wanted = [x, layer.mix, *([] if whole else [layer.spatial]), *([] if layer.bias is None else [layer.bias])]
    gradients = torch.autograd.grad(y, wanted, gy)
    relu, added = draw.random() < 0.5, draw.random() < 0.5
    expected = y + residual if added else y
    shared = layer_on(kernel, *x.shape[3:])
    put(file, 0, lanes, len(x), draw.randint(1, 7), relu, added, kernel.matrices.numel())
    put(file, *(getattr(shared, field) for field, kind in shared._fields_[:18]))
    put(file, kernel.table, kernel.matrices, kernel.basis, kernel.pixels, layer.mix)
    put(file, None if whole else layer.spatial, layer.bias)
    put(file, positions(x), positions(residual) if added else None, positions(gy))
    put(file, positions(F.relu(expected) if relu else expected), positions(gradients[0]), *gradients[1:])


def write_norm(file: BinaryIO, draw: random.Random) -> None:
    """A case of :mod:`gconv.kernels.batch_norm`."""
    n, channels, order, relu = (
        draw.randint(2, 1500),
        draw.randint(1, 20),
        draw.choice((1, 2, 4, 8)),
        draw.random() < 0.5,
    )
    x = torch.randn(n, order, channels).double().requires_grad_()
    norm = nn.BatchNorm1d(channels).double()
    nn.init.uniform_(norm.weight, -2, 2)
    nn.init.uniform_(norm.bias, -1, 1)
    y = norm(x.flatten(0, 1)).view_as(x)
    g = torch.randn_like(y) * (y.abs() > 1e-3)  # near zero, rounding decides what ReLU lets pass
    expected = F.relu(y) if relu else y
    gradients = torch.autograd.grad(expected, [x, norm.weight, norm.bias], g)
    var, mean = torch.var_mean(x, (0, 1), correction=0)
    put(
        file,
        1,
        n,
        channels,
        order,
        relu,
        draw.randint(1, 7),
        x,
        norm.weight,
        norm.bias,
        g,
        expected,
        mean,
        var,
        *gradients,
    )


def write_small_conv(file: BinaryIO, draw: random.Random) -> None:
    """A case of :mod:`gconv.kernels.small_conv`."""
    n, channels, outs, k = draw.randint(1, 4), draw.randint(1, 9), 8 * draw.randint(1, 12), draw.randint(1, 4)
    x = torch.randn(n, channels, draw.randint(k, 9), draw.randint(k, 19))
    weight, bias, relu = torch.randn(outs, channels, k, k), torch.randn(outs), draw.random() < 0.5
    y = F.conv2d(x.double(), weight.double(), bias.double())
    y = F.relu(y) if relu else y
    put(file, 2, n, channels, outs, k, *x.shape[2:], relu, draw.randint(1, 7))
    put(file, x.permute(0, 2, 3, 1).contiguous(), weight.permute(2, 3, 1, 0).contiguous(), bias)
    put(file, y.permute(0, 2, 3, 1).contiguous())


def write_cases(path: Path, seed: int = 0) -> None:
    """Random cases of all kernels."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    with path.open("wb") as file:
        for write, number in ((write_layer, LAYERS), (write_small_conv, CONVOLUTIONS), (write_norm, NORMS)):
            for _ in range(number):
                write(file, draw)


def build(folder: Path, compiler: str, flags: str) -> Path:
    """The harness, compiled together with the kernels."""
    path = folder / "harness"
    files = [*sorted(FOLDER.glob("*.c")), Path(__file__).with_name("harness.c")]
    command = [
        *shlex.split(compiler),
        *shlex.split(flags),
        '-DGCONV_SOURCES=""',
        f"-I{FOLDER}",
        "-pthread",
        "-Wall",
        "-Wextra",
    ]
    subprocess.run([*command, "-Werror", *map(str, files), "-lm", "-o", str(path)], check=True)
    return path


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--compiler", default="cc", help="the C compiler and its options")
    p.add_argument("--flags", default="-O2", help="more options")
    p.add_argument(
        "--sanitize", action="store_true", help="with sanitizers, and each part of the scratch memory by itself"
    )
    p.add_argument("--emulator", default="", help="what runs the program, where this machine cannot")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args(argv)
    flags = f"{args.flags} -g -DGCONV_SEPARATE_SCRATCH {SANITIZERS}" if args.sanitize else args.flags
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        program = [*shlex.split(args.emulator), str(build(folder, args.compiler, flags))]
        cases = folder / "cases"
        write_cases(cases, args.seed)
        found = subprocess.run([*program, str(cases)], check=False).returncode
        # One wrong number must be seen: the last of the file is expected of a kernel that runs everywhere.
        values = bytearray(cases.read_bytes())
        values[-4:] = np.float32(1e3).tobytes()
        cases.write_bytes(values)
        blind = subprocess.run([*program, str(cases)], capture_output=True, check=False).returncode == 0
        if blind:
            print("the harness does not see a wrong value", file=sys.stderr)
    return found or int(blind)


if __name__ == "__main__":
    sys.exit(main())
