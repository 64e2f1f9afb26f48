"""Choices by time, with a clock that the test sets: what is timed is what is entered."""

import pytest
import torch
from torch import nn

from analysis import convert
from analysis.allocation.options import energy_curves, executed_macs, smaller_options
from analysis.conversion import autotune
from analysis.conversion.layers import Runs
from analysis.latency import timing
from gconv import (
    FORMS,
    GConv2d,
    GroupMaxPool,
    LiftingConv2d,
    SeparableGConv2d,
    SpatialMeanPool2d,
)

SIZE = (1, 11, 11)
POSITIONS = (81, 49)


def network(middle):
    torch.manual_seed(0)
    head = (GroupMaxPool(), SpatialMeanPool2d(), nn.Linear(3, 2))
    return nn.Sequential(LiftingConv2d(1, 4, 3, group="p4"), middle, *head).eval()


def full():
    return GConv2d(4, 3, 3, group="p4")


@pytest.fixture
def clock(monkeypatch):
    """The milliseconds of a layer are those that this dictionary has for its execution; a full layer takes 8."""
    milliseconds = {"dense": 5.0, "factorized": 3.0, "irrep": 4.0}

    def layer_times(layer, x, others=()):
        return [milliseconds[one.execution] if isinstance(one, SeparableGConv2d) else 8.0 for one in (layer, *others)]

    for module in (timing, autotune):
        monkeypatch.setattr(module, "layer_times", layer_times)
    monkeypatch.setattr(timing, "medians", lambda runs, **_: ([1.0] * len(runs), 1))
    return milliseconds


@pytest.mark.parametrize("fastest", ["dense", "factorized", "irrep"])
@pytest.mark.parametrize("execution", ["auto", "dense", "factorized"])
def test_a_timed_option_has_the_macs_of_the_execution_that_was_timed(clock, fastest, execution):
    clock[fastest] = 1.0
    layer = full()
    own = smaller_options(layer, energy_curves(layer), FORMS.values(), POSITIONS)
    x = torch.zeros(2, 4, 4, 9, 9)
    timed = autotune.timed_options({"1": layer}, {"1": own}, {"1": x}, {"1": Runs(1, POSITIONS)}, execution)["1"]
    assert timed[0].milliseconds == 8
    assert len(timed) > 10
    executions = set()
    for option in timed[1:]:
        form = FORMS[option.form]
        expected = min(form.executions, key=clock.__getitem__) if execution == "auto" else execution
        assert option.execution == expected
        assert option.milliseconds == clock[expected]
        assert option.macs == executed_macs(layer, form, option.rank, expected, POSITIONS)
        executions.add(expected)
    assert len(executions) == (2 if execution == "auto" and fastest == "irrep" else 1)


def test_a_layer_that_runs_three_times_takes_its_time_three_times(clock):
    layer = full()
    own = smaller_options(layer, energy_curves(layer), [FORMS["gc"]], (243, 147))
    x = torch.zeros(2, 4, 4, 9, 9)
    timed = autotune.timed_options({"1": layer}, {"1": own}, {"1": x}, {"1": Runs(3, (243, 147))})["1"]
    assert [option.milliseconds for option in timed] == [24.0] + [9.0] * (len(timed) - 1)
    assert timed[1].macs == executed_macs(layer, FORMS["gc"], 1, "factorized", (243, 147))


@pytest.mark.parametrize("fastest", ["dense", "factorized", "irrep"])
@pytest.mark.parametrize("form", FORMS)
def test_a_layer_is_set_to_the_fastest_execution_only_where_auto_gives_another(clock, form, fastest):
    """The report says that it was timed on this machine, and what ``auto`` would be."""
    clock[fastest] = 1.0
    after, report = convert(network(full()), form, rank=1, input_shape=SIZE)
    (row,) = report.layers
    layer = after.get_submodule(row.name)
    auto = SeparableGConv2d.like(layer, form, 1).resolved_execution
    fastest = min(FORMS[form].executions, key=clock.__getitem__)
    assert (row.execution, layer.resolved_execution) == (fastest, fastest)
    said = f"; set to {fastest} as timed on this machine, where auto is {auto}"
    if fastest == auto:
        assert (layer.execution, row.forced) == ("auto", False)
        assert "set to" not in row.why
    else:
        assert (layer.execution, row.forced) == (fastest, True)
        assert row.why.endswith(said)


@pytest.mark.parametrize("execution", ["dense", "factorized"])
def test_the_time_before_is_that_of_the_layer_as_given(clock, execution):
    """Not that of the converted layer run dense, which is another one where the layer was separable before."""
    given = SeparableGConv2d.from_dense(full(), "g", 3, execution)
    clock["irrep"] = 2.0
    _, report = convert(network(given), "gc", rank=1, input_shape=SIZE)
    (row,) = report.layers
    assert row.execution == "irrep"
    assert row.milliseconds == (clock[execution], 2.0)
    _, report = convert(network(full()), "gc", rank=1, input_shape=SIZE)
    assert report.layers[0].milliseconds == (8.0, 2.0)
