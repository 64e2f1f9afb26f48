"""The eleven networks: their published sizes, their options, and which of their outputs respect the group."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gconv.functional.forms import FORMS
from gconv.groups.point_groups import GROUPS, group
from gconv.models.equivariance import equivariance_error
from gconv.models.zoo import MODELS, Model, build_model, create_model
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
}
PUBLISHED_MILLIONS = {"resnet44": "2.64", "p4m-resnet44": "2.62", "g-p4m-resnet44": "1.78", "gc-p4m-resnet44": "1.88"}
NOT_PLANAR = [name for name in GROUPS if name != "z2"]
RESNETS = ("p4m-resnet44", "g-p4m-resnet44", "gc-p4m-resnet44")
STAGES = ("stage1", "stage2", "stage3")


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
    assert set(MODELS) == {*PUBLISHED_PARAMETERS, *PUBLISHED_MILLIONS}


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_cnn_parameters_equal_the_published_count(name):
    assert parameters(create_model(name)) == PUBLISHED_PARAMETERS[name]


@pytest.mark.parametrize("name", PUBLISHED_MILLIONS)
def test_resnet_parameters_equal_the_published_digits(name):
    assert f"{parameters(create_model(name)) / 1e6:.2f}" == PUBLISHED_MILLIONS[name]


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
    resnet = create_model("resnet44", width=3)
    assert resnet.spec.widths == (3, 6, 12)
    assert resnet.stem.out_channels == 3
    assert resnet.stage3[6].conv2.out_channels == 12


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
        ("p4cnn", {"width": 0}, "width is 0; accepted: a whole number of at least 1"),
        ("p4cnn", {"width": -3}, "width is -3"),
        ("p4cnn", {"width": 2.5}, "width is 2.5"),
        ("p4m-resnet44", {"width": "2"}, "width is '2'"),
        ("p4cnn", {"in_channels": 0}, "in_channels is 0"),
        ("p4cnn", {"classes": 0}, "classes is 0"),
        ("p4cnn", {"classes": 1.0}, "classes is 1.0"),
    ],
)
def test_wrong_options_are_one_line_that_says_what_is_accepted(name, options, what):
    with pytest.raises(InputError) as caught:
        create_model(name, **options)
    message = str(caught.value)
    assert what in message
    assert "accepted: " in message
    assert "\n" not in message


@pytest.mark.parametrize("name", MODELS)
def test_a_spec_rebuilds_its_model_and_wrong_ones_are_refused(name):
    model = create_model(name, width=2, classes=3)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    assert {key: value.shape for key, value in build_model(model.spec).state_dict().items()} == shapes
    with pytest.raises(InputError, match="widths, got"):
        build_model(replace(model.spec, widths=(2, 2)))
    with pytest.raises(InputError, match="unknown model"):
        build_model(replace(model.spec, name=name.upper()))


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
