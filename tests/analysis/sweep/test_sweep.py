"""The sweep: the same as one conversion after another, and after any interruption the same as without."""

import contextlib
import copy
import csv
import functools
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import analysis
import gconv.training.datasets
from analysis import convert
from analysis.conversion import convert as conversion
from analysis.conversion import planner as planning
from analysis.latency import timing as execution
from analysis.plots import pareto
from analysis.sweep import rows as sweeping
from analysis.sweep.__main__ import PROG, main, parser
from analysis.sweep.rows import mark_pareto, sweep
from analysis.sweep.table import print_sweep
from analysis.sweep.units import COSTS, ERRORS, FILES
from gconv import (
    GConv2d,
    GroupBatchNorm2d,
    GroupMaxPool,
    InputError,
    LiftingConv2d,
    SpatialMeanPool2d,
    Split,
    cost,
    create_model,
    evaluate,
    save,
)
from tests.strict_python import STRICT_PYTHON

BUDGETS = [0.5, 0.05, 0.7]  # the second is out of reach


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """In an empty folder, on a machine on which everything takes equally long."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(execution, "medians", lambda runs, **_: ([1.0] * len(runs), 1))


@functools.cache
def tiny(seed=0):
    """A classifier of 9 x 9 images with two layers to convert."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            LiftingConv2d(1, 2, 3, group="p4"),
            GConv2d(2, 4, 3, group="p4"),
            GroupBatchNorm2d(4),
            GConv2d(4, 4, 3, group="p4"),
            GroupMaxPool(),
            SpatialMeanPool2d(),
            nn.Linear(4, 3),
        ).eval()


def images(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Split(
        torch.rand(count, 1, 9, 9, generator=generator), torch.randint(3, (count,), generator=generator)
    )  # fmt: skip


SPLITS = {"data": images(40), "validation": images(20, 1), "test": images(30, 2)}


def run(budgets=BUDGETS, unit="params", *, model=None, out="out", **kwargs):
    return sweep(tiny() if model is None else model, budgets, unit, input_shape=(1, 9, 9), out=out, **kwargs)


def document(out="out"):
    """What is in sweep.json, without what differs from run to run."""
    found = json.loads(Path(out, "sweep.json").read_text())
    return {**found, "rows": [{**row, "seconds": None} for row in found["rows"]]}


def contents():
    return {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()}


@pytest.fixture
def converted(monkeypatch):
    """The budgets that were converted to, in turn; ``stop`` interrupts the conversion to one of them."""
    budgets = []
    real = conversion.convert

    def convert(model, **arguments):
        budget = next(arguments[unit] for unit in ("params", "macs", "latency") if unit in arguments)
        if budget == stop["at"]:
            stop["at"] = None
            raise KeyboardInterrupt
        budgets.append(budget)
        return real(model, **arguments)

    stop = {"at": None}
    monkeypatch.setattr(conversion, "convert", convert)
    return budgets, stop


# --- rows


@pytest.mark.parametrize("splits", [{}, {"data": SPLITS["data"], "test": SPLITS["test"]}, SPLITS], ids=len)
@pytest.mark.parametrize(("unit", "budgets"), [("params", [0.5, 400]), ("macs", [0.4, 0.6]), ("latency", ["1.5ms"])])
def test_rows_are_what_convert_gives_for_the_same_budget(unit, budgets, splits):
    rows = run(budgets, unit, out=None, **splits)
    assert [row["requested"] for row in rows] == [None, *budgets]
    assert [row["out_of_reach"] for row in rows] == [None] * len(rows)
    stage = "batch_norm" if splits else "converted"
    for budget, row in zip(budgets, rows[1:], strict=True):
        model, report = convert(tiny(), **{unit: budget}, input_shape=(1, 9, 9), **splits)
        validation = report.accuracy.get("validation", {})
        expected = {
            "parameters": cost(model, (1, 9, 9)).parameters,
            "macs_published": report.macs_published[1],
            "macs_executed": report.macs_executed[1],
            "memory_bytes": report.memory[1],
            "equivariance_error": report.equivariance_error[1],
            "output_error": report.output_error,
            "validation_error": validation.get(stage),
            "test_error": report.accuracy.get(stage),
            "latency_ms_before": 1.0,
            "latency_ms_after": 1.0,
            "latency_share": 1.0,
            "layers": {
                layer.name: {"form": layer.form, "rank": layer.rank, "execution": layer.execution}
                for layer in report.layers
            },
        }
        assert {key: row[key] for key in expected} == expected


def test_the_first_row_is_the_network_as_given():
    first = run([0.5], out=None, **SPLITS)[0]
    total = cost(tiny(), (1, 9, 9))
    for key in ("parameters", "macs_published", "macs_executed"):
        assert first[key] == getattr(total, key)
    assert first["test_error"] == evaluate(tiny(), SPLITS["test"]).error
    assert first["validation_error"] == evaluate(tiny(), SPLITS["validation"]).error
    assert (first["requested"], first["output_error"], first["latency_share"]) == (None, 0, 1)


def test_the_latency_share_is_that_of_times_measured_side_by_side(monkeypatch):
    speeds = iter(range(10, 1000))

    def drifting(runs, **_):
        speed = next(speeds)
        return [float(speed * (n + 1)) for n in range(len(runs))], 1

    monkeypatch.setattr(execution, "medians", drifting)
    first, second = run([0.5], out=None, execution="dense")
    assert first["latency_ms_after"] == first["latency_ms_before"]
    assert (first["latency_share"], second["latency_share"]) == (1, 2)
    assert second["latency_ms_after"] == 2 * second["latency_ms_before"] != 2 * first["latency_ms_before"]


def test_the_given_network_is_not_changed():
    model = copy.deepcopy(tiny()).train()
    before = copy.deepcopy(model.state_dict())
    run([0.5], model=model, **SPLITS)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_budget_out_of_reach_is_a_row_with_the_reason():
    rows = run()
    assert [row["out_of_reach"] is None for row in rows] == [True, True, False, True]
    assert "params of at most" in rows[2]["out_of_reach"]
    assert "Give at least" in rows[2]["out_of_reach"]
    assert rows[2]["requested"] == 0.05
    kept = {"requested", "out_of_reach", "seconds", "pareto"}
    assert all(value is None for key, value in rows[2].items() if key not in kept)
    assert rows[2]["pareto"] == dict.fromkeys(COSTS, False)
    assert set(rows[2]) == set(rows[1])


def test_nothing_in_reach_is_a_result_too():
    rows = run([0.01, 0.02])
    assert [row["out_of_reach"] is None for row in rows] == [True, False, False]
    assert sorted(contents()) == [f"out/{name}" for name in sorted(FILES)]


def test_sensitivity_is_measured_once(monkeypatch):
    calls = []
    real = planning.measure_options
    monkeypatch.setattr(planning, "measure_options", lambda *args: (calls.append(1), real(*args))[1])
    run(**SPLITS)
    assert len(calls) == 1


def test_a_budget_given_twice_counts_once():
    assert [row["requested"] for row in run([0.5, "0.5", 0.7, 0.5])] == [None, 0.5, 0.7]


@pytest.mark.parametrize("budget", ["0.5", "3.25ms", "1000.5ms"])
def test_a_latency_is_asked_for_as_it_was_given(budget, converted):
    run([budget], "latency", out=None)
    assert [str(given) for given in converted[0]] == [budget]


# --- the Pareto front

numbers = st.integers(0, 4)  # so few that ties are common
networks = st.lists(st.tuples(numbers, numbers, numbers, numbers, st.booleans()), min_size=1, max_size=8)


@given(networks, st.sampled_from(ERRORS))
def test_the_front_is_what_no_other_network_beats(drawn, error):
    rows = []
    for n, (*costs, loss, reached) in enumerate(drawn):
        found = reached or n == 0
        values = {**dict(zip(COSTS, costs, strict=True)), **dict.fromkeys(ERRORS[ERRORS.index(error) :], 100 - loss)}
        values = {**values, error: loss}
        names = (*COSTS, *ERRORS)
        rows.append({"out_of_reach": None if found else "no", **{k: values.get(k) if found else None for k in names}})
    assert mark_pareto(rows) == error
    for cost_name in COSTS:
        points = [(row[cost_name], row[error]) for row in rows if row["out_of_reach"] is None]
        for row in rows:
            mine = (row[cost_name], row[error])
            beaten = row["out_of_reach"] is not None
            for other in points:
                if row["out_of_reach"] is None and other != mine:
                    beaten = beaten or (other[0] <= mine[0] and other[1] <= mine[1])
            assert row["pareto"][cost_name] is not beaten


# --- interruptions


def interrupted_at(where, converted, monkeypatch):
    """Sweep until the row of a budget (None: the original's) is begun, then a second time."""
    budgets, stop = converted
    if where is None:
        with monkeypatch.context() as patch:
            patch.setattr(planning.Planner, "measured", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                run(**SPLITS)
    else:
        stop["at"] = where
        with pytest.raises(KeyboardInterrupt):
            run(**SPLITS)
    said = []
    return run(**SPLITS, say=said.append), list(budgets), said


@pytest.mark.parametrize("where", [None, *BUDGETS])
def test_interrupted_at_any_row_it_goes_on_to_the_same_result(where, converted, monkeypatch):
    undisturbed = run(**SPLITS, out="other")
    converted[0].clear()
    rows, budgets, said = interrupted_at(where, converted, monkeypatch)
    assert budgets == BUDGETS  # none was converted to twice
    assert document() == document("other")
    assert [{**row, "seconds": 0} for row in rows] == [{**row, "seconds": 0} for row in undisturbed]
    done = 0 if where is None else 1 + BUDGETS.index(where)
    assert said == ([f"out/sweep.json has {done} of 4 rows already, they are not computed again"] if done else [])
    for name in FILES[1:]:
        assert Path("out", name).exists()


def test_a_finished_sweep_computes_nothing_and_keeps_its_file(converted):
    run()
    written = Path("out/sweep.json").read_bytes()
    Path("out/sweep.csv").unlink()
    converted[0].clear()
    run()
    assert converted[0] == []
    assert Path("out/sweep.json").read_bytes() == written
    assert Path("out/sweep.csv").exists()


def test_a_killed_sweep_goes_on_and_the_module_is_its_function(tmp_path):
    save(create_model("p4cnn", width=2), "net.pt")
    script = """
import os, signal, sys
import analysis.sweep
import analysis, gconv
from analysis.conversion import convert as conversion
from analysis.latency import timing
timing.medians = lambda runs, **_: ([1.0] * len(runs), 1)
real = conversion.convert
def convert(model, **arguments):
    if arguments["params"] == 0.6:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(model, **arguments)
conversion.convert = convert
analysis.sweep(gconv.load("net.pt"), [0.4, 0.6], out="out")
"""
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [*STRICT_PYTHON, "-c", script],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert sorted(path.name for path in Path("out").iterdir()) == ["sweep.json"]
    torch.set_num_threads(json.loads(Path("out/sweep.json").read_text())["environment"]["threads"])
    said = []
    rows = sweep(gconv.load("net.pt"), [0.4, 0.6], out="out", say=said.append)
    assert len(rows) == 3
    assert "2 of 3 rows" in said[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"model": tiny(1)}, "is of another network"),
        ({"test": images(30, 3)}, "is of other images"),
        ({"data": images(39)}, "is of other images"),
        ({"validation": None}, "is of other images"),
        ({"budgets": [0.5, 0.7]}, "is of a sweep with budgets 0.5, 0.05, 0.7, not 0.5, 0.7"),
        ({"unit": "macs"}, "is of a sweep with unit params, not macs"),
        ({"form": "gc"}, "is of a sweep with form auto, not gc"),
        ({"seed": 1}, "is of a sweep with seed 0, not 1"),
        ({"minimise": "weights"}, "is of a sweep with minimise auto, not weights"),
        ({"allocation": "greedy"}, "is of a sweep with allocation auto, not greedy"),
        ({"execution": "dense"}, "is of a sweep with execution auto, not dense"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_sweep_is_not_continued_as_another(arguments, said, finished):
    before = contents()
    with pytest.raises(InputError) as caught:
        run(**{**SPLITS, **arguments})
    message = str(caught.value)
    assert message == f"out/sweep.json {said}. Give another --out, or --force to replace it."
    assert contents() == before


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """The folder of a finished sweep."""
    out = tmp_path_factory.mktemp("sample")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execution, "medians", lambda runs, **_: ([1.0] * len(runs), 1))
        run(out=out, **SPLITS)
    return out


@pytest.fixture
def finished(sample):
    """A copy of it in ``out``."""
    Path("out").mkdir()
    for path in sample.iterdir():
        Path("out", path.name).write_bytes(path.read_bytes())
    return json.loads(Path("out/sweep.json").read_text())


@pytest.mark.parametrize(("name", "value"), [("machine", "an abacus"), ("threads", 99), ("torch", "0.1")])
def test_a_sweep_is_not_continued_elsewhere(name, value, finished):
    finished["environment"][name] = value
    Path("out/sweep.json").write_text(json.dumps(finished))
    with pytest.raises(InputError, match=rf"is of a sweep with {name} {value}, not"):
        run(**SPLITS)


def test_a_sweep_is_not_continued_with_images_of_another_size():
    sweep(tiny(), [0.5], input_shape=(1, 9, 9), out="out")
    with pytest.raises(InputError, match="input_shape 1, 9, 9, not 1, 11, 11"):
        sweep(tiny(), [0.5], input_shape=(1, 11, 11), out="out")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda found: None,
        lambda found: [found],
        lambda found: {},
        lambda found: {**found, "rows": []},
        lambda found: {**found, "rows": None},
        lambda found: {**found, "rows": found["rows"][1:]},
        lambda found: {**found, "rows": found["rows"][::-1]},
        lambda found: {**found, "rows": found["rows"] + found["rows"][-1:]},
        lambda found: {**found, "rows": [{"requested": row["requested"]} for row in found["rows"]]},
        lambda found: {**found, "rows": [1, 2]},
        lambda found: {**found, "options": [1]},
        lambda found: {**found, "environment": None},
        lambda found: {**found, "sensitivity": None},
        lambda found: {key: value for key, value in found.items() if key != "network"},
    ],
)
def test_a_table_that_is_none_is_refused_and_kept(spoil, finished):
    Path("out/sweep.json").write_text(json.dumps(spoil(finished)))
    before = contents()
    with pytest.raises(InputError, match=r"^out/sweep.json is not the file of a sweep\. Give another --out, or"):
        run(**SPLITS)
    assert contents() == before


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"hello"])
def test_a_file_that_is_no_json_is_refused(text):
    Path("out").mkdir()
    Path("out/sweep.json").write_bytes(text)
    with pytest.raises(InputError, match="is not the file of a sweep"):
        run()
    assert Path("out/sweep.json").read_bytes() == text


# --- files


@pytest.mark.parametrize("name", FILES[1:])
def test_results_of_something_else_are_not_replaced_without_force(name):
    Path("out").mkdir()
    Path("out", name).write_text("precious")
    with pytest.raises(InputError, match=f"out/{name} exists; choose another output or replace it with --force"):
        run()
    assert contents() == {f"out/{name}": b"precious"}
    run(force=True)
    assert len(document()["rows"]) == 4


def test_force_starts_over(finished, converted):
    run(**SPLITS, force=True)
    assert converted[0] == BUDGETS
    converted[0].clear()
    run([0.7], force=True)
    assert converted[0] == [0.7]
    assert len(document()["rows"]) == 2


@pytest.mark.parametrize("name", FILES)
def test_a_folder_in_the_place_of_a_result(name):
    Path("out", name).mkdir(parents=True)
    with pytest.raises(InputError, match=f"cannot write out/{name}: it is a directory"):
        run(force=True)


def test_without_out_nothing_is_written():
    run(out=None)
    assert contents() == {}


def test_csv_says_what_json_says(finished):
    with open("out/sweep.csv", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(finished["rows"]) == 4
    for line, row in zip(table, finished["rows"], strict=True):
        for name, text in line.items():
            if name.startswith("pareto_"):
                assert text == str(row["pareto"][name.removeprefix("pareto_")])
            elif name == "layers":
                words = [
                    layer
                    + (f" {choice['form']} {choice['rank']} {choice['execution']}" if choice["form"] else " unchanged")
                    for layer, choice in (row["layers"] or {}).items()
                ]
                assert text == "; ".join(words)
            elif row[name] is None:
                assert text == ""
            else:
                assert text == row[name] if isinstance(row[name], str) else float(text) == row[name]
    assert {name for name in table[0] if not name.startswith("pareto_")} == set(finished["rows"][0]) - {"pareto"}


def test_the_figure_is_a_picture(finished):
    pixels = plt.imread("out/sweep.png")
    assert pixels.shape[1] > 1500
    assert pixels.std() > 0.05


def test_csv_and_figure_are_replaced_together_or_not_at_all(finished, monkeypatch):
    before = {name: Path("out", name).read_bytes() for name in FILES[1:]}
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: pytest.fail("no room"))
    with pytest.raises(pytest.fail.Exception):
        run([0.7], force=True)
    plt.close("all")
    assert {path.name: path.read_bytes() for path in Path("out").iterdir() if path.name in before} == before
    assert len(list(Path("out").iterdir())) == 3


def test_the_figure_shows_the_error_that_rows_are_compared_by(monkeypatch):
    shown = []
    real = pareto.plot_pareto
    monkeypatch.setattr(pareto, "plot_pareto", lambda rows, error: (shown.append(error), real(rows, error))[1])
    run([0.5], **SPLITS)
    run([0.5], out="plain")
    assert shown == [document()["error"], document("plain")["error"]] == ["validation_error", "output_error"]


# --- bad input


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"budgets": []}, "budgets is []. Give a list of at least one"),
        ({"budgets": "0.5"}, "budgets is '0.5'. Give a list of at least one"),
        ({"budgets": 0.5}, "budgets is 0.5. Give a list of at least one"),
        ({"budgets": [0.5, 0]}, "params is 0. Give a fraction up to 1"),
        ({"unit": "rank"}, "unknown unit 'rank'; accepted: params, macs, latency"),
        ({"form": "cg"}, "unknown form 'cg'"),
        ({"minimise": "outputs"}, "minimise='outputs' needs training images"),
        ({"model": nn.Linear(2, 2)}, "no group-to-group layer"),
        ({"test": images(3)._replace(labels=torch.tensor([0, 1, 7]))}, "test has labels from 0 to 7"),
    ],
)
def test_wrong_arguments_are_refused_and_nothing_is_written(arguments, said):
    with pytest.raises(InputError, match=re.escape(said)):
        run(**arguments)
    assert contents() == {}


# --- the command


def command(*argv):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            code = main([str(arg) for arg in argv])
        except SystemExit as stop:  # argparse
            code = stop.code
    return code, out.getvalue(), err.getvalue()


@pytest.fixture
def checkpoint():
    save(create_model("p4cnn", width=2), "small.pt")
    return "small.pt"


def test_the_command_writes_prints_and_goes_on(checkpoint, converted):
    converted[1]["at"] = 0.6
    code, out, err = command(checkpoint, "--params", "0.01,0.6")
    assert (code, out) == (130, "")
    assert "to continue: the same command (what was done is in small-sweep/sweep.json)" in err
    code, out, err = command(checkpoint, "--params", "0.01,0.6", "--json")
    assert code == 0
    assert out == Path("small-sweep/sweep.json").read_text()
    found = json.loads(out)
    assert [row["requested"] for row in found["rows"]] == [None, 0.01, 0.6]
    assert (found["checkpoint"], found["dataset"]) == (checkpoint, None)
    assert err.startswith("small-sweep/sweep.json has 2 of 3 rows already")
    code, out, err = command(checkpoint, "--params", "0.01,0.6")
    assert "written: small-sweep/sweep.json, small-sweep/sweep.csv, small-sweep/sweep.png\n" in out
    assert re.search(r"^original +1\.\d+k 100%", out, re.MULTILINE)
    assert re.search(r"^0\.01 +out of reach", out, re.MULTILINE)
    assert "params 0.01: params of at most" in out
    assert converted[0].count(0.01) == converted[0].count(0.6) == 1


@pytest.mark.parametrize("trained_on", ["train", "train and validation"])
def test_validation_images_that_the_network_has_seen_are_no_validation(trained_on, monkeypatch):
    given = {}
    data = gconv.training.datasets.Dataset("few", "", *(images(n, n) for n in (4, 5, 6)), "digest")
    data = gconv.training.datasets.Dataset(
        "few", "some", *(Split(torch.rand(n, 1, 28, 28), torch.arange(n)) for n in (4, 5, 6)), "digest"
    )
    monkeypatch.setattr(gconv.training.datasets, "load_dataset", lambda name: data)
    monkeypatch.setattr(sweeping, "sweep", lambda *_, **kwargs: given.update(kwargs) or 1 / 0)
    save(create_model("p4cnn", width=2), "small.pt", record={"trained_on": trained_on})
    with pytest.raises(ZeroDivisionError):
        command("small.pt", "--data", "few")
    sizes = [None if given[name] is None else len(given[name].labels) for name in ("data", "validation", "test")]
    assert sizes == ([4, 5, 6] if trained_on == "train" else [9, None, 6])
    assert given["about"]["dataset"] == {"name": "few", "description": "some", "sha256": "digest"}
    assert tuple(given["input_shape"]) == (1, 28, 28)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("", "the following arguments are required: CKPT"),
        ("absent.pt", "absent.pt does not exist"),
        ("small.pt --params 0.5 --macs 0.5", "argument --macs: not allowed with argument --params"),
        ("small.pt --params 0.5,,0.7", "params is ''. Give a fraction up to 1"),
        ("small.pt --params 0.5,x", "params is 'x'. Give a fraction up to 1"),
        ("small.pt --macs 0", "macs is '0'. Give a fraction up to 1"),
        ("small.pt --latency 3.5", "latency is '3.5'. Give a fraction up to 1"),
        ("small.pt --form cg", "unknown form 'cg'"),
        ("small.pt --minimise outputs", "minimise='outputs' needs training images"),
        ("small.pt --minimise x", "unknown minimise 'x'"),
        ("small.pt --data mnist", "unknown data set 'mnist'"),
        ("small.pt --device tpu", "unknown device 'tpu'"),
        ("small.pt --seed -1", "argument --seed: '-1' is not a whole number of at least 0"),
        ("small.pt --out small.pt", "cannot write small.pt/sweep.json: small.pt is not a directory"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(options, said, checkpoint):
    before = contents()
    code, out, err = command(*options.split())
    assert (code, out) == (2, "")
    assert re.fullmatch(rf"{PROG}: error: [^\n]+\n", err)
    assert said in err
    assert contents() == before


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


@pytest.mark.parametrize("width", [80, 160])
def test_the_table_fits_the_terminal_whole(width, finished, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    large = {"parameters": 123456789, "latency_ms_after": 1234.5, "test_error": 100.0}
    rows = [{**row, **large} if row["out_of_reach"] is None else row for row in finished["rows"]]
    print_sweep(rows, "latency", file=(file := Terminal()))
    text = re.sub(r"\x1b\[\d*m", "", file.getvalue())
    assert all(len(line) <= width for line in text.splitlines())
    assert "…" not in text
    table = text.split("\n\n")[0].splitlines()
    assert len([line for line in table if re.match(r"original|0\.5|0\.05|0\.7", line)]) == 4
    assert len(table) == 7  # two lines of heading and a rule: no cell is folded
    assert ("memory" in text) == ("unchanged" in text or "layers" in text) == (width == 160)
    assert "*: on the Pareto front of validation error against this" in text


def test_stars_are_where_the_front_is(finished):
    print_sweep(finished["rows"], "params", file=(file := io.StringIO()))
    lines = [line for line in file.getvalue().splitlines() if re.match(r"(original|0\.5|0\.7) ", line)]
    shown = [row for row in finished["rows"] if row["out_of_reach"] is None]
    assert [line.count("*") for line in lines] == [sum(row["pareto"].values()) for row in shown]


def test_help_does_not_wait_for_pytorch():
    code = (
        "import sys; from analysis.sweep.__main__ import parser\n"
        "print(parser().format_help(), *{'torch', 'numpy', 'matplotlib', 'rich'} & set(sys.modules), sep='|', end='|')"
    )
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [*STRICT_PYTHON, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True
    )
    assert done.stdout.startswith(b"usage: python -m analysis.sweep")
    assert done.stdout.endswith(b"--force\n|")


def test_the_examples_in_the_help_are_commands():
    examples = re.findall(r"^  python -m analysis.sweep ([^>\n]+)", parser().format_help(), re.MULTILINE)
    assert len(examples) == 4
    for arguments in examples:
        parser().parse_args(shlex.split(arguments))


def test_the_package_has_the_function():
    assert analysis.sweep(tiny(), [0.5], input_shape=(1, 9, 9))[1]["requested"] == 0.5
