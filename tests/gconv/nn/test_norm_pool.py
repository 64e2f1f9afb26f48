"""Batch norm and pools on group maps against loops over channels, windows and positions; all of them equivariant."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gconv import (
    GROUPS,
    GroupBatchNorm2d,
    GroupMaxPool,
    GroupMeanPool,
    InputError,
    SpatialMaxPool2d,
    SpatialMeanPool2d,
    equivariance_error,
    group,
)

every_group = pytest.mark.parametrize("name", GROUPS)
sizes = st.integers(1, 5)


def map_on(name, n=5, m=4, c=3):
    return torch.randn(2, c, group(name).order, n, m, dtype=torch.float64)


def trained_norm(c=3):
    """A batch norm whose every number differs from its default, and from channel to channel."""
    norm = GroupBatchNorm2d(c, dtype=torch.float64)
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        nn.init.uniform_(tensor, 0.5, 2)
    return norm


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@every_group
@given(c=st.integers(1, 4), n=st.integers(2, 5), m=sizes, training=st.booleans())
def test_batch_norm_is_one_affine_map_per_channel(name, c, n, m, training):
    norm, x = trained_norm(c).train(training), 3 * map_on(name, n, m, c) + 1
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    y = norm(x)
    for channel in range(c):
        values = x[:, channel]
        if training:
            close(norm.running_mean[channel], 0.9 * mean[channel] + 0.1 * values.mean())
            close(norm.running_var[channel], 0.9 * var[channel] + 0.1 * values.var())
            centre, scale = values.mean(), (values.var(correction=0) + norm.eps).sqrt()
        else:
            centre, scale = mean[channel], (var[channel] + norm.eps).sqrt()
        close(y[:, channel], norm.weight[channel] * (values - centre) / scale + norm.bias[channel])


def test_batch_norm_has_the_keys_and_the_planar_behaviour_of_nn_batchnorm2d():
    ours, theirs = trained_norm(), nn.BatchNorm2d(3, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    planar = map_on("z2")[:, :, 0]
    for training in (True, False):
        close(ours.train(training)(planar), theirs.train(training)(planar))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(ours.state_dict()[key].equal(value) for key, value in theirs.state_dict().items())


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (1, 3, 4, 2, 2, 2)])
def test_batch_norm_names_a_shape_that_is_no_map(shape):
    with pytest.raises(InputError) as error:
        GroupBatchNorm2d(3)(torch.zeros(shape))
    assert (
        str(error.value)
        == f"GroupBatchNorm2d got an input of shape {list(shape)}; accepted: [N, C, S, H, W] or [N, C, H, W]"
    )


@every_group
def test_group_pools_take_the_largest_and_the_mean_over_the_elements(name):
    x = map_on(name)
    elements = [x[:, :, s] for s in range(x.shape[2])]
    largest = elements[0]
    for other in elements[1:]:
        largest = torch.where(other > largest, other, largest)
    assert GroupMaxPool()(x).equal(largest)
    close(GroupMeanPool()(x), sum(elements) / len(elements))


@given(n=sizes, m=sizes, k=st.integers(1, 3), stride=st.none() | st.integers(1, 3), data=st.data())
def test_spatial_max_pool_is_the_largest_in_every_window(n, m, k, stride, data):
    padding = data.draw(st.integers(0, k // 2))
    n, m, step = n + k, m + k, stride or k
    x = map_on("p4", n, m)
    y = SpatialMaxPool2d(k, stride, padding)(x)
    assert y.shape[3:] == tuple((size + 2 * padding - k) // step + 1 for size in (n, m))
    for row in range(y.shape[3]):
        for column in range(y.shape[4]):
            top, left = row * step - padding, column * step - padding
            window = x[..., max(top, 0) : top + k, max(left, 0) : left + k]
            assert y[..., row, column].equal(window.amax((-2, -1)))
    assert SpatialMaxPool2d(k, stride, padding)(x[:, :, 0]).equal(y[:, :, 0])


def test_spatial_mean_pool_averages_the_plane_of_any_map():
    x = map_on("p4m")
    expected = sum(x[..., row, column] for row in range(5) for column in range(4)) / 20
    close(SpatialMeanPool2d()(x), expected)
    close(SpatialMeanPool2d()(x[:, :, 0]), expected[:, :, 0])


def test_spatial_max_pool_says_its_window():
    assert repr(SpatialMaxPool2d(2)) == "SpatialMaxPool2d(kernel_size=2, stride=2, padding=0)"
    assert repr(SpatialMaxPool2d(3, 1, 1)) == "SpatialMaxPool2d(kernel_size=3, stride=1, padding=1)"


@every_group
@pytest.mark.parametrize(
    "module",
    [
        trained_norm().train(),
        trained_norm().eval(),
        GroupMaxPool(),
        GroupMeanPool(),
        SpatialMaxPool2d(2),
        SpatialMaxPool2d(3, 2, 1),
        SpatialMeanPool2d(),
        nn.Sequential(GroupMaxPool(), SpatialMeanPool2d()),
    ],
    ids=str,
)
def test_norm_and_pools_are_equivariant(name, module):
    n, m = (5, 7) if getattr(module, "padding", 0) else (6, 4)
    report = equivariance_error(module, name, map_on(name, n, m))
    assert report.max <= 1e-12
    assert report.inexact == ()


@pytest.mark.parametrize("pool", [GroupMaxPool(), GroupMeanPool()])
def test_group_pools_refuse_maps_without_a_group_axis(pool: nn.Module) -> None:
    with pytest.raises(InputError, match=r"got an input of shape \[1, 2, 5, 5\]; accepted: \[N, C, S, H, W\]"):
        pool(torch.zeros(1, 2, 5, 5))
