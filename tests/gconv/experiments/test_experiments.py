"""Experiments: what a run records, that it is done once and continues, how the command stops; and the tables."""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gconv.experiments import __main__ as experiments
from gconv.experiments import perform as performing
from gconv.experiments import workers
from gconv.experiments.__main__ import EXPERIMENTS, main
from gconv.experiments.perform import recipe_of
from gconv.experiments.runs import Run, load_records, record_path
from gconv.experiments.tables import PUBLISHED, as_csv, as_markdown, efficiency, seeds, spread, table
from gconv.experiments.workers import execute
from gconv.models import checkpoint
from gconv.models.cost import cost
from gconv.models.memory import training_memory
from gconv.models.zoo import create_model
from gconv.system.errors import InputError
from gconv.training import datasets as data
from gconv.training import recipe
from gconv.training.datasets import Dataset, Split, load_dataset
from gconv.training.device import environment
from gconv.training.evaluation import evaluate
from gconv.training.loop import fit
from gconv.training.recipe import Recipe

RECORDS, WORK = Path("records"), Path("work")
TINY = Run("z2cnn", 3, "rotdigits", images=20, epochs=2)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("rotdigits")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own_with_few_images(monkeypatch, tmp_path, digits):
    monkeypatch.chdir(tmp_path)
    sizes = {"train": 25, "validation": 6, "test": 30}
    cut = {name: Split(*(part[:count] for part in getattr(digits, name))) for name, count in sizes.items()}
    few = replace(digits, **cut)
    monkeypatch.setattr(performing, "load_dataset", lambda name, **_: few if name == few.name else load_dataset(name))


def perform(run: Run = TINY) -> dict[str, Any]:
    """The record that a run leaves."""
    performing.perform(run, RECORDS, WORK, "cpu")
    return json.loads(record_path(run, RECORDS).read_text())


def timeless(item: Any) -> Any:
    if isinstance(item, dict):
        return {key: timeless(value) for key, value in item.items() if key != "seconds"}
    return [timeless(value) for value in item] if isinstance(item, list) else item


def files() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*") if path.is_file())


def command(capsys, *argv: str) -> tuple[int | str | None, str, str]:
    try:
        code = main(argv)
    except SystemExit as exit_:
        code = exit_.code
    return code, *capsys.readouterr()


# --- runs


def test_the_names_of_runs_say_all_that_differs():
    names = {
        Run("p4cnn", 0): "p4cnn_published_seed0",
        Run("p4cnn", 7, "rotmnist", "other"): "p4cnn_other_seed7",
        Run("p4cnn", 0, images=120): "p4cnn_published_first120_seed0",
        Run("p4cnn", 0, epochs=3, held_out=True): "p4cnn_published_3epochs_heldout_seed0",
        Run("z2cnn", 1, images=1, epochs=2, held_out=True): "z2cnn_published_first1_2epochs_heldout_seed1",
    }
    assert {run: run.name for run in names} == names
    assert record_path(Run("p4cnn", 0, "rotmnist"), RECORDS) == Path("records/rotmnist/p4cnn_published_seed0.json")


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_first_seeds_come_first_and_no_run_twice(experiment):
    runs = EXPERIMENTS[experiment]("rotdigits", 3)
    assert len(set(runs)) == len(runs) == len({run.name for run in runs})
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    assert {run.seed for run in runs} == {0, 1, 2}
    assert {run.data for run in runs} == {"rotdigits"}


def test_experiments_share_their_runs():
    efficient, table_ = (set(EXPERIMENTS[name]("rotdigits", 2)) for name in ("data-efficiency", "rotmnist"))
    assert {(run.model, run.seed) for run in efficient & table_} == {
        (model, seed) for model in ("z2cnn", "p4cnn", "gc-p4cnn") for seed in (0, 1)
    }


def test_a_record_says_what_was_done_and_what_came_out(digits):
    found = perform()
    few = performing.load_dataset("rotdigits")
    split = Split(*(part[:20] for part in few.train_and_validation))
    how = Recipe(epochs=2, batch_size=20, decay_epoch=2)
    torch.manual_seed(3)
    model = create_model("z2cnn")
    counted = cost(model, model.input_shape)
    history = fit(model, split, how, seed=3, label=None)
    score = evaluate(model, few.test)
    seconds = found.pop("seconds")
    assert timeless(found) == {
        "dataset": "rotdigits",
        "dataset_description": digits.description,
        "dataset_sha256": digits.sha256,
        "trained_on": "train and validation",
        "train_images": 20,
        "seed": 3,
        "recipe": how.to_dict(),
        "environment": environment(torch.device("cpu")),
        "test_error": score.error,
        "test_loss": score.loss,
        "test_images": 30,
        "run": asdict(TINY),
        "steps": 2,
        "parameters": counted.parameters,
        "macs_published": counted.macs_published,
        "macs_executed": counted.macs_executed,
        "training_memory_batch_2": training_memory(model, few.train.images[:2]),
        "history": timeless(history),
    }
    assert set(seconds) == {"training", "testing"}
    assert all(value >= 0 for value in seconds.values())
    assert all("seconds" in row for row in found["history"])
    assert files() == [f"records/rotdigits/{TINY.name}.json", f"work/rotdigits/{TINY.name}.pt"]
    kept = checkpoint.read(f"work/rotdigits/{TINY.name}.pt")
    assert kept.resume is None
    assert kept.record["test_error"] == score.error
    (again,) = load_records(RECORDS, "rotdigits")
    assert again["run"] == TINY


def test_a_run_that_holds_out_does_not_read_the_test_set(monkeypatch):
    few = performing.load_dataset("rotdigits")
    blind = replace(few, test=None)
    monkeypatch.setattr(performing, "load_dataset", lambda name, **_: blind)
    found = perform(replace(TINY, images=None, held_out=True))
    assert (found["trained_on"], found["train_images"]) == ("train", 25)
    assert found["validation_error"] == found["history"][-1]["validation_error"]
    assert not any(key.startswith("test") for key in found)


def test_one_image_left_over_makes_no_step_of_its_own(monkeypatch):
    monkeypatch.setitem(recipe.RECIPES, "small", Recipe(epochs=1, batch_size=10))
    assert perform(replace(TINY, recipe="small", images=21))["steps"] == 2 * 2


class Killed(BaseException):
    pass


@pytest.mark.parametrize("averaging", [0.0, 0.5])
@pytest.mark.parametrize("save", [1, 2, 3])
def test_a_run_killed_after_any_file_continues_to_the_same_record(monkeypatch, save, averaging):
    how = Recipe(epochs=2, batch_size=10, averaging=averaging, augmentation="rotation")
    monkeypatch.setitem(recipe.RECIPES, "changed", how)
    run = replace(TINY, recipe="changed")
    whole = perform(run)
    for path in (*RECORDS.rglob("*.json"), *WORK.rglob("*.pt")):
        path.unlink()
    original, saved = checkpoint.save, []

    def dying(*args: Any, **options: Any) -> None:
        original(*args, **options)
        saved.append(args)
        if len(saved) == save:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(performing, "save", dying)
        with pytest.raises(Killed):
            perform(run)
    assert files() == [f"work/rotdigits/{run.name}.pt"]
    assert timeless(perform(run)) == timeless(whole)


def test_a_run_stopped_within_an_epoch_continues_to_the_same_record(monkeypatch):
    monkeypatch.setitem(recipe.RECIPES, "changed", Recipe(batch_size=5, averaging=0.5))
    run = replace(TINY, recipe="changed")
    whole = perform(run)
    record_path(run, RECORDS).unlink()
    Path(f"work/rotdigits/{run.name}.pt").unlink()
    steps, original = [], torch.optim.Adam.step

    def signalling(self: torch.optim.Adam) -> None:
        original(self)
        steps.append(1)
        if len(steps) == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", signalling)
        with pytest.raises(KeyboardInterrupt):
            perform(run)
    kept = checkpoint.read(f"work/rotdigits/{run.name}.pt")
    assert (kept.resume["epochs_done"], kept.resume["partial_epoch"]["step"]) == (1, 2)
    assert timeless(perform(run)) == timeless(whole)


def test_a_network_of_another_recipe_is_not_continued(monkeypatch):
    perform()
    monkeypatch.setitem(recipe.RECIPES, "published", Recipe(learning_rate=0.5))
    with pytest.raises(InputError, match=r"\.pt is of other data or of another recipe; remove it, or give another"):
        perform()


def test_a_recipe_is_cut_to_the_epochs_and_images():
    assert recipe_of(Run("z2cnn", 0), 12_000) == Recipe()
    assert recipe_of(Run("z2cnn", 0), 120) == Recipe(batch_size=120)
    assert recipe_of(Run("z2cnn", 0, epochs=10), 12_000) == Recipe(epochs=10, decay_epoch=8)
    with pytest.raises(InputError, match="unknown recipe 'none'; accepted: published"):
        recipe_of(Run("z2cnn", 0, recipe="none"), 10)


# --- processes


def test_runs_are_done_once_each_in_a_process(capsys):
    runs = [replace(TINY, epochs=1, seed=seed) for seed in (0, 1, 0)]
    execute(runs, records=RECORDS, work=WORK, device="cpu", jobs=2)
    found = load_records(RECORDS, "rotdigits")
    assert [record["run"] for record in found] == runs[:2]
    assert {record["environment"]["threads"] for record in found} == {1}
    assert {record["test_images"] for record in found} == {600}  # other processes have the data set as it is
    out, err = capsys.readouterr()
    assert out == ""
    said = [line for line in err.splitlines() if "error" in line]
    expected = [f"{r['run'].name}: test error {r['test_error']:.2f} % after 1 epochs" for r in found]
    assert sorted(said) == sorted(expected)


def test_what_is_recorded_is_not_done_again(monkeypatch):
    perform()
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    monkeypatch.setattr(workers, "sigint_blocked", lambda: pytest.fail("it is recorded already"))
    monkeypatch.setattr(data, "load_dataset", lambda name: pytest.fail("there is nothing to do"))
    execute([TINY, TINY], records=RECORDS, work=WORK, device="cpu")
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before


def test_a_run_that_cannot_be_done_is_one_line_and_stops_the_others():
    bad = replace(TINY, images=1)
    slow = Run("z2cnn", 0, "rotdigits", epochs=10_000)
    said = rf"^{bad.name}: all training images have the label \d; give images of two classes or more$"
    with pytest.raises(InputError, match=said) as caught:
        execute([slow, bad], records=RECORDS, work=WORK, device="cpu", jobs=2)
    assert "\n" not in str(caught.value)
    assert multiprocessing.active_children() == []
    assert not RECORDS.exists()


def variables() -> dict[str, str]:
    paths = os.pathsep.join([str(Path(experiments.__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_the_command_is_stopped_with_all_that_it_began_and_goes_on(number):
    """Ctrl-C, which a terminal sends to all processes, or SIGTERM to the command alone."""
    argv = "-m gconv.experiments data-efficiency --data rotdigits --models z2cnn --jobs 1 --records records --work work"
    run = Run("z2cnn", 0, "rotdigits", images=120)
    network = Path(f"work/rotdigits/{run.name}.pt")
    with subprocess.Popen(
        [sys.executable, *argv.split()], env=variables(), stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        while not network.exists() and process.poll() is None:
            time.sleep(0.02)
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("python -m gconv.experiments: interrupted")
    assert files() == [str(network)]
    kept, before = checkpoint.read(network), network.read_bytes()
    time.sleep(1)
    assert network.read_bytes() == before  # nothing goes on
    assert 1 <= kept.resume["epochs_done"] < 50
    assert len(kept.record["history"]) == kept.resume["epochs_done"]


# --- mistakes


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("mnist", "unknown experiment 'mnist'; accepted: rotmnist, data-efficiency"),
        ("rotmnist plot", "unknown action 'plot'; accepted: run, table"),
        ("rotmnist --models p4cnn,p5cnn", "unknown model of rotmnist 'p5cnn'; accepted: "),
        ("data-efficiency --models g-p4cnn", "unknown model of data-efficiency 'g-p4cnn'; accepted: gc-p4cnn, p4cnn,"),
        ("rotmnist --data mnist", "unknown data set 'mnist'; accepted: rotdigits,"),
        ("rotmnist --device tpu", "unknown device 'tpu'; accepted: auto, cpu, cuda"),
        ("rotmnist table --data rotdigits", "there are no records in checkpoints/records/rotdigits"),
        ("rotmnist --seeds 0", "argument --seeds: '0' is not a whole number"),
        ("rotmnist --jobs x", "argument --jobs: 'x' is not a whole number"),
        ("", "the following arguments are required: EXPERIMENT"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_done(capsys, argv, said):
    code, out, err = command(capsys, *argv.split())
    assert (code, out) == (2, "")
    assert err.startswith("python -m gconv.experiments: error: ")
    assert said in err
    assert err.count("\n") == 1
    assert files() == []


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"run": {"model": "p4cnn"}}', '{"run": {"x": 1}}', '{"run": 1}'])
def test_a_file_that_is_no_record_is_named(capsys, content):
    path = RECORDS / "rotdigits" / "bad.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    code, _, err = command(capsys, *["rotmnist", "table", "--data", "rotdigits", "--records", "records"])
    assert code == 2
    assert f"{path} is not a record of python -m gconv.experiments: " in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("argv", [["--help"], ["rotmnist", "--seeds", "0"], ["nothing"]])
def test_help_and_wrong_options_do_not_wait_for_torch(argv):
    code = f"""
import sys
from gconv.experiments.__main__ import main
try:
    main({argv})
finally:
    print(sorted({{"torch", "numpy", "sklearn"}} & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], env=variables(), capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == "[]"


# --- tables


def record(run: Run, error: float, **more: Any) -> dict[str, Any]:
    facts = {
        "run": run,
        "recipe": {"epochs": 50},
        "train_images": run.images or 12_000,
        "steps": 2350,
        "test_error": error,
        "parameters": 24_810,
        "macs_published": 11_670_000,
        "macs_executed": 12_345_678,
        "training_memory_batch_2": 2_030_000,
        "seconds": {"training": 630.0, "testing": 1.0},
        "environment": {"device": "cpu"},
    }
    return facts | more


OTHERS = [
    record(Run("p4cnn", 0, recipe="modern"), 99.0),
    record(Run("p4cnn", 0, images=120), 99.0),
    record(Run("p4cnn", 0, epochs=3), 99.0),
    record(Run("p4cnn", 0, held_out=True), 99.0),
]


def test_the_table_has_mean_deviation_and_seeds_beside_what_was_published():
    errors = [2.1, 2.4, 2.35]
    seconds = [{"training": 60.0 * minutes, "testing": 0.0} for minutes in (10, 11, 90)]
    own = [record(Run("p4cnn", i), error, seconds=s) for i, (error, s) in enumerate(zip(errors, seconds, strict=True))]
    rows = table("rotmnist", [*OTHERS, *own, record(Run("z2cnn", 0), 9.0)])
    assert [row["model"] for row in rows] == list(PUBLISHED)
    found = {row["model"]: row for row in rows}
    assert found["p4cnn"] == {
        "model": "p4cnn",
        "seeds": "3",
        "test error": f"{statistics.mean(errors):.2f} ± {statistics.stdev(errors):.2f} %",
        "published": "2.23 ± 0.06 %",
        "within 3 deviations, or better": "yes",
        "parameters": "24,810",
        "MACs (published)": "11.67 M (11.67 M)",
        "MACs as executed, without the kernel": "11.67 M",
        "with the AVX-512 kernel": "11.67 M",
        "memory, batch 2 (published)": "2.03 MB (2.03 MB)",
        "CPU minutes a run": "11",
    }
    assert (found["z2cnn"]["seeds"], found["z2cnn"]["test error"]) == ("1", "9.00 %")
    assert found["z2cnn"]["within 3 deviations, or better"] == "no"
    for model in set(PUBLISHED) - {"p4cnn", "z2cnn"}:
        empty = {key: value for key, value in found[model].items() if key not in ("model", "published")}
        assert empty == {**dict.fromkeys(empty, ""), "seeds": "0"}


def test_the_table_tells_runs_on_a_gpu_from_those_on_a_cpu():
    seconds = [{"training": 60.0 * minutes, "testing": 0.0} for minutes in (10, 1, 1)]
    own = [record(Run("p4cnn", i), 2.0, seconds=s) for i, s in enumerate(seconds)]
    for one in own[1:]:
        one["environment"] = {**one["environment"], "device": "a card"}
    rows = {row["model"]: row for row in table("rotmnist", [*own, {**own[1], "run": Run("z2cnn", 0)}])}
    assert (rows["p4cnn"]["seeds"], rows["p4cnn"]["CPU minutes a run"]) == ("3 (2 on a GPU)", "10")
    assert (rows["z2cnn"]["seeds"], rows["z2cnn"]["CPU minutes a run"]) == ("1 (1 on a GPU)", "")


@pytest.mark.parametrize(("error", "good"), [(2.41, "yes"), (2.42, "no"), (0.5, "yes")])
def test_within_three_deviations_or_better(error, good):
    rows = {row["model"]: row for row in table("rotmnist", [record(Run("p4cnn", 0), error)])}
    assert rows["p4cnn"]["within 3 deviations, or better"] == good  # 2.23 + 3 * 0.061 = 2.413


def test_the_published_numbers_are_those_of_the_networks():
    for model in ("z2cnn", "p4cnn", "g-p4cnn", "gc-p4cnn", "gc-p4cnn-small"):
        counted = cost(create_model(model), (1, 28, 28))
        assert counted.parameters == PUBLISHED[model].parameters
        assert counted.macs_published / 1e6 == pytest.approx(PUBLISHED[model].macs, rel=0.02)


def test_data_efficiency_has_a_row_for_each_number_of_images():
    few = [(0, 120, 8.0), (1, 120, 9.0), (0, 600, 4.0)]
    records = [record(Run("p4cnn", seed, images=images), error) for seed, images, error in few]
    records += [record(Run("z2cnn", 0, images=600), 7.0), record(Run("z2cnn", 0), 5.0), record(Run("p4cnn", 0), 2.0)]
    records += [record(Run("g-p4cnn", 0), 2.0)]  # of the other experiment
    rows = table("data-efficiency", [*OTHERS[::2], *OTHERS[3:], *records])
    assert [row["images"] for row in rows] == ["120", "600", "12,000"]
    assert [row["z2cnn"] for row in rows] == ["", "7.00 % (1 seed)", "5.00 % (1 seed)"]
    assert [row["p4cnn"] for row in rows] == ["8.50 ± 0.71 % (2 seeds)", "4.00 % (1 seed)", "2.00 % (1 seed)"]
    assert {(row["epochs"], row["steps"]) for row in rows} == {("50", "2,350")}
    assert "g-p4cnn" not in rows[0]
    assert [len(of["p4cnn"]) for of in efficiency(records).values()] == [2, 1, 1]


def test_a_table_of_nothing_is_told():
    with pytest.raises(InputError, match=r"^there are records, but none of data-efficiency$"):
        table("data-efficiency", [record(Run("p4cnn", 0), 2.0)])


def test_spread():
    assert spread([]) == ""
    assert spread([1.234]) == "1.23 %"
    assert spread([1.0, 2.0, 6.0]) == "3.00 ± 2.65 %"


@pytest.mark.parametrize(("counts", "said"), [((1,), "1 seed"), ((3, 3), "3 seeds"), ((1, 3, 2), "1 to 3 seeds")])
def test_seeds_are_counted(counts, said):
    assert seeds(*([{}] * count for count in counts)) == said


def test_no_rows_are_told_in_a_table_too():
    assert as_markdown([]) == "*There are no records of this yet.*"


def test_markdown_and_csv_have_the_same_cells(capsys):
    perform(Run("z2cnn", 0, "rotdigits", images=20))
    perform(Run("z2cnn", 1, "rotdigits", images=20))
    argv = ["data-efficiency", "table", "--data", "rotdigits", "--records", "records"]
    code, markdown, _ = command(capsys, *argv)
    assert code == 0
    lines = [[cell.strip() for cell in line.strip("| \n").split("|")] for line in markdown.splitlines()]
    code, text, _ = command(capsys, *argv, "--csv")
    assert code == 0
    parsed = list(csv.reader(io.StringIO(text)))
    assert [lines[0], *lines[2:]] == parsed
    assert set(lines[1]) == {"---"}
    assert parsed[0] == ["images", "epochs", "steps", "z2cnn"]
    assert parsed[1][:3] == ["20", "50", "50"]
    assert parsed[1][3].endswith(" % (2 seeds)")
    code, text, _ = command(capsys, "rotmnist", *argv[1:], "--csv")
    assert {row["seeds"] for row in csv.DictReader(io.StringIO(text))} == {"0"}


def test_cells_with_commas_and_quotes_survive_csv():
    rows = [{"a,b": '1,000 "x"', "c": "line\nbreak"}]
    assert list(csv.DictReader(io.StringIO(as_csv(rows)))) == rows
    assert as_markdown([{"a": "1", "b": "2"}]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
