"""Convolutions of few channels against PyTorch's."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gconv import create_model, fuse
from gconv.functional.expansion import channels_last
from gconv.kernels import small_conv
from gconv.kernels.small_conv import runs_small_conv
from tests.gconv.kernels.comparing import close

narrow = pytest.mark.skipif(not runs_small_conv(), reason="no AVX-512 here")


@narrow
@settings(max_examples=80, deadline=None)
@given(st.data())
def test_small_convolutions_are_those_of_pytorch(data):
    k = data.draw(st.integers(1, 4))
    channels, out_channels = data.draw(st.integers(1, 9)), 8 * data.draw(st.integers(1, 12))
    shape = data.draw(st.integers(1, 4)), channels, data.draw(st.integers(k, 7)), data.draw(st.integers(k, 19))
    x, weight = channels_last(torch.randn(shape)), torch.randn(out_channels, channels, k, k)
    bias = torch.randn(out_channels) if data.draw(st.booleans()) else None
    relu = data.draw(st.booleans())
    y = small_conv.small_conv2d(x, weight.permute(2, 3, 1, 0).contiguous(), bias, relu)
    expected = F.conv2d(x.double(), weight.double(), None if bias is None else bias.double())
    expected = F.relu(expected) if relu else expected
    assert close(y, expected)
    wrong = small_conv.small_conv2d(x, 1.01 * weight.permute(2, 3, 1, 0).contiguous(), bias, relu)
    assert not close(wrong, expected) or expected.abs().max() < 1e-3
    empty = small_conv.small_conv2d(x[:0], weight.permute(2, 3, 1, 0).contiguous(), bias, relu)
    assert empty.shape == (0, *y.shape[1:])


@narrow
@pytest.mark.parametrize("needs", [(True, True, True), (False, True, True), (True, False, False), (False, False, True)])
def test_their_gradients_are_those_of_pytorch_and_have_some(needs):
    torch.manual_seed(0)
    x, weight, bias = channels_last(torch.randn(2, 3, 6, 7)), torch.randn(16, 3, 3, 3), torch.randn(16)
    ours = [
        tensor.clone(memory_format=torch.preserve_format).requires_grad_(need)
        for tensor, need in zip((x, weight, bias), needs, strict=True)
    ]
    theirs = [tensor.double().requires_grad_(need) for tensor, need in zip((x, weight, bias), needs, strict=True)]
    found = []
    for x, weight, bias in (ours, theirs):
        y = small_conv.convolve(x, weight, bias, 1, 0, 1)
        assert ("_SmallConv" in type(y.grad_fn).__name__) == (x.dtype == torch.float32)
        given = [tensor for tensor in (x, weight, bias) if tensor.requires_grad]
        first = torch.autograd.grad(y.tanh().sum(), given, create_graph=True)
        second = torch.autograd.grad(sum(gradient.square().sum() for gradient in first), given)
        found.append([y, *first, *second])
    for one, other in zip(*found, strict=True):
        assert close(one, other, 1e-4)


@narrow
def test_a_fused_network_of_few_channels_runs_so(monkeypatch):
    torch.manual_seed(0)
    net = create_model("p4cnn").eval()
    fused = fuse(net)
    images = torch.rand(5, 1, 28, 28)
    called = []
    small_conv2d = small_conv.small_conv2d
    monkeypatch.setattr("gconv.deploy.program.small_conv2d", lambda *of: called.append(of) or small_conv2d(*of))
    with torch.no_grad():
        for some in (images, images[:1]):
            called.clear()
            torch.testing.assert_close(fused(some), net(some), rtol=1e-4, atol=1e-5)
            assert len(called) == 7
        images[0, 0, 14, 14] = float("nan")
        scores = fused(images)
    assert scores[0].isnan().all()
    assert scores[1:].isfinite().all()
