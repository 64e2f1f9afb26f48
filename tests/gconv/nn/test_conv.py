"""The layers: one function whichever way they run, drawn at the right scale, and as handy as ``nn.Conv2d``."""

import copy
import io
import math
import pickle
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

import gconv
from gconv import FORMS, GROUPS, GConv2d, InputError, LiftingConv2d, SeparableGConv2d, gconv2d, group
from gconv.functional.expansion import Sampling, from_group_major, has_channels_last_strides, to_group_major

KINDS = ("lifting", "full", *FORMS)

every_kind = pytest.mark.parametrize("kind", KINDS)
every_form = pytest.mark.parametrize("form", FORMS)


def make(kind, *arguments, group="p4", **keywords):
    if kind in FORMS:
        return SeparableGConv2d(*arguments, group=group, form=kind, **keywords)
    return {"lifting": LiftingConv2d, "full": GConv2d}[kind](*arguments, group=group, **keywords)


def map_for(layer, n=7, m=6):
    _, i, s_in, _ = layer.filter_shape
    return torch.randn(2, i, s_in, n, m, dtype=next(layer.parameters()).dtype)


@st.composite
def layers(draw, kind):
    """A float64 layer of that kind: any group, size, rank and sampling."""
    channels = st.integers(1, 3)
    layer = make(
        "full" if kind in FORMS else kind,
        draw(channels),
        draw(channels),
        draw(st.integers(1, 5)),
        stride=draw(st.integers(1, 3)),
        padding=draw(st.integers(0, 2)),
        dilation=draw(st.integers(1, 2)),
        bias=draw(st.booleans()),
        group=draw(st.sampled_from(GROUPS)),
        dtype=torch.float64,
    )
    if kind not in FORMS:
        return layer
    rank = draw(st.integers(1, FORMS[kind].max_rank(layer.filter_shape)))
    return SeparableGConv2d.like(layer, kind, rank, draw(st.sampled_from(FORMS[kind].executions)))


def map_drawn_for(data, layer):
    reach = layer.dilation[0] * (layer.kernel_size[0] - 1)
    return map_for(layer, *(reach + data.draw(st.integers(1, 5)) for _ in "hw"))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# One function


@every_kind
@given(data=st.data())
def test_a_layer_is_the_group_convolution_with_its_weight_and_bias(kind, data):
    layer = data.draw(layers(kind))
    x = map_drawn_for(data, layer)
    sampling = Sampling(layer.stride[0], layer.padding[0], layer.dilation[0])
    close(layer(x), gconv2d(x, layer.weight, layer.bias, layer.group, sampling))


@every_form
@given(data=st.data())
def test_all_executions_and_to_dense_are_one_function(form, data):
    layer = data.draw(layers(form))
    x = map_drawn_for(data, layer)
    full = layer.to_dense()
    assert type(full) is GConv2d
    assert full.weight.equal(layer.weight)
    close(full(x), layer(x))
    for execution in FORMS[form].executions:
        other = copy.deepcopy(layer)
        other.execution = execution
        close(other(x), layer(x))


@every_form
@given(data=st.data())
def test_from_dense_at_full_rank_is_the_same_layer(form, data):
    layer = data.draw(layers(data.draw(st.sampled_from(KINDS[1:]))))
    x = map_drawn_for(data, layer)
    rank = FORMS[form].max_rank(layer.filter_shape)
    for execution in FORMS[form].executions:
        close(SeparableGConv2d.from_dense(layer, form, rank, execution)(x), layer(x))


@every_form
@given(data=st.data())
def test_what_from_dense_loses_is_the_energy_left_unexplained(form, data):
    layer = data.draw(layers("full"))
    rank = data.draw(st.integers(1, FORMS[form].max_rank(layer.filter_shape)))
    separable = SeparableGConv2d.from_dense(layer, form, rank)
    folded = FORMS[form].fold(layer.weight.detach(), layer.tables.pixels).numpy()
    energy = np.linalg.svd(folded, compute_uv=False) ** 2
    explained = energy[:, :rank].sum() / energy.sum()
    error = (separable.weight - layer.weight).norm() / layer.weight.norm()
    assert error.item() == pytest.approx(math.sqrt(max(0.0, 1 - explained)), abs=1e-6)


@every_form
def test_conversions_keep_settings_bias_mode_and_dtype_and_share_nothing(form):
    layer = GConv2d(2, 3, 3, stride=2, padding=1, dilation=2, group="p4m", dtype=torch.float64).eval()
    separable = SeparableGConv2d.from_dense(layer, form, 2)
    back = separable.to_dense()
    for converted in (separable, back):
        assert converted.bias.equal(layer.bias)
        assert converted.bias.data_ptr() != layer.bias.data_ptr()
        assert converted.weight.dtype == torch.float64
        assert not converted.training
        assert converted(map_for(layer, 9, 8)).shape == layer(map_for(layer, 9, 8)).shape
    assert back.extra_repr() == layer.extra_repr()
    assert SeparableGConv2d.from_dense(GConv2d(2, 3, 3, bias=False, group="p4"), form, 1).to_dense().bias is None


@given(data=st.data())
def test_lifting_takes_planar_maps_with_or_without_the_axis_of_one(data):
    layer = data.draw(layers("lifting"))
    x = map_drawn_for(data, layer)
    assert layer(x[:, :, 0]).equal(layer(x))


@pytest.mark.parametrize(
    ("kind", "execution"),
    [("lifting", None), ("full", None), *((form, e) for form in FORMS for e in FORMS[form].executions)],
)
def test_gradients_are_those_of_finite_differences(kind, execution):
    how = {"rank": 2, "execution": execution} if execution else {}
    layer = make(kind, 2, 1, 2, padding=1, group="pmm", dtype=torch.float64, **how)
    names, values = zip(*layer.named_parameters(), strict=True)

    def run(x, *parameters):
        return functional_call(layer, dict(zip(names, parameters, strict=True)), x)

    assert torch.autograd.gradcheck(run, (map_for(layer, 2, 3).requires_grad_(), *values))


# Cost


@every_kind
@given(data=st.data())
def test_macs_are_those_of_the_convolutions_that_run(kind, data):
    layer = data.draw(layers(kind))
    x = map_drawn_for(data, layer)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layer.eval()(x)  # builds the filters and keeps them
        built = sum(counter.get_flop_counts()["Global"].values())
        y = layer(x)
    before, after = layer.macs()
    # Of convolutions, and of matrix products in place of 1x1 ones. PyTorch counts a multiply-add as two.
    counted = sum(counter.get_flop_counts()["Global"].values()) - built
    assert counted == 2 * len(x) * (before * x[0, 0, 0].numel() + after * y[0, 0, 0].numel())


@every_form
@given(data=st.data())
def test_parameters_and_macs_of_a_separable_layer_are_those_of_its_form(form, data):
    layer = data.draw(layers(form))
    form, size = layer.form, (layer.filter_shape, layer.rank)
    mix, spatial = form.macs(*size)
    assert layer.mix.numel() + layer.spatial.numel() == form.parameters(*size)
    assert layer.macs("factorized") == ((0, mix + spatial) if form.name in ("gc_in", "g_turned") else (mix, spatial))
    assert layer.macs() == layer.macs(layer.execution)


@every_kind
@given(data=st.data())
def test_dense_macs_are_the_entries_of_the_expanded_filter(kind, data):
    layer = data.draw(layers(kind))
    o, i, s_in, k = layer.filter_shape
    assert layer.weight.shape == (o, i, s_in, k, k)
    assert s_in == (1 if kind == "lifting" else layer.group.order)
    assert layer.fan_in == i * s_in * k * k
    assert layer.dense_macs == o * layer.group.order * i * s_in * k * k
    assert layer.macs("dense") == (0, layer.dense_macs)


# Initialisation


@pytest.mark.parametrize("kind", ["lifting", "full"])
@pytest.mark.parametrize("name", GROUPS)
def test_full_filters_are_drawn_as_conv2d_draws_at_the_expanded_width(kind, name):
    layer = make(kind, 32, 1000, 3, group=name)
    fan_in = 32 * 9 * (1 if kind == "lifting" else group(name).order)
    bound = 1 / math.sqrt(fan_in)
    assert layer.weight.var().item() == pytest.approx(1 / (3 * fan_in), rel=0.01)
    for parameter in (layer.weight, layer.bias):
        assert 0.99 * bound < parameter.abs().max() <= bound
    assert abs(layer.bias.mean()) < 0.1 * bound


@every_form
@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_separable_filters_start_at_the_full_layers_scale(form, name, k):
    full = GConv2d(16, 16, k, group=name, bias=False)
    x = torch.randn(16, 16, full.group.order, k + 5, k + 5)
    largest = FORMS[form].max_rank(full.filter_shape)
    for rank in sorted({1, (largest + 1) // 2, largest}):
        layer = SeparableGConv2d.like(full, form, rank, "dense")
        assert layer.weight.square().mean().item() == pytest.approx(1 / (3 * layer.fan_in), rel=1e-5)
        with torch.no_grad():
            assert layer(x).var().item() == pytest.approx(full(x).var().item(), rel=0.1)


@every_form
def test_separable_biases_are_drawn_as_the_full_layers(form):
    layer = SeparableGConv2d(3, 2000, 3, group="p4", form=form)
    bound = 1 / math.sqrt(3 * 4 * 9)
    assert 0.99 * bound < layer.bias.abs().max() <= bound


@every_kind
def test_reset_draws_every_parameter_anew(kind):
    layer = make(kind, 2, 3, 3)
    before = copy.deepcopy(layer.state_dict())
    layer.reset_parameters()
    assert all((layer.state_dict()[name] != value).all() for name, value in before.items())


# Arguments


@every_kind
def test_pairs_of_equal_numbers_say_the_same_as_a_number(kind):
    one = make(kind, 2, 3, 3, 2, 1, 2)
    pairs = make(kind, 2, 3, (3, 3), (2, 2), (1, 1), [2, 2])
    pairs.load_state_dict(one.state_dict())
    assert pairs(x := map_for(one)).equal(one(x))
    assert repr(pairs) == repr(one)


SIZE = "Give a whole number of at least"
SQUARE = "Give a whole number, or a pair of two equal ones"


@every_kind
@pytest.mark.parametrize(
    ("keywords", "accepted"),
    [
        ({"in_channels": 0}, f"{SIZE} 1"),
        ({"out_channels": -2}, f"{SIZE} 1"),
        ({"in_channels": 2.0}, f"{SIZE} 1"),
        ({"in_channels": "2"}, f"{SIZE} 1"),
        ({"out_channels": None}, f"{SIZE} 1"),
        ({"out_channels": True}, f"{SIZE} 1"),
        ({"kernel_size": 0}, f"{SIZE} 1"),
        ({"kernel_size": 3.0}, f"{SIZE} 1"),
        ({"kernel_size": None}, f"{SIZE} 1"),
        ({"kernel_size": (3, 5)}, SQUARE),
        ({"kernel_size": (3, 3, 3)}, SQUARE),
        ({"stride": 0}, f"{SIZE} 1"),
        ({"stride": -1}, f"{SIZE} 1"),
        ({"stride": (1, 2)}, SQUARE),
        ({"padding": -1}, f"{SIZE} 0"),
        ({"padding": "same"}, f"{SIZE} 0"),
        ({"padding": (0, 1)}, SQUARE),
        ({"dilation": 0}, f"{SIZE} 1"),
        ({"dilation": (1, 2)}, SQUARE),
    ],
    ids=str,
)
def test_a_number_that_cannot_be_is_named_with_what_to_give(kind, keywords, accepted):
    ((name, value),) = keywords.items()
    with pytest.raises(InputError) as error:
        make(kind, **{"in_channels": 2, "out_channels": 3, "kernel_size": 3} | keywords)
    assert str(error.value) == f"{name} is {value!r}. {accepted}."


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"group": "p6"}, "unknown group 'p6'; accepted: z2, p2, p4, pm, pmm, p4m"),
        ({"form": "cg"}, "unknown form 'cg'; accepted: g, gc, gc_in, g_turned, gc_turned"),
        ({"execution": "fast"}, "unknown execution 'fast'; accepted: auto, dense, factorized, irrep"),
        ({"rank": 0}, "rank 0 is out of range for form 'gc' of a [3, 2, 4, 3, 3] filter; accepted: 1 to 8"),
        ({"rank": 9}, "rank 9 is out of range for form 'gc' of a [3, 2, 4, 3, 3] filter; accepted: 1 to 8"),
        ({"rank": 1.5}, "rank 1.5 is out of range for form 'gc' of a [3, 2, 4, 3, 3] filter; accepted: 1 to 8"),
    ],
    ids=str,
)
def test_an_unknown_word_or_rank_is_named_with_what_is_accepted(keywords, message):
    with pytest.raises(InputError) as error:
        SeparableGConv2d(2, 3, 3, **{"group": "p4"} | keywords)
    assert str(error.value) == message


@every_kind
@pytest.mark.parametrize("shape", [(1, 2, 3, 5, 5), (1, 3, 4, 5, 5), (1, 3, 5, 5), (2, 4, 5), (2, 5, 5), ()])
def test_an_input_of_the_wrong_shape_is_named_with_what_is_accepted(kind, shape):
    layer = make(kind, 2, 3, 3)
    with pytest.raises(InputError) as error:
        layer(torch.zeros(shape))
    accepted = "[N, 2, 1, H, W] or [N, 2, H, W]" if kind == "lifting" else "[N, 2, 4, H, W]"
    assert str(error.value) == f"{type(layer).__name__} got an input of shape {list(shape)}; accepted: {accepted}"


# What modules do


@every_kind
def test_dtype_and_device_reach_every_parameter(kind):
    layer = make(kind, 2, 3, 3, dtype=torch.float64, device="cpu")
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.float64}
    assert layer(map_for(layer)).dtype == torch.float64
    assert layer.float()(map_for(layer)).dtype == torch.float32
    assert {tensor.device.type for tensor in make(kind, 2, 3, 3, device="meta").parameters()} == {"meta"}


@every_kind
def test_the_state_dict_holds_parameters_only_in_every_mode_and_after_a_run(kind):
    layer = make(kind, 2, 3, 3)
    keys = {"mix", "spatial", "bias"} if kind in FORMS else {"weight", "bias"}
    for module in (layer, layer.eval(), layer.train()):
        assert set(module.state_dict()) == keys
        module(map_for(module))
        assert set(module.state_dict()) == keys
    assert set(make(kind, 2, 3, 3, bias=False).state_dict()) == keys - {"bias"}


@pytest.mark.parametrize(("kind", "s_in"), [("lifting", 1), ("full", 4)])
def test_a_plain_dict_of_5d_weights_loads_as_it_is(kind, s_in):
    state = {"weight": torch.randn(3, 2, s_in, 3, 3), "bias": torch.randn(3)}
    layer = make(kind, 2, 3, 3)
    layer.load_state_dict(state)
    torch.testing.assert_close(layer(x := map_for(layer)), gconv2d(x, state["weight"], state["bias"]))


def test_repr_says_how_to_make_the_layer():
    assert repr(LiftingConv2d(1, 2, 3, group="pm")) == "LiftingConv2d(1, 2, group=pm, kernel_size=3)"
    assert (
        repr(GConv2d(1, 2, 5, 2, 1, 3, False, group="p4m"))
        == "GConv2d(1, 2, group=p4m, kernel_size=5, stride=2, padding=1, dilation=3, bias=False)"
    )
    assert (
        repr(SeparableGConv2d(1, 2, 3, group="p4", form="g", rank=2, execution="factorized"))
        == "SeparableGConv2d(1, 2, group=p4, kernel_size=3, form=g, rank=2, execution=factorized)"
    )


@pytest.mark.parametrize("form", FORMS)
def test_a_lifting_layer_cannot_be_separated(form: str) -> None:
    with pytest.raises(InputError, match=r"LiftingConv2d cannot be separated\. Give a GConv2d"):
        SeparableGConv2d.from_dense(LiftingConv2d(2, 3, 3, group="p4"), form, 1)  # type: ignore[arg-type]


def test_an_unknown_execution_is_refused_wherever_it_is_given() -> None:
    with pytest.raises(InputError, match="unknown execution ''"):
        SeparableGConv2d(2, 3, 3, group="p4", execution="")
    with pytest.raises(InputError, match="unknown execution 'bogus'"):
        SeparableGConv2d(2, 3, 3, group="p4").macs("bogus")


@every_kind
@pytest.mark.parametrize("execution", ["bogus", "Dense", "", None, 1, "irrep", "factorized", "dense", "auto"])
def test_a_layer_takes_an_execution_that_it_has_and_no_other(kind, execution):
    layer = make(kind, 2, 3, 3)
    has = ("auto", *FORMS[kind].executions) if kind in FORMS else ("dense",)
    if execution in has:
        layer.execution = execution
        assert layer.execution == execution
        return
    before = layer.execution
    with pytest.raises(InputError, match="execution") as error:
        layer.execution = execution
    assert "\n" not in str(error.value) and repr(execution).strip("'") in str(error.value)
    assert layer.execution == before
    assert layer(x := map_for(layer)).equal(copy.deepcopy(layer)(x))


@pytest.mark.parametrize("name", ["LiftingConv2d", "GConv2d", "SeparableGConv2d", "P4ConvZ2", "P4ConvP4", "gcP4ConvP4"])
def test_options_of_conv2d_that_there_are_not_are_refused_with_what_to_do(name):
    build = getattr(gconv, name)
    on = {} if name.endswith(("Z2", "P4")) else {"group": "p4"}
    expected = {
        "groups": (2, f"{name} has no channel groups, but groups is 2. Leave it out."),
        "padding_mode": ("circular", f"{name} pads with zeros only, but padding_mode is 'circular'. Leave it out"),
        "bias": (2, f"bias of {name} is 2. Give True or False."),
    }
    for option, (value, message) in expected.items():
        with pytest.raises(InputError) as error:
            build(2, 4, 3, **on, **{option: value})
        assert str(error.value).startswith(message) and "\n" not in str(error.value)
    same = build(2, 4, 3, **on, groups=1, padding_mode="zeros")
    assert repr(same) == repr(build(2, 4, 3, **on))


@every_kind
def test_padding_that_the_error_proposes_is_that_of_conv2d(kind):
    layer, x = make(kind, 2, 3, 3), map_for(make(kind, 2, 3, 3))
    with pytest.raises(InputError) as error:
        make(kind, 2, 3, 3, padding=1, padding_mode="circular")
    proposed = str(error.value).split("pad x with ")[1]
    padded = eval(proposed, {"torch": torch, "x": x, "p": 1})
    wide = padded[..., 1:-1, 1:-1]
    assert wide.equal(x) and padded[..., 0, 1:-1].equal(x[..., -1, :])
    close_enough = torch.testing.assert_close
    # A shift of the map is then a shift of the output.
    close_enough(layer(padded).roll(2, -1), layer(eval(proposed, {"torch": torch, "x": x.roll(2, -1), "p": 1})))


def test_a_residual_that_the_kernel_does_not_take_runs_no_subclass_twice():
    class Doubled(GConv2d):
        def forward(self, x, *, residual=None, relu=False):
            return super().forward(2 * x, residual=residual, relu=relu)

    layer = Doubled(8, 8, 5, padding=2, group="p4m").eval()  # of a size that the compiled kernel runs
    x = from_group_major(torch.randn(2, 64, 6, 6).contiguous(memory_format=torch.channels_last), 8)
    with torch.no_grad():
        expected = gconv2d(2 * x, layer.weight, layer.bias, layer.group, layer.sampling) + x
        for residual in (x, x.contiguous()):
            torch.testing.assert_close(layer(x, residual=residual), expected, rtol=1e-4, atol=1e-4)


# What is kept in eval mode


def prepared_in(layer, run):
    """How often a layer makes its filters anew while ``run`` runs."""
    make_filters = type(layer)._new_filters
    with patch.object(type(layer), "_new_filters", autospec=True, side_effect=make_filters) as counted:
        run()
    return counted.call_count


def lies_channels_last_in(x):
    """Whether a layer reads this map as channels-last; it keeps its filters for one memory format."""
    return has_channels_last_strides(to_group_major(x))


def as_new(layer, x):
    """The output of the layer without anything kept."""
    assert layer.training or layer._cache is not None  # or there would be nothing to compare with
    with torch.enable_grad():
        return copy.deepcopy(layer)(x).detach()


def warm(kind, **keywords):
    """A layer that has run in eval mode, and its input."""
    layer = make(kind, 2, 3, 3, **keywords).eval()
    x = map_for(layer)
    with torch.no_grad():
        layer(x)
    assert layer._cache is not None
    return layer, x


@every_kind
@pytest.mark.parametrize("without_gradients", [torch.no_grad, torch.inference_mode])
@given(data=st.data())
def test_filters_are_made_once_in_eval_mode_and_give_the_same_bits(kind, without_gradients, data):
    layer = data.draw(layers(kind)).eval()
    maps = [map_drawn_for(data, layer) for _ in range(3)]
    maps.sort(key=lies_channels_last_in)
    expected = [layer(x).detach() for x in maps]
    with without_gradients():
        formats = len({lies_channels_last_in(x) for x in maps})
        assert prepared_in(layer, lambda: [layer(x) for x in maps]) == formats
        assert all(layer(x).equal(y) for x, y in zip(maps, expected, strict=True))


def a_factor(layer):
    return layer.weight if isinstance(layer, (GConv2d, LiftingConv2d)) else layer.mix


def in_place(layer):
    with torch.no_grad():
        a_factor(layer).add_(1)


def one_entry(layer):
    # NumPy shares the memory: no version counter moves.
    a_factor(layer).detach().numpy().reshape(-1)[-1] += 1


def in_inference_mode(layer):
    with torch.inference_mode():
        a_factor(layer).data.mul_(2)


def step(layer):
    optimiser = torch.optim.SGD(layer.parameters(), 1.0)
    layer(map_for(layer)).square().sum().backward()
    optimiser.step()


def other_state(layer):
    return {name: torch.randn_like(value) for name, value in layer.state_dict().items()}


def new_parameter(layer):
    name = "weight" if isinstance(layer, (GConv2d, LiftingConv2d)) else "mix"
    setattr(layer, name, nn.Parameter(a_factor(layer).detach() + 1))


CHANGES = {
    "in place": in_place,
    "one entry": one_entry,
    "in inference mode": in_inference_mode,
    "data in place": lambda layer: a_factor(layer).data.zero_(),
    "data replaced": lambda layer: [setattr(p, "data", p.data.clone() + 1) for p in layer.parameters()],
    "last factor": lambda layer: list(layer.parameters())[-1].data.mul_(2),
    "bias": lambda layer: layer.bias.data.add_(1),
    "no bias": lambda layer: setattr(layer, "bias", None),
    "parameter replaced": new_parameter,
    "load_state_dict": lambda layer: layer.load_state_dict(other_state(layer)),
    "load_state_dict, assigned": lambda layer: layer.load_state_dict(other_state(layer), assign=True),
    "optimiser": step,
    "drawn anew": lambda layer: layer.reset_parameters(),
    "vector_to_parameters": lambda layer: nn.utils.vector_to_parameters(
        torch.randn(sum(p.numel() for p in layer.parameters())), layer.parameters()
    ),
}


@every_kind
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_change_of_the_parameters_is_seen_in_eval_mode(kind, change):
    layer, x = warm(kind)
    with torch.no_grad():
        before = layer(x)
    change(layer)
    with torch.no_grad():
        after = layer(x)
        assert not after.equal(before)
        assert after.equal(as_new(layer, x))
        assert prepared_in(layer, lambda: layer(x)) == 0


@every_kind
@pytest.mark.parametrize("bias", [True, False])
def test_a_change_of_dtype_is_seen_in_eval_mode(kind, bias):
    layer, x = warm(kind, bias=bias)
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        layer.to(dtype)
        with torch.no_grad():
            y = layer(x.to(dtype))
        assert y.dtype == dtype
        assert y.equal(as_new(layer, x.to(dtype)))


@every_form
def test_a_change_of_execution_is_seen_in_eval_mode(form):
    layer, x = warm(form)
    for execution in (*FORMS[form].executions, "dense"):
        layer.execution = execution
        with torch.no_grad():
            assert prepared_in(layer, lambda: layer(x)) <= 1
            assert layer(x).equal(as_new(layer, x))


@every_kind
def test_weights_that_are_not_numbers_are_never_hidden(kind):
    layer, x = warm(kind)
    a_factor(layer).data.fill_(math.nan)
    with torch.no_grad():
        assert layer(x).isnan().all()
        a_factor(layer).data.fill_(0)
        assert layer(x).isfinite().all()


@every_kind
def test_nothing_is_kept_with_gradients_and_they_are_the_same(kind):
    layer, x = warm(kind)
    twin = copy.deepcopy(layer)
    for one in (layer, twin):
        one(x).square().sum().backward()
    assert layer._cache is None
    for ours, theirs in zip(layer.parameters(), twin.parameters(), strict=True):
        assert ours.grad.abs().max() > 0
        assert ours.grad.equal(theirs.grad)


@every_kind
def test_what_was_kept_in_inference_mode_serves_without_gradients_and_not_with_them(kind):
    layer = make(kind, 2, 3, 3).eval()
    x = map_for(layer)
    with torch.inference_mode():
        y = layer(x).clone()
    with torch.no_grad():
        assert prepared_in(layer, lambda: layer(x)) == 0
        assert layer(x).equal(y)
    layer(x).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


@every_kind
def test_a_layer_that_goes_back_to_training_lets_go_of_what_it_kept(kind):
    layer, x = warm(kind)
    assert layer.train()._cache is None
    layer, x = warm(kind)
    layer.training = True  # as gconv.nn.modes gives a network its modes back
    with torch.no_grad():
        assert prepared_in(layer, lambda: (layer(x), layer(x))) == 2
    assert layer._cache is None
    layer, x = warm(kind)
    assert layer.eval()._cache is not None


@every_kind
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, copy.copy, lambda layer: pickle.loads(pickle.dumps(layer)), "torch.save"],
    ids=["deepcopy", "copy", "pickle", "torch.save"],
)
def test_what_is_kept_is_in_no_copy_file_or_state(kind, copied):
    layer, x = warm(kind)
    new = make(kind, 2, 3, 3)
    assert layer.state_dict().keys() == new.state_dict().keys()
    assert len(pickle.dumps(layer)) <= len(pickle.dumps(new.eval()))
    if copied == "torch.save":
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        twin = copied(layer)
    assert twin._cache is None
    assert layer._cache is not None
    with torch.no_grad():
        assert twin(x).equal(layer(x))


@every_kind
def test_parameters_put_in_place_for_one_pass_leave_nothing_behind(kind):
    layer, x = warm(kind)
    with torch.no_grad():
        right = layer(x)
        others = [{name: value.detach() + n for name, value in layer.named_parameters()} for n in (1, 2)]
        stacked = {name: torch.stack([other[name] for other in others]) for name in others[0]}
        ensemble = torch.vmap(lambda parameters: functional_call(layer, parameters, x))(stacked)
        for other, y in zip(others, ensemble, strict=True):
            torch.testing.assert_close(functional_call(layer, other, x), y, rtol=1e-4, atol=1e-3)
        assert layer(x).equal(right)


@pytest.mark.parametrize(
    ("kind", "execution"), [("lifting", None), ("full", None), *((f, e) for f in FORMS for e in FORMS[f].executions)]
)
def test_a_pass_of_another_kind_leaves_nothing_behind(kind, execution):
    layer = make(kind, 2, 3, 3, **({"execution": execution} if kind in FORMS else {})).eval()
    x = map_for(layer)

    def in_fake_mode():
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert layer(mode.from_tensor(x)).shape == right.shape

    def in_autocast():
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(layer(x).float(), right, rtol=0.1, atol=0.1)

    def in_vmap():
        torch.testing.assert_close(torch.vmap(layer)(torch.stack([x, x]))[1], right, rtol=1e-5, atol=1e-5)

    with torch.no_grad():
        right = copy.deepcopy(layer)(x)
        for run in (in_fake_mode, in_autocast, in_vmap):
            layer = copy.deepcopy(layer)
            for _ in range(2):  # with nothing kept before, and with something
                run()
                assert layer(x).equal(right)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of the check of the input's shape
@every_kind
def test_compiled_traced_and_exported_programs_keep_nothing(kind):
    layer = make(kind, 2, 3, 3).eval()
    x = map_for(layer)
    with torch.no_grad():
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        traced = torch.jit.trace(layer, x)
        exported = [torch.export.export(layer, (x,), strict=strict).module() for strict in (False, True)]
        for program in (compiled, traced, *exported):
            torch.testing.assert_close(program(x), as_new(layer.train(), x))
            layer.eval()
        assert layer._cache is None
        a_factor(layer).data.add_(1)
        for program in (compiled, traced):
            torch.testing.assert_close(program(x), layer(x))


# Factors from elsewhere


@every_form
@given(data=st.data())
def test_from_factors_is_the_layer_of_those_factors(form, data):
    layer = data.draw(layers(data.draw(st.sampled_from(KINDS[1:])))).train(data.draw(st.booleans()))
    x = map_drawn_for(data, layer)
    shape = layer.filter_shape
    rank = data.draw(st.integers(1, FORMS[form].max_rank(shape)))
    mix, spatial = (torch.randn(size, dtype=torch.float64) for size in FORMS[form].factor_shapes(shape, rank))
    bias = None if layer.bias is None or data.draw(st.booleans()) else torch.randn_like(layer.bias)
    made = SeparableGConv2d.from_factors(
        layer, form, mix, spatial, bias, data.draw(st.sampled_from(FORMS[form].executions))
    )
    assert (made.form.name, made.rank, made.training) == (form, rank, layer.training)
    generator = FORMS[form].generator(mix, spatial, shape, layer.tables.pixels)
    bias = layer.bias if bias is None else bias
    close(made(x), gconv2d(x, generator, bias, layer.group, layer.sampling))
    for ours, theirs in zip((made.mix, made.spatial, made.bias), (mix, spatial, bias), strict=True):
        assert theirs is None or (ours.equal(theirs) and ours.data_ptr() != theirs.data_ptr())


@pytest.mark.parametrize(
    ("form", "mix", "spatial", "bias", "message"),
    [
        ("gc", (3, 1, 2, 4), (3, 1, 3, 3), (2,), "a bias of shape [2] does not fit. Give [3]."),
        ("gc", (3, 9, 2, 4), (3, 9, 3, 3), None, "rank 9 is out of range"),
        ("gc", (3, 0, 2, 4), (3, 0, 3, 3), None, "rank 0 is out of range"),
        ("gc", (3, 2, 2, 4), (3, 1, 3, 3), None, "accepted at rank 1: [3, 1, 2, 4] and [3, 1, 3, 3]"),
        ("gc", (3, 1, 2, 4), (3, 3), None, "accepted at rank 1: [3, 1, 2, 4] and [3, 1, 3, 3]"),
        ("gc_in", (3, 1, 2, 4), (3, 1, 3, 3), None, "accepted at rank 1: [2, 1, 3, 4] and [2, 1, 3, 3]"),
        ("g_turned", (3, 1, 2, 4), (3, 1, 3, 3), None, "accepted at rank 1: [3, 2, 1, 4] and [3, 2, 1, 3, 3]"),
        ("cg", (3, 1, 2, 4), (3, 1, 3, 3), None, "unknown form 'cg'"),
    ],
)
def test_factors_that_do_not_fit_are_refused_with_what_is_accepted(form, mix, spatial, bias, message):
    factors = [None if size is None else torch.zeros(size) for size in (mix, spatial, bias)]
    with pytest.raises(InputError) as error:
        SeparableGConv2d.from_factors(GConv2d(2, 3, 3, group="p4"), form, *factors)
    assert message in str(error.value)


def test_a_bias_is_refused_where_the_layer_has_none():
    layer = GConv2d(2, 3, 3, bias=False, group="p4")
    factors = [torch.zeros(size) for size in FORMS["gc"].factor_shapes(layer.filter_shape, 1)]
    with pytest.raises(InputError, match=r"a bias of shape \[3\] does not fit\. Leave it out, as the layer has none\."):
        SeparableGConv2d.from_factors(layer, "gc", *factors, torch.zeros(3))
    assert SeparableGConv2d.from_factors(layer, "gc", *factors).bias is None
