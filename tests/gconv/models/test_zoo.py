"""The eleven networks by name: their published sizes and their options."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from gconv.functional.forms import FORMS
from gconv.groups.point_groups import GROUPS, group
from gconv.models.networks import ModelSpec
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
STAGES = ("stage1", "stage2", "stage3")


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


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
