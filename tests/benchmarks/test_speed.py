"""Records of speed: each section once, and the tables that are made from them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

import gconv
from analysis.allocation.budget import Budget
from benchmarks import speed, speed_conversions, speed_figure, speed_layers, speed_networks, speed_report, timing
from benchmarks.timing import interleaved, summary
from gconv.system.errors import InputError


def row(
    subject: str, direction: str, batch: int, variant: str, median: float, macs: int | None = None
) -> dict[str, Any]:
    times = {"median_ms": median, "quartiles_ms": [0.9 * median, 1.2 * median], "rounds": 5}
    return {"subject": subject, "variant": variant, "direction": direction, "batch": batch, "macs": macs, **times}


NETWORKS = [
    row("p4cnn", "training", 128, "gconv", 50, 2_000_000),
    row("p4cnn", "training", 128, "dense", 125, 4_000_000),
    row("p4cnn", "training", 128, "dense, channels-last", 100, 4_000_000),
    row("p4cnn", "training", 128, "lists", 50),
]
LAYERS = [
    row("p4, 2 channels, 8x8", "forward", 4, variant, median, macs) | {"side": 8}
    for variant, median, macs in (("gc", 3.0, 1), ("dense", 12.0, 10), ("dense, channels-last", 10.0, 10))
]
CONVERSIONS = [row("0", "inference", 16, "original", 4.0), row("0", "inference", 16, "converted", 3.0)]
CONVERSIONS += [row("0", "inference", 16, "copy", 4.2)]
CONVERSIONS += [row("1", "inference", 16, "original", 4.0), row("1", "inference", 16, "converted", 5.0)]
CONVERSIONS += [row("1", "inference", 16, "copy", 3.8)]
CONVERSIONS += [
    row("2", "inference", 16, name, ms) for name, ms in (("original", 4.0), ("converted", 4.1), ("copy", 4))
]
START_UP = [row("start-up", "process", 1, "import torch", 1000), row("start-up", "process", 1, "decompose", 2250)]
GPU = [
    row("p4cnn", "inference", 128, name, ms) | {"precision": "tf32", "device": "a card"}
    for name, ms in (
        ("dense", 9.0), ("dense, CUDA graph", 2.0), ("dense, channels-last", 8.0),
        ("dense, channels-last, CUDA graph", 3.0), ("gconv, fused", 2.0), ("gconv, fused, CUDA graph", 1.0),
    )
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    sections = {"p4cnn": NETWORKS, "layers-p4": LAYERS, "conversions": CONVERSIONS, "start-up": START_UP, "gpu": GPU}
    sections["resnets"] = [row("p4cnn", "training", 128, "gconv", 1, 2_000_000)]  # measured apart: not to be compared
    for section, rows in sections.items():
        (tmp_path / f"{section}.json").write_text(json.dumps({"section": section, "rows": rows}))
    return tmp_path


def test_the_table_says_what_is_in_the_records(folder: Path) -> None:
    table = speed_report.table(folder, every=True)
    lines = [" ".join(line.split()) for line in table.splitlines()]
    assert (
        "| p4cnn | training | 128 | gconv | dense / dense, channels-last | 1.00 | 0.50 (dense, channels-last) | yes |"
        in lines
    )
    assert "| p4cnn | training | 128 | gconv | escnn / lists | 0.83 | 1.00 (lists) | no |" in lines
    assert "| p4cnn | training | 128 | gconv | 50 ms | 45–60 | 2.0 M | 0.50 | 1.00 |" in lines
    assert "| p4cnn | training | 128 | lists | 50 ms | 45–60 | | 0.50 | |" in lines
    assert "| p4cnn | training | 128 | gconv | 1 ms | 0.9–1.2 | 2.0 M | | |" in lines
    assert "| p4, 2 channels, 8x8 | forward | 0.30 (0.10) |" in lines
    assert "Of 3 random conversions 2 came out slower than the original, 1 of them by more" in table
    assert "(0.95 to 1.05 of its time)" in table
    assert "They take 0.75 to 1.25 of the original's time, half" in table
    assert " 50 ms " not in speed_report.table(folder)
    assert "| a card: graph (launched) / limit |" in lines[-3]
    assert lines[-1] == "| p4cnn | inference | tf32 | 2.00 ms | | 0.50 (0.25) | |"
    assert "| p4cnn | inference | 128 | gconv, fused |" not in " ".join(lines)  # which is a table of times on a CPU
    assert "in 2.2 s, the start of the process included (at most 2.3 s asked)." in table
    assert "Importing PyTorch alone takes 1.0 s." in table


def test_the_figure_is_drawn(folder: Path) -> None:
    path = speed_figure.draw(folder)
    assert path == folder / "speed.png"
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_without_records_there_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no records"):
        speed_report.table(tmp_path)


def test_runs_take_turns_and_the_first_turns_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "TURN_SECONDS", 0.0)
    calls: list[str] = []
    found = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    turns = [tuple(calls[at : at + 2]) for at in range(0, 10, 2)]
    assert all(sorted(turn) == ["a", "b"] for turn in turns)
    assert found["a"]["rounds"] == found["b"]["rounds"] == 3


def test_a_turn_of_short_runs_has_several_and_its_time_is_shared() -> None:
    found = interleaved({"short": lambda: time.sleep(0.002), "long": lambda: time.sleep(0.03)}, 3)
    assert 2 <= found["short"]["median_ms"] < 20
    assert found["long"]["median_ms"] >= 30
    calls: list[str] = []
    interleaved({"short": lambda: calls.append("s"), "long": lambda: (calls.append("l"), time.sleep(0.03))}, 2)
    assert calls.count("l") == 4
    assert calls.count("s") > 20


def test_no_run_is_always_behind_the_same_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "TURN_SECONDS", 0.0)
    calls: list[str] = []
    interleaved({name: lambda name=name: calls.append(name) for name in "abc"}, 20)  # type: ignore[misc]
    assert {calls[at - 1] for at, name in enumerate(calls) if name == "b" and at} >= {"a", "c"}


def test_a_summary_has_the_median_and_the_quartiles() -> None:
    assert summary([4.0, 1.0, 2.0, 3.0, 5.0]) == {"median_ms": 3.0, "quartiles_ms": [2.0, 4.0], "rounds": 5}
    assert summary([4.0])["quartiles_ms"] == [4.0, 4.0]


def test_a_section_with_a_record_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    sections = {
        name: lambda full, name=name: done.append(name) or ([{"name": name}] if name != "none" else [])
        for name in ("a", "none")
    }
    monkeypatch.setattr(speed, "SECTIONS", sections)
    for _ in range(2):
        assert speed.main(["--out", str(tmp_path)]) == 0
    assert done == ["a", "none", "none"]
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["rows"] == [{"name": "a"}]
    assert record["machine"]["threads"] >= 1
    assert speed.main(["--out", str(tmp_path), "--only", "a", "--force"]) == 0
    assert done[3:] == ["a"]
    with pytest.raises(SystemExit, match="accepted: a, none"):
        speed.main(["--only", "b"])


def test_every_kind_of_layer_is_measured_at_every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed_layers, "CASES", {"p4": [(2, 4)]})
    monkeypatch.setattr(speed_layers, "interleaved", lambda runs, rounds: interleaved(runs, 1))
    rows = speed_layers.measure("p4", full=False)
    kinds = {"lifting", "full", *gconv.FORMS, "dense", "dense, channels-last"}
    assert {(r["variant"], r["direction"]) for r in rows} == {
        (kind, direction) for kind in kinds for direction in ("forward", "forward and backward")
    }
    macs = {r["variant"]: r["macs"] for r in rows}
    assert macs["full"] == macs["dense"] == 8 * 8 * 9
    assert macs["lifting"] == 3 * 8 * 9


def test_networks_are_measured_beside_their_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed_networks, "interleaved", lambda runs, rounds: interleaved(runs, 1))
    monkeypatch.setattr(
        speed_networks, "random_images", lambda like, batch: speed_networks.torch.rand(2, *like.input_shape)
    )
    monkeypatch.setattr(speed_networks, "has_escnn", lambda: False)
    rows = speed_networks.p4cnn(full=False)
    names = {"gconv", "dense", "dense, channels-last", "lists"}
    assert {r["variant"] for r in rows if r["direction"] == "training"} == names
    assert {r["variant"] for r in rows if r["direction"] == "inference"} == {*names, "gconv, fused", "gconv, exported"}
    assert {r["macs"] for r in rows if r["variant"] not in ("lists", "gconv, exported")} == {11_673_760}


def test_drawn_conversions_are_of_full_networks_and_within_what_a_budget_may_be() -> None:
    drawn = speed_conversions.draw(20)
    assert drawn == speed_conversions.draw(20) != speed_conversions.draw(20, seed=1)
    for name, request in drawn:
        assert (speed_conversions.CHECKPOINTS / name).exists()
        form = request.pop("form")
        assert form == "auto" or form in gconv.FORMS
        assert Budget.of(**request)
