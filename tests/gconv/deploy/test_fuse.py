"""Batch norm folded into convolutions: the same function, to rounding, whatever the layer and the statistics."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from gconv.deploy.fuse import fold, fuse
from gconv.functional.forms import FORMS
from gconv.groups.point_groups import GROUPS
from gconv.models.checkpoint import save
from gconv.models.equivariance import equivariance_error
from gconv.models.zoo import MODELS, Model, create_model
from gconv.nn.batchnorm import GroupBatchNorm2d
from gconv.nn.conv import GConv2d, LiftingConv2d
from gconv.nn.separable_conv import SeparableGConv2d
from gconv.system.errors import InputError

KINDS = ("planar", "depthwise", "lifting", "full", *FORMS)


def norms(net: nn.Module) -> list[str]:
    return [name for name, module in net.named_modules() if isinstance(module, GroupBatchNorm2d)]


def learned(norm: GroupBatchNorm2d) -> GroupBatchNorm2d:
    """With statistics and, if there are some, parameters that are nobody's defaults; some variances are zero."""
    norm.running_mean.normal_()
    norm.running_var.uniform_(0, 3).mul_(torch.rand_like(norm.running_var) > 0.2)
    if norm.affine:
        norm.weight.data.normal_()
        norm.bias.data.normal_()
    return norm


def trained(net: Model, dtype: torch.dtype = torch.float64) -> tuple[Model, Tensor]:
    """In eval mode, with batch norms that know the maps, so that no unit is dead; and some images."""
    for norm in map(net.get_submodule, norms(net)):
        norm.momentum = 1.0
        norm.weight.data.uniform_(0.5, 1.5)
        norm.bias.data.uniform_(-0.5, 0.5)
    images = torch.rand(5, *net.input_shape, dtype=dtype)
    net.to(dtype).train()(images)
    return net.eval(), images


def off(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest entry."""
    return ((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


@st.composite
def layers(draw: st.DrawFn, kind: str) -> nn.Module:
    """A float64 layer of that kind: any group, size, rank, sampling and execution."""
    o, i, k = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    options = {name: draw(st.integers(low, 2)) for name, low in (("stride", 1), ("padding", 0), ("dilation", 1))}
    options |= {"bias": draw(st.booleans()), "dtype": torch.float64}
    if kind in ("planar", "depthwise"):
        groups = i if kind == "depthwise" else 1
        return nn.Conv2d(i, o * groups, k, groups=groups, **options)
    options["group"] = draw(st.sampled_from(GROUPS))
    if kind in ("lifting", "full"):
        return {"lifting": LiftingConv2d, "full": GConv2d}[kind](i, o, k, **options)
    full = GConv2d(i, o, k, **options)
    rank = draw(st.integers(1, FORMS[kind].max_rank(full.filter_shape)))
    return SeparableGConv2d.like(full, kind, rank, draw(st.sampled_from(FORMS[kind].executions)))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(data=st.data())
def test_a_folded_layer_does_what_layer_and_norm_did(kind, data):
    layer = data.draw(layers(kind))
    order = 1 if isinstance(layer, (nn.Conv2d, LiftingConv2d)) else layer.group.order
    eps, momentum, affine = data.draw(
        st.tuples(st.sampled_from([1e-5, 1e-3, 2.0]), st.sampled_from([0.1, None]), st.booleans())
    )
    norm = learned(GroupBatchNorm2d(layer.out_channels, eps, momentum, affine, dtype=torch.float64)).eval()
    n = layer.dilation[0] * (layer.kernel_size[0] - 1) + data.draw(st.integers(1, 4))
    x = torch.randn(2, layer.in_channels, *([] if order == 1 else [order]), n, n, dtype=torch.float64)
    with torch.no_grad():
        expected = norm(layer(x))
        fold(layer, norm)
        assert off(layer(x), expected) < 1e-12


def test_what_a_separable_layer_shares_with_another_is_not_changed():
    first, second = (SeparableGConv2d(2, 2, 3, group="p4", form="gc_in") for _ in range(2))
    second.mix = first.mix
    before = first.mix.detach().clone()
    fold(second, learned(GroupBatchNorm2d(2)))
    assert first.mix.equal(before)
    assert not second.mix.equal(before)


# Networks


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_a_fused_network_is_the_same_function(name, dtype, tolerance):
    net, images = trained(create_model(name, width=2), dtype)
    fused = fuse(net)
    with torch.no_grad():
        assert off(fused(images), net(images)) < tolerance
    stay = [f"stage{stage}.{block}.bn1" for stage in (1, 2, 3) for block in range(7)] + ["bn"]
    assert norms(fused) == (stay if "resnet" in name else [])  # those of the shortcuts are folded
    assert all(isinstance(fused.get_submodule(name), nn.Identity) for name in set(norms(net)) - set(norms(fused)))


@settings(max_examples=15)
@given(data=st.data())
def test_a_converted_network_of_any_group_fuses_and_stays_equivariant(data):
    on = data.draw(st.sampled_from([name for name in GROUPS if name != "z2"]))
    net = create_model("p4cnn", group=on, width=2)
    for number in range(2, 8):
        form = data.draw(st.sampled_from([None, *FORMS]))
        if form is not None:
            layer = net.get_submodule(f"conv{number}")
            rank = data.draw(st.integers(1, FORMS[form].max_rank(layer.filter_shape)))
            separable = SeparableGConv2d.like(layer, form, rank, data.draw(st.sampled_from(FORMS[form].executions)))
            net.set_submodule(f"conv{number}", separable)
    net, images = trained(net)
    fused = fuse(net)
    with torch.no_grad():
        assert off(fused(images), net(images)) < 1e-12
    assert equivariance_error(fused, on, images).max < 1e-12


def test_the_original_stays_as_it_was():
    net = trained(create_model("p4m-resnet44", width=1))[0].train()
    before, text = deepcopy(net.state_dict()), repr(net)
    random = torch.get_rng_state()
    fused = fuse(net)
    assert torch.get_rng_state().equal(random)
    assert repr(net) == text
    assert all(tensor.equal(before[name]) for name, tensor in net.state_dict().items())
    assert all(module.training for module in net.modules())
    assert not any(module.training for module in fused.modules())
    assert not net.fused
    with torch.no_grad():
        fused.fc.weight.zero_()
    assert net.fc.weight.any()


def test_fusing_twice_changes_nothing_more():
    net, _ = trained(create_model("gc-p4cnn", width=2))
    once, twice = fuse(net), fuse(fuse(net))
    assert all(tensor.equal(twice.state_dict()[name]) for name, tensor in once.state_dict().items())


def test_a_layer_that_runs_twice_keeps_its_two_norms():
    net = create_model("p4cnn", width=2)
    net.conv4 = net.conv3
    net, images = trained(net)
    fused = fuse(net)
    assert norms(fused) == ["bn3", "bn4"]
    assert off(fused(images), net(images)) < 1e-12


def test_layers_that_share_a_weight_are_parted():
    net = create_model("p4cnn", width=2)
    net.conv4.weight = net.conv3.weight
    net, images = trained(net)
    assert off(fuse(net)(images), net(images)) < 1e-12


@pytest.mark.parametrize("watched", ["conv3", "bn3"])
def test_a_watched_pair_is_not_folded_and_its_hook_sees_what_it_saw(watched):
    net, images = trained(create_model("p4cnn", width=2))
    seen = []
    net.get_submodule(watched).register_forward_hook(lambda layer, given, output: seen.append(output.clone()))
    fused = fuse(net)
    assert norms(fused) == ["bn3"]
    with torch.no_grad():
        assert off(fused(images), net(images)) < 1e-12
    assert len(seen) == 2 and off(seen[0], seen[1]) < 1e-12


# Refusals


def refused(net: nn.Module) -> str:
    with pytest.raises(InputError) as caught:
        fuse(net)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "other", [nn.Linear(2, 2), GConv2d(1, 1, 3, group="p4"), None], ids=["linear", "gconv", "none"]
)
def test_only_networks_of_this_package_are_fused(other):
    assert "only networks of gconv.create_model can be fused" in refused(other)


@pytest.mark.parametrize("place", ["stage1.0.bn1", "stage1.0.bn2"])
def test_norms_without_statistics_are_refused(place):
    net = create_model("p4m-resnet44", width=1)
    net.set_submodule(place, GroupBatchNorm2d(1, track_running_stats=False))
    assert f"{place} has no running statistics" in refused(net)


@pytest.mark.parametrize("name", ["p4cnn", "z2cnn"])
def test_a_filter_that_is_computed_is_refused(name):
    net = create_model(name, width=1)
    weight_norm(net.conv2)
    assert "is computed from other parameters. Remove the parametrisation" in refused(net)


def test_a_fused_network_has_no_checkpoint(tmp_path):
    with pytest.raises(InputError, match=r"^a fused network cannot be saved: .* or use gconv\.export\.$"):
        save(fuse(create_model("p4cnn", width=1)), tmp_path / "net.pt")
    assert not list(tmp_path.iterdir())
