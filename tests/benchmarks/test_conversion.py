"""The comparison's tables and figures say what its records say."""

import dataclasses
import json
import statistics

import matplotlib.pyplot as plt
import pytest

import gconv
from benchmarks import conversion
from benchmarks.conversion import HELD_OUT, P4M, RUNS, WIDE, Run


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
                tuple(xy) for line in axis.get_lines() if line.get_linestyle() == "None" for xy in line.get_xydata()
            ]
            rows = [row for row in conversion.rows() if stage in row.errors]
            assert sorted(drawn) == sorted((getattr(row, cost), statistics.mean(row.errors[stage])) for row in rows)
            lines = {line.get_label(): line for line in axis.get_lines()}
            assert set(lines["original"].get_ydata()) == {3.0}
    finally:
        plt.close(figure)


def test_every_run_has_a_record_of_its_own():
    assert len({run.path for run in RUNS}) == len(RUNS)


def test_what_lies_in_the_records_is_of_the_runs():
    known = {run.path.name: run for run in RUNS}
    paths = [path for path in conversion.RECORDS.glob("*.json") if not path.name.startswith("sensitivity_")]
    assert paths
    for path in paths:
        found = json.loads(path.read_text(encoding="utf-8"))
        assert found["run"] == vars(known[path.name])
        source = gconv.read(f"checkpoints/{found['run']['checkpoint']}.pt")
        assert found["original"]["test_error"] == source.record["test_error"]
        assert found["trained_on"] == source.record["trained_on"]
        if source.record["trained_on"] == "train and validation":
            assert not any("validation_error" in stage for stage in found["stages"].values())


def test_the_wide_and_the_smallest_runs_have_the_sizes_that_the_runs_say():
    for name, parameters in ((HELD_OUT[0], 3420), (WIDE, 24640)):
        network = gconv.load(f"checkpoints/{name}.pt")
        small = gconv.create_model("p4cnn", separable="gc_in", width=network.conv2.out_channels)
        assert gconv.cost(small, (1, 28, 28)).parameters == parameters


class TestRecord:
    """One record made for real, of a network on few digits."""

    @pytest.fixture(scope="class")
    @staticmethod
    def made():
        data = gconv.load_dataset("rotdigits")
        with pytest.MonkeyPatch.context() as patch:
            small = {
                part: gconv.Split(getattr(data, part).images[:40], getattr(data, part).labels[:40])
                for part in ("train", "validation", "test")
            }
            patch.setattr(conversion, "load_dataset", lambda name: dataclasses.replace(data, **small))
            return conversion.record(Run(P4M, "svd gc_in", "params", 0.5, 1))

    def test_it_is_plain_data_with_every_stage(self, made):
        assert json.loads(json.dumps(made)) == made
        assert set(made["stages"]) == {"converted", "batch_norm", "finetuned"}
        assert made["parameters"] <= 0.5 * made["original"]["parameters"]
        assert made["equivariance_error"] < 1e-12
        assert {layer["form"] for layer in made["layers"]} == {"gc_in"}

    def test_layers_run_as_their_form_does_by_default(self, made):
        small = gconv.create_model("p4cnn", group="p4m", separable="gc_in", width=7)
        at_rank_1 = gconv.cost(small, (1, 28, 28)).macs_executed
        assert at_rank_1 <= made["macs_executed"] < made["original"]["macs_executed"]


def test_the_command_prints_the_table(records, capsys):
    assert conversion.main(["table"]) == 0
    assert capsys.readouterr().out == conversion.table() + "\n"
