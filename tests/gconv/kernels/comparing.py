"""How the tests compare a compiled kernel with the definitions."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from unittest import mock

import pytest
import torch

from gconv import gconv2d
from gconv.functional.expansion import is_strictly_channels_last, to_group_major
from gconv.kernels.dispatch import OVER_PIXELS, variants
from gconv.kernels.library import GRAIN, library, openmp_functions, require_library
from gconv.kernels.separable_conv import Kernel

built = pytest.mark.skipif(library() is None, reason="there is no compiled library")
versions = pytest.mark.parametrize("version", variants() or [0])
over_channels = pytest.mark.parametrize("version", [v for v in variants() if v != OVER_PIXELS] or [1])
forms = pytest.mark.parametrize("form", ["gc", "gc_in"])


def kernel_of_pass(layer, x):
    """The kernel that runs the layer on this map; None where PyTorch's operations do."""
    used = []
    forward = Kernel.forward

    def watched(self, *args, **kwargs):
        used.append(self)
        return forward(self, *args, **kwargs)

    with mock.patch.object(Kernel, "forward", watched):
        layer(x)
    return used[0] if used else None


@contextmanager
def fine_grained():
    """Threads are woken for any little work."""
    if library() is None:
        yield
        return
    use, functions = require_library().functions["use_threads"], openmp_functions() or (None, None, None)
    use(*functions, 1)
    try:
        yield
    finally:
        use(*functions, GRAIN)


@contextmanager
def on_threads(number):
    """So many threads for PyTorch and the kernels."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def close(ours, theirs, tolerance=1e-5):
    return (ours - theirs).abs().max() <= tolerance * max(theirs.abs().max(), 1e-3)


def as_defined(layer, x):
    """The output of a layer that the kernel runs; it and its gradients must be those of the definition."""
    assert kernel_of_pass(layer, x) is not None
    exact = copy.deepcopy(layer).double()
    given = x.detach().requires_grad_(), x.detach().double().requires_grad_()
    y = layer(given[0])
    expected = gconv2d(given[1], exact.weight, exact.bias, exact.group, exact.sampling)
    assert is_strictly_channels_last(to_group_major(y)) or min(y.shape[3:]) == 1 or y.shape[1] * y.shape[2] == 1
    assert close(y, expected)
    direction = torch.rand_like(y)  # not a plain sum: values of either sign could cancel
    ours = torch.autograd.grad(y, [given[0], *layer.parameters()], direction)
    theirs = torch.autograd.grad(expected, [given[1], *exact.parameters()], direction.double())
    for one, other in zip(ours, theirs, strict=True):
        assert close(one, other)
    return y
