"""The compiled batch norm against PyTorch's."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gconv import GroupBatchNorm2d
from gconv.functional.expansion import channels_last, from_group_major
from gconv.kernels.batch_norm import norm_train
from tests.gconv.kernels.comparing import built, close, fine_grained, on_threads


@st.composite
def drawn_maps(draw):
    """A map with values far from zero, and its group."""
    order, channels = draw(st.sampled_from([1, 2, 4, 8])), draw(st.integers(2, 9))
    shape = draw(st.integers(1, 5)), order * channels, draw(st.integers(2, 20)), draw(st.integers(2, 9))
    scale, shift = 10.0 ** draw(st.integers(-3, 3)), draw(st.sampled_from([0, 1, 30]))
    x = channels_last(scale * (torch.randn(shape) + shift))
    return from_group_major(x, order) if order > 1 else x


@built
@settings(max_examples=60, deadline=None)
@given(drawn_maps(), st.booleans(), st.integers(1, 3))
def test_batch_norm_is_that_of_the_definition(x, relu, threads):
    norm = GroupBatchNorm2d(x.shape[1])
    nn.init.uniform_(norm.weight, -2, 2)
    nn.init.uniform_(norm.bias, -1, 1)
    exact = nn.BatchNorm3d(x.shape[1], eps=norm.eps).double()
    exact.load_state_dict(norm.state_dict())
    given = x.requires_grad_(), x.detach().double().requires_grad_()
    with on_threads(threads), fine_grained():
        y = norm(given[0], relu=relu)
        expected = exact(given[1] if x.dim() == 5 else given[1].unsqueeze(2)).view(y.shape)
        apart = y.detach().double().sign() == expected.sign()  # ReLU is undecided where rounding decides
        expected = F.relu(expected) if relu else expected
        direction = torch.randn_like(y) * apart
        ours = torch.autograd.grad(y, [given[0], *norm.parameters()], direction)
    theirs = torch.autograd.grad(expected, [given[1], *exact.parameters()], direction.double())
    far = (x.mean() / x.std()).abs().item()  # of values far from zero less is left
    assert close(y, expected, 1e-5 * (1 + far))
    assert close(ours[0], theirs[0], 1e-5 * (1 + 3 * far))
    for one, other in zip(ours[1:], theirs[1:], strict=True):
        assert (one - other).abs().max() <= 1e-3 * max(other.abs().max(), direction.abs().sum().item() / 50)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(norm, name).double(), getattr(exact, name), rtol=1e-3, atol=1e-6)


@built
def test_sums_of_many_positions_do_not_drift():
    torch.manual_seed(0)
    x = channels_last(100 + torch.randn(16, 16, 64, 64))
    y, mean, var = norm_train(x, torch.ones(2), torch.zeros(2), 8, 0.0, False)
    exact = x.double().unflatten(1, (8, 2))
    torch.testing.assert_close(mean.double(), exact.mean((0, 1, 3, 4)), rtol=1e-7, atol=0)
    torch.testing.assert_close(var.double(), exact.var((0, 1, 3, 4), unbiased=False), rtol=1e-5, atol=0)
    assert y.mean().abs() < 1e-4


@built
@pytest.mark.parametrize("train", [True, False])
def test_batch_norm_keeps_what_is_not_a_number(train):
    norm = GroupBatchNorm2d(2).train(train)
    x = from_group_major(channels_last(torch.randn(2, 8, 3, 3)), 4)
    x[0, 1, 2, 1, 1] = float("nan")
    with torch.no_grad():
        y = norm(x, relu=True)
    assert y[0, 1, 2, 1, 1].isnan()
    assert y[:, 0].isfinite().all()
    assert y[:, 1].isnan().all() if train else y.isnan().sum() == 1


@built
@pytest.mark.parametrize("relu", [False, True])
@fine_grained()
def test_nothing_depends_on_the_number_of_threads(relu):
    torch.manual_seed(0)
    norm = GroupBatchNorm2d(3)
    x = from_group_major(channels_last(torch.randn(3, 12, 40, 31)), 4).requires_grad_()
    found = []
    for threads in (1, 2, 7, 64):
        with on_threads(threads):
            y = norm(x, relu=relu)
            found.append([y, *torch.autograd.grad(y.square().sum(), [x, *norm.parameters()])])
    for others in zip(*found, strict=True):
        assert all(torch.equal(others[0], other) for other in others)
