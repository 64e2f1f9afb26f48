"""``python -m gconv.train`` as its user meets it: what it writes, how it resumes, and how it says no."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from gconv.models import checkpoint
from gconv.models.zoo import MODELS, Model, create_model
from gconv.nn.separable_conv import SeparableGConv2d
from gconv.train import main
from gconv.training import datasets as data
from gconv.training import run as training
from gconv.training import steps
from gconv.training.datasets import Dataset, Split, load_dataset
from gconv.training.evaluation import Score, evaluate
from gconv.training.loop import fit
from gconv.training.recipe import Recipe

SMALL = ("rotdigits", "--model", "p4cnn", "--width", "2")
TIMELESS = ("seconds", "environment")


class Result(NamedTuple):
    code: int | str | None
    out: str
    err: str


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("rotdigits")


@pytest.fixture(scope="module")
def few(digits) -> Dataset:
    """The embedded data set, cut to 60 + 20 + 30 images."""
    splits = {"train": 60, "validation": 20, "test": 30}
    cut = {name: Split(*(part[:count] for part in getattr(digits, name))) for name, count in splits.items()}
    return replace(digits, **cut)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own_with_few_images(monkeypatch, tmp_path, few):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "load_dataset", lambda name: few if name.lower() == few.name else load_dataset(name))


@pytest.fixture
def train(capsys):
    """The command: what it returns and prints."""

    def run(*argv: str) -> Result:
        try:
            code = main([str(argument) for argument in argv])
        except SystemExit as exit_:
            code = exit_.code
        return Result(code, *capsys.readouterr())

    return run


@contextmanager
def interrupted(module: Any, name: str, call: int, *, after: bool = False) -> Iterator[None]:
    """Ctrl-C is pressed as this function of a module is called for the ``call``th time, or when that call is over."""
    original, calls = getattr(module, name), []

    def interrupt(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == call and not after:
            raise KeyboardInterrupt
        result = original(*args, **kwargs)
        if len(calls) == call:
            raise KeyboardInterrupt
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, interrupt)
        yield


def files() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*") if path.is_file())


def equal(a: Model, b: Model) -> bool:
    states = a.state_dict(), b.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][key], states[1][key]) for key in states[0]
    )


def timeless(item: Any) -> Any:
    """A record without what differs between two runs of the same command."""
    if isinstance(item, dict):
        return {key: timeless(value) for key, value in item.items() if key not in TIMELESS}
    return [timeless(value) for value in item] if isinstance(item, list) else item


def says(result: Result, *parts: str) -> None:
    """It failed by the user's fault, and said so in one line on stderr and nothing on stdout."""
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("python -m gconv.train: error: ")
    assert result.err.count("\n") == 1
    for part in parts:
        assert part in result.err


# --- a run


def test_a_run_on_the_embedded_digits(monkeypatch, train, digits):
    monkeypatch.setattr(training, "load_dataset", load_dataset)
    code, out, err = train(*SMALL, "--epochs", "1", "--out", "net.pt")
    assert code == 0
    assert files() == ["net.pt"]
    saved = checkpoint.read("net.pt")
    record = saved.record
    assert saved.resume is None
    assert saved.model.spec == create_model("p4cnn", width=2).spec
    assert record["test_error"] == evaluate(saved.model, digits.test).error
    assert record["history"][-1]["validation_error"] == evaluate(saved.model, digits.validation).error
    assert (record["dataset"], record["dataset_sha256"]) == ("rotdigits", digits.sha256)
    assert (record["train_images"], record["test_images"]) == (len(digits.train.labels), len(digits.test.labels))
    assert (record["seed"], record["trained_on"], record["snapshots"]) == (0, "train", [])
    assert record["dataset_description"] == digits.description
    assert record["environment"]["torch"] == torch.__version__
    assert out == f"p4cnn: test error {record['test_error']:.2f} % on 600 images of rotdigits; saved to net.pt\n"
    assert err.startswith("p4cnn on rotdigits: epoch 1/1, train loss ")


def test_the_defaults_are_the_published_recipe_and_the_library_does_the_same(train, few):
    assert train(*SMALL).code == 0
    saved = checkpoint.read("p4cnn-rotdigits-seed0.pt")
    recipe = replace(Recipe(), batch_size=60)  # all there are
    assert saved.record["recipe"] == recipe.to_dict()
    assert [row["epoch"] for row in saved.record["history"]] == list(range(1, 51))
    torch.manual_seed(0)
    model = create_model("p4cnn", width=2)
    history = fit(model, few.train, recipe, seed=0, validation=few.validation)
    assert equal(saved.model, model)
    assert timeless(saved.record["history"]) == timeless(history)


def test_the_options_reach_the_run(train, few):
    options = (
        "--seed 5 --batch-size 16 --lr 0.002 --weight-decay 0.1 --epochs 5 --group pmm --separable gc_in --out n.pt"
    )
    assert train(*SMALL, *options.split()).code == 0
    saved = checkpoint.read("n.pt")
    recipe = Recipe(epochs=5, batch_size=16, learning_rate=0.002, weight_decay=0.1, decay_epoch=4)
    assert (saved.record["seed"], saved.record["recipe"]) == (5, recipe.to_dict())
    torch.manual_seed(5)
    model = create_model("p4cnn", group="pmm", width=2, separable="gc_in")
    fit(model, few.train, recipe, seed=5)
    assert saved.model.spec == model.spec
    assert equal(saved.model, model)


def test_the_test_set_is_read_once_at_the_end(monkeypatch, train):
    scored = []

    def noted(model: Model, split: Split, **options: Any) -> Score:
        scored.append(len(split.labels))
        return evaluate(model, split, **options)

    for module in (steps, training):  # of the run after every epoch, and of the command at the end
        monkeypatch.setattr(module, "evaluate", noted)
    assert train(*SMALL, "--epochs", "3").code == 0
    assert scored == [20, 20, 20, 30]


def test_all_data_trains_on_the_validation_images_too(train, few):
    assert train(*SMALL, "--epochs", "2", "--all-data").code == 0
    saved = checkpoint.read("p4cnn-rotdigits-seed0.pt")
    assert (saved.record["train_images"], saved.record["trained_on"]) == (80, "train and validation")
    assert not any("validation_error" in row for row in saved.record["history"])
    torch.manual_seed(0)
    model = create_model("p4cnn", width=2)
    fit(model, few.train_and_validation, Recipe(epochs=2, batch_size=80, decay_epoch=2), seed=0)
    assert equal(saved.model, model)


def test_no_epochs_keep_the_initial_network(train):
    assert train(*SMALL, "--epochs", "0", "--seed", "3").code == 0
    torch.manual_seed(3)
    initial = create_model("p4cnn", width=2)
    assert equal(checkpoint.load("p4cnn-rotdigits-seed3.pt"), initial)


def test_snapshots_are_the_network_after_these_epochs(train):
    assert train(*SMALL, "--epochs", "3", "--snapshots", "2,0,3", "--out", "net.pt").code == 0
    assert files() == ["net.pt", "net/epoch-000.pt", "net/epoch-002.pt", "net/epoch-003.pt"]
    torch.manual_seed(0)
    initial, final = create_model("p4cnn", width=2), checkpoint.read("net.pt")
    assert final.record["snapshots"] == [0, 2, 3]

    def kept(epoch: int) -> dict[str, Tensor]:
        snapshot = checkpoint.read(f"net/epoch-{epoch:03d}.pt")
        assert (snapshot.record["epoch"], snapshot.record["history"]) == (epoch, final.record["history"][:epoch])
        return snapshot.model.state_dict()

    half = {"rtol": 2**-11, "atol": 1e-7}  # they are stored in half precision
    torch.testing.assert_close(kept(0), initial.state_dict(), **half)
    torch.testing.assert_close(kept(3), final.model.state_dict(), **half)
    assert not torch.equal(kept(2)["conv1.weight"], kept(3)["conv1.weight"])


def test_json_is_one_document_on_stdout(train):
    code, out, err = train(*SMALL, "--epochs", "2", "--json", "--out", "net.pt")
    assert code == 0
    assert json.loads(out) == {"file": "net.pt", **checkpoint.read("net.pt").record}
    assert err.count("\n") == 2


# --- interruption


@pytest.mark.parametrize("epoch", [1, 3, 4])
def test_a_run_stopped_after_an_epoch_resumes_to_the_bit(train, epoch):
    """Four epochs, the rate falling after three; after the fourth only the test is left."""
    assert train(*SMALL, "--epochs", "4", "--out", "whole.pt").code == 0
    with interrupted(training, "save", epoch, after=True):
        code, out, err = train(*SMALL, "--epochs", "4", "--out", "net.pt")
    assert (code, out) == (130, "")
    assert err.splitlines()[-1].startswith("python -m gconv.train: interrupted")
    stopped = checkpoint.read("net.pt")
    assert [row["epoch"] for row in stopped.record["history"]] == list(range(1, epoch + 1))
    assert "test_error" not in stopped.record

    torch.manual_seed(99)
    assert train("ROTDIGITS", "--resume", "net.pt").code == 0
    resumed, whole = checkpoint.read("net.pt"), checkpoint.read("whole.pt")
    assert equal(resumed.model, whole.model)
    assert timeless(resumed.record) == timeless(whole.record)
    assert resumed.resume is None


def test_a_run_stopped_within_an_epoch_keeps_the_last_one(train):
    assert train(*SMALL, "--epochs", "1", "--lr", "0.01", "--out", "one.pt").code == 0
    with interrupted(steps, "evaluate", 2):
        assert train(*SMALL, "--epochs", "9", "--out", "net.pt").code == 130
    assert files() == ["net.pt", "one.pt"]
    assert equal(checkpoint.load("net.pt"), checkpoint.load("one.pt"))


def test_a_run_stopped_before_its_first_epoch_leaves_nothing(train):
    with interrupted(steps, "evaluate", 1):
        assert train(*SMALL).code == 130
    assert files() == []


@pytest.fixture
def unfinished(train) -> str:
    """A run of three epochs with all images and snapshots, stopped after the first."""
    with interrupted(training, "save", 2, after=True):
        train(*SMALL, "--epochs", "3", "--seed", "7", "--all-data", "--snapshots", "1,3", "--out", "net.pt")
    return "net.pt"


def test_an_unfinished_run_continues_as_it_began(train, unfinished):
    whole = ("--epochs", "3", "--seed", "7", "--all-data", "--snapshots", "1,3", "--out", "whole.pt")
    assert train(*SMALL, *whole).code == 0
    assert train("rotdigits", "--resume", unfinished, "--out", "new.pt").code == 0
    assert equal(checkpoint.load("new.pt"), checkpoint.load("whole.pt"))
    assert timeless(checkpoint.read("new.pt").record) == timeless(checkpoint.read("whole.pt").record)
    assert {"net/epoch-001.pt", "new/epoch-003.pt"} < set(files())
    assert checkpoint.read(unfinished).resume is not None


def test_an_unfinished_run_takes_no_other_recipe(train, unfinished):
    before = Path(unfinished).read_bytes()
    architecture = ("--model p4cnn", "--group p4", "--separable g", "--width 2")
    recipe = (
        "--epochs 3",
        "--seed 0",
        "--batch-size 256",
        "--lr 0",
        "--weight-decay 1e-5",
        "--all-data",
        "--snapshots 1",
    )
    for option in (*architecture, *recipe):
        flag = option.split()[0]
        refusal = f"{unfinished} is an unfinished run and continues as it began; leave out {flag}\n"
        says(train("rotdigits", "--resume", unfinished, *option.split()), refusal)
    says(train("rotdigits", "--resume", unfinished, "--lr", "0", "--width", "2"), "leave out --width, --lr\n")
    assert Path(unfinished).read_bytes() == before


def test_an_unfinished_run_takes_no_other_data(monkeypatch, train, unfinished, few):
    says(train("rotmnist", "--resume", unfinished), "was being trained on 'rotdigits', not 'rotmnist'")
    monkeypatch.setattr(training, "load_dataset", lambda name: replace(few, sha256="0" * 64))
    says(train("rotdigits", "--resume", unfinished), unfinished, "sha256 differs")


def test_an_unfinished_run_replaces_another_file_only_with_force(train, unfinished):
    Path("mine.pt").write_text("mine")
    says(train("rotdigits", "--resume", unfinished, "--out", "mine.pt"), "mine.pt exists", "--force")
    assert Path("mine.pt").read_text() == "mine"
    assert train("rotdigits", "--resume", unfinished, "--out", "mine.pt", "--force").code == 0
    assert checkpoint.read("mine.pt").resume is None


# --- training further


def test_a_converted_network_is_retrained_as_it_is(train, few):
    assert train(*SMALL, "--epochs", "1", "--out", "full.pt").code == 0
    full = checkpoint.read("full.pt")
    full.model.conv2 = SeparableGConv2d.from_dense(full.model.conv2, "g", 2)
    full.model.conv5 = SeparableGConv2d.from_dense(full.model.conv5, "gc_in", 3, "dense")
    checkpoint.save(full.model, "converted.pt", record={**full.record, "conversion": "by hand"})
    assert train("rotdigits", "--resume", "converted.pt", "--epochs", "2", "--lr", "0.003", "--seed", "4").code == 0

    again = checkpoint.read("converted-retrained-rotdigits-seed4.pt")
    model = checkpoint.load("converted.pt")
    recipe = Recipe(epochs=2, batch_size=60, learning_rate=0.003, decay_epoch=2)
    fit(model, few.train, recipe, seed=4)
    assert repr(again.model) == repr(model)
    assert equal(again.model, model)
    assert (again.record["recipe"], again.record["seed"]) == (recipe.to_dict(), 4)
    assert [row["epoch"] for row in again.record["history"]] == [1, 2]
    assert again.record["started_from"]["conversion"] == "by hand"
    assert again.record["started_from"]["history"] == full.record["history"]


@pytest.mark.parametrize("option", ["--model p4cnn", "--group p4", "--separable g", "--width 2"])
def test_a_finished_network_takes_no_other_architecture(train, option):
    checkpoint.save(create_model("p4cnn", width=2), "net.pt")
    says(train("rotdigits", "--resume", "net.pt", *option.split()), "network comes from net.pt", option.split()[0])
    assert files() == ["net.pt"]


# --- mistakes


@pytest.mark.parametrize(
    ("command", "parts"),
    [
        ("--model p4cnn", ["the following arguments are required: DATASET"]),
        ("rotdigits", ["--model is missing; accepted: z2cnn,", "--resume"]),
        ("mnist --model p4cnn", ["unknown data set 'mnist'; accepted: rotdigits, rotmnist-regen, rotmnist"]),
        ("rotdigits --model p5cnn", ["unknown model 'p5cnn'; accepted: z2cnn,", "gc-p4m-resnet44"]),
        ("rotdigits --model p4cnn --group p6", ["unknown group 'p6'; accepted: z2, p2, p4, pm, pmm, p4m"]),
        ("rotdigits --model p4cnn --separable cg", ["'cg'; accepted: g, gc, gc_in, g_turned, gc_turned"]),
        ("rotdigits --model z2cnn --separable g", ["'g'; accepted: c"]),
        ("rotdigits --model p4cnn --width 0", ["--width: '0' is not a whole number of at least 1"]),
        ("rotdigits --model p4cnn --width 2.5", ["--width: '2.5'"]),
        ("rotdigits --model p4cnn --epochs -1", ["--epochs: '-1' is not a whole number of at least 0"]),
        ("rotdigits --model p4cnn --epochs ten", ["--epochs: 'ten'"]),
        ("rotdigits --model p4cnn --seed -1", ["--seed: '-1' is not a whole number of at least 0"]),
        ("rotdigits --model p4cnn --seed 99999999999999999999", ["--seed: '99999999999999999999'"]),
        ("rotdigits --model p4cnn --batch-size 0", ["--batch-size: '0'"]),
        ("rotdigits --model p4cnn --lr -0.1", ["--lr: '-0.1' is not a number from 0 to 1000"]),
        ("rotdigits --model p4cnn --lr nan", ["--lr: 'nan'"]),
        ("rotdigits --model p4cnn --lr inf", ["--lr: 'inf'"]),
        ("rotdigits --model p4cnn --weight-decay -1", ["--weight-decay: '-1'"]),
        ("rotdigits --model p4cnn --epochs 3 --snapshots 4", ["--snapshots is '4'; give epochs from 0 to 3"]),
        ("rotdigits --model p4cnn --snapshots 1,x", ["--snapshots is '1,x'"]),
        ("rotdigits --model p4cnn --snapshots 1, --epochs 1", ["--snapshots is '1,'"]),
        ("rotdigits --model p4cnn --snapshots 1 --out net", ["--snapshots", "net has no suffix"]),
        ("rotdigits --model p4cnn --device tpu", ["unknown device 'tpu'; accepted: auto, cpu, cuda"]),
        ("rotdigits --model p4cnn --learning-rate 1", ["unrecognized arguments: --learning-rate 1"]),
        ("rotdigits --model p4cnn --ep 1", ["unrecognized arguments: --ep 1"]),
        ("rotdigits --resume none.pt", ["none.pt does not exist"]),
        ("rotdigits --resume .", [". is a directory"]),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_file(train, command, parts):
    says(train(*command.split()), *parts)
    assert files() == []


def test_a_damaged_checkpoint_is_one_line(train):
    checkpoint.save(create_model("p4cnn", width=2), "net.pt")
    Path("net.pt").write_bytes(Path("net.pt").read_bytes()[:-100])
    says(train("rotdigits", "--resume", "net.pt"), "net.pt", "damaged")


def test_a_network_for_other_images_is_refused(train):
    checkpoint.save(create_model("p4cnn", width=2, classes=3), "three.pt")
    says(train("rotdigits", "--resume", "three.pt"), "3 classes; rotdigits has 1 and 10")


@pytest.mark.parametrize("out", [[], ["--out", "net.pt"]])
def test_a_file_that_exists_is_replaced_only_with_force(train, out):
    name = out[1] if out else "p4cnn-rotdigits-seed0.pt"
    Path(name).write_text("mine")
    says(train(*SMALL, *out), f"{name} exists", "--force")
    assert Path(name).read_text() == "mine"
    assert train(*SMALL, *out, "--epochs", "1", "--force").code == 0
    assert checkpoint.load(name).spec.widths == (2,)


def test_snapshots_that_exist_are_replaced_only_with_force(train):
    run = (*SMALL, "--epochs", "1", "--snapshots", "1", "--out", "net.pt")
    Path("net").mkdir()
    Path("net/epoch-001.pt").write_text("mine")
    says(train(*run), "net exists", "--force")
    assert Path("net/epoch-001.pt").read_text() == "mine"
    assert train(*run, "--force").code == 0
    assert checkpoint.read("net/epoch-001.pt").record["epoch"] == 1


def test_what_cannot_be_written_is_told_before_training(monkeypatch, train):
    monkeypatch.setattr(training, "load_dataset", lambda name: pytest.fail("too late"))
    Path("file").write_text("x")
    Path("folder").mkdir()
    says(train(*SMALL, "--out", "file/net.pt"), "cannot write file/net.pt", "file is not a directory")
    says(train(*SMALL, "--out", "folder"), "folder exists")
    says(train(*SMALL, "--out", "folder", "--force"), "cannot write folder", "is a directory")
    says(train(*SMALL, "--out", "x" * 300), "File name too long")
    assert files() == ["file"]


# --- as a process


def python(*argv: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(Path(data.__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "COLUMNS": "100"}
    return subprocess.run([sys.executable, *argv], env=environment, capture_output=True, text=True, check=False)


def test_help_shows_examples():
    shown = python("-m", "gconv.train", "--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "examples:\n  python -m gconv.train rotdigits --model p4cnn --epochs 10\n" in shown.stdout
    assert "--resume converted.pt" in shown.stdout


@pytest.mark.parametrize("argv", [["--help"], ["rotdigits", "--width", "0"]])
def test_help_and_wrong_options_do_not_wait_for_torch(argv):
    code = f"""
import sys
from gconv.train import main
try:
    main({argv})
finally:
    print(sorted({{"torch", "numpy", "sklearn"}} & set(sys.modules)), file=sys.stderr)
"""
    assert python("-c", code).stderr.splitlines()[-1] == "[]"


def test_the_exit_code_reaches_the_shell():
    failed = python("-m", "gconv.train", "rotdigits", "--model", "p5cnn")
    assert failed.returncode == 2
    assert (failed.stdout, failed.stderr.count("\n")) == ("", 1)


def test_the_help_names_every_model(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert f"one of {', '.join(MODELS)}" in shown


def test_a_resnet_takes_the_channels_of_the_data(train):
    assert train("rotdigits", "--model", "p4m-resnet44", "--width", "1", "--epochs", "0", "--out", "net.pt").code == 0
    assert checkpoint.load("net.pt").spec.in_channels == 1


def test_an_interrupted_run_is_told_how_it_continues(monkeypatch, train):
    def interrupt(*_, after_epoch, **__):
        after_epoch({"epoch": 1}, {"epochs_done": 1})
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "fit", interrupt)
    result = train(*SMALL, "--out", "net.pt")
    assert result.code == 130
    assert "to continue: python -m gconv.train rotdigits --resume net.pt" in result.err


@pytest.mark.parametrize(
    ("where", "value"), [("resume", {"foo": 1}), ("resume", "x"), ("recipe", {"zzz": 1}), ("recipe", None)]
)
def test_an_unfinished_run_that_cannot_be_continued_is_one_line(train, where, value):
    resume = {"optimizer": {}, "epochs_done": 1}
    recipe = Recipe(epochs=2).to_dict()
    record = {"dataset": "rotdigits", "dataset_sha256": "", "trained_on": "train"}
    record |= {"seed": 0, "history": [], "snapshots": []}
    record["recipe"] = value if where == "recipe" else recipe
    model = create_model("p4cnn", width=1)
    checkpoint.save(model, "half-way.pt", record=record, resume=value if where == "resume" else resume)
    says(train("rotdigits", "--resume", "half-way.pt"), "half-way.pt is inconsistent")


def test_a_width_beyond_all_memory_is_one_line(train):
    says(train("rotdigits", "--model", "p4cnn", "--width", "10000000"), "no memory for p4cnn with --width 10000000")


# --- data that cannot be used


def change(few: Dataset, split: str, **parts: Tensor) -> Dataset:
    return replace(few, **{split: getattr(few, split)._replace(**parts)})


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda few: change(few, "train", labels=few.train.labels + 1), "labels go from 1 to 10; give labels from 0"),
        (lambda few: change(few, "validation", labels=few.validation.labels - 5), "give labels from 0 to 9"),
        (lambda few: change(few, "train", labels=few.train.labels * 0), "all training images have the label 0"),
        (lambda few: change(few, "train", images=few.train.images[..., 1:]), "cannot take images [1, 28, 27]"),
        (lambda few: change(few, "train", images=few.train.images / 0), "has NaN or infinite pixels"),
        (lambda few: change(few, "train", labels=few.train.labels[:-1]), "60 images and labels [59]"),
        (lambda few: replace(few, validation=Split(*(part[:0] for part in few.train))), "the data set has no images"),
    ],
    ids=["label", "validation label", "one class", "size", "NaN", "number", "empty"],
)
def test_bad_data_is_one_line_and_leaves_no_file(monkeypatch, train, few, edit, said):
    monkeypatch.setattr(training, "load_dataset", lambda name: edit(few))
    says(train(*SMALL, "--epochs", "1"), said)
    assert files() == []


def test_a_batch_larger_than_the_set_is_refused(train):
    says(train(*SMALL, "--batch-size", "61"), "a batch of 61 is larger than the training set of 60 images")
    assert files() == []


@pytest.mark.parametrize(
    ("name", "file"),
    [("rotmnist-regen", "train-images-idx3-ubyte.gz"), ("rotmnist", "mnist_rotation_new.zip")],
)
@pytest.mark.parametrize(
    "content", [b"", b"\x1f\x8b\x08damaged", b"PK\x03\x04" + bytes(100)], ids=["empty", "gz", "zip"]
)
def test_a_damaged_archive_is_one_line_that_names_it(monkeypatch, tmp_path, train, name, file, content):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{listener.getsockname()[1]}/"
    monkeypatch.setattr(data, "MNIST_URL", closed)
    monkeypatch.setattr(data, "ROTMNIST_URL", f"{closed}mnist_rotation_new.zip")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("GCONV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("GCONV_DATA", str(tmp_path))
    (tmp_path / file).write_bytes(content)
    result = train(name, "--model", "p4cnn")
    says(result, f"{tmp_path / file} is damaged or another file", "its md5 is not the published one", "cannot download")
    assert files() == [file]


def test_a_truncated_text_file_of_the_official_archive_is_named(monkeypatch, tmp_path, train):
    path = tmp_path / "mnist_all_rotation_normalized_float_train_valid.amat"
    path.write_text("0.5 " * 784 + "3\n" + "0.5 " * 300)
    monkeypatch.setenv("GCONV_DATA", str(tmp_path))
    says(train("rotmnist", "--model", "p4cnn"), str(path), "cannot be read as rotated MNIST")


# --- logs


def lines(path: str) -> list[dict[str, Any]]:
    text = Path(path).read_text()
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def test_the_history_is_one_object_an_epoch_and_line(monkeypatch, train):
    seen = []

    def noting(*args: Any, **options: Any) -> None:
        save(*args, **options)
        seen.append(len(lines("log/history")) if Path("log/history").exists() else 0)

    save = checkpoint.save
    monkeypatch.setattr(training, "save", noting)
    assert train(*SMALL, "--epochs", "3", "--history", "log/history", "--out", "net.pt").code == 0
    assert seen == [0, 1, 2, 3]
    assert lines("log/history") == checkpoint.read("net.pt").record["history"]
    assert [row["epoch"] for row in lines("log/history")] == [1, 2, 3]
    assert files() == ["log/history", "net.pt"]


@pytest.mark.parametrize("epoch", [1, 3])
def test_the_history_is_whole_after_a_resumption_too(train, epoch):
    """Also when only the test was left, and when the file is new or longer than what the checkpoint knows of."""
    with interrupted(training, "save", epoch, after=True):
        assert train(*SMALL, "--epochs", "3", "--history", "history", "--out", "net.pt").code == 130
    Path("history").write_text('{"epoch": 1}\n' * 5)
    with interrupted(training if epoch == 3 else steps, "evaluate", 1):
        assert train("rotdigits", "--resume", "net.pt", "--history", "history").code == 130
    assert lines("history") == checkpoint.read("net.pt").record["history"]
    assert len(lines("history")) == epoch
    assert train("rotdigits", "--resume", "net.pt", "--history", "new").code == 0
    assert lines("new") == checkpoint.read("net.pt").record["history"]
    assert len(lines("new")) == 3


def test_a_history_is_replaced_only_with_force(train):
    Path("history").write_text("mine")
    says(train(*SMALL, "--history", "history"), "history exists", "--force")
    assert Path("history").read_text() == "mine"
    assert train(*SMALL, "--epochs", "1", "--history", "history", "--force").code == 0
    assert len(lines("history")) == 1


def test_a_history_that_cannot_be_written_is_told_before_training(monkeypatch, train, unfinished):
    monkeypatch.setattr(training, "fit", lambda *_, **__: pytest.fail("too late"))
    for run in (SMALL, ("rotdigits", "--resume", unfinished)):
        says(
            train(*run, "--history", f"{unfinished}/history"),
            "cannot write net.pt/history",
            "net.pt is not a directory",
        )


@pytest.fixture
def no_tensorboard(monkeypatch):
    for name in ("tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.usefixtures("no_tensorboard")
def test_without_tensorboard_that_is_one_line_before_anything_is_read(monkeypatch, train, unfinished):
    monkeypatch.setattr(training, "load_dataset", lambda name: pytest.fail("too late"))
    before = files()
    for run in (SMALL, ("rotdigits", "--resume", unfinished)):
        says(train(*run, "--tensorboard", "runs", "--out", "other.pt"), "--tensorboard needs a package: pip install")
    assert files() == before


def test_tensorboard_gets_every_number_of_every_epoch(monkeypatch, train):
    told: list[tuple[Any, ...]] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            told.append((folder, purge_step))

        def add_scalar(self, name: str, value: float, epoch: int) -> None:
            told.append((name, value, epoch))

        def flush(self) -> None:
            pass

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    with interrupted(training, "save", 2, after=True):
        train(*SMALL, "--epochs", "3", "--tensorboard", "runs", "--out", "net.pt")
    assert train("rotdigits", "--resume", "net.pt", "--tensorboard", "runs").code == 0
    history = checkpoint.read("net.pt").record["history"]
    expected = [("runs", 1), *((name, history[0][name], 1) for name in history[0] if name != "epoch")]
    # The second epoch was saved, but the run was stopped before it was logged.
    expected += [("runs", 3), *((name, history[2][name], 3) for name in history[2] if name != "epoch")]
    assert told == expected


# --- other passes


def test_half_precision_is_recorded_and_goes_on(train, few):
    run = (*SMALL, "--epochs", "3", "--precision", "bfloat16")
    assert train(*run, "--out", "whole.pt").code == 0
    with interrupted(training, "save", 1, after=True):
        assert train(*run, "--out", "net.pt").code == 130
    assert checkpoint.read("net.pt").record["precision"] == "bfloat16"
    says(train("rotdigits", "--resume", "net.pt", "--precision", "float32"), "leave out --precision")
    assert train("rotdigits", "--resume", "net.pt").code == 0
    whole, resumed = checkpoint.read("whole.pt"), checkpoint.read("net.pt")
    assert equal(whole.model, resumed.model)
    assert timeless(whole.record) == timeless(resumed.record)
    torch.manual_seed(0)
    model = create_model("p4cnn", width=2)
    recipe = Recipe(epochs=3, batch_size=60, decay_epoch=2)
    fit(model, few.train, recipe, seed=0, precision="bfloat16")
    assert equal(resumed.model, model)
    assert {value.dtype for value in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("command", ["--precision float16", "--recipe none"])
def test_an_unknown_precision_or_recipe_is_told_before_anything_is_read(monkeypatch, train, command):
    monkeypatch.setattr(training, "load_dataset", lambda name: pytest.fail("too late"))
    option, value = command.split()
    says(train(*SMALL, option, value), f"unknown {option.strip('-')} {value!r}; accepted: ")


def test_compile_without_a_compiler_is_one_line(tmp_path):
    paths = {**os.environ, "PYTHONPATH": str(Path(data.__file__).parents[2]), "PATH": "", "CXX": "/none"}
    environment = {**paths, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    argv = [sys.executable, "-m", "gconv.train", *SMALL, "--compile", "--out", "net.pt"]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    says(Result(done.returncode, done.stdout, done.stderr), "torch.compile does not work here", "compiler")
    assert not Path("net.pt").exists()
