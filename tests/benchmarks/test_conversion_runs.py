"""The runs of the comparison: each has a record of its own, and a record made here has every stage."""

import dataclasses
import json

import pytest

import gconv
from benchmarks import conversion_runs
from benchmarks.conversion_runs import HELD_OUT, P4M, RUNS, WIDE, Run


def test_every_run_has_a_record_of_its_own():
    assert len({run.path for run in RUNS}) == len(RUNS)


def test_what_lies_in_the_records_is_of_the_runs():
    known = {run.path.name: run for run in RUNS}
    paths = [path for path in conversion_runs.RECORDS.glob("*.json") if not path.name.startswith("sensitivity_")]
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
            patch.setattr(conversion_runs, "load_dataset", lambda name: dataclasses.replace(data, **small))
            return conversion_runs.record(Run(P4M, "svd gc_in", "params", 0.5, 1))

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
