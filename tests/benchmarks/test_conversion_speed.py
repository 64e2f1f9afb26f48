"""The table of the speed of conversion says what its records say."""

import json

from benchmarks import conversion_speed


def test_times_and_latencies(tmp_path, monkeypatch):
    monkeypatch.setattr(conversion_speed, "RECORDS", tmp_path)
    assert conversion_speed.table() == ""
    times = [{"images": 512, "seconds": 250.4, "peak_memory": 3 * 2**30, "environment": {"threads": 2}}]
    row = {"network": "a", "reported": [2.0, 1.0], "measured": [[2, 0.9], [2, 1.04], [5, 1.5]], "layers_slower": []}
    (tmp_path / "resnet.json").write_text(json.dumps(times))
    (tmp_path / "latency.json").write_text(json.dumps([row, {**row, "network": "b", "layers_slower": ["conv3"]}]))
    first, second = conversion_speed.table().split("\n\n")
    assert first.splitlines()[2:] == ["| 512 | 250 | 3.0 GiB | 2 |"]
    assert second.splitlines()[2:] == [
        f"| {name} | 2.00 → 1.00 ms | 0.500 | 0.90, 1.04, 1.50 ms | 0.450, 0.520, 0.300 | +4.0% | -10.0% | {slower} |"
        for name, slower in (("a", "none"), ("b", "conv3"))
    ]
