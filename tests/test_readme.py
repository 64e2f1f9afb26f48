"""The numbers in README.md and docs are those that the committed records and checkpoints give."""

import importlib
import io
import json
import re
import shlex
from pathlib import Path

import pytest

import analysis
import gconv
from analysis.plots.console import print_report
from benchmarks import (
    conversion,
    conversion_speed,
    headlines,
    plain_conversion,
    retraining,
    speed,
    speed_figure,
    speed_report,
)
from gconv.catalog import table
from gconv.experiments import __main__ as experiments
from gconv.experiments import runs, tables

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}


def test_the_readme_is_one_page() -> None:
    assert len(README.splitlines()) <= 130


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda path: path.stem
)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)]*)\)", path.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        page = path.parent / name if name else path
        assert page.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [head.lower().replace(" ", "-") for head in heads], target


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
    assert table(sorted(map(str, (ROOT / "checkpoints").glob("*.pt")))) in PAGES["checkpoints"]


RECORDS = runs.load_records(ROOT / experiments.FOLDER, "rotmnist-regen")
MADE = {
    **{name: ("results", tables.as_markdown(rows(RECORDS))) for name, rows in tables.TABLES.items()},
    "conversion": ("results", conversion.table()),
    "retraining": ("results", retraining.table()),
    "plain_conversion": ("guide", plain_conversion.table()),
    "speed": ("speed", speed_report.table(speed.RESULTS)),
    **{f"conversion_speed {n}": ("speed", part) for n, part in enumerate(conversion_speed.table().split("\n\n"))},
}


@pytest.mark.parametrize("name", MADE)
def test_tables_are_made_from_the_records(name: str) -> None:
    page, table = MADE[name]
    assert table in PAGES[page]


def test_the_headlines_are_made_from_the_records() -> None:
    assert headlines.table() in README


def test_the_figure_of_speed_is_there() -> None:
    assert (speed.RESULTS / speed_figure.FIGURE).exists()
    assert f"](../benchmarks/results/{speed_figure.FIGURE})" in PAGES["speed"]


@pytest.mark.parametrize("compiled", [True, False])
def test_what_the_wide_separable_resnet_takes(compiled: bool) -> None:
    net = gconv.create_model("gc-p4m-resnet44")
    counted = gconv.cost(net, net.input_shape, kernel="avx512" if compiled else "none")
    published, executed = (f"{count / 1e9:.2f} G" for count in (counted.macs_published, counted.macs_executed))
    text = " ".join(PAGES["guide"].split())
    assert f"is charged {published} MACs in the published convention. As executed" in text
    assert (f"As executed it takes {executed}" if compiled else f"without it {executed}") in text


def test_the_time_of_runs_at_once_is_that_of_the_record() -> None:
    record = json.loads((ROOT / "benchmarks" / "records" / "parallel_runs.json").read_text(encoding="utf-8"))
    assert (record["runs"], record["environment"]["threads"]) == (2, 2)
    assert f"trainings of P4CNN at once take {record['ratio']:.2f} of the time" in " ".join(PAGES["guide"].split())


def test_demo_block_is_what_the_demo_measures() -> None:
    net = gconv.load(ROOT / "checkpoints" / "p4cnn-rotdigits.pt")
    data = gconv.load_dataset("rotdigits")
    _, report = analysis.convert(net, rank=2, data=data.train_and_validation, test=data.test)
    printed = io.StringIO()
    print_report(report, {"data": {"name": "rotdigits"}}, file=printed)
    (line,) = (line for line in printed.getvalue().splitlines() if line.startswith("whole network"))
    # MACs as executed depend on the machine: every layer runs in the way that is measured to be faster.
    assert f"{line.partition('as executed')[0]}as executed …" in README
    shown = {"before": "the network as given", "converted": "converted", "batch_norm": "batch norm re-estimated"}
    for stage, text in shown.items():
        (line,) = (line for line in README.splitlines() if line.strip().startswith(f"{text}  "))
        # A few of the 600 images lie so near a decision boundary that another processor's rounding may turn them.
        assert abs(float(line.split()[-2]) - report.accuracy[stage]) <= 1
