"""Convert and retrain against training from scratch: what a run does, and what the table makes of the records."""

import dataclasses
import json
import statistics

import matplotlib.pyplot as plt
import pytest

import gconv
from benchmarks import retraining
from benchmarks.retraining import RUNS, Run
from gconv.experiments.runs import Run as Scratch


@pytest.fixture
def small(monkeypatch, tmp_path):
    """One epoch each on a few digits, and all files in a folder of their own."""
    digits = gconv.load_dataset("rotdigits")
    few = gconv.Split(digits.train.images[:150], digits.train.labels[:150])
    parts = dataclasses.replace(digits, train=few, validation=few, test=few)
    monkeypatch.setattr(gconv, "load_dataset", lambda name: parts)
    monkeypatch.setattr(retraining, "EPOCHS", 1)
    monkeypatch.setattr(retraining, "WORK", tmp_path / "work")
    monkeypatch.setattr(retraining, "RECORDS", tmp_path / "records")
    (tmp_path / "work").mkdir()
    return tmp_path


def test_a_run_trains_converts_and_trains_again(small):
    document = json.loads(json.dumps(retraining.record(Run(0))))
    assert document["parameters"] == 3420
    assert set(document["test_error"]) == {"full", "converted", "batch_norm", "retrained"}
    assert {stage: len(rows) for stage, rows in document["history"].items()} == {"full": 1, "retraining": 1}
    (kept,) = (small / "work").iterdir()
    before = kept.read_bytes()
    taught = retraining.record(Run(0, distilled=True))
    assert kept.read_bytes() == before  # the full network is trained once
    assert taught["test_error"]["full"] == document["test_error"]["full"]
    assert taught["history"]["retraining"] != document["history"]["retraining"]


def test_the_penalty_is_on_the_full_network_alone(small):
    plain, pulled = (retraining.record(Run(0, weight)) for weight in (0.0, 1.0))
    assert pulled["history"]["full"][0]["train_loss"] > plain["history"]["full"][0]["train_loss"]
    assert pulled["recipe"]["low_rank_penalty"] == 1.0
    assert "low_rank_penalty" not in plain["recipe"]
    assert len(list((small / "work").iterdir())) == 2


def test_from_scratch_it_is_the_same_form_and_size_for_all_epochs(small):
    document = json.loads(json.dumps(retraining.record(Run(0, scratch=True))))
    assert document["parameters"] == retraining.record(Run(0))["parameters"] == 3420
    assert set(document["test_error"]) == {"retrained"}
    assert len(document["history"]["retraining"]) == 2


def test_the_runs_are_told_apart_by_their_files():
    assert len({run.path for run in RUNS}) == len(RUNS)


def written(run, error):
    run.path.parent.mkdir(parents=True, exist_ok=True)
    errors = {"full": 2.0, "converted": 9.0, "batch_norm": 8.0, "retrained": error}
    history = {"full": [{"train_error": 5.0}], "retraining": [{"train_error": 4.0}]}
    if run.scratch:
        errors, history = {"retrained": error}, {"retraining": [{"train_error": 6.0}]}
    document = {"run": vars(run), "parameters": 3420, "test_error": errors, "history": history}
    run.path.write_text(json.dumps(document))


@pytest.fixture
def records(small, monkeypatch):
    """Two seeds of one way, one of two others, and one of each form from scratch."""
    for seed, error in enumerate([2.5, 2.7]):
        written(Run(seed), error)
    written(Run(0, distilled=True), 2.4)
    written(Run(0, 0.1), 2.9)
    written(Run(0, scratch=True), 3.1)
    own = {
        "run": Scratch("gc-p4cnn-small", 0), "parameters": 3420, "test_error": 3.3,
        "history": [{"train_error": 3.0}, {"train_error": 2.0}],
    }  # fmt: skip
    other = {**own, "run": Scratch("gc-p4cnn-small", 0, images=120), "test_error": 50.0}
    monkeypatch.setattr(retraining.runs, "load_records", lambda folder, data: [own, other])


def test_the_table_has_a_row_for_each_way_and_those_from_scratch(records):
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in retraining.table().splitlines()[2:]]
    assert [row[-1] for row in rows] == [
        f"2.60 ± {statistics.stdev([2.5, 2.7]):.2f} %",
        "2.90 %",
        "2.40 %",
        "3.10 %",
        "3.30 %",
    ]
    assert [row[2] for row in rows] == ["2", "1", "1", "1", "1"]
    assert [row[4] for row in rows] == ["8.00 ± 0.00 %", "8.00 %", "8.00 %", "", ""]
    assert "penalty 0.1" in rows[1][0]
    assert "teacher" in rows[2][0]


def test_the_figure_has_a_line_for_each_run_and_a_point_for_its_end(records):
    plt.switch_backend("agg")
    figure = retraining.plot()
    try:
        curves, ends = figure.axes
        drawn = [list(line.get_ydata()) for line in curves.get_lines() if len(line.get_ydata()) and not is_rule(line)]
        assert drawn == [[5.0, 4.0]] * 4 + [[6.0], [3.0, 2.0]]
        points = sorted(x for line in ends.get_lines() if line.get_marker() != "|" for x in line.get_xdata())
        assert points == [2.4, 2.5, 2.7, 2.9, 3.1, 3.3]
        numbers = [label.get_text() for label in ends.get_yticklabels()]
        legend = [text.get_text() for text in figure.legends[0].get_texts()]
        assert [text.split(":")[0] for text in legend] == numbers == ["1", "2", "3", "4", "5"]
    finally:
        plt.close(figure)


def is_rule(line):
    return line.get_linestyle() == ":"


def test_the_command_prints_the_table(records, capsys):
    assert retraining.main(["table"]) == 0
    assert capsys.readouterr().out == retraining.table() + "\n"
