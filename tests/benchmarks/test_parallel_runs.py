"""The comparison of runs at once and runs in turn does both, and leaves a record."""

import json

import pytest

from benchmarks import parallel_runs


def test_both_ways_are_timed_in_turn(tmp_path, monkeypatch, capsys):
    ways = []

    def seconds(runs, jobs):
        ways.append((len(runs), jobs))
        return [3.0, 4.0] if jobs > 1 else [2.0, 3.0]

    monkeypatch.setattr(parallel_runs, "seconds", seconds)
    monkeypatch.setattr(parallel_runs.torch, "get_num_threads", lambda: 2)
    parallel_runs.main(["--rounds", "2", "--json", str(tmp_path / "record.json")])
    assert ways == [(2, 2), (2, 1)] * 2
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["ratio"] == 4 / 5
    assert record["seconds"] == {"at once, one thread each": [4.0] * 2, "in turn, all threads": [5.0] * 2}
    assert "0.80" in capsys.readouterr().out


def test_seconds_are_those_of_the_records(monkeypatch):
    def execute(runs, *, records, work, device, jobs):
        for run in runs:
            path = records / run.data / f"{run.name}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"run": vars(run), "seconds": {"training": 1.0 + run.seed, "testing": 9.0}}))

    monkeypatch.setattr(parallel_runs, "execute", execute)
    runs = [parallel_runs.Run("p4cnn", seed, "rotdigits", epochs=1) for seed in range(2)]
    assert parallel_runs.seconds(runs, 2) == [1.0, 2.0]


def test_a_wrong_number_is_refused_in_a_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        parallel_runs.main(["--epochs", "0"])
    assert stopped.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
