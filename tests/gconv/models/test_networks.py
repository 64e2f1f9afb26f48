"""The architectures: what they compute, what hooks see of it, and which outputs respect the group."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gconv.catalog import table
from gconv.deploy.fuse import fuse
from gconv.functional.forms import FORMS
from gconv.groups.point_groups import GROUPS, group
from gconv.models.checkpoint import load, save
from gconv.models.equivariance import equivariance_error
from gconv.models.networks import Model
from gconv.models.zoo import build_model, create_model
from gconv.nn.batchnorm import GroupBatchNorm2d

NOT_PLANAR = [name for name in GROUPS if name != "z2"]
RESNETS = ("p4m-resnet44", "g-p4m-resnet44", "gc-p4m-resnet44")
STAGES = ("stage1", "stage2", "stage3")
OLDER = Path(__file__).resolve().parents[2] / "data" / "older_versions"


def trained(model: Model) -> Model:
    """In float64 and eval mode, with batch norms that know the maps, as after training: no unit is dead."""
    for layer in model.modules():
        if isinstance(layer, GroupBatchNorm2d):
            layer.momentum = 1.0
            layer.weight.data.uniform_(0.5, 1.5)
            layer.bias.data.uniform_(0.5, 1.5)
    model.double().train()(torch.rand(8, *model.input_shape, dtype=torch.float64))
    return model.eval()


def moved(element: int, image: Tensor) -> Tensor:
    """Element 4 m + r of p4m on the pixels: r quarter turns, then, if m, the rows reversed."""
    turned = torch.rot90(image, element % 4, (-2, -1))
    return turned.flip(-2) if element >= 4 else turned


def change(model: Model, element: int, image: Tensor) -> float:
    """The largest change of the class scores, relative to the largest score, when the image moves."""
    with torch.no_grad():
        scores = model(image)
        return ((model(moved(element, image)) - scores).abs().max() / scores.abs().max()).item()


def body(model: Model) -> nn.Module:
    """A ResNet up to its last batch norm: the maps that its head averages."""
    return nn.Sequential(OrderedDict((name, getattr(model, name)) for name in ("stem", *STAGES, "bn")))


# --- the architecture of the ResNets


def by_the_description(net: Model, x: Tensor, *, raw: bool = True) -> Tensor:
    """The scores of a ResNet, operation by operation as its description says; ``raw`` is what the shortcut reads."""
    x = net.stem(x)
    for block in (block for stage in STAGES for block in getattr(net, stage)):
        active = F.relu(block.bn1(x))
        hidden = block.conv2(F.relu(block.bn2(block.conv1(active))))
        if block.shortcut is None:
            x = x + hidden
        elif raw:
            x = block.shortcut_bn(block.shortcut(x)) + hidden
        else:
            x = block.shortcut(active) + hidden
    return net.fc(F.relu(net.bn(x)).flatten(-2).mean(-1).flatten(1))


@pytest.mark.parametrize("shortcut", ["raw", "activated"])
@pytest.mark.parametrize("name", [*RESNETS, "resnet44"])
def test_a_resnet_is_what_its_description_says(name, shortcut):
    spec = replace(create_model(name, widths=(2, 3, 3), depth=14).spec, shortcut=shortcut)
    net = trained(build_model(spec))
    x = torch.rand(2, 3, 9, 9, dtype=torch.float64)
    expected = by_the_description(net, x, raw=shortcut == "raw")
    torch.testing.assert_close(net(x), expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(net(x), expected, rtol=1e-12, atol=1e-12)
    with pytest.raises((AssertionError, TypeError)):
        torch.testing.assert_close(net(x), by_the_description(net, x, raw=shortcut != "raw"), rtol=1e-3, atol=1e-3)


def test_a_file_of_the_old_architecture_gives_its_old_scores_and_says_what_it_is(tmp_path):
    with np.load(OLDER / "resnet_activated_shortcut_io.npz") as file:
        images, scores = torch.from_numpy(file["x"]).double(), torch.from_numpy(file["y64"])
    net = load(OLDER / "resnet_activated_shortcut.pt")
    save(net, tmp_path / "again.pt")
    for loaded in (net, load(tmp_path / "again.pt")):
        assert loaded.spec.shortcut == "activated"
        assert str(loaded.spec) == "gc-p4m-resnet44, shortcut activated"
        assert "shortcut activated" in repr(loaded)
        with torch.no_grad():
            torch.testing.assert_close(loaded.double()(images), scores, rtol=1e-12, atol=1e-12)
    assert "| gc-p4m-resnet44, shortcut activated |" in table([str(OLDER / "resnet_activated_shortcut.pt")])


# --- hooks


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", ["plain", "fused", "identities"])
@pytest.mark.parametrize("name", ["p4cnn", "c-z2cnn", "gc-p4cnn", "p4m-resnet44", "gc-p4m-resnet44"])
def test_what_a_hook_kept_stays_as_it_was(name, kind, training, gradients):
    options = {"depth": 8} if "resnet" in name else {}
    net = trained(create_model(name, width=2, **options))
    if kind == "fused":
        net = fuse(net)
    elif kind == "identities":
        for layer, norm in list(net.named_modules()):
            if isinstance(norm, GroupBatchNorm2d):
                net.set_submodule(layer, nn.Identity())
    net.train(training)
    x = torch.rand(2, *net.input_shape, dtype=torch.float64)
    expected = net(x)
    kept = []
    for layer in net.modules():
        if layer is not net:
            layer.register_forward_hook(lambda layer, given, output: kept.append((output, output.detach().clone())))
    with torch.set_grad_enabled(gradients):
        found = net(x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert len(kept) > 10
    assert all(torch.equal(output, copy) for output, copy in kept)


# --- what the group does to the outputs


@pytest.mark.parametrize("separable", [None, *FORMS])
@pytest.mark.parametrize("on", NOT_PLANAR)
def test_cnn_scores_are_invariant_under_every_element_of_the_group_and_no_other(on, separable):
    model = trained(create_model("p4cnn", group=on, width=3, separable=separable))
    image = torch.rand(2, 1, 28, 28, dtype=torch.float64)
    for element in range(8):
        if element in group(on).elements:
            assert change(model, element, image) <= 1e-12
        else:
            assert change(model, element, image) > 1e-6


@pytest.mark.parametrize("name", ["z2cnn", "c-z2cnn"])
def test_planar_scores_are_not_invariant(name):
    assert change(trained(create_model(name, width=3)), 1, torch.rand(2, 1, 28, 28, dtype=torch.float64)) > 1e-6


@pytest.mark.parametrize("name", RESNETS)
def test_resnet_features_are_equivariant_at_exact_sizes_and_its_head_is_not_invariant(name):
    model = trained(create_model(name, width=2))
    image = torch.rand(1, 3, 33, 33, dtype=torch.float64)
    report = equivariance_error(body(model), "p4m", image)
    assert report.max <= 1e-12
    assert report.inexact == ()
    for element in range(1, 8):
        assert change(model, element, image) > 1e-6


@pytest.mark.parametrize("name", RESNETS)
def test_resnet_features_are_not_equivariant_on_cifar_and_the_report_says_where(name):
    model = trained(create_model(name, width=2))
    report = equivariance_error(body(model), "p4m", torch.rand(1, 3, 32, 32, dtype=torch.float64))
    # Sampling from the top left corner keeps the diagonal, so element 5, the reflection in it, stays exact.
    assert max(report.errors[0], report.errors[5]) <= 1e-12
    assert min(report.errors[1:5] + report.errors[6:]) > 1e-4
    assert [(layer.name, layer.size) for layer in report.inexact] == [
        ("stage2.0.shortcut", (32, 32)),
        ("stage2.0.conv1", (32, 32)),
        ("stage3.0.shortcut", (16, 16)),
        ("stage3.0.conv1", (16, 16)),
    ]
    assert "stage2.0.conv1: stride 2 on a 32 x 32 map is inexact; 31 x 31 or 33 x 33 is exact" in str(report)
