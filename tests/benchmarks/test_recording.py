"""Every run is done once, and its record is whole or not there."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.recording import command, complete


@dataclass(frozen=True)
class Run:
    path: Path


def test_what_has_no_record_is_done_and_no_more(tmp_path, capsys):
    runs = [Run(tmp_path / "new" / f"{name}.json") for name in "ab"]
    done = []

    def record(run):
        done.append(run)
        return {"parameters": 3, "error": {"test": 1.5}}

    complete(runs[:1], record, "error")
    complete(runs, record, "error")
    assert done == runs
    assert json.loads(runs[1].path.read_text()) == {"parameters": 3, "error": {"test": 1.5}}
    assert capsys.readouterr().out.splitlines() == [f"{name}.json 3 {{'test': 1.5}}" for name in "ab"]


@pytest.mark.parametrize("wrong", [KeyboardInterrupt(), ValueError("NaN")], ids=["interrupted", "failed"])
def test_a_run_that_did_not_end_leaves_nothing(tmp_path, wrong):
    def record(run):
        raise wrong

    run = Run(tmp_path / "a.json")
    with pytest.raises(type(wrong)):
        complete([run], record, "error")
    assert list(tmp_path.iterdir()) == []


def test_not_a_number_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        complete([Run(tmp_path / "a.json")], lambda run: {"parameters": float("nan")}, "parameters")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def runs(tmp_path):
    return [Run(tmp_path / f"{name}.json") for name in ("a_seed0", "b_seed0", "b_seed1")]


def called(runs, *argv):
    document = {"parameters": 3, "error": 1}
    try:
        return command("prog", argv, runs=runs, record=lambda run: document, shown="error", table=lambda: "| |")
    except SystemExit as exit_:
        return exit_.code


@pytest.mark.parametrize(("argv", "done"), [(["run"], [0, 1, 2]), (["run", "seed0"], [0, 1]), (["run", "b_"], [1, 2])])
def test_the_command_does_all_runs_or_those_of_a_name(runs, argv, done):
    assert called(runs, *argv) == 0
    assert [run for run in runs if run.path.exists()] == [runs[i] for i in done]


def test_the_command_prints_the_table(runs, capsys):
    assert called(runs, "table") == 0
    assert capsys.readouterr().out == "| |\n"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "the following arguments are required: run | table"),
        (["runs"], "unknown action 'runs'; accepted: run, table"),
        (["run", "seed2"], "no run of prog has 'seed2' in the name of its record; leave it out to do all"),
        (["run", "a", "b"], "unrecognized arguments: b"),
        (["table", "b"], "table shows all records; leave out 'b'"),
        (["table", "--csv"], "unrecognized arguments: --csv"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_done(runs, tmp_path, capsys, argv, said):
    assert called(runs, *argv) == 2
    assert capsys.readouterr() == ("", f"prog: error: {said}\n")
    assert list(tmp_path.iterdir()) == []
