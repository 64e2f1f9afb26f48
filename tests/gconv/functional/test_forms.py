"""The forms against their definitions, written with loops over channels and elements."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from gconv import FORMS, GROUPS, InputError, group
from gconv.functional.expansion import Sampling, Tables, expand
from gconv.functional.form_base import EXECUTIONS, FilterShape
from gconv.functional.forms import check_execution, form_named, transformed
from gconv.functional.mixing import basis_of

PICTURE = torch.arange(9).view(3, 3)

every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
channels = st.integers(1, 3)
groups = st.sampled_from(GROUPS).map(group)
ks = st.integers(1, 5)


@st.composite
def filters(draw):
    """A group and the size of a filter on it."""
    on = draw(groups)
    return on, FilterShape(draw(channels), draw(channels), on.order, draw(ks))


def moved(on, s, image):
    flips, turns = divmod(on.elements[s], 4)
    image = torch.rot90(image, turns, (-2, -1))
    return image.flip(-2) if flips else image


def relative(on, s, t):
    """s^-1 t, found by trying every element on a picture."""
    (u,) = (u for u in range(on.order) if moved(on, s, moved(on, u, PICTURE)).equal(moved(on, t, PICTURE)))
    return u


def drawn_factors(form, shape, rank):
    return tuple(torch.randn(factor, dtype=torch.float64) for factor in form.factor_shapes(shape, rank))


def drawn_weight(shape):
    o, i, s, k = shape
    return torch.randn(o, i, s, k, k, dtype=torch.float64)


def ranks(form, shape):
    return st.integers(1, form.max_rank(shape))


def pixels(on, k):
    return Tables.build(on, k).pixels


def folded(name, on, weight):
    """The blocks of a filter, one entry of the block index and one row after the other."""
    o, i, s, *_ = weight.shape
    if name in ("gc_in", "g_turned", "gc_turned"):  # K[o, i, t, t y]: the kernel turned back by t
        weight = torch.stack([moved(on, relative(on, t, 0), weight[:, :, t]) for t in range(s)], dim=2)
    if name in ("g", "g_turned"):
        blocks = [[weight[a, b, t] for t in range(s)] for a in range(o) for b in range(i)]
    elif name in ("gc", "gc_turned"):
        blocks = [[weight[a, b, t] for b in range(i) for t in range(s)] for a in range(o)]
    else:
        blocks = [[weight[a, b, t] for a in range(o) for t in range(s)] for b in range(i)]
    return torch.stack([torch.stack([row.flatten() for row in block]) for block in blocks])


def expanded(name, on, mix, spatial):
    """The filters K_s ``[S, O, I, S, k, k]`` that the factors stand for, from the definition of the form."""
    everyone = range(on.order)
    u = torch.tensor([[relative(on, s, t) for t in everyone] for s in everyone])
    d = torch.stack([moved(on, s, spatial) for s in everyone])
    if name == "g":  # K_s = sum_r w[o, i, r, s^-1 s'] d[o, i, r, s^-1 y]
        return torch.einsum("oirst,soiryz->soityz", mix[..., u], d)
    if name == "gc":  # K_s = sum_r w[o, r, i, s^-1 s'] d[o, r, s^-1 y]
        return torch.einsum("orist,soryz->soityz", mix[..., u], d)
    if name == "g_turned":  # K_s = sum_r w[o, i, r, s^-1 s'] d[o, i, r, s'^-1 y]
        return torch.einsum("oirst,toiryz->soityz", mix[..., u], d)
    if name == "gc_turned":  # K_s = sum_r w[o, r, i, s^-1 s'] d[o, r, s'^-1 y]
        return torch.einsum("orist,toryz->soityz", mix[..., u], d)
    return torch.einsum("irost,tiryz->soityz", mix[..., u], d)  # K_s = sum_r w[i, r, o, s^-1 s'] d[i, r, s'^-1 y]


@every_form
@given(case=filters())
def test_fold_is_its_definition(form, case):
    on, shape = case
    weight = drawn_weight(shape)
    matrices = form.fold(weight, pixels(on, shape.k))
    assert matrices.equal(folded(form.name, on, weight))
    assert len(matrices) == form.blocks(shape)


@every_form
@given(case=filters())
def test_fold_and_unfold_are_inverse_isometries(form, case):
    on, shape = case
    weight = drawn_weight(shape)
    matrices = form.fold(weight, pixels(on, shape.k))
    assert form.unfold(matrices, shape, pixels(on, shape.k)).equal(weight)
    assert matrices.flatten().sort().values.equal(weight.flatten().sort().values)
    assert form.fold(form.unfold(matrices, shape, pixels(on, shape.k)), pixels(on, shape.k)).equal(matrices)


@every_form
@given(case=filters(), data=st.data())
def test_the_filter_of_the_factors_is_the_definition_of_the_form(form, case, data):
    on, shape = case
    mix, spatial = drawn_factors(form, shape, data.draw(ranks(form, shape)))
    tables = Tables.build(on, shape.k)
    weight = form.generator(mix, spatial, shape, tables.pixels)
    o, i, s, k = shape
    dense = expand(weight, tables.expansion).view(o, s, i, s, k, k).transpose(0, 1)
    torch.testing.assert_close(dense, expanded(form.name, on, mix, spatial), rtol=1e-12, atol=1e-12)


@every_form
@given(
    case=filters(),
    data=st.data(),
    sampling=st.builds(Sampling, st.integers(1, 3), st.integers(0, 2), st.integers(1, 2)),
    extra=st.tuples(ks, ks),
)
def test_factorised_run_equals_one_convolution_with_the_dense_filter(form, case, data, sampling, extra):
    on, shape = case
    o, i, s, k = shape
    rank = data.draw(ranks(form, shape))
    mix, spatial = drawn_factors(form, shape, rank)
    x = torch.randn(2, s * i, *(sampling.dilation * (k - 1) + e for e in extra), dtype=torch.float64)
    bias = torch.randn(o, dtype=torch.float64).repeat(s) if data.draw(st.booleans()) else None
    # [S, O, I, S, k, k], and both sides group-major, as the maps are.
    dense = expanded(form.name, on, mix, spatial).transpose(2, 3).reshape(s * o, s * i, k, k)
    for basis in (None, basis_of(on)) if "irrep" in form.executions else (None,):
        w, d = form.filters(mix, spatial, Tables.build(on, k), basis)
        y = form.run(x, w, d, bias, shape, rank, sampling)
        torch.testing.assert_close(y, F.conv2d(x, dense, bias, *sampling), rtol=1e-12, atol=1e-11)


@every_form
@given(case=filters(), data=st.data())
def test_factoring_is_the_best_approximation_and_shares_the_singular_values_evenly(form, case, data):
    on, shape = case
    rank = data.draw(ranks(form, shape))
    weight = drawn_weight(shape)
    mix, spatial = form.factor(weight, rank, pixels(on, shape.k))
    singular = np.linalg.svd(folded(form.name, on, weight).numpy(), compute_uv=False)
    lost = weight - form.generator(mix, spatial, shape, pixels(on, shape.k))
    assert lost.norm() == pytest.approx(np.sqrt((singular[:, rank:] ** 2).sum()), rel=1e-10, abs=1e-12)
    for factor in (mix, spatial):
        np.testing.assert_allclose(
            factor.reshape(len(singular), rank, -1).norm(dim=2) ** 2, singular[:, :rank], rtol=1e-10, atol=1e-12
        )


@every_form
@given(case=filters())
def test_every_filter_is_separable_at_the_largest_rank_and_no_earlier(form, case):
    on, shape = case
    weight = drawn_weight(shape)
    largest = form.max_rank(shape)
    assert largest == np.linalg.matrix_rank(folded(form.name, on, weight).numpy()).max()
    restored = form.generator(*form.factor(weight, largest, pixels(on, shape.k)), shape, pixels(on, shape.k))
    torch.testing.assert_close(restored, weight, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "largest", "parameters", "macs", "outputs"),
    [
        (
            "g",
            lambda O, I, S, k: min(S, k * k),
            lambda O, I, S, k, R: O * I * R * (S + k * k),
            lambda O, I, S, k, R: (O * I * R * S * S, O * S * I * R * k * k),
            lambda O, I, S, R: (O * I * R * S, O * S),
        ),
        (
            "gc",
            lambda O, I, S, k: min(I * S, k * k),
            lambda O, I, S, k, R: O * R * (I * S + k * k),
            lambda O, I, S, k, R: (O * S * R * I * S, O * S * R * k * k),
            lambda O, I, S, R: (O * S * R, O * S),
        ),
        (
            "gc_in",
            lambda O, I, S, k: min(O * S, k * k),
            lambda O, I, S, k, R: I * R * (O * S + k * k),
            lambda O, I, S, k, R: (O * S * I * S * R, I * S * R * k * k),
            lambda O, I, S, R: (O * S, I * S * R),
        ),
        (
            "g_turned",
            lambda O, I, S, k: min(S, k * k),
            lambda O, I, S, k, R: O * I * R * (S + k * k),
            lambda O, I, S, k, R: (O * S * I * S * R, O * I * S * R * k * k),
            lambda O, I, S, R: (O * S, O * I * S * R),
        ),
        (
            "gc_turned",
            lambda O, I, S, k: min(I * S, k * k),
            lambda O, I, S, k, R: O * R * (I * S + k * k),
            lambda O, I, S, k, R: (O * R * S * S * I, O * R * S * S * k * k),
            lambda O, I, S, R: (O * R * S * S, O * S),
        ),
    ],
    ids=FORMS,
)
@given(case=filters(), data=st.data())
def test_ranks_parameters_and_macs_are_these_formulas(name, largest, parameters, macs, outputs, case, data):
    form, (_, shape) = FORMS[name], case
    rank = data.draw(ranks(form, shape))
    assert form.max_rank(shape) == largest(*shape)
    assert form.parameters(shape, rank) == parameters(*shape, rank)
    assert form.parameters(shape, rank) == sum(factor.numel() for factor in drawn_factors(form, shape, rank))
    assert form.macs(shape, rank) == macs(*shape, rank)
    computed = zip(outputs(*shape[:3], rank), form.fan_ins(shape, rank), strict=True)
    assert form.macs(shape, rank) == tuple(map(math.prod, computed))


@given(on=groups, k=ks)
def test_turned_makes_all_copies_of_a_kernel(on, k):
    kernels = torch.randn(2, 3, k, k)
    copies = transformed(kernels, pixels(on, k))
    assert copies.shape == (2, on.order, 3, k, k)
    assert all(copies[:, s].equal(moved(on, s, kernels)) for s in range(on.order))


@every_form
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_filter_that_is_not_finite_is_refused(form, bad):
    weight = drawn_weight(FilterShape(2, 2, 4, 3))
    weight[1, 0, 2, 1, 1] = bad
    with pytest.raises(InputError, match="NaN or infinite"):
        form.factor(weight, 1, pixels(group("p4"), 3))


@every_form
def test_a_rank_out_of_range_names_the_range(form):
    shape = FilterShape(1, 1, 4, 3)
    for rank in (0, -1, 5, 1.5, "2", None, True):
        with pytest.raises(InputError) as error:
            form.check_rank(rank, shape)
        expected = f"rank {rank!r} is out of range for form '{form.name}' of a [1, 1, 4, 3, 3] filter; accepted: 1 to 4"
        assert str(error.value) == expected


def test_forms_and_executions_are_found_by_name_or_refused_with_the_known_names():
    assert tuple(FORMS) == ("g", "gc", "gc_in", "g_turned", "gc_turned")
    for name, form in FORMS.items():
        assert form_named(name.upper()) is form_named(form) is form
    assert tuple(map(check_execution, ("auto", *EXECUTIONS))) == ("auto", "dense", "factorized", "irrep")
    for wrong in ("cg", None):
        with pytest.raises(InputError, match=rf"^unknown form '{wrong}'; accepted: g, gc, gc_in, g_turned, gc_turned$"):
            form_named(wrong)
        with pytest.raises(InputError) as error:
            check_execution(wrong)
        assert str(error.value) == f"unknown execution '{wrong}'; accepted: auto, dense, factorized, irrep"
    for name, form in FORMS.items():
        assert all(check_execution(execution, form) == execution for execution in ("auto", *form.executions))
        if name not in ("gc", "gc_in"):
            words = f"form '{name}' has no execution 'irrep', which is for gc, gc_in; accepted: auto, dense, factorized"
            with pytest.raises(InputError) as error:
                check_execution("irrep", form)
            assert str(error.value) == words


@every_form
def test_a_form_says_what_its_factors_depend_on(form):
    axes = {"g": "oi", "gc": "o", "gc_in": "i"}[form.name.removesuffix("_turned")]
    assert form.block_axes == axes
    assert form.input_frame == (form.name not in ("g", "gc"))
    sizes = {"o": 2, "i": 3}
    planar, others = [sizes[axis] for axis in axes], [sizes[axis] for axis in "oi" if axis not in axes]
    assert form.factor_shapes(FilterShape(2, 3, 8, 5), 4) == ((*planar, 4, *others, 8), (*planar, 4, 5, 5))


@every_form
def test_a_copied_or_unpickled_form_is_the_same_form(form):
    for twin in (copy.copy(form), copy.deepcopy(form), pickle.loads(pickle.dumps(form))):
        assert twin == form and hash(twin) == hash(form)
        assert {name for name, other in FORMS.items() if other == twin} == {form.name}
