"""Pooling of group maps against loops over windows and positions, and its equivariance."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gconv import (
    GROUPS,
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


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


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
    "pool",
    [
        GroupMaxPool(),
        GroupMeanPool(),
        SpatialMaxPool2d(2),
        SpatialMaxPool2d(3, 2, 1),
        SpatialMeanPool2d(),
        nn.Sequential(GroupMaxPool(), SpatialMeanPool2d()),
    ],
    ids=str,
)
def test_pools_are_equivariant(name, pool):
    n, m = (5, 7) if getattr(pool, "padding", 0) else (6, 4)
    report = equivariance_error(pool, name, map_on(name, n, m))
    assert report.max <= 1e-12
    assert report.inexact == ()


@pytest.mark.parametrize("pool", [GroupMaxPool(), GroupMeanPool()])
def test_group_pools_refuse_maps_without_a_group_axis(pool: nn.Module) -> None:
    with pytest.raises(InputError, match=r"got an input of shape \[1, 2, 5, 5\]; accepted: \[N, C, S, H, W\]"):
        pool(torch.zeros(1, 2, 5, 5))
