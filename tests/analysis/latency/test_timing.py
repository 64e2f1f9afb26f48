"""Measured time, under a clock that only the test moves."""

import itertools
import statistics
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from analysis.latency import timing as execution
from analysis.latency.timing import BATCH, fastest_execution, latency, layer_inputs, layer_times, medians
from gconv import GConv2d, GroupBatchNorm2d, GroupMaxPool, LiftingConv2d, SeparableGConv2d, SpatialMeanPool2d
from gconv.functional.forms import FORMS


class Clock:
    """Stands still unless it is moved."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now

    def __deepcopy__(self, memo):
        return self


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(execution, "time", made)
    return made


def with_clock(patch):
    made = Clock()
    patch.setattr(execution, "time", made)
    return made


class Takes(nn.Module):
    """Takes so many milliseconds, in each execution."""

    def __init__(self, clock, **milliseconds):
        super().__init__()
        self.clock, self.milliseconds, self.execution = clock, milliseconds, "dense"
        self.form = FORMS["g"]  # which has these two
        self.seen = []

    def forward(self, x):
        self.seen.append((self.execution, self.training, torch.is_inference_mode_enabled()))
        self.clock.now += self.milliseconds[self.execution] / 1000
        return x


def runs_of(clock, durations, log=None):
    """Functions that take these milliseconds, one after the other."""

    def run(number, left):
        if log is not None:
            log.append(number)
        clock.now += next(left) / 1000

    return [partial(run, number, iter(own)) for number, own in enumerate(durations)]


# --- medians

milliseconds = st.integers(1, 50).map(float)


@settings(deadline=None)
@given(rounds=st.integers(1, 6), data=st.data())
def test_the_median_of_all_rounds_but_the_first(rounds, data):
    own = st.lists(milliseconds, min_size=rounds + 1, max_size=rounds + 1)
    durations = data.draw(st.lists(own, min_size=1, max_size=3))
    log = []
    with pytest.MonkeyPatch.context() as patch:
        clock = with_clock(patch)
        times, count = medians(runs_of(clock, durations, log), rounds=rounds, seconds=1e9)
    assert count == rounds
    assert times == pytest.approx([statistics.median(own[1:]) for own in durations])
    assert log == list(range(len(durations))) * (rounds + 1)  # in turns


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 1), (0.025, 2), (0.045, 4), (1.0, 9)])
def test_it_ends_when_the_time_is_up_but_never_without_a_round(clock, seconds, rounds):
    # Ten milliseconds a round, the first one included.
    times, count = medians(runs_of(clock, [itertools.repeat(4), itertools.repeat(6)]), rounds=9, seconds=seconds)
    assert times == pytest.approx([4, 6])
    assert count == rounds


def test_what_is_far_behind_is_not_repeated_and_one_slow_round_is_not_far_behind(clock):
    durations = [[5, 9, 2, 9, *[3] * 6], [5, *[5] * 9], [5, 4, *[3] * 8], [1, *[4] * 9]]
    log = []
    times, count = medians(runs_of(clock, durations, log), rounds=9, seconds=1e9, hopeless=2)
    assert [log.count(run) for run in range(4)] == [10, 4, 10, 4]
    assert times == pytest.approx([3, 5, 3, 4])
    assert count == 9


def test_the_device_is_waited_for(clock, monkeypatch):
    def wait():
        clock.now += 0.005

    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    durations = [itertools.repeat(2)]
    assert medians(runs_of(clock, durations), rounds=3, cuda=True)[0] == pytest.approx([7])
    assert medians(runs_of(clock, durations), rounds=3)[0] == pytest.approx([2])


# --- of networks


def test_the_latency_of_two_networks(clock):
    before, after = Takes(clock, dense=2.00049), Takes(clock, dense=0.5)
    measured = latency(before, after, torch.zeros(7, 1))
    assert measured == {
        "milliseconds": [2.0, 0.5],
        "batch": 7,
        "rounds": 15,
        "machine": execution.machine(torch.device("cpu")),
        "threads": torch.get_num_threads(),
    }
    assert measured["machine"]
    assert {inference for *_, inference in before.seen + after.seen} == {True}


def test_a_processor_has_a_name_where_the_system_does_not_tell(monkeypatch):
    def missing(*given, **options):
        raise OSError

    monkeypatch.setattr("builtins.open", missing)
    monkeypatch.setattr(execution, "platform", SimpleNamespace(processor=lambda: "", machine=lambda: "abacus"))
    assert execution.machine(torch.device("cpu")) == "abacus"


# --- of layers


def test_layers_are_timed_in_eval_mode_and_left_alone(clock):
    layers = [Takes(clock, dense=time).train() for time in (3, 1, 2)]
    assert layer_times(layers[0], torch.zeros(1), layers[1:]) == pytest.approx([3, 1, 2])
    assert layer_times(layers[1], torch.zeros(1)) == pytest.approx([1])
    for layer in layers:
        assert layer.training
        assert layer.seen == []  # a copy has run


def test_layers_are_run_in_eval_mode_without_gradients(clock):
    seen = []

    class Watching(Takes):
        def forward(self, x):
            seen.append((self.training, torch.is_inference_mode_enabled(), x.shape))
            return super().forward(x)

    layer_times(Watching(clock, dense=40), torch.zeros(2, 3))
    assert set(seen) == {(False, True, (2, 3))}
    assert len(seen) == 3  # once to warm up, and until a tenth of a second is over


@settings(deadline=None)
@given(dense=milliseconds, factorized=milliseconds)
def test_the_fastest_execution_is_chosen(dense, factorized):
    with pytest.MonkeyPatch.context() as patch:
        layer = Takes(with_clock(patch), dense=dense, factorized=factorized)
        chosen, times, _ = fastest_execution(layer, torch.zeros(1))
    assert times == pytest.approx({"dense": dense, "factorized": factorized})
    assert times[chosen] <= times["dense"]  # never a slower one than the full layer's
    if abs(factorized - dense) > 0.031 * dense:
        assert chosen == ("factorized" if factorized < dense else "dense")


@pytest.mark.parametrize(
    ("factorized", "chosen"), [(50, "factorized"), (96, "factorized"), (98, "dense"), (100, "dense"), (200, "dense")]
)
def test_the_factorized_execution_must_be_faster_beyond_noise(clock, factorized, chosen):
    assert fastest_execution(Takes(clock, dense=100, factorized=factorized), torch.zeros(1))[0] == chosen


@pytest.mark.parametrize(
    ("form", "own", "times"),
    [
        ("gc", "dense", (1.0, 2.0, 3.0)),
        ("gc", "irrep", (2.0, 1.0, 3.0)),
        ("gc_in", "factorized", (3.0, 2.0, 1.0)),
        ("g", "factorized", (1.0, 2.0)),
        ("gc_turned", "dense", (2.0, 1.0)),
    ],
)
def test_all_executions_of_a_layer_are_compared(monkeypatch, form, own, times):
    layer = SeparableGConv2d(1, 2, 3, group="p4", form=form, execution=own)
    x = torch.randn(2, 1, 4, 5, 5)
    compared = []

    def timed(first, given, others):
        compared.extend([first, *others])
        assert given is x
        return list(times)

    monkeypatch.setattr(execution, "layer_times", timed)
    chosen, by_name, _ = fastest_execution(layer, x)
    executions = ["dense", "factorized", "irrep"][: len(times)]
    assert [variant.execution for variant in compared] == executions
    assert by_name == dict(zip(executions, times, strict=True))
    assert chosen == min(by_name, key=by_name.get)
    for variant in compared:
        torch.testing.assert_close(variant(x), layer(x))
    assert layer.execution == own
    assert all(variant is not layer for variant in compared)


# --- what a layer reads


def network():
    return nn.Sequential(
        LiftingConv2d(2, 2, 3, group="p4"),
        GroupBatchNorm2d(2),
        nn.ReLU(),
        GConv2d(2, 3, 3, group="p4"),
        nn.Dropout(0.5),
        GConv2d(3, 1, 3, stride=2, group="p4"),
        GroupMaxPool(),
        SpatialMeanPool2d(),
    ).double()


def test_layer_inputs_are_what_a_hook_sees():
    model = network().train()
    model[1].eval()
    modes = [part.training for part in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    seen = {}
    handles = [
        model[n].register_forward_hook(lambda module, given, output, n=n: seen.__setitem__(str(n), given[0].clone()))
        for n in (0, 3, 5)
    ]
    kept = layer_inputs(model, ["3", "0", "5"], (2, 11, 9))
    for handle in handles:
        handle.remove()
    assert {name: tuple(x.shape) for name, x in kept.items()} == {
        "0": (BATCH, 2, 11, 9),
        "3": (BATCH, 2, 4, 9, 7),
        "5": (BATCH, 3, 4, 7, 5),
    }
    for name, x in kept.items():
        assert x.equal(seen[name])
        assert x.dtype == torch.float64
        assert not x.requires_grad
    # In eval mode: the same as from the images, part by part.
    x = kept["0"]
    with torch.no_grad():
        for n, part in enumerate(model.eval()):
            if str(n) in kept:
                assert x.equal(kept[str(n)])
            x = part(x)
    model.train()
    model[1].eval()
    assert 0 <= kept["0"].min() < kept["0"].max() <= 1
    assert layer_inputs(model, ["3"], (2, 11, 9))["3"].equal(kept["3"])
    assert [part.training for part in model.modules()] == modes
    assert all(state[name].equal(tensor) for name, tensor in model.state_dict().items())
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in model.modules())
    assert torch.get_rng_state().equal(random)


def test_after_a_failure_nothing_is_left_either():
    model = network().train()
    with pytest.raises(RuntimeError):
        layer_inputs(model, ["3", "5"], (2, 4, 4))
    assert all(part.training for part in model.modules())
    assert not any(part._forward_pre_hooks for part in model.modules())
