"""Latency by a new process: that it is another one with the same settings, and what happens where there is none."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from analysis import ConversionReport, convert
from analysis.allocation.options import Choice
from analysis.conversion import autotune as timing
from analysis.conversion.planner import Planner
from analysis.conversion.report import random_images
from analysis.latency import isolated as fresh
from analysis.latency import timing as execution
from analysis.latency.isolated import fresh_latency
from analysis.latency.timing import BUDGET_ROUNDS, machine
from gconv import InputError, SeparableGConv2d, create_model

ROOT = Path(fresh.__file__).parents[2]
NOTE = "latency was measured in the converting process, which may take longer than a new one: "


def network(**kwargs):
    return create_model("p4cnn", width=1, **kwargs).eval()


def batch(model):
    return random_images(model, model.input_shape, 0)


@pytest.fixture(autouse=True)
def _no_stopwatch(monkeypatch):
    """In this process nothing takes the time that measuring takes."""
    monkeypatch.setattr(execution, "medians", lambda runs, **_: ([1.0] * len(runs), 1))


@pytest.fixture
def here(monkeypatch):
    """What was measured in this process, each in five and four milliseconds."""
    measured = []

    def latency(before, after, images, *, rounds):
        measured.append((before, after, images, rounds))
        return {"milliseconds": [5.0, 4.0]}

    monkeypatch.setattr(fresh, "latency", latency)
    return measured


@pytest.fixture
def ended(monkeypatch):
    """Lets the new process end with an exit code, and with what it wrote on stdout and on stderr."""

    def end(code, out="", err=""):
        done = subprocess.CompletedProcess([], code, out, err)
        monkeypatch.setattr(fresh.subprocess, "run", lambda *_, **__: done)

    return end


# --- the new process


def test_under_a_latency_budget_a_new_process_measures_what_is_reported(here, tmp_path, monkeypatch):
    """From another folder, whose modules are none of its business; with the threads of this process."""
    monkeypatch.chdir(tmp_path)
    for name in ("analysis.py", "torch.py"):
        Path(name).write_text("raise SystemExit('the wrong module')")
    model, report = network(), ConversionReport({"budget": "latency"}, [])
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        report.measure(model, model, model.input_shape, 0)
    finally:
        torch.set_num_threads(threads)
    assert not here
    milliseconds, rounds = report.latency.pop("milliseconds"), report.latency.pop("rounds")
    assert report.latency == {
        "original": milliseconds[:1],
        "batch": 16,
        "machine": machine(torch.device("cpu")),
        "threads": threads + 1,
        "process": "new",
    }
    assert len(milliseconds) == 2
    assert min(milliseconds) > 0
    assert 1 <= rounds <= BUDGET_ROUNDS
    assert not report.notes


def test_it_finds_the_packages_of_a_script_that_went_elsewhere_and_has_no_main_guard(tmp_path):
    """They are those of the working directory it had, which the path names by an empty string."""
    script = f"""
import os, sys
from analysis.latency import isolated as fresh, timing as execution
from analysis.conversion.report import random_images
from gconv import create_model
sys.path = ["", *(entry for entry in sys.path if entry not in ("", {str(ROOT)!r}))]
os.chdir({str(tmp_path)!r})
def nowhere_else(*given, **options): raise AssertionError
execution.medians = nowhere_else
model = create_model("p4cnn", width=1).double().eval()
print(fresh.fresh_latency(model, model, random_images(model, model.input_shape, 0), print)["process"])
print(fresh.import_path().split(os.pathsep)[0])
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"new\n{ROOT}\n", "")


def test_it_measures_the_two_networks_on_the_images_as_they_are(monkeypatch):
    """By what it is given: in this process, the files are read back and measured as there."""
    before, after = network().double(), convert(network(), "gc", rank=1)[0].double()
    images = batch(before)
    expected = [model(images) for model in (before, after)]
    seen = []

    def latency(first, second, given, *, rounds):
        assert not any(module.training for one in (first, second) for module in one.modules())
        seen.extend((first(given), second(given), given, rounds))
        return {"milliseconds": [2, 1]}

    def run(command, *, cwd, **_):
        monkeypatch.chdir(cwd)
        assert command[1:4] == ["-P", "-m", "analysis.latency.isolated"]
        return SimpleNamespace(returncode=0, stdout=json.dumps(fresh.measure(*command[4:])))

    monkeypatch.setattr(fresh, "latency", latency)
    monkeypatch.setattr(fresh.subprocess, "run", run)
    with torch.no_grad():
        found = fresh_latency(before, after, images, pytest.fail)
    assert found == {"milliseconds": [2, 1], "process": "new"}
    assert all(torch.equal(*pair) for pair in zip(seen[:3], [*expected, images], strict=True))
    assert seen[3] == BUDGET_ROUNDS


def test_a_word_of_something_else_on_its_screen_does_no_harm(ended):
    ended(0, 'a greeting\n{"milliseconds": [2, 1]}\n')
    model = network()
    assert fresh_latency(model, model, batch(model), pytest.fail) == {"milliseconds": [2, 1], "process": "new"}


@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")  # killed, but not yet buried
@pytest.mark.skipif(os.name != "posix", reason="needs a shell and signals")
def test_an_interrupt_ends_it_and_leaves_no_files(tmp_path, monkeypatch):
    executable, pid = tmp_path / "python", tmp_path / "pid"
    executable.write_text(f"#!/bin/sh\necho $$ $PWD > {pid}.part; mv {pid}.part {pid}; exec sleep 600\n")
    executable.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(executable))

    def interrupt():
        while not pid.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    model = network()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # processes in the background ignore it
    try:
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            fresh_latency(model, model, batch(model), pytest.fail)
        thread.join()
    finally:
        signal.signal(signal.SIGINT, before)
    number, folder = pid.read_text().split()
    with contextlib.suppress(ChildProcessError):  # which says that it was buried already
        assert os.WTERMSIG(os.waitpid(int(number), 0)[1]) == signal.SIGKILL
    assert not Path(folder).exists()


# --- the speed of the machine


@pytest.fixture
def speeds(monkeypatch):
    """The machine's speed at each measurement, as the milliseconds of the first network; and the seconds slept."""
    slept = []

    def set_speeds(times):
        left = iter(times)

        def latency(before, after, images, *, rounds):
            assert rounds == BUDGET_ROUNDS
            first = next(left)
            return {"milliseconds": [first, first / 2]}

        monkeypatch.setattr(fresh, "latency", latency)
        return slept

    clock = SimpleNamespace(perf_counter=lambda: float(sum(slept)), sleep=slept.append)
    monkeypatch.setattr(fresh, "time", clock)
    return set_speeds


@pytest.mark.parametrize(
    ("known", "times", "taken"),
    [
        (float("inf"), [25.0], 25.0),  # nothing to compare with
        (20.0, [19.0], 19.0),
        (20.0, [20.5], 20.5),  # the same speed
        (20.0, [25.0, 24.0, 26.0, 20.1], 20.1),
        (20.0, [25.0, 24.0, 26.0] + [30.0] * 28, 24.0),  # for half a minute
    ],
)
def test_what_is_reported_is_measured_at_a_speed_that_was_seen_before(speeds, known, times, taken):
    slept = speeds(times)
    assert fresh.at_speed(None, None, None, known)["milliseconds"] == [taken, taken / 2]
    assert len(slept) == len(times) - 1  # so that none is left


def test_the_speed_to_wait_for_is_the_best_at_which_the_choice_was_made(monkeypatch):
    given = []

    def elsewhere(before, after, images, known):
        given.append(known)
        return {"milliseconds": [[22.0, 20.0, 21.0][len(given) - 1], 11.0]}

    for module in (timing, execution):
        monkeypatch.setattr(module, "layer_times", lambda layer, x, others=(): [2.0] + [0.25] * len(others))
    monkeypatch.setattr(fresh, "in_new_process", elsewhere)
    # The first is of the original alone, the second of the choice.
    report = convert(network(), "gc", latency=0.6)[1]
    assert given == [float("inf"), float("inf"), 20.0]
    assert report.latency["original"] == [22.0, 20.0, 21.0]


# --- where there is none


class Wrapped(nn.Module):
    """A network that is not of this package."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def test_a_network_without_a_checkpoint_is_measured_here_and_the_report_says_so(here, monkeypatch):
    monkeypatch.setattr(fresh.subprocess, "run", pytest.fail)
    after, report = convert(Wrapped(network()), "gc", latency="6ms", input_shape=(1, 28, 28))
    assert report.latency == {"milliseconds": [5.0, 4.0], "process": "converting", "original": [5.0] * len(here)}
    what = "only networks of gconv.create_model can be saved with their architecture, not "
    (note,) = [note for note in report.notes if "latency" in note]
    assert note.startswith(f"{NOTE}{what}{Wrapped}")
    before, measured, images, rounds = here[-1]
    assert isinstance(before, Wrapped)
    assert measured is after
    assert torch.equal(images, batch(network()))
    assert rounds == BUDGET_ROUNDS


@pytest.mark.parametrize(
    ("code", "out", "err", "why"),
    [
        (1, "", "Traceback:\n  in line 1\nRuntimeError: no room\n", "exit code 1 (RuntimeError: no room)"),
        (-9, "", "", "exit code -9 (no message)"),
    ],
)
def test_a_process_that_fails_costs_no_conversion_but_a_line(ended, here, code, out, err, why):
    ended(code, out, err)
    report = convert(network(), "gc", latency="6ms")[1]
    assert report.latency == {"milliseconds": [5.0, 4.0], "process": "converting", "original": [5.0] * len(here)}
    assert [note for note in report.notes if "latency" in note] == [f"{NOTE}the new one ended with {why}"]


@pytest.mark.parametrize("out", ["", "no latency\n"])
def test_a_process_that_answers_nonsense(ended, here, out):
    ended(0, out)
    notes, model = [], network()
    assert fresh_latency(model, model, batch(model), notes.append)["process"] == "converting"
    assert len(here) == 1
    (note,) = notes
    assert note.startswith(NOTE)
    assert "\n" not in note


@pytest.mark.parametrize("executable", ["", "/nowhere/python"])
def test_a_python_that_cannot_be_started(here, monkeypatch, executable):
    monkeypatch.setattr(sys, "executable", executable)
    notes, model = [], network()
    assert fresh_latency(model, model, batch(model), notes.append)["process"] == "converting"
    assert len(notes) == 1
    assert notes[0].startswith(NOTE)


def test_without_a_folder_for_the_files(here, monkeypatch):
    def full(*_, **__):
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(fresh.tempfile, "TemporaryDirectory", full)
    notes, model = [], network()
    fresh_latency(model, model, batch(model), notes.append)
    assert notes == [f"{NOTE}[Errno 2] No usable temporary directory found"]


# --- what it is used for


def test_the_time_in_a_new_process_is_what_decides_and_what_is_reported(monkeypatch, here):
    """In this one, a converted layer takes an eighth of the time; there, a converted network half of it."""

    def converted(model):
        return any(isinstance(module, SeparableGConv2d) for module in model.modules())

    def layer_times(layer, x, others=()):
        return [0.25 if converted(one) else 2.0 for one in (layer, *others)]

    def elsewhere(before, after, images, known):
        return {"milliseconds": [10.0 if converted(model) else 20.0 for model in (before, after)]}

    for module in (execution, timing):
        monkeypatch.setattr(module, "layer_times", layer_times)
    monkeypatch.setattr(fresh, "in_new_process", elsewhere)
    for value in (0.5, "10ms"):
        report = convert(network(), "gc", latency=value)[1]
        assert set(report.latency.pop("original")) == {20}
        assert report.latency == {"milliseconds": [20.0, 10.0], "process": "new"}
        assert report.request["limit"] == 10
    with pytest.raises(InputError, match=r"The nearest that was measured is 0\.500 of the network's\.$"):
        convert(network(), "gc", latency=0.49)
    assert not here


@pytest.mark.parametrize(("again", "noted"), [(10.0, False), (10.5, True)])
@pytest.mark.parametrize("budget", [0.5, "10ms"])
def test_a_budget_that_is_met_when_chosen_and_not_when_measured_again(monkeypatch, budget, again, noted):
    times = iter([(20.0, 20.0), (20.0, 9.0), (20.0, again)])  # before, while and after choosing
    monkeypatch.setattr(timing, "layer_times", lambda layer, x, others=(): [2.0] + [0.25] * len(others))
    monkeypatch.setattr(execution, "layer_times", lambda layer, x, others=(): [2.0] + [0.25] * len(others))
    monkeypatch.setattr(fresh, "in_new_process", lambda *_: {"milliseconds": list(next(times))})
    report = convert(network(), "gc", latency=budget)[1]
    assert report.latency["milliseconds"] == [20.0, again]
    notes = [note for note in report.notes if "measured again" in note]
    assert len(notes) == noted
    assert all("10.5 ms" in note and "the budget of 10 ms" in note for note in notes)


@pytest.mark.parametrize(("second", "tries"), [(9.7, 2), (9.8, 6)])
def test_a_choice_that_is_barely_within_is_taken_only_where_none_is_safely(monkeypatch, second, tries):
    """Of several barely within, the first, which was given the most time."""
    limits, times = [], iter([20.0, 9.9, second, 9.8, 9.8, 9.8, 9.8, 9.0])

    def share_out(self, options, unit, limit, total):
        limits.append(limit)
        self.report.request |= {"limit": limit, "allocation_why": f"try {len(limits)}"}
        return {name: Choice(own[1], "") for name, own in options.items()}

    for module in (timing, execution):
        monkeypatch.setattr(module, "layer_times", lambda layer, x, others=(): [2.0] + [0.25] * len(others))
    monkeypatch.setattr(fresh, "in_new_process", lambda *_: {"milliseconds": [20.0, next(times)]})
    monkeypatch.setattr(Planner, "_share_out", share_out)
    request = convert(network(), "gc", latency=0.5)[1].request
    assert limits == pytest.approx([10 * 0.98**n for n in range(tries)])
    assert request["limit"] == 10
    assert request["allocation_why"] == ("try 2" if tries == 2 else "try 1")


def test_other_budgets_start_no_process(monkeypatch):
    monkeypatch.setattr(fresh.subprocess, "run", pytest.fail)
    for budget in ({"rank": 1}, {"params": 0.7}, {"macs": 0.9}):
        assert convert(network(), "gc", **budget)[1].latency["process"] == "converting"


def test_a_report_of_before_is_read():
    written = {"request": {}, "layers": [], "latency": {"milliseconds": [2.0, 1.0], "batch": 16, "threads": 2}}
    assert ConversionReport.from_dict(written).latency == written["latency"]
