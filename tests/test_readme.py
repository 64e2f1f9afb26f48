"""The numbers in README.md are those that the committed checkpoints give."""

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

import analysis
import gconv
from analysis.plots.console import _change
from benchmarks import conversion, conversion_speed, plain_conversion, retraining, speed, speed_figure, speed_report
from gconv.catalog import table
from gconv.experiments import __main__ as experiments
from gconv.experiments import runs, tables

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
    command = importlib.import_module(module)
    if hasattr(command, "__path__"):  # a package is run by its __main__
        command = importlib.import_module(f"{module}.__main__")
    command.parser().parse_args(words)


def test_checkpoint_table_is_what_the_catalog_prints() -> None:
    assert table(sorted(map(str, (ROOT / "checkpoints").glob("*.pt")))) in README


RECORDS = runs.load_records(ROOT / experiments.FOLDER, "rotmnist-regen")
MADE = {
    **{name: tables.as_markdown(rows(RECORDS)) for name, rows in tables.TABLES.items()},
    **{module.__name__: module.table() for module in (plain_conversion, conversion, conversion_speed, retraining)},
}


@pytest.mark.parametrize("name", MADE)
def test_tables_are_made_from_the_records(name: str) -> None:
    """Those of experiments that have not been run yet may be missing."""
    head = MADE[name].partition("\n")[0]
    if head in README:
        assert MADE[name] in README
    else:
        assert name in ("recipes", "modern", "benchmarks.retraining")


def test_the_table_of_speed_is_made_from_the_records() -> None:
    assert speed_report.table(speed.RESULTS) in README
    assert (speed.RESULTS / speed_figure.FIGURE).exists()


@pytest.mark.parametrize("compiled", [True, False])
def test_what_the_wide_separable_resnet_takes(monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    monkeypatch.setattr("gconv.kernels.dispatch.variants", lambda: {1: 16} if compiled else {})
    net = gconv.create_model("gc-p4m-resnet44")
    counted = gconv.cost(net, net.input_shape)
    published, executed = (f"{count / 1e9:.2f} G" for count in (counted.macs_published, counted.macs_executed))
    assert f"is charged {published} MACs in the published convention. As executed" in README
    assert (f"As executed it takes {executed}" if compiled else f"without it {executed}") in README


def test_the_time_of_runs_at_once_is_that_of_the_record() -> None:
    record = json.loads((ROOT / "benchmarks" / "records" / "parallel_runs.json").read_text(encoding="utf-8"))
    assert (record["runs"], record["environment"]["threads"]) == (2, 2)
    assert f"trainings of P4CNN at once take {record['ratio']:.2f} of the time" in README


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
