"""``torch.compile`` takes every network whole, without a graph break, and gives the same network."""

from __future__ import annotations

import copy

import pytest
import torch

from gconv.deploy.fuse import fuse
from gconv.models.zoo import MODELS, create_model


@pytest.fixture(autouse=True)
def _forget_what_was_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("name", MODELS)
def test_a_network_is_compiled_whole(name):
    """For training, with the gradients, and for inference.

    ``aot_eager`` is all of the compiler but the writing of kernels; ``eager`` only reads the program, as for 44 layers
    the rest takes minutes, and so would reading them twice.
    """
    torch.manual_seed(0)
    # In double precision where 44 layers at the kinks of ReLU would multiply the rounding of single.
    dtype = torch.float64 if "resnet" in name else torch.float32
    model = create_model(name, width=1 if "resnet" in name else 2).to(dtype)
    images = torch.rand(2, *model.input_shape, dtype=dtype)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="eager" if "resnet" in name else "aot_eager", fullgraph=True)
    expected, scores = model(images), compiled(images)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    expected.square().sum().backward()
    scores.square().sum().backward()
    # Of a bias in front of batch norm the gradient is rounding.
    largest = max(float(parameter.grad.abs().max()) for parameter in model.parameters())
    for mine, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-4 * largest)
    if "resnet" in name:
        return
    with torch.no_grad():
        torch.testing.assert_close(compiled.eval()(images), model.eval()(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["p4cnn", "gc-p4m-resnet44"])
def test_a_fused_network_is_compiled_whole(name):
    model = fuse(create_model(name, width=1))
    images = torch.rand(2, *model.input_shape)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-4)
