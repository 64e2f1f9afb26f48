"""The numbers in README.md are those that the committed checkpoints give."""

import importlib
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest

import analysis
import gconv
from analysis.screen import _change
from benchmarks import conversion, plain_conversion
from gconv import experiments, runs, tables
from gconv.catalog import table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(example, {})
    assert isinstance(gconv.load("small.pt").conv2, gconv.SeparableGConv2d)


@pytest.mark.parametrize("line", re.findall(r"^    python -m (.*)$", README, re.MULTILINE))
def test_commands_are_understood(line: str) -> None:
    module, *words = shlex.split(line)
    importlib.import_module(module).parser().parse_args(words)


def test_checkpoint_table_is_what_the_catalog_prints() -> None:
    assert table(sorted(map(str, (ROOT / "checkpoints").glob("*.pt")))) in README


@pytest.mark.parametrize("made", [plain_conversion, conversion], ids=lambda module: module.__name__)
def test_conversion_tables_are_made_from_the_records(made: ModuleType) -> None:
    assert made.table().count("\n") > 3
    assert made.table() in README


def test_the_rotated_mnist_table_is_made_from_the_records() -> None:
    records = runs.load_records(ROOT / experiments.FOLDER, "rotmnist-regen")
    assert tables.as_markdown(tables.table("rotmnist", records)) in README


def test_demo_block_is_what_the_demo_measures() -> None:
    net = gconv.load(ROOT / "checkpoints" / "p4cnn-rotdigits.pt")
    data = gconv.load_dataset("rotdigits")
    _, report = analysis.convert(net, rank=2, data=data.train_and_validation, test=data.test)
    assert f"parameters {_change(*report.parameters)}" in README
    # As executed depends on the machine: what is faster is measured.
    assert f"MACs published {_change(*report.macs_published)}, as executed …" in README
    shown = {"before": "the network as given", "converted": "converted", "batch_norm": "batch norm re-estimated"}
    for stage, text in shown.items():
        (line,) = (line for line in README.splitlines() if line.strip().startswith(f"{text}  "))
        # A few of the 600 images lie so near a decision boundary that another processor's rounding may turn them.
        assert abs(float(line.split()[-2]) - report.accuracy[stage]) <= 1
