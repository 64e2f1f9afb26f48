"""The layers: one function whichever way they run, drawn at the right scale, and as handy as ``nn.Conv2d``."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from gconv import FORMS, GROUPS, GConv2d, InputError, LiftingConv2d, SeparableGConv2d, gconv2d, group
from gconv.functional import Sampling
from gconv.separable import EXECUTIONS

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
    return SeparableGConv2d.like(layer, kind, rank, draw(st.sampled_from(EXECUTIONS)))


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
def test_factorized_dense_and_to_dense_are_one_function(form, data):
    layer = data.draw(layers(form))
    x = map_drawn_for(data, layer)
    other = copy.deepcopy(layer)
    other.execution = next(execution for execution in EXECUTIONS if execution != layer.execution)
    full = layer.to_dense()
    assert type(full) is GConv2d
    assert full.weight.equal(layer.weight)
    close(other(x), layer(x))
    close(full(x), layer(x))


@every_form
@given(data=st.data())
def test_from_dense_at_full_rank_is_the_same_layer(form, data):
    layer = data.draw(layers(data.draw(st.sampled_from(KINDS[1:]))))
    x = map_drawn_for(data, layer)
    rank = FORMS[form].max_rank(layer.filter_shape)
    for execution in EXECUTIONS:
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
    ("kind", "execution"), [("lifting", None), ("full", None), *((form, e) for form in FORMS for e in EXECUTIONS)]
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
    with FlopCounterMode(display=False) as counter:
        y = layer(x)
    before, after = layer.macs()
    counted = counter.get_flop_counts()["Global"][torch.ops.aten.convolution]
    # PyTorch counts a multiply-add as two.
    assert counted == 2 * len(x) * (before * x[0, 0, 0].numel() + after * y[0, 0, 0].numel())


@every_form
@given(data=st.data())
def test_parameters_and_macs_of_a_separable_layer_are_those_of_its_form(form, data):
    layer = data.draw(layers(form))
    form, size = layer.form, (layer.filter_shape, layer.rank)
    mix, spatial = form.macs(*size)
    assert layer.mix.numel() + layer.spatial.numel() == form.parameters(*size)
    assert layer.macs("factorized") == ((0, mix + spatial) if form.name == "gc_in" else (mix, spatial))
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


SIZE = "a whole number of at least"
SQUARE = "a whole number, or a pair of equal ones (square only)"


@every_kind
@pytest.mark.parametrize(
    ("keywords", "accepted"),
    [
        ({"in_channels": 0}, f"{SIZE} 1"),
        ({"out_channels": -2}, f"{SIZE} 1"),
        ({"in_channels": 2.0}, f"{SIZE} 1"),
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
def test_a_number_that_cannot_be_is_named_with_what_is_accepted(kind, keywords, accepted):
    ((name, value),) = keywords.items()
    with pytest.raises(InputError) as error:
        make(kind, **{"in_channels": 2, "out_channels": 3, "kernel_size": 3} | keywords)
    assert str(error.value) == f"{name} is {value!r}; accepted: {accepted}"


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"group": "p6"}, "unknown group 'p6'; accepted: z2, p2, p4, pm, pmm, p4m"),
        ({"form": "cg"}, "unknown form 'cg'; accepted: g, gc, gc_in"),
        ({"execution": "fast"}, "unknown execution 'fast'; accepted: dense, factorized"),
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
def test_a_layer_made_without_memory_works_once_it_is_given_some(kind):
    layer = make(kind, 2, 3, 3, device="meta")
    assert layer(torch.empty(1, *layer.filter_shape[1:3], 5, 5, device="meta")).shape == (1, 3, 4, 3, 3)
    layer.to_empty(device="cpu")
    for tensor in layer.buffers():
        tensor.fill_(2**40)  # what to_empty() leaves is arbitrary
    layer.reset_parameters()
    real = make(kind, 2, 3, 3)
    real.load_state_dict(layer.state_dict())
    assert layer(x := map_for(layer)).equal(real(x))


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
    assert layer(x := map_for(layer)).equal(gconv2d(x, state["weight"], state["bias"]))


@every_kind
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_and_pickles_compute_the_same_and_are_independent(kind, copied):
    layer = make(kind, 2, 3, 3, group="p4m")
    twin, x = copied(layer), map_for(layer)
    assert repr(twin) == repr(layer)
    assert twin(x).equal(layer(x))
    twin.reset_parameters()
    assert not twin(x).equal(layer(x))


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


@every_form
def test_the_default_execution_is_the_forms(form):
    assert SeparableGConv2d(1, 2, 3, group="p4", form=form).execution == FORMS[form].default_execution


@pytest.mark.parametrize("form", FORMS)
def test_a_lifting_layer_cannot_be_separated(form: str) -> None:
    with pytest.raises(InputError, match="LiftingConv2d cannot be separated; accepted: a group-to-group layer"):
        SeparableGConv2d.from_dense(LiftingConv2d(2, 3, 3, group="p4"), form, 1)  # type: ignore[arg-type]


def test_an_unknown_execution_is_refused_wherever_it_is_given() -> None:
    with pytest.raises(InputError, match="unknown execution ''"):
        SeparableGConv2d(2, 3, 3, group="p4", execution="")
    with pytest.raises(InputError, match="unknown execution 'bogus'"):
        SeparableGConv2d(2, 3, 3, group="p4").macs("bogus")
