"""Networks: a training step and inference, beside the dense limit and the designs of other libraries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gconv
from gconv.models.memory import forward_memory, training_memory

from .timing import interleaved
from .twins import Escnn, Kit, Lists, Plain, TwinCNN, TwinResNet, escnn_exported, has_escnn

LIMITS = ("dense", "dense, channels-last")


def twin(like: gconv.Model, kit: Kit) -> nn.Module:
    """The network of the same widths with the layers of this kit."""
    widths, order = like.spec.widths, gconv.group(like.spec.group).order
    return TwinCNN(kit, *widths) if len(widths) == 1 else TwinResNet(kit, widths, order)


def limits(like: gconv.Model) -> dict[str, nn.Module]:
    """The dense limits: ordinary networks of the expanded width, in both memory formats."""
    order = gconv.group(like.spec.group).order
    return {name: twin(like, Plain(order, channels_last=name != LIMITS[0])) for name in LIMITS}


def peers(like: gconv.Model) -> dict[str, nn.Module]:
    """The same network with the layers of other libraries."""
    on = like.spec.group
    found = {"lists": twin(like, Lists(on))}
    return found | ({"escnn": twin(like, Escnn(on))} if has_escnn() else {})


def exported(networks: dict[str, nn.Module], order: int) -> dict[str, nn.Module]:
    """The networks in eval mode, and their versions for inference: fused, and exported to ordinary layers."""
    networks = {name: network.eval() for name, network in networks.items()}
    more: dict[str, nn.Module] = {}
    for name, network in networks.items():
        if isinstance(network, gconv.Model):
            more[f"{name}, fused"] = gconv.fuse(network)
            more[f"{name}, exported"] = gconv.to_plain(network)
        elif name == "escnn":
            more["escnn, exported"] = escnn_exported(network, order)
    return networks | more


def training_steps(networks: dict[str, nn.Module], images: Tensor) -> dict[str, Callable[[], object]]:
    """By network, a function that does one training step: forward, backward and Adam on a batch."""
    labels = torch.arange(len(images)) % 10

    def step(network: nn.Module) -> Callable[[], object]:
        optimizer = torch.optim.Adam(network.train().parameters(), lr=1e-3)

        def run() -> None:
            loss = F.cross_entropy(network(images), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

        return run

    return {name: step(network) for name, network in networks.items()}


def train(subject: str, networks: dict[str, nn.Module], images: Tensor, rounds: int) -> list[dict[str, Any]]:
    """Rows of training steps."""
    return _rows(subject, "training", networks, images, interleaved(training_steps(networks, images), rounds))


def infer(subject: str, networks: dict[str, nn.Module], images: Tensor, rounds: int) -> list[dict[str, Any]]:
    """Rows of inference; the networks must be in eval mode."""
    with torch.inference_mode():
        found = interleaved({name: partial(net, images) for name, net in networks.items()}, rounds)
    return _rows(subject, "inference", networks, images, found)


def _rows(
    subject: str, direction: str, networks: dict[str, nn.Module], images: Tensor, found: dict[str, Any]
) -> list[dict[str, Any]]:
    """Times with their networks; MACs are as executed, for one image, and None for layers of other libraries."""
    rows = []
    for name, times in found.items():
        network = networks[name]
        ours = isinstance(network, gconv.Model) or name in LIMITS
        macs = gconv.cost(network, images.shape[1:]).macs_executed if ours else None
        rows.append(
            {"subject": subject, "variant": name, "direction": direction, "batch": len(images), "macs": macs, **times}
        )
    return rows


def random_images(like: gconv.Model, batch: int) -> Tensor:
    return torch.rand(batch, *like.input_shape)


def p4cnn(full: bool) -> list[dict[str, Any]]:
    """P4CNN beside all others: training, inference on a batch, and inference on a single image."""
    torch.manual_seed(0)
    ours = gconv.create_model("p4cnn")
    networks = {"gconv": ours, **limits(ours), **peers(ours)}
    images = random_images(ours, 128)
    rows = train("p4cnn", networks, images, 45 if full else 15)
    networks = exported(networks, 4)
    rows += infer("p4cnn", networks, images, 45 if full else 15)
    return rows + infer("p4cnn", networks, images[:1], 300 if full else 100)


def cnns(full: bool) -> list[dict[str, Any]]:
    """The other CNNs, each beside its dense limit."""
    rows = []
    for name in (name for name in gconv.MODELS if "cnn" in name and name != "p4cnn"):
        torch.manual_seed(0)
        ours = gconv.create_model(name)
        networks = {"gconv": ours, **limits(ours)}
        rows += train(name, networks, random_images(ours, 128), 15 if full else 5)
        rows += infer(
            name, exported(networks, gconv.group(ours.spec.group).order), random_images(ours, 128), 15 if full else 5
        )
    return rows


def _p4m_resnets() -> tuple[dict[str, nn.Module], Tensor]:
    torch.manual_seed(0)
    ours = gconv.create_model("p4m-resnet44")
    separable = gconv.create_model("gc-p4m-resnet44")
    return {"gconv": ours, "gconv, gc": separable, **limits(ours), **peers(ours)}, random_images(ours, 32)


def resnet_training(full: bool) -> list[dict[str, Any]]:
    """Training of the p4m-ResNet beside all others, and beside its published separable version."""
    networks, images = _p4m_resnets()
    return train("p4m-resnet44", networks, images, 9 if full else 5)


def resnet_inference(full: bool) -> list[dict[str, Any]]:
    """Inference of the same networks."""
    networks, images = _p4m_resnets()
    return infer("p4m-resnet44", exported(networks, 8), images, 15 if full else 5)


def resnets(full: bool) -> list[dict[str, Any]]:
    """All ResNets; with ``full`` their dense limits too."""
    torch.manual_seed(0)
    names: Sequence[str] = [name for name in gconv.MODELS if "resnet" in name]
    networks: dict[str, nn.Module] = {name: gconv.create_model(name) for name in names}
    images = torch.rand(32, 3, 32, 32)
    rows = []
    groups = [networks]
    if full:
        groups += [{f"{name}, {limit}": net for limit, net in limits(networks[name]).items()} for name in names]  # type: ignore[arg-type]
    for some in groups:
        for row in train("resnets", some, images, 3) + infer("resnets", some, images, 3):
            name, _, limit = row["variant"].partition(", ")
            rows.append({**row, "subject": name, "variant": limit or "gconv"})
    return rows


def memory(full: bool) -> list[dict[str, Any]]:
    """Peak bytes of live tensors in a training step and in inference, for every network and for the twins of P4CNN."""
    rows = []
    for name in gconv.MODELS:
        torch.manual_seed(0)
        ours = gconv.create_model(name)
        networks: dict[str, nn.Module] = {"gconv": ours}
        if name == "p4cnn":
            networks |= limits(ours) | {"lists": twin(ours, Lists(ours.spec.group))}
        images = random_images(ours, 8)
        for variant, network in networks.items():
            rows.append(
                {
                    "subject": name,
                    "variant": variant,
                    "batch": len(images),
                    "training_bytes": training_memory(network, images),
                    "inference_bytes": forward_memory(network.eval(), images),
                }
            )
    return rows
