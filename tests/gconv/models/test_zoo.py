"""The eleven networks: their published sizes, their options, and which of their outputs respect the group."""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gconv.catalog import table
from gconv.deploy.fuse import fuse
from gconv.functional.forms import FORMS
from gconv.groups.point_groups import GROUPS, group
from gconv.models.checkpoint import load, save
from gconv.models.equivariance import equivariance_error
from gconv.models.networks import Model, ModelSpec
from gconv.models.zoo import MODELS, build_model, create_model
from gconv.nn.conv import GConv2d, LiftingConv2d
from gconv.nn.separable_conv import SeparableGConv2d
from gconv.system.errors import InputError

PUBLISHED_PARAMETERS = {
    "z2cnn": 25_210,
    "c-z2cnn": 25_603,
    "p4cnn": 24_810,
    "g-p4cnn-small": 8_910,
    "g-p4cnn": 25_255,
    "gc-p4cnn-small": 3_420,
    "gc-p4cnn": 24_640,
    "p4m-resnet44": 2_621_829,
    "g-p4m-resnet44": 1_782_381,
    "gc-p4m-resnet44": 1_884_270,
}
NOT_PLANAR = [name for name in GROUPS if name != "z2"]
RESNETS = ("p4m-resnet44", "g-p4m-resnet44", "gc-p4m-resnet44")
STAGES = ("stage1", "stage2", "stage3")
OLDER = Path(__file__).resolve().parents[2] / "data" / "older_versions"


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def trained(model: Model) -> Model:
    """In float64 and eval mode, with batch norms that know the maps, as after training: no unit is dead."""
    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
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


# --- names and sizes


def test_the_names_are_the_published_ones():
    assert set(MODELS) == {*PUBLISHED_PARAMETERS, "resnet44"}


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_parameters_equal_the_published_count(name):
    assert parameters(create_model(name)) == PUBLISHED_PARAMETERS[name]


def resnet_parameters(widths: tuple[int, int, int], order: int, depth: int, separable: str | None) -> int:
    """Counted from the description of the architecture; ``order`` is |H|."""

    def conv(i: int, o: int) -> int:
        factors = {"g": i * o * (order + 9), "gc": i * o * order + o * 9}
        return factors[separable] if separable else i * o * order * 9

    count = 3 * widths[0] * 9  # the stem
    before = widths[0]
    for stage, width in enumerate(widths):
        for block in range((depth - 2) // 6):
            count += 2 * before + conv(before, width) + 2 * width + conv(width, width)
            if block == 0 and (stage > 0 or before != width):
                count += before * width * order + 2 * width  # a 1x1 convolution and its batch norm
            before = width
    return count + 2 * before + before * order * 10 + 10  # the last batch norm and the head


@pytest.mark.parametrize("depth", [8, 14, 44])
@pytest.mark.parametrize("widths", [(11, 23, 45), (5, 3, 3)])
@pytest.mark.parametrize("separable", [None, "g", "gc"])
@pytest.mark.parametrize("on", ["z2", "p4", "p4m"])
def test_resnet_parameters_of_any_depth_and_widths(on, separable, widths, depth):
    if on == "z2" and separable:
        return
    net = create_model("resnet44", group=on, widths=widths, depth=depth, separable=separable)
    assert parameters(net) == resnet_parameters(widths, group(on).order, depth, separable)


def test_the_planar_resnet_has_the_published_digits():
    assert parameters(create_model("resnet44")) == resnet_parameters((32, 64, 128), 1, 44, None) == 2_636_458


@pytest.mark.parametrize("name", MODELS)
def test_names_are_case_insensitive(name):
    assert create_model(name.upper(), width=2).spec == create_model(name, width=2).spec


@pytest.mark.parametrize("name", MODELS)
def test_input_shape_is_what_the_network_takes(name):
    model = create_model(name, width=2, classes=7).eval()
    assert model(torch.rand(2, *model.input_shape)).shape == (2, 7)


def test_the_same_seed_gives_the_same_network():
    states = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        states.append(create_model("gc-p4cnn", width=2).state_dict())
    same, again, other = states
    assert all(torch.equal(same[name], again[name]) for name in same)
    assert not torch.equal(same["conv2.mix"], other["conv2.mix"])


# --- options


@pytest.mark.parametrize("on", GROUPS)
def test_group_option(on):
    model = create_model("p4cnn", group=on.upper(), width=2)
    found = {layer.group.name for layer in model.modules() if isinstance(layer, (GConv2d, LiftingConv2d))}
    assert model.spec.group == on
    assert found == (set() if on == "z2" else {on})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["p4cnn", "p4m-resnet44"])
def test_separable_option_separates_all_but_the_first_layer_and_the_shortcuts(name, form):
    model = create_model(name, width=2, separable=form)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, (GConv2d, SeparableGConv2d))}
    full = {name for name, layer in layers.items() if isinstance(layer, GConv2d)}
    assert full == ({"stage2.0.shortcut", "stage3.0.shortcut"} if "resnet" in name else set())
    assert {layer.form.name for name, layer in layers.items() if name not in full} == {form}
    assert len(layers) == (6 if name == "p4cnn" else 2 * 21 + 2)


def test_width_option():
    assert create_model("p4cnn", width=3).spec.widths == (3,)
    assert create_model("p4cnn", widths=[3]).spec == create_model("p4cnn", width=3).spec
    resnet = create_model("resnet44", width=3)
    assert resnet.spec.widths == (3, 6, 12)
    assert resnet.stem.out_channels == 3
    assert resnet.stage3[6].conv2.out_channels == 12


def test_widths_and_depth_options():
    net = create_model("gc-p4m-resnet44", widths=(4, 6, 8), depth=14)
    assert (net.spec.widths, net.spec.depth) == ((4, 6, 8), 14)
    assert [len(getattr(net, stage)) for stage in STAGES] == [2, 2, 2]
    assert [getattr(net, stage)[1].conv2.out_channels for stage in STAGES] == [4, 6, 8]
    assert len([m for m in net.modules() if isinstance(m, SeparableGConv2d)]) + 2 == net.spec.depth
    assert create_model("gc-p4m-resnet44", width=1).spec.depth == 44


def test_a_network_says_what_it_is():
    net = create_model("gc-p4m-resnet44", widths=(4, 6, 8), depth=14)
    assert "gc-p4m-resnet44, depth 14, group=p4m, widths=(4, 6, 8), separable=gc" in repr(net)
    assert str(create_model("p4m-resnet44", width=1).spec) == "p4m-resnet44"
    assert str(create_model("p4cnn", width=1).spec) == "p4cnn"


@pytest.mark.parametrize("name", ["z2cnn", "p4cnn", "gc-p4m-resnet44"])
def test_channel_and_class_options(name):
    model = create_model(name, width=2, in_channels=5, classes=3).eval()
    side = model.input_shape[-1]
    assert model.input_shape == (5, side, side)
    assert model(torch.rand(2, 5, side, side)).shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "options", "what"),
    [
        ("p5cnn", {}, "model 'p5cnn'; accepted: z2cnn"),
        ("", {}, "model ''"),
        (None, {}, "model 'None'"),
        ("p4cnn", {"group": "p6"}, "group 'p6'; accepted: z2, p2"),
        ("p4cnn", {"separable": "x"}, "'x'; accepted: g, gc, gc_in, g_turned, gc_turned"),
        ("p4cnn", {"separable": "c"}, "'c'; accepted: g, gc, gc_in, g_turned, gc_turned"),
        ("z2cnn", {"separable": "g"}, "form (of z2cnn on z2) 'g'; accepted: c"),
        ("resnet44", {"separable": "c"}, "form (of resnet44 on z2) 'c'"),
        ("p4cnn", {"width": 0}, "width is 0. Give a whole number of at least 1"),
        ("p4cnn", {"width": -3}, "width is -3"),
        ("p4cnn", {"width": 2.5}, "width is 2.5"),
        ("p4m-resnet44", {"width": "2"}, "width is '2'"),
        ("p4cnn", {"in_channels": 0}, "in_channels is 0"),
        ("p4cnn", {"classes": 0}, "classes is 0"),
        ("p4cnn", {"classes": 1.0}, "classes is 1.0"),
        ("p4cnn", {"widths": (2, 4, 8)}, "widths of p4cnn are [2, 4, 8]. Give one width"),
        ("p4m-resnet44", {"widths": (2, 4)}, "widths of p4m-resnet44 are [2, 4]. Give 3 widths"),
        ("p4m-resnet44", {"widths": (2, 0, 8)}, "width is 0"),
        ("p4m-resnet44", {"widths": (2, 4, 8), "width": 2}, "both width=2 and widths=(2, 4, 8) were given. Give one"),
        ("p4m-resnet44", {"depth": 45}, "depth of p4m-resnet44 is 45. Give 6 n + 2 layers"),
        ("p4m-resnet44", {"depth": 2}, "depth of p4m-resnet44 is 2. Give 6 n + 2 layers"),
        ("p4m-resnet44", {"depth": 20.0}, "depth of p4m-resnet44 is 20.0. Give 6 n + 2 layers"),
        ("p4cnn", {"depth": 8}, "p4cnn is a CNN of seven layers. Only ResNets have a depth"),
    ],
)
def test_wrong_options_are_one_line_that_says_what_to_do(name, options, what):
    with pytest.raises(InputError) as caught:
        create_model(name, **options)
    message = str(caught.value)
    assert what in message
    assert "accepted: " in message or "Give " in message or "Only " in message
    assert "\n" not in message


@pytest.mark.parametrize("name", MODELS)
def test_a_spec_rebuilds_its_model_and_wrong_ones_are_refused(name):
    model = create_model(name, width=2, classes=3)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    assert {key: value.shape for key, value in build_model(model.spec).state_dict().items()} == shapes
    with pytest.raises(InputError, match="widths of"):
        build_model(replace(model.spec, widths=(2, 2)))
    with pytest.raises(InputError, match="unknown model"):
        build_model(replace(model.spec, name=name.upper()))


@pytest.mark.parametrize("name", MODELS)
def test_a_spec_survives_plain_data(name):
    options = {"depth": 14} if "resnet" in name else {}
    spec = create_model(name, width=2, **options).spec
    assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


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
            if isinstance(norm, _BatchNorm):
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
