"""The choice between full layers as mixes and expanded rests on the record, and makes no measured layer slower."""

import json

import pytest

from benchmarks.dispatch_fit import INSTRUCTIONS, RECORD, fitted, measure
from gconv.functional.form_base import FilterShape
from gconv.groups.point_groups import group
from gconv.kernels import dispatch
from gconv.kernels.dispatch import CLEARLY, MIXES, mixes_over_expanded
from tests.gconv.kernels.comparing import built

LANES = {"avx512": 16, "avx2": 8}


@pytest.fixture(scope="module")
def record():
    return json.loads(RECORD.read_text(encoding="utf-8"))


def test_the_constants_are_those_of_the_record(record):
    assert {LANES[name]: tuple(constants) for name, constants in fitted(record).items()} == MIXES
    assert set(record["rows"]) == set(INSTRUCTIONS) == set(LANES)


@pytest.mark.parametrize("name", LANES)
def test_no_measured_layer_that_runs_as_mixes_is_slower(record, name):
    chosen = []
    for row in record["rows"][name]:
        shape = FilterShape(row["channels"], row["channels"], group(row["group"]).order, row["k"])
        estimate = mixes_over_expanded(group(row["group"]), shape, LANES[name])
        assert estimate > 0.7 * row["time"]
        if estimate < CLEARLY:
            chosen.append(row["time"])
    assert len(chosen) > len(record["rows"][name]) / 6
    assert max(chosen) < 0.9


@built
def test_a_measurement_gives_rows_as_in_the_record(monkeypatch, record):
    monkeypatch.setattr("benchmarks.dispatch_fit.shapes", lambda: iter([("p4", 8, 3, 14)]))
    [row] = measure()
    assert set(row) == set(record["rows"]["avx2"][0])
    assert row["time"] > 0
    assert dispatch.variants()
