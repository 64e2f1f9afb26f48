"""The comparison's tables and figures say what its records say."""

import statistics

import matplotlib.pyplot as plt
import numpy as np
import pytest

import gconv
from benchmarks import conversion
from benchmarks.conversion_runs import HELD_OUT, Run


def document(run, seed, *, parameters=3420, stages=("converted", "batch_norm", "finetuned")):
    """A record as ``record`` makes it, its errors told apart by seed and stage."""
    return {
        "run": vars(run),
        "dataset": "rotmnist-regen",
        "original": {"parameters": 24810, "macs_executed": 11, "test_error": 2.0 + seed},
        "parameters": parameters,
        "macs_executed": 1000 + seed,
        "equivariance_error": 10.0 ** (-15 + seed),
        "stages": {stage: {"test_error": 10.0 * (n + 1) + seed} for n, stage in enumerate(stages)},
    }


@pytest.fixture
def records(monkeypatch):
    """Three seeds of one run, a Tucker-2 and a network trained from scratch."""
    runs = [Run(name, "ours gc_in", "rank", 1, 10) for name in HELD_OUT]
    documents = [document(run, seed) for seed, run in enumerate(runs)]
    documents.append(document(Run(HELD_OUT[0], "tucker", "params", 8910), 0, parameters=8800, stages=("converted",)))
    monkeypatch.setattr(conversion, "load_records", lambda: documents)
    monkeypatch.setattr(conversion, "SCRATCH", {"P4CNN": ("gc-p4cnn-small-rotmnist-regen-heldout-seed0",)})
    return documents


def test_seeds_are_taken_together_and_methods_are_not(records):
    ours, tucker, scratch = conversion.rows()
    assert (ours.network, ours.method, ours.epochs) == ("P4CNN", "ours, gc_in", 10)
    assert ours.errors == {
        "original": [2, 3, 4], "converted": [10, 11, 12], "batch_norm": [20, 21, 22], "finetuned": [30, 31, 32],
    }  # fmt: skip
    assert (ours.parameters, ours.macs, ours.equivariance) == (3420, 1001, 1e-13)
    assert (tucker.method, tucker.epochs, set(tucker.errors)) == ("Tucker-2, expanded", 0, {"original", "converted"})
    source = gconv.read("checkpoints/gc-p4cnn-small-rotmnist-regen-heldout-seed0.pt")
    assert scratch.errors == {"finetuned": [source.record["test_error"]]}
    assert (scratch.method, scratch.parameters, scratch.epochs) == ("from scratch, gc", 3420, 50)


def test_the_table_has_means_and_deviations_and_the_largest_first(records):
    head, rule, *lines = conversion.table().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert {line.count("|") for line in (head, rule, *lines)} == {11}
    assert [row[1] for row in cells] == ["Tucker-2, expanded", "from scratch, gc", "ours, gc_in"]
    deviation = statistics.stdev([10, 11, 12])
    assert cells[2][2:] == [
        "3,420", "1,001", "1e-13", "3",
        f"3.00 ± {deviation:.2f} %", f"11.00 ± {deviation:.2f} %", f"21.00 ± {deviation:.2f} %",
        f"31.00 ± {deviation:.2f} % (10 epochs)",
    ]  # fmt: skip
    assert cells[0][4:] == ["1e-15", "1", "2.00 %", "10.00 %", "", ""]


@pytest.mark.parametrize("cost", ["parameters", "macs"])
def test_the_figure_has_a_point_for_every_row_of_a_stage(records, cost):
    plt.switch_backend("agg")
    figure = conversion.plot("P4CNN", cost)
    try:
        for axis, stage in zip(figure.axes, conversion.PANELS, strict=True):
            drawn = [
                tuple(xy)
                for line in axis.get_lines()
                if line.get_linestyle() == "None" and line.get_marker() in "osD^v"
                for xy in line.get_xydata()
            ]
            rows = [row for row in conversion.rows() if stage in row.errors]
            assert sorted(drawn) == sorted((getattr(row, cost), statistics.mean(row.errors[stage])) for row in rows)
            bars = [segment[:, 1] for bar in axis.collections for segment in bar.get_segments()]
            ends = [(min(row.errors[stage]), max(row.errors[stage])) for row in rows]
            np.testing.assert_allclose(sorted(map(tuple, bars)), sorted(ends))
            ours, *others = [bar.lines[0] for bar in axis.containers]
            assert ours.get_markerfacecolor() != "none"
            assert all(line.get_markerfacecolor() == "none" for line in others)  # ours can be seen inside them
            assert all(line.get_zorder() < ours.get_zorder() for line in others)
            lines = {line.get_label(): line for line in axis.get_lines()}
            assert set(lines["original"].get_ydata()) == {3.0}
    finally:
        plt.close(figure)


def test_the_command_prints_the_table(records, capsys):
    assert conversion.main(["table"]) == 0
    assert capsys.readouterr().out == conversion.table() + "\n"
