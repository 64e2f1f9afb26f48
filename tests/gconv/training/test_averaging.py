"""The moving average of a network's weights, against the recurrence written out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gconv.training.averaging import AveragedWeights


def network() -> nn.Module:
    """With a buffer of whole numbers, the count of a batch norm, which is not averaged."""
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()


def change(model: nn.Module) -> dict[str, torch.Tensor]:
    """New weights; a copy of them."""
    for value in model.state_dict().values():
        value.copy_(torch.randn_like(value) if value.is_floating_point() else value + 1)
    return copy(model)


def copy(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_it_is_the_recurrence_with_a_decay_that_grows():
    model = network()
    expected, average = copy(model), AveragedWeights(model, 0.6)
    for step in range(12):
        weights = change(model)
        average.update(step)
        decay = min(0.6, (1 + step) / (10 + step))
        for name, value in weights.items():
            expected[name] = decay * expected[name] + (1 - decay) * value if value.is_floating_point() else value
    own = copy(model)
    with average.in_use():
        torch.testing.assert_close(copy(model), expected, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(average.values, [v for v in own.values() if v.is_floating_point()], rtol=0, atol=0)
    torch.testing.assert_close(copy(model), own, rtol=0, atol=0)
    average.keep()
    torch.testing.assert_close(copy(model), expected, rtol=1e-13, atol=1e-13)
    assert average.values == []


def test_it_continues_from_the_two_sets_of_weights():
    model = network()
    average = AveragedWeights(model, 0.6)
    change(model)
    average.update(0)
    other = network()
    with average.in_use():
        saved, own = copy(model), [value.clone() for value in average.values]
    other.load_state_dict(saved)
    again = AveragedWeights(other, 0.6)
    again.restore(own)
    torch.testing.assert_close(copy(other), copy(model), rtol=0, atol=0)
    torch.testing.assert_close(again.values, average.values, rtol=0, atol=0)
    with pytest.raises(ValueError, match="shorter"):
        again.restore(own[:-1])


def test_without_a_decay_nothing_happens():
    model = network()
    average = AveragedWeights(model, 0.0)
    weights = change(model)
    average.update(0)
    with average.in_use():
        torch.testing.assert_close(copy(model), weights, rtol=0, atol=0)
    average.keep()
    torch.testing.assert_close(copy(model), weights, rtol=0, atol=0)
