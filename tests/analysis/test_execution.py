"""Times are measured in turns, and what is faster is chosen; the clock is a fake one."""

import time

import pytest
import torch
from torch import nn

import gconv
from analysis import execution
from analysis.execution import BATCH, faster_execution, latency, layer_inputs, layer_times, medians


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves only when it is told to."""

    class Clock:
        now = 0.0
        log: list[str]

        def work(self, name, milliseconds):
            """A run that takes these milliseconds in turn, the last of them ever after."""
            left = list(milliseconds)

            def run():
                self.log.append(name)
                self.now += (left.pop(0) if len(left) > 1 else left[0]) / 1000

            return run

    made = Clock()
    made.log = []
    monkeypatch.setattr(time, "perf_counter", lambda: made.now)
    return made


def test_runs_take_turns_and_the_first_turn_warms_up(clock):
    runs = [clock.work("a", [1000, 3, 1, 2]), clock.work("b", [500, 10, 30, 20])]
    times, rounds = medians(runs, rounds=3, seconds=100)
    assert clock.log == ["a", "b"] * 4
    assert times == pytest.approx([2, 20])
    assert rounds == 3


def test_it_ends_when_the_time_is_spent_but_not_before_one_round(clock):
    times, rounds = medians([clock.work("a", [400])], rounds=50, seconds=1)
    assert (times, rounds) == (pytest.approx([400]), 2)
    times, rounds = medians([clock.work("a", [9000])], rounds=50, seconds=1)
    assert (times, rounds) == (pytest.approx([9000]), 1)


def test_an_outlier_does_not_count(clock):
    assert medians([clock.work("a", [1, 5, 5, 900, 5, 5])], rounds=5, seconds=100)[0] == pytest.approx([5])


class Slow(nn.Module):
    def __init__(self, work):
        super().__init__()
        self.work = work

    def forward(self, x):
        self.work()
        return x


def test_latency_says_with_what_it_was_measured(clock):
    found = latency(Slow(clock.work("a", [4])), Slow(clock.work("b", [2])), torch.rand(16, 1, 4, 4))
    assert found["milliseconds"] == pytest.approx([4, 2])
    assert found["batch"] == 16
    assert found["threads"] == torch.get_num_threads()
    assert found["rounds"] >= 1
    assert found["machine"]


@pytest.mark.parametrize(
    ("dense", "factorized", "chosen"),
    [
        (5.0, 2.0, "factorized"),
        (2.0, 5.0, "dense"),
        (2.0, 2.0, "dense"),
        (2.0, 1.99, "dense"),
        (2.0, 1.9, "factorized"),
    ],
)
def test_the_faster_execution_is_chosen_and_dense_where_they_are_alike(monkeypatch, dense, factorized, chosen):
    layer = gconv.SeparableGConv2d(2, 3, 3, group="p4", form="gc", rank=1)
    seen = []

    def measured(first, x, others):
        seen.extend(one.execution for one in (first, *others))
        return [{"dense": dense, "factorized": factorized}[name] for name in seen]

    monkeypatch.setattr(execution, "layer_times", measured)
    before = layer.execution
    assert faster_execution(layer, torch.rand(1, 2, 4, 8, 8)) == (chosen, {"dense": dense, "factorized": factorized})
    assert sorted(seen) == ["dense", "factorized"]
    assert layer.execution == before


def test_layers_are_timed_in_eval_mode_and_left_as_they_are(clock):
    states = []

    class Watching(nn.Module):
        def forward(self, x):
            states.append((self.training, torch.is_inference_mode_enabled()))
            clock.now += 0.003
            return x

    layers = [Watching().train(), Watching().train()]
    assert layer_times(layers[0], torch.rand(1), layers[1:]) == pytest.approx([3, 3])
    assert set(states) == {(False, True)}
    assert all(layer.training for layer in layers)


@pytest.mark.parametrize("group", ["p4", "p4m"])
def test_inputs_are_those_of_a_forward_pass(group):
    torch.manual_seed(0)
    network = gconv.create_model("p4cnn", group=group, width=2).train()
    names = ["conv2", "conv4", "conv7"]
    found = layer_inputs(network, names, (1, 28, 28))
    assert list(found) == names
    assert all(module.training for module in network.modules())
    assert not any(module._forward_pre_hooks for module in network.modules())
    images = torch.rand(BATCH, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    network.eval()
    with torch.no_grad():
        for name in names:
            # What the layer makes of its input is what it makes in the network.
            outputs = []
            hook = network.get_submodule(name).register_forward_hook(lambda m, i, o, kept=outputs: kept.append(o))
            network(images)
            hook.remove()
            torch.testing.assert_close(network.get_submodule(name)(found[name]), outputs[0])


def test_hooks_go_when_the_network_fails():
    network = gconv.create_model("p4cnn", width=2)
    with pytest.raises(gconv.InputError):
        layer_inputs(network, ["conv2"], (3, 28, 28))
    assert not any(module._forward_pre_hooks for module in network.modules())
