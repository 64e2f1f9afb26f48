"""Every run is done once, and its record is whole or not there."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.records import complete


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
