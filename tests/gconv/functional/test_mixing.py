"""Mixing in irreducible representations against mixing directly, and the layers that run so."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gconv import GROUPS, SeparableGConv2d, gconv2d, group
from gconv.functional.expansion import from_group_major, is_strictly_channels_last
from gconv.functional.mixing import basis_of, regular
from gconv.kernels.dispatch import OVER_PIXELS, in_basis_pays, variants

forms = pytest.mark.parametrize("form", ["gc", "gc_in"])


@st.composite
def drawn_layers(draw, form):
    """A layer in irreps of any group, size, rank and sampling, in float64."""
    name, k = draw(st.sampled_from(GROUPS)), draw(st.integers(1, 4))
    o, i = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    rank = draw(st.integers(1, min((i if form == "gc" else o) * group(name).order, k * k)))
    sampling = {"stride": draw(st.integers(1, 2)), "padding": draw(st.integers(0, 2))}
    bias = draw(st.booleans())
    return SeparableGConv2d(
        i, o, k, **sampling, bias=bias, group=name, form=form, rank=rank, execution="irrep", dtype=torch.float64
    )


def maps(layer, size, dtype, channels_last):
    x = torch.randn(2, layer.group.order * layer.in_channels, size, size + 1, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    return from_group_major(x, layer.group.order).requires_grad_()


@forms
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@settings(max_examples=40)
@given(data=st.data())
def test_outputs_and_gradients_are_those_of_the_definition(form, dtype, tolerance, data):
    layer = data.draw(drawn_layers(form)).to(dtype)
    x = maps(layer, 6, dtype, data.draw(st.booleans()))
    y = layer(x)
    exact, given_exactly = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()
    expected = gconv2d(given_exactly, exact.weight, exact.bias, exact.group, exact.sampling)
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    direction = torch.rand_like(y)  # sums of either sign could come out as nearly nothing
    found = torch.autograd.grad(y, [x, *layer.parameters()], direction)
    wanted = torch.autograd.grad(expected, [given_exactly, *exact.parameters()], direction.double())
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@forms
@pytest.mark.parametrize("execution", ["factorized", "irrep"])
@pytest.mark.parametrize("rank", [1, 2])
def test_channels_last_maps_stay_so(form, execution, rank):
    layer = SeparableGConv2d(3, 2, 3, padding=1, group="p4m", form=form, rank=rank, execution=execution)
    y = layer(maps(layer, 6, torch.float32, True))
    assert is_strictly_channels_last(y.transpose(1, 2).flatten(1, 2))


def test_the_change_of_basis_pays_where_there_are_many_channels():
    p4, p4m = basis_of(group("p4")), basis_of(group("p4m"))
    assert (p4.macs, p4m.macs) == (6, 12)
    for basis, few, many in ((p4, 64, 96), (p4m, 28, 32)):
        assert not basis.pays(few, few)
        assert basis.pays(many, many)
    assert not basis_of(group("z2")).pays(10**6, 10**6)  # there is nothing to gain


@pytest.mark.skipif(OVER_PIXELS not in variants(), reason="no AVX-512 here")
@pytest.mark.parametrize(("stride", "p4", "p4m"), [(1, 5, 3), (2, 10, 8)])
def test_in_the_kernel_it_pays_where_there_are_few(stride, p4, p4m):
    for on, least in (("p4", p4), ("p4m", p4m)):  # as README says
        assert [n for n in range(2, 100) if in_basis_pays(group(on), n, n, stride)] == [*range(least, 100)]
    assert not in_basis_pays(group("z2"), 10**6, 10**6, stride)


@pytest.mark.parametrize("of", [basis_of, regular])
def test_a_basis_is_on_the_cpu_whatever_the_default_device_is(of):
    of.cache_clear()
    with torch.device("meta"):
        basis = of(group("p4"))
    assert {t.device.type for t in (basis.basis, *basis.matrices)} == {"cpu"}


@forms
@pytest.mark.parametrize("rank", [1, 3])
def test_macs_are_those_of_the_products_and_of_the_changes_of_basis(form, rank):
    layer = SeparableGConv2d(5, 7, 3, group="p4m", form=form, rank=rank, execution="irrep")
    products, planar = 12 * 5 * 7 * rank, 9 * 8 * (7 if form == "gc" else 5) * rank
    if form == "gc":  # each input map is changed once, and what each term gives
        assert layer.macs() == (products + 64 * (5 + 7 * rank), planar)
    else:
        assert layer.macs() == (0, products + 64 * (5 * rank + 7) + planar)


@pytest.mark.parametrize("kind", ["gc", "gc_in", "g", "g_turned", "gc_turned"])
def test_every_execution_compiles_without_a_graph_break(kind):
    for execution in SeparableGConv2d(2, 3, 3, group="p4", form=kind).form.executions:
        torch.compiler.reset()
        layer = SeparableGConv2d(2, 3, 3, group="p4", form=kind, rank=2, execution=execution)
        x = maps(layer, 6, torch.float32, True)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), layer(x))
