"""A training step of P4CNN against the same network on plain convolutions, and against re-expanding through lists.

From the root of the repository: ``python -m benchmarks.training_speed [--json OUT]``. All networks take turns in one
process on the same batches; medians are compared:

* ``gconv``: this package's P4CNN;
* ``plain``: ``nn.Conv2d`` and ``nn.BatchNorm2d`` at the expanded width, 40 channels, whose every weight is its own;
* ``plain, channels-last``: that in the memory format it is fastest in, on a CPU;
* ``lists``: P4CNN as the first library for group convolutions has it: the filter is expanded in every pass by indexing
  with Python lists, and batch norm is ``nn.BatchNorm3d``.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gconv
from gconv.cli import Parser, number
from gconv.files import atomic_path, check_output
from gconv.memory import reuse_freed_memory
from gconv.training import environment

WIDTH, ORDER = 10, 4
AT_MOST = {"plain": 1.05, "lists": 1 / 1.2}
"""What a step of ``gconv`` may take, as a share of these."""


class Plain(nn.Module):
    """The seven layers of P4CNN as ordinary convolutions of the expanded width."""

    def __init__(self, channels_last: bool = False) -> None:
        super().__init__()
        channels = [1] + [WIDTH * ORDER] * 7
        sizes = [3] * 6 + [4]
        self.convs = nn.ModuleList(nn.Conv2d(channels[i], channels[i + 1], sizes[i]) for i in range(7))
        self.norms = nn.ModuleList(nn.BatchNorm2d(WIDTH * ORDER) for _ in range(7))
        self.fc = nn.Linear(WIDTH, 10)
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.to(memory_format=self.format)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone(memory_format=self.format)
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = F.relu(norm(conv(x)))
            if i == 1:
                x = F.max_pool2d(x, 2)
        return self.fc(x.unflatten(1, (WIDTH, ORDER)).amax(2).flatten(1))


class _ListConv(nn.Module):
    """A group convolution whose filter is expanded by indexing with Python lists, anew in every pass."""

    def __init__(self, layer: gconv.GConv2d | gconv.LiftingConv2d) -> None:
        super().__init__()
        self.weight, self.bias, self.order = layer.weight, layer.bias, layer.group.order
        s_in, k = self.weight.shape[2:4]
        flat = layer.tables.expansion.view(self.order, s_in, k, k)
        self.indices = (flat // (k * k)).tolist(), (flat // k % k).tolist(), (flat % k).tolist()

    def forward(self, x: Tensor) -> Tensor:
        o, i, s_in, k, _ = self.weight.shape
        element, row, column = self.indices
        expanded = self.weight[:, :, element, row, column]  # [O, I, S, S_in, k, k]
        filters = expanded.permute(0, 2, 1, 3, 4, 5).reshape(o * self.order, i * s_in, k, k)
        y = F.conv2d(x.reshape(len(x), i * s_in, *x.shape[-2:]), filters)
        return y.view(len(x), o, self.order, *y.shape[2:]) + self.bias.view(1, o, 1, 1, 1)


class Lists(nn.Module):
    """P4CNN on :class:`_ListConv`."""

    def __init__(self) -> None:
        super().__init__()
        like = gconv.create_model("p4cnn", width=WIDTH)
        self.convs = nn.ModuleList(_ListConv(like.get_submodule(f"conv{i}")) for i in range(1, 8))  # type: ignore[arg-type]
        self.norms = nn.ModuleList(nn.BatchNorm3d(WIDTH) for _ in range(7))
        self.fc = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = F.relu(norm(conv(x)))
            if i == 1:
                n, c, s, h, w = x.shape
                x = F.max_pool2d(x.view(n, c * s, h, w), 2).view(n, c, s, h // 2, w // 2)
        return self.fc(x.amax(2).flatten(1))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and record; 0 if both budgets hold, else 1."""
    p = Parser("training_speed", __doc__ or "", "  python -m benchmarks.training_speed --json out/speed.json")
    p.add_argument("--rounds", type=number(int, 1), default=15, help="turns of each, default 15")
    p.add_argument("--batch", type=number(int, 2), default=256, help="images a step, default 256")
    p.add_argument("--json", metavar="OUT", help="also write the record here")
    args = p.parse_args(argv)
    if args.json:
        check_output(args.json, force=True)
    reuse_freed_memory()
    torch.manual_seed(0)
    networks: dict[str, nn.Module] = {
        "gconv": gconv.create_model("p4cnn", width=WIDTH),
        "plain": Plain(),
        "plain, channels-last": Plain(channels_last=True),
        "lists": Lists(),
    }
    optimizers = {name: torch.optim.Adam(net.parameters(), lr=1e-3) for name, net in networks.items()}
    images, labels = torch.rand(args.batch, 1, 28, 28), torch.arange(args.batch) % 10
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    for turn in range(args.rounds + 1):
        for name, network in networks.items():
            began = time.perf_counter()
            loss = F.cross_entropy(network(images), labels)
            optimizers[name].zero_grad(set_to_none=True)
            loss.backward()
            optimizers[name].step()
            if turn:  # the first one loads what is loaded on first use
                seconds[name].append(time.perf_counter() - began)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    record = {
        "batch": args.batch,
        "environment": environment(torch.device("cpu")),
        "median_seconds": median,
        "quartiles": {name: statistics.quantiles(times, n=4)[::2] for name, times in seconds.items()},
        "ratio": {name: median["gconv"] / median[name] for name in networks},
    }
    print(f"a training step on {args.batch} images, {torch.get_num_threads()} threads")
    for name, value in median.items():
        limit = f" (at most {AT_MOST[name]:.2f} asked)" if name in AT_MOST else ""
        print(f"{name:<22}{1e3 * value:8.1f} ms   gconv takes {median['gconv'] / value:.2f} of it{limit}")
    if args.json:
        with atomic_path(args.json) as temporary:
            Path(temporary).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0 if all(median["gconv"] <= share * median[name] for name, share in AT_MOST.items()) else 1


if __name__ == "__main__":
    sys.exit(main())
