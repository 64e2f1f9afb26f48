"""Capturing what flows into and out of layers, however they are called, and leaving no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gconv.nn.capture import Call, capture, watch_calls
from gconv.system.errors import InputError


class ByKeyword(nn.Module):
    """Calls its layers by position, by keyword, with a tensor behind another argument, and without arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 2, 3)
        self.second = nn.Conv2d(2, 2, 3)
        self.scaled = Scaled()
        self.constant = Constant()

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(2.0, x=self.second(input=self.first(x).relu_())) + self.constant()


class Scaled(nn.Module):
    def forward(self, factor: float, x: Tensor) -> Tensor:
        return factor * x


class Constant(nn.Module):
    def forward(self) -> Tensor:
        return torch.ones(())


def hooks_of(model: nn.Module) -> list[Any]:
    return [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_inputs_and_outputs_of_layers_that_are_called_in_any_way(x):
    net = ByKeyword()
    with torch.no_grad(), capture(net, inputs=["second", "scaled"], outputs=["first", "constant"]) as seen:
        y = net(x)
        first = net.first(x)
    assert torch.equal(y, net(x))
    assert torch.equal(seen.outputs["first"], first)  # as it was before the ReLU that changes it in place
    assert torch.equal(seen.inputs["second"], first.relu())
    assert torch.equal(seen.inputs["scaled"], net.second(first.relu()))
    assert seen.outputs["constant"].item() == 1
    assert not hooks_of(net)


def test_a_kept_output_has_gradients(x):
    net = ByKeyword()
    with capture(net, outputs=["first"]) as seen:
        y = net(x)
    (gradient,) = torch.autograd.grad(y.sum(), seen.outputs["first"])
    hidden = seen.outputs["first"].detach().requires_grad_()
    expected = torch.autograd.grad(2 * net.second(hidden.relu()).sum(), hidden)[0]
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("ends", ["inputs", "outputs"])
def test_the_pass_stops_when_everything_was_seen(x, ends):
    net, reached = ByKeyword(), []
    net.scaled.register_forward_pre_hook(lambda *_: reached.append(True))
    with capture(net, **{"inputs": ["first"], ends: ["first", "second"]}, stop=True) as seen:
        net(x)
        raise AssertionError("the rest of the block runs")
    assert set(getattr(seen, ends)) == {"first", "second"}
    assert not reached


def test_one_capture_inside_another_stops_only_itself(x):
    net = ByKeyword()
    with capture(net, outputs=["second"]) as outer:
        with capture(net, inputs=["first"], stop=True):
            net(x)
        assert not outer.outputs
        net(x)
    assert set(outer.outputs) == {"second"}


def test_an_error_in_the_pass_goes_on_and_leaves_no_hooks(x):
    net = ByKeyword()
    with pytest.raises(RuntimeError), capture(net, inputs=["first"], outputs=["second"]):
        net(x[:, :, :2])
    assert not hooks_of(net)


def test_a_layer_under_two_names_and_one_that_runs_twice(x):
    conv = nn.Conv2d(1, 1, 3, padding=1)
    net = nn.Sequential(conv, nn.ReLU(), conv)
    calls: list[Call] = []
    with torch.no_grad(), watch_calls([conv, conv], before=calls.append), capture(net, inputs=["0", "2"]) as seen:
        net(x)
        expected = conv(x).relu()
    assert [call.layer for call in calls[:2]] == [conv, conv] and len(calls) == 3
    assert torch.equal(calls[1].input, expected)
    with torch.no_grad(), capture(net, inputs=["0", "2"]) as seen:
        net(x)
    assert torch.equal(seen.inputs["0"], expected) and torch.equal(seen.inputs["2"], expected)


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_compiled_networks_run_eagerly_meanwhile(x, how):
    net = ByKeyword()
    model = torch.compile(net, backend="eager") if how == "wrapped" else net
    if how == "in place":
        net.compile(backend="eager")
    before = model(x)
    with capture(net, outputs=["first"], stop=True) as seen:
        model(x)
    assert torch.equal(seen.outputs["first"], net.first(x))
    assert torch.equal(model(x), before)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"inputs": ["constant"]}, "constant was called without a tensor"),
        ({"outputs": ["pair"]}, "pair returned a tuple"),
    ],
)
def test_what_cannot_be_captured_is_refused_by_name(x, names, message):
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    net = nn.Sequential()
    net.constant, net.pair = Constant(), Pair()
    net.forward = lambda x: (net.constant(), net.pair(x))
    with pytest.raises(InputError, match=message), capture(net, **names):
        net(x)
