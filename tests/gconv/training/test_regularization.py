"""The penalty on what separable filters leave out, against singular values."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gconv import FORMS, GROUPS, GConv2d, InputError, LiftingConv2d, SeparableGConv2d, create_model, group
from gconv.training.datasets import Split
from gconv.training.loop import fit
from gconv.training.recipe import Recipe
from gconv.training.regularization import rank1_residual

every_form = pytest.mark.parametrize("form", FORMS)
every_group = pytest.mark.parametrize("on", [name for name in GROUPS if group(name).order > 1])


def by_singular_values(layers: list[GConv2d], form: str) -> Tensor:
    """From its definition, block by block."""
    tails = []
    for layer in layers:
        blocks = FORMS[form].fold(layer.weight, layer.tables.pixels)
        left_out = sum(torch.linalg.svdvals(block)[1:].square().sum() for block in blocks)
        tails.append(left_out / layer.weight.square().sum())
    return torch.stack(tails).mean()


@every_form
@every_group
@settings(max_examples=8)
@given(sizes=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(2, 4)), min_size=1, max_size=3))
def test_it_is_the_energy_beyond_the_first_singular_values(form, on, sizes):
    layers = [GConv2d(a, b, k, group=on, dtype=torch.float64) for a, b, k in sizes]
    found = rank1_residual(nn.ModuleList(layers), form)
    torch.testing.assert_close(found, by_singular_values(layers, form), rtol=1e-9, atol=1e-12)
    assert 0 <= found < 1


@every_form
@every_group
def test_it_is_nothing_for_separable_filters(form, on):
    layer = SeparableGConv2d(3, 2, 3, group=on, form=form, dtype=torch.float64).to_dense()
    assert isinstance(layer, GConv2d)
    assert abs(rank1_residual(layer, form)) < 1e-12


def test_another_form_leaves_out_another_share():
    layer = SeparableGConv2d(3, 2, 3, group="p4", form="g", dtype=torch.float64).to_dense()
    assert abs(rank1_residual(layer, "g")) < 1e-12 < 0.01 < rank1_residual(layer, "gc")


@every_form
def test_the_scale_of_the_filters_does_not_matter(form):
    layer = GConv2d(2, 3, 3, group="p4", dtype=torch.float64)
    before = rank1_residual(layer, form)
    with torch.no_grad():
        layer.weight *= 1e-3
    torch.testing.assert_close(rank1_residual(layer, form), before)


@every_form
def test_its_gradient_is_that_of_finite_differences(form):
    layer = GConv2d(2, 2, 3, group="p4", bias=False, dtype=torch.float64)

    def of(weight: Tensor) -> Tensor:
        twin = GConv2d(2, 2, 3, group="p4", bias=False, dtype=torch.float64)
        del twin.weight
        twin.weight = weight
        twin.register_parameter("first", nn.Parameter(torch.zeros((), dtype=torch.float64)))
        return rank1_residual(twin, form)

    assert torch.autograd.gradcheck(of, layer.weight.detach().clone().requires_grad_())


def test_only_full_layers_from_group_to_group_with_larger_kernels_count():
    counted = GConv2d(2, 2, 3, group="p4")
    others = [
        LiftingConv2d(1, 2, 3, group="p4"),
        GConv2d(2, 2, 1, group="p4"),
        SeparableGConv2d(2, 2, 3, group="p4", form="g"),
        nn.Conv2d(3, 3, 3),
    ]
    assert rank1_residual(nn.Sequential(*others), "g") == 0
    assert rank1_residual(nn.Sequential(counted, *others), "g") == rank1_residual(counted, "g") > 0
    assert rank1_residual(create_model("z2cnn", width=2), "g") == 0


def test_no_layers_have_no_gradient_and_do_no_harm():
    model = nn.Linear(2, 2)
    (model(torch.ones(1, 2)).sum() + rank1_residual(model, "gc")).backward()
    assert model.weight.grad is not None


def test_an_unknown_form_is_told():
    with pytest.raises(InputError, match=r"unknown .*form 'cg'; accepted: g, gc"):
        rank1_residual(GConv2d(1, 1, 3, group="p4"), "cg")


@pytest.mark.parametrize("form", ["g", "gc_in"])
def test_training_with_it_lowers_it(form):
    images = Split(torch.rand(20, 1, 28, 28), torch.arange(20) % 10)

    def after(weight: float) -> tuple[float, float]:
        torch.manual_seed(0)
        model = create_model("p4cnn", width=2)
        before = float(rank1_residual(model, form).detach())
        recipe = Recipe(epochs=5, batch_size=10, low_rank_penalty=weight, low_rank_form=form)
        (*_, last) = fit(model, images, recipe, seed=0, label=None)
        return before - float(rank1_residual(model, form).detach()), last["train_loss"]

    (without, plain), (with_it, loss) = after(0.0), after(3.0)
    assert with_it > 0.1 > abs(without)
    assert loss > plain  # it is part of what is minimised
