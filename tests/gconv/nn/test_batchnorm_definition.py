"""Batch norm on group maps against loops over channels, and its equivariance."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gconv import GROUPS, GroupBatchNorm2d, InputError, equivariance_error, group

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
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_is_equivariant(name, training):
    report = equivariance_error(trained_norm().train(training), name, map_on(name, 6, 4))
    assert report.max <= 1e-12
    assert report.inexact == ()
