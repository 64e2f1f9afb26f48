"""The networks on a GPU, if there is one: in single precision, TF32 and bfloat16, with and without CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

import gconv

from .speed_networks import exported, limits
from .timing import interleaved

PRECISIONS = ("fp32", "tf32", "bf16")


def measure(full: bool) -> list[dict[str, Any]]:
    """Rows of inference, and of a forward and a backward pass; no rows without a GPU."""
    if not torch.cuda.is_available():
        return []
    rows = []
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        for name in ("p4cnn", "gc-p4cnn", "p4m-resnet44", "gc-p4m-resnet44"):
            torch.manual_seed(0)
            ours = gconv.create_model(name)
            images = torch.rand(128 if "cnn" in name else 32, *ours.input_shape, device="cuda")
            networks: dict[str, nn.Module] = {"gconv": ours, **limits(ours)}
            for direction in ("forward and backward", "inference"):
                if direction == "inference":
                    networks = exported(networks, gconv.group(ours.spec.group).order)
                networks = {variant: network.cuda() for variant, network in networks.items()}
                for precision in PRECISIONS:
                    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
                    runs = {variant: passes(net, images, direction, precision) for variant, net in networks.items()}
                    runs |= {f"{variant}, CUDA graph": graphed(run) for variant, run in runs.items()}
                    found = interleaved({variant: finished(run) for variant, run in runs.items()}, 60 if full else 20)
                    rows += [
                        {"subject": name, "variant": variant, "direction": direction, "precision": precision}
                        | {"batch": len(images), "device": torch.cuda.get_device_name(), **times}
                        for variant, times in found.items()
                    ]
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    return rows


def passes(network: nn.Module, images: Tensor, direction: str, precision: str) -> Callable[[], object]:
    """A function that does one pass in that precision."""
    training = direction != "inference"
    network.train(training)

    def run() -> None:
        lower = torch.autocast(images.device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
        with torch.set_grad_enabled(training), lower:
            scores = network(images)
        if training:
            network.zero_grad(set_to_none=False)  # a CUDA graph needs gradients at the same addresses
            scores.float().square().mean().backward()

    return run


def graphed(run: Callable[[], object]) -> Callable[[], object]:
    """A function that replays the pass, which is recorded once as a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def finished(run: Callable[[], object]) -> Callable[[], object]:
    """A function that does the pass and waits until the GPU has finished it."""

    def both() -> None:
        run()
        torch.cuda.synchronize()

    return both
