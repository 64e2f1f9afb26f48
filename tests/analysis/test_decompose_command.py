"""``python -m analysis.decompose``: the whole road, and one line for everything that can be wrong on it."""

import contextlib
import copy
import dataclasses
import io
import json
import os
import pickle
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.figure import Figure

import gconv.train
import gconv.training.datasets
from analysis import ConversionReport, convert, decompose
from analysis.conversion import convert as conversion
from analysis.conversion import planner as planning
from analysis.latency import isolated as fresh
from analysis.latency import timing as execution
from analysis.plots import spectra as spectra_plot
from gconv import SeparableGConv2d, Split, cost, create_model, evaluate, load, read, save
from gconv.models.checkpoint import layer_choices

PROG = decompose.PROG
SHIPPED = Path(__file__).parents[2] / "checkpoints" / "p4cnn-rotdigits.pt"
RESULTS = ["converted.pt", "report.json", "spectra.png"]
REQUEST = {
    "form": "auto", "budget": "energy", "value": 0.95, "fraction": False,
    "allocation": "auto", "minimise": "weights", "execution": "auto",
}  # fmt: skip


class Run(NamedTuple):
    """What a command left behind on the screen."""

    code: int
    out: str
    err: str


def run(*argv, main=decompose.main):
    """The command in this process; the streams are not terminals."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            code = main([str(arg) for arg in argv])
        except SystemExit as stop:  # argparse
            code = stop.code
    return Run(code, out.getvalue(), err.getvalue())


def small(path="small.pt", name="p4cnn", record=None, **kwargs):
    """The path of a checkpoint of a small network that has seen some images."""
    torch.manual_seed(2)
    model = create_model(name, width=2, **kwargs)
    with torch.no_grad():
        model.train()(torch.rand(8, *model.input_shape))
    save(model, path, record=record)
    return Path(path)


def everything(folder):
    """All files below a folder with their contents; hidden ones too."""
    paths = (Path(where, name) for where, _, names in os.walk(folder) for name in names)
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def stop_the_clock(patch):
    """Everything takes a millisecond, and no new process is needed to say so."""
    patch.setattr(execution, "medians", lambda runs, **_: ([1.0] * len(runs), 1))
    patch.setattr(
        fresh, "in_new_process", lambda before, after, images, known: execution.latency(before, after, images)
    )


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """In an empty folder, without the time that measuring takes."""
    monkeypatch.chdir(tmp_path)
    stop_the_clock(monkeypatch)


@pytest.fixture(scope="module")
def digits():
    return gconv.training.datasets.load_dataset("rotdigits")


@pytest.fixture
def few(digits, monkeypatch):
    """``--data rotdigits`` with fewer images; those for training make two steps."""

    def first(split, count):
        return Split(split.images[:count], split.labels[:count])

    sizes = {"train": 300, "validation": 60, "test": 60}
    data = dataclasses.replace(digits, **{name: first(getattr(digits, name), count) for name, count in sizes.items()})
    # First the module that has its own name for it: imported later, it would keep the replacement.
    monkeypatch.setattr("gconv.training.run.load_dataset", {"rotdigits": data}.__getitem__)
    monkeypatch.setattr(gconv.training.datasets, "load_dataset", {"rotdigits": data}.__getitem__)
    return data


# --- the shipped network, once


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("shipped") / "new" / "folders"


@pytest.fixture(scope="module")
def shipped(out):
    with pytest.MonkeyPatch.context() as patch:
        stop_the_clock(patch)
        return run(SHIPPED, "--form", "gc_in", "--rank", 2, "--data", "rotdigits", "--out", out, "--json")


@pytest.fixture(scope="module")
def document(shipped, out):
    return json.loads((out / "report.json").read_text())


def test_the_shipped_network_is_converted(shipped, out):
    assert shipped.code == 0
    assert sorted(everything(out)) == RESULTS
    assert {(choice["form"], choice["rank"]) for choice in layer_choices(load(out / "converted.pt")).values()} == {
        ("gc_in", 2)
    }


def test_stdout_is_the_report_and_nothing_else(shipped, document):
    assert json.loads(shipped.out) == document
    assert document["checkpoint"] == str(SHIPPED)
    asked = {**REQUEST, "form": "gc_in", "budget": "rank", "value": 2, "minimise": "outputs"}
    assert document["request"] == asked
    assert document["refinement_steps"] == 18  # one pass over 1,197 images


def test_the_table_is_on_stderr(shipped):
    for i in range(2, 8):
        assert re.search(rf"^ *conv{i} +p4 +10x10x4x.*gc_in rank 2", shipped.err, re.MULTILINE)
    for text in ("parameters 24.81k → ", "equivariance error", "test error on 600 images of rotdigits", "converted"):
        assert text in shipped.err


def test_the_saved_network_has_the_accuracy_that_is_reported(document, out, digits):
    accuracy = document["accuracy"]
    assert accuracy["before"] == read(SHIPPED).record["test_error"]
    assert accuracy["batch_norm"] == evaluate(load(out / "converted.pt"), digits.test).error
    assert accuracy["test_images"] == 600
    assert document["data"] == {"name": "rotdigits", "description": digits.description, "sha256": digits.sha256}


def test_the_saved_network_has_the_cost_that_is_reported(document, out):
    total = gconv.cost(load(out / "converted.pt"), (1, 28, 28))
    for key in ("parameters", "macs_published", "macs_executed"):
        assert document[key][1] == getattr(total, key)


def test_the_record_tells_where_the_network_comes_from(document, out):
    record = read(out / "converted.pt").record
    assert record["converted_from"] == read(SHIPPED).record
    assert record["conversion"] == {
        key: document[key] for key in ("data", "seed", "request", "accuracy", "environment")
    }


def test_the_figure_is_a_picture_of_the_spectra(shipped, out):
    pixels = plt.imread(out / "spectra.png")
    assert pixels.shape[0] > 400
    assert pixels.shape[1] > 1200
    assert pixels.std() > 0.05


# --- other roads


def test_without_data_it_says_what_it_could_not_measure():
    done = run(small())
    assert (done.code, done.err) == (0, "")
    assert re.search(r"conv7 +p4 +2x2x4x4x4", done.out)
    for text in ("nothing was converted", "accuracy was not measured", "batch norm was not", "forward pass"):
        assert text in done.out
    assert f"written: {', '.join(f'small-converted/{name}' for name in RESULTS)}\n" in done.out
    written = json.loads(Path("small-converted/report.json").read_text())
    assert (written["data"], written["accuracy"], len(written["notes"])) == (None, {}, 3)
    assert written["request"] == REQUEST


def test_energy_and_form_reach_the_conversion():
    done = run(small(), "--form", "GC", "--energy", "0.7", "--json")
    for row in json.loads(done.out)["layers"]:
        kept = row["explained_energy"]["gc"]
        assert kept[row["rank"] - 1] >= 0.7 > ([0, *kept])[row["rank"] - 1]


def test_fine_tuning_is_reported_as_saved(few):
    done = run(small(), "--form", "g", "--rank", 1, "--data", "rotdigits", "--finetune", 2, "--json")
    accuracy = json.loads(done.out)["accuracy"]
    assert done.code == 0
    assert {"before", "converted", "batch_norm", "finetuned"} < set(accuracy)
    assert accuracy["finetuned"] == evaluate(load("small-converted/converted.pt"), few.test).error
    assert "fine-tuned for 2 epochs" in done.err


def test_the_same_command_writes_the_same_network(few):
    command = [small(), "--form", "gc", "--rank", 1, "--data", "rotdigits", "--finetune", 1]
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run(*command, "--seed", seed, "--out", name).code == 0
    assert Path("a/converted.pt").read_bytes() == Path("b/converted.pt").read_bytes()
    assert not torch.equal(load("a/converted.pt").fc.weight, load("c/converted.pt").fc.weight)


@pytest.mark.parametrize("record", [{"trained_on": "train and validation"}, {"trained_on": "train"}, {}], ids=str)
def test_batch_norm_sees_what_the_network_was_trained_on(few, record):
    path = small(record=record)
    assert run(path, "--form", "gc", "--rank", 1, "--data", "rotdigits").code == 0
    images = few.train_and_validation if "validation" in record.get("trained_on", "") else few.train
    expected = convert(load(path), "gc", rank=1, data=images)[0].state_dict()
    written = load("small-converted/converted.pt").state_dict()
    assert all(torch.equal(tensor, written[name]) for name, tensor in expected.items())


def test_a_converted_network_is_converted_again():
    path = small(record={"seed": 7})
    assert run(path, "--form", "gc", "--rank", 3, "--out", "first").code == 0
    assert run("first/converted.pt", "--form", "gc", "--rank", 1, "--out", "second").code == 0
    again = read("second/converted.pt")
    assert {choice["rank"] for choice in layer_choices(again.model).values()} == {1}
    assert again.record["converted_from"]["converted_from"] == {"seed": 7}
    once = convert(load(path), "gc", rank=1)[0].state_dict()["conv4.mix"].abs()
    torch.testing.assert_close(again.model.state_dict()["conv4.mix"].abs(), once, rtol=1e-4, atol=1e-5)


def test_a_converted_network_is_retrained(few):
    assert run(small(record={"seed": 7}), "--form", "gc_in", "--rank", 2).code == 0
    start = "small-converted/converted.pt"
    command = ["rotdigits", "--resume", start, "--epochs", 1, "--out", "retrained.pt"]
    assert run(*command, main=gconv.train.main).code == 0
    before, after = read(start), read("retrained.pt")
    assert layer_choices(after.model) == layer_choices(before.model)
    assert not torch.equal(after.model.conv4.mix, before.model.conv4.mix)
    assert after.record["started_from"] == before.record
    assert after.record["test_error"] == evaluate(after.model, few.test).error


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [("p4m-resnet44", {"group": "p4"}), ("gc-p4cnn", {}), ("p4cnn", {"group": "pmm", "in_channels": 3, "classes": 4})],
)
def test_other_networks(name, kwargs):
    done = run(small(name=name, **kwargs), "--form", "gc_in", "--rank", 1, "--json")
    assert done.code == 0
    assert sorted(everything("small-converted")) == RESULTS


def test_costs_are_for_images_of_the_size_that_the_data_has(few):
    path = small(name="p4m-resnet44", group="p4", in_channels=1)
    done = run(path, "--form", "gc_in", "--rank", 1, "--data", "rotdigits", "--json")
    at_28, at_32 = (gconv.cost(load(path), (1, size, size)).macs_executed for size in (28, 32))
    assert json.loads(done.out)["macs_executed"][0] == at_28 < at_32


def test_a_network_in_float64(few):
    save(load(small()).double(), "double.pt")
    assert run("double.pt", "--form", "gc", "--rank", 1, "--data", "rotdigits", "--finetune", 1).code == 0
    assert load("double-converted/converted.pt").fc.weight.dtype == torch.float64


def test_force_replaces_all_results():
    path = small()
    assert run(path, "--form", "gc", "--rank", 1).code == 0
    before = everything("small-converted")
    assert run(path, "--form", "gc", "--rank", 2, "--force").code == 0
    after = everything("small-converted")
    assert sorted(after) == RESULTS
    assert all(after[name] != before[name] for name in RESULTS)


# --- budgets of the whole network


def report_of(done):
    """What it printed, which must be what it wrote."""
    assert done.code == 0
    document = json.loads(done.out)
    assert json.loads(Path("small-converted/report.json").read_text()) == document
    return document


@pytest.mark.parametrize("value", ["0.6", "600", "0.6k"])
@pytest.mark.parametrize("form", ["auto", "g_turned"])
def test_the_file_has_the_parameters_that_are_allowed(form, value):
    path = small()
    document = report_of(run(path, "--form", form, "--params", value, "--json"))
    before, after = (sum(p.numel() for p in load(file).parameters()) for file in (path, "small-converted/converted.pt"))
    limit = 0.6 * before if value == "0.6" else 600
    assert after <= limit < before
    assert document["parameters"] == [before, after]
    assert (document["request"]["limit"], document["request"]["fraction"]) == (limit, value == "0.6")


@pytest.mark.parametrize("value", ["0.6", "300000", "300k", "0.3M"])
def test_the_file_runs_with_the_macs_that_are_allowed(value):
    path = small()
    document = report_of(run(path, "--macs", value, "--json"))
    before, after = (cost(load(file), (1, 28, 28)).macs_executed for file in (path, "small-converted/converted.pt"))
    limit = 0.6 * before if value == "0.6" else 300_000
    assert after <= limit < before
    assert document["macs_executed"] == [before, after]
    assert document["request"]["limit"] == limit


def test_the_time_that_is_allowed_is_kept_or_the_nearest_is_named():
    path = small()
    message = (
        "latency of at most 0.5ms is out of reach with form auto. Give at least 1.000ms, or 1.0000 of the network."
    )
    assert refused(path, "--latency", "0.5") == refused(path, "--latency", "0.5ms") == message
    document = report_of(run(path, "--latency", "1ms", "--json"))
    assert document["latency"]["milliseconds"] == [1.0, 1.0]
    assert (document["request"]["limit"], document["request"]["fraction"]) == (1.0, False)


@pytest.mark.parametrize("allowed", [3, 99])
def test_the_file_drops_no_more_than_is_allowed(few, allowed):
    path = small()
    document = report_of(
        run(path, "--form", "gc", "--max-drop", allowed, "--data", "rotdigits", "--minimise", "weights", "--json")
    )
    before, after = (evaluate(load(file), few.validation).error for file in (path, "small-converted/converted.pt"))
    assert after - before <= allowed
    validation = document["accuracy"]["validation"]
    assert (validation["images"], validation["before"], validation["batch_norm"]) == (60, before, after)
    if allowed == 99:
        assert {row["rank"] for row in document["layers"]} == {1}


def test_a_drop_cannot_be_read_off_images_that_the_network_was_trained_on(few):
    path = small(record={"trained_on": "train and validation"})
    assert refused(path, "--max-drop", 1, "--data", "rotdigits") == (
        "--max-drop: the network was trained on the validation images too, so they tell nothing about a drop. "
        "Give a network that was trained without --all-data."
    )


@pytest.mark.parametrize("budget", [("--params", "0.6"), ("--rank", "1", "--data", "rotdigits", "--finetune", "1")])
def test_the_written_report_reads_back_as_a_report(few, budget):
    document = report_of(run(small(), "--form", "gc", *budget, "--json"))
    own = {field.name: document[field.name] for field in dataclasses.fields(ConversionReport)}
    assert json.loads(json.dumps(ConversionReport.from_dict(own).to_dict())) == own


def test_the_report_is_of_the_file(monkeypatch):
    """Even where the file is not quite what was converted."""

    def saves_factorized(model, path, **kwargs):
        model = copy.deepcopy(model)
        for layer in model.modules():
            if isinstance(layer, SeparableGConv2d):
                layer.execution = "factorized"
        save(model, path, **kwargs)

    monkeypatch.setattr("gconv.models.checkpoint.save", saves_factorized)
    document = report_of(run(small(), "--form", "gc", "--rank", 1, "--execution", "dense", "--json"))
    assert {row["execution"] for row in document["layers"]} == {"factorized"}
    assert document["macs_executed"][1] == cost(load("small-converted/converted.pt"), (1, 28, 28)).macs_executed


@pytest.mark.parametrize(
    ("option", "target", "weight"), [("scores", "scores", 0.9), ("layers", "layers", 0.9), ("none", "scores", 0)]
)
def test_fine_tuning_learns_from_what_it_is_told_to(few, option, target, weight):
    command = [small(), "--form", "gc", "--rank", 1, "--data", "rotdigits", "--finetune", 1, "--distill", option]
    told = report_of(run(*command, "--json"))["finetuning"]["distillation"]
    assert (told["target"], told["weight"]) == (target, weight)


# --- measurements that are used again


@pytest.fixture
def counted(monkeypatch):
    """The calls of what measures the options of a network."""
    calls = []

    def measure(*args, real=planning.measure_options):
        calls.append(args)
        return real(*args)

    monkeypatch.setattr(planning, "measure_options", measure)
    return calls


def test_the_measurements_in_a_report_are_not_made_again(few, counted):
    command = [small(), "--form", "gc", "--params", "0.6", "--data", "rotdigits"]
    assert run(*command, "--out", "a").code == 0
    assert len(counted) == 1
    assert run(*command, "--out", "b", "--sensitivity", "a/report.json").code == 0
    assert len(counted) == 1
    assert Path("a/converted.pt").read_bytes() == Path("b/converted.pt").read_bytes()
    again = json.loads(Path("b/report.json").read_text())
    assert again["sensitivity"] == json.loads(Path("a/report.json").read_text())["sensitivity"]

    torch.manual_seed(5)
    save(create_model("p4cnn", width=2), "other.pt")
    for arguments, message in (
        (
            ["other.pt", "--form", "gc"],
            "sensitivity was measured on another network. Give that of a report on this one.",
        ),
        (
            [command[0], "--form", "g"],
            "sensitivity was measured for form gc, not for g. Give that of a report with form auto.",
        ),
    ):
        assert refused(*arguments, "--params", "0.6", "--sensitivity", "a/report.json", "--out", "c") == message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "old.json is not a report. Give a report.json of this command."),
        ("[1]", "old.json is not a report. Give a report.json of this command."),
        (
            '{"sensitivity": null}',
            "old.json has no measurements. Give the report of --params, --macs, --latency or --max-drop.",
        ),
        ('{"sensitivity": 5}', "sensitivity is not a table of this package. Give that of an earlier report."),
        (b"\xff\xfe", "old.json is not a report. Give a report.json of this command."),
    ],
    ids=str,
)
def test_a_file_without_measurements(content, message):
    Path("old.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert refused(small(), "--params", "0.6", "--sensitivity", "old.json") == message


# --- interrupted and continued


TUNE = ["--form", "gc", "--rank", 1, "--data", "rotdigits", "--minimise", "weights"]
STATE = Path("small-converted/finetuning.pt")


def interrupted_fine_tuning(path, step):
    """Stop as this step ends; five make an epoch."""
    steps = []

    def stop(*args, original=torch.optim.Adam.step, **kwargs):
        steps.append(original(*args, **kwargs))
        if len(steps) == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", stop)
        return run(path, *TUNE, "--finetune", 3)


@pytest.mark.parametrize(("step", "epochs"), [(7, 1), (15, 2)])
def test_an_interrupted_fine_tuning_is_continued_to_the_bit(few, step, epochs):
    path = small()
    assert run(path, *TUNE, "--finetune", 3, "--out", "whole").code == 0
    assert sorted(everything("whole")) == RESULTS
    stopped = interrupted_fine_tuning(path, step)
    assert stopped.code == 130
    assert f"to continue: the same command with --resume (its state is in {STATE})" in stopped.err
    assert sorted(everything("small-converted")) == ["finetuning.pt"]
    assert torch.load(STATE, weights_only=True)["fit"]["epochs_done"] == epochs
    continued = run(path, *TUNE, "--finetune", 3, "--resume")
    assert continued.code == 0
    assert [f"epoch {n}/3" in continued.err for n in (1, 2, 3)] == [n > epochs for n in (1, 2, 3)]
    assert sorted(everything("small-converted")) == RESULTS
    # Not the files' bytes: equal strings may be one object here and two there, which a pickle tells apart.
    one, other = (load(Path(folder, "converted.pt")) for folder in ("small-converted", "whole"))
    assert layer_choices(one) == layer_choices(other)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
    reports = [json.loads(Path(folder, "report.json").read_text()) for folder in ("whole", "small-converted")]
    for report in reports:
        assert [row.pop("seconds") >= 0 for row in report["finetuning"]["history"]] == [True] * 3
    assert reports[0] == reports[1]


def test_an_interruption_before_the_first_epoch_is_over_leaves_nothing(few):
    stopped = interrupted_fine_tuning(small(), 2)
    assert stopped.code == 130
    assert "to continue" not in stopped.err
    assert not Path("small-converted").exists()


def test_a_fine_tuning_is_continued_as_it_began_or_not_at_all(few):
    path = small()
    interrupted_fine_tuning(path, 7)
    other = create_model("p4cnn", width=2)
    save(other, "other.pt")
    for arguments, message in (
        ([path, *TUNE, "--rank", 2, "--finetune", 3], "was of another network or another budget"),
        ([path, *TUNE, "--form", "g", "--finetune", 3], "was of another network or another budget"),
        (["other.pt", *TUNE, "--finetune", 3, "--out", STATE.parent], "was of another network or another budget"),
        ([path, *TUNE, "--finetune", 4], "had other epochs, another seed or another loss"),
        ([path, *TUNE, "--finetune", 3, "--seed", 1], "had other epochs, another seed or another loss"),
        ([path, *TUNE, "--finetune", 3, "--distill", "none"], "had other epochs, another seed or another loss"),
    ):
        assert refused(*arguments, "--resume") == f"the interrupted fine-tuning {message}"
    assert run(path, *TUNE, "--finetune", 3, "--resume").code == 0


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_text("hello"), "is damaged or cut off, or it is no file of tensors"),
        (lambda path: torch.save([1], path), "holds no interrupted fine-tuning. Give the command without --resume."),
        (
            lambda path: torch.save({"a": 1}, path),
            "the state of the interrupted fine-tuning is inconsistent: 'original'",
        ),
        (
            lambda path: torch.save({"a": Bomb()}, path),
            "or holds objects that are not plain data; nothing in it was executed",
        ),
    ],
    ids=["text", "a list", "another dictionary", "bomb"],
)
def test_a_state_that_is_none(few, write, message):
    path = small()
    STATE.parent.mkdir()
    write(STATE)
    assert message in refused(path, *TUNE, "--finetune", 3, "--resume")


# --- bad input


def refused(*argv):
    """The one line with which a command is refused; nothing was written, wherever it may be."""
    before = everything(".")
    done = run(*argv)
    assert done.code == 2
    assert done.out == ""
    assert re.fullmatch(rf"{PROG}: error: [^\n]+\n", done.err)
    assert everything(".") == before
    return done.err.removeprefix(f"{PROG}: error: ").rstrip("\n")


class Bomb:
    """Unpickling it leaves a file behind."""

    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


def truncated(path):
    content = small(path).read_bytes()
    path.write_bytes(content[: len(content) // 2])


def bit_flipped(path):
    content = bytearray(small(path).read_bytes())
    content[content.index(load(path).conv4.weight.detach().numpy().tobytes()) + 40] ^= 1
    path.write_bytes(content)


def spoilt(value):
    def write(path):
        save(create_model("p4cnn", width=2), path)
        content = torch.load(path, weights_only=True)
        content["state_dict"]["conv5.weight"][0, 0, 0, 0, 0] = value
        torch.save(content, path)

    return write


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "bad.pt does not exist"),
        (Path.mkdir, "bad.pt is a directory; give a file"),
        (Path.touch, "bad.pt is damaged or cut off, or it is no file of tensors"),
        (lambda path: path.write_text("hello"), "bad.pt is damaged or cut off, or it is no file of tensors"),
        (truncated, "bad.pt is damaged or cut off, or it is no file of tensors"),
        (bit_flipped, "bad.pt is damaged"),
        (lambda path: path.write_bytes(pickle.dumps(Bomb())), "nothing in it was executed"),
        (lambda path: torch.save({"format": "gconv-checkpoint", "record": Bomb()}, path), "nothing in it was executed"),
        (lambda path: torch.save({"weight": torch.zeros(3)}, path), "bad.pt is not a gconv checkpoint; give a file"),
        (spoilt(float("nan")), "bad.pt has NaN or infinite entries in conv5.weight; weights must be finite"),
        (spoilt(float("-inf")), "bad.pt has NaN or infinite entries in conv5.weight; weights must be finite"),
    ],
    ids=[
        "missing", "directory", "empty", "text", "truncated", "bit flipped", "pickle bomb", "bomb in a checkpoint",
        "another torch file", "NaN", "Inf",
    ],
)  # fmt: skip
def test_a_file_that_is_no_sound_checkpoint(write, message):
    write(Path("bad.pt"))
    line = refused("bad.pt", "--rank", 1)
    assert line.startswith("bad.pt")
    assert message in line


def test_the_bomb_is_a_real_one():
    pickle.loads(pickle.dumps(Bomb()))
    assert Path("exploded").exists()


def test_a_network_without_group_layers():
    message = "no group-to-group layer to separate. Give one with gconv.GConv2d layers"
    assert message in refused(small(name="z2cnn"))


ABOVE_1 = "or a whole number above 1."
A_TIME = "or a time such as 3.5ms."
POINTS = "Give points of accuracy above 0 and below 100, such as 0.5."


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *[(f"--rank {no}", f"argument --rank: '{no}' is not a whole number of at least 1") for no in (0, -1, "a", 1.5)],
        ("--rank 99", "rank 99 is above the largest that form auto has here; accepted: 1 to 8"),
        ("--rank 99 --form g", "rank 99 is above the largest that form g has here; accepted: 1 to 4"),
        ("--energy 0", "--energy is 0. Give a share above 0 and up to 1."),
        *[(f"--energy {no}", f"argument --energy: '{no}' is not a number from 0 to 1") for no in (-1, "a", 1.5, 99)],
        ("--energy nan", "argument --energy: 'nan' is not a number from 0 to 1"),
        ("--rank 1 --energy 0.5", "argument --energy: not allowed with argument --rank"),
        *[
            (f"--{kind}={no}", f"{kind} is '{no}'. Give a fraction up to 1 of what the network has, {ABOVE_1}")
            for kind in ("params", "macs")
            for no in ("0", "-3", "1.5", "a", "nan", "inf", "0k", "-2k")
        ],
        *[
            (f"--latency={no}", f"latency is '{no}'. Give a fraction up to 1 of what the network takes, {A_TIME}")
            for no in ("0", "-1", "1.5", "3s", "ms", "-2ms", "nan")
        ],
        *[
            (f"--max-drop {no} --data rotdigits", f"max_drop is '{no}'. {POINTS}")
            for no in ("0", "-1", "100", "a", "nan")
        ],
        ("--max-drop 1", "--max-drop needs validation images. Give --data NAME with it."),
        *[
            (f"--params 0.5 {other}", f"argument {other.split()[0]}: not allowed with argument --params")
            for other in ("--rank 1", "--energy 0.5", "--macs 0.5", "--latency 0.5", "--max-drop 1")
        ],
        (
            "--params 10",
            "params of at most 10 is out of reach with form auto. Give at least 308, or 0.2890 of the network.",
        ),
        (
            "--form gc --macs 0.001",
            "macs of at most 505.888 is out of reach with form gc. Give at least 172,000, or 0.3400 of the network.",
        ),
        (
            "--allocation fair",
            "unknown allocation 'fair'; accepted: auto, uniform, energy, minmax, lagrangian, greedy, dynamic",
        ),
        ("--minimise all", "unknown minimise 'all'; accepted: auto, weights, outputs"),
        ("--minimise outputs", "minimise='outputs' needs training images. Give them as data."),
        ("--execution fast", "unknown execution 'fast'; accepted: auto, dense, factorized, irrep"),
        ("--distill all", "unknown target of distillation 'all'; accepted: scores, layers"),
        ("--resume", "--resume continues fine-tuning. Give the options of the interrupted command as they were."),
        (
            "--resume --finetune 1 --data rotdigits",
            "small-converted/finetuning.pt does not exist, so there is nothing to resume. "
            "Give the command without --resume.",
        ),
        ("--sensitivity none.json", "cannot read none.json: No such file or directory"),
        ("--form cg", "unknown form 'cg'; accepted: auto, g, gc, gc_in, g_turned, gc_turned"),
        ("--data mnist", "unknown data set 'mnist'; accepted: rotdigits, rotmnist-regen, rotmnist"),
        ("--device tpu", "unknown device 'tpu'; accepted: auto, cpu, cuda"),
        ("--finetune 3", "--finetune needs training images. Give --data NAME with it."),
        ("--finetune -3 --data rotdigits", "argument --finetune: '-3' is not a whole number of at least 0"),
        ("--seed x", "argument --seed: 'x' is not a whole number of at least 0"),
        ("--ranks 1", "unrecognized arguments: --ranks 1"),
        ("other.pt", "unrecognized arguments: other.pt"),
    ],
)
def test_a_wrong_option(options, message):
    assert refused(small(), *options.split()) == message


def test_no_checkpoint_at_all():
    assert refused() == "the following arguments are required: CKPT"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there():
    message = "no GPU is available to PyTorch here; give --device cpu or auto"
    assert refused(small(), "--device", "cuda") == message


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"in_channels": 3}, "takes 3 channels and 10 classes; rotdigits has 1 and 10"),
        ({"classes": 4}, "takes 1 channels and 4 classes; rotdigits has 1 and 10"),
    ],
)
def test_a_network_that_the_data_does_not_fit(kwargs, message):
    assert message in refused(small(**kwargs), "--data", "rotdigits")


def test_data_that_is_not_there(monkeypatch):
    monkeypatch.setenv("GCONV_DATA", "nowhere")
    message = "GCONV_DATA is 'nowhere', not a directory; set it to a directory of data files, or unset it"
    assert refused(small(), "--data", "rotmnist") == message


@pytest.mark.parametrize("name", RESULTS)
def test_results_that_exist_are_not_replaced(name):
    path = small()
    Path("results").mkdir()
    Path("results", name).write_text("precious")
    message = f"results/{name} exists; choose another output or replace it with --force"
    assert refused(path, "--out", "results") == message


def test_out_is_a_file():
    path = small()
    Path("results").write_text("precious")
    message = "cannot write results/converted.pt: results is not a directory"
    assert refused(path, "--out", "results", "--force") == message


def test_out_is_below_a_file():
    path = small()
    Path("file").write_text("precious")
    message = "cannot write file/results/converted.pt: file is not a directory"
    assert refused(path, "--out", "file/results") == message


def test_out_has_a_name_that_no_folder_can_have():
    message = refused(small(), "--out", "x" * 300)
    assert message.startswith("cannot write")
    assert message.endswith("File name too long")


@pytest.mark.parametrize("name", RESULTS)
def test_a_folder_in_the_place_of_a_result(name):
    path = small()
    Path("results", name).mkdir(parents=True)
    message = f"cannot write results/{name}: it is a directory"
    assert refused(path, "--out", "results", "--force") == message


def test_from_the_shell_a_mistake_is_one_line_too(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "analysis.decompose", "missing.pt"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"{PROG}: error: missing.pt does not exist\n")


# --- our own failures


def unfinished(folder):
    """What a failed run left in a folder: only whole files under their own names."""
    left = everything(folder) if Path(folder).exists() else {}
    assert set(left) <= set(RESULTS)
    if "converted.pt" in left:
        load(Path(folder, "converted.pt"))
    if "report.json" in left:
        json.loads(left["report.json"])
    return left


def fail(*_, **__):
    raise RuntimeError("our own failure")


def half_a_figure(self, path, **_):
    Path(path).write_bytes(b"\x89PNG")
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("force", [[], ["--force"]], ids=["new", "replacing"])
@pytest.mark.parametrize(("where", "what"), [(spectra_plot, "draw_spectra"), (Figure, "savefig"), (json, "dumps")])
def test_a_failure_leaves_no_half_written_file(monkeypatch, where, what, force):
    path = small()
    if force:
        assert run(path, "--form", "g", "--rank", 1).code == 0
    before = everything("small-converted") if force else {}
    monkeypatch.setattr(where, what, fail)
    with pytest.raises(RuntimeError, match="our own failure"):
        run(path, "--form", "gc", "--rank", 1, *force)
    assert unfinished("small-converted").get("spectra.png") == before.get("spectra.png")


def test_a_full_disk_is_one_line_and_leaves_no_half_written_file(monkeypatch):
    monkeypatch.setattr(Figure, "savefig", half_a_figure)
    done = run(small(), "--rank", 1)
    assert done.code == 2
    assert done.err == f"{PROG}: error: cannot write small-converted/spectra.png: No space left on device\n"
    assert "spectra.png" not in unfinished("small-converted")


def test_an_interruption_writes_nothing(monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(conversion, "convert", interrupted)
    path = small()
    before = everything(".")
    assert run(path).code == 130
    assert everything(".") == before


def test_a_saved_network_that_differs_from_the_one_reported_is_a_failure(monkeypatch):
    def saves_another(model, path, **kwargs):
        state = model.state_dict()
        state["conv3.mix"] = state["conv3.mix"] + 1
        other = convert(model, "gc", rank=1)[0]
        other.load_state_dict(state)
        save(other, path, **kwargs)

    monkeypatch.setattr("gconv.models.checkpoint.save", saves_another)
    path = small()
    with pytest.raises(RuntimeError, match=r"not the converted one: conv3\.mix differs"):
        run(path, "--form", "gc", "--rank", 1)


# --- help


def test_help_is_there_before_pytorch_is(tmp_path):
    code = (
        "import sys, analysis.decompose\n"
        "try: analysis.decompose.main(['--help'])\n"
        "finally: print(*{'torch', 'numpy', 'matplotlib', 'rich'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "\n")
    assert "examples:\n  python -m analysis.decompose checkpoints/p4cnn-rotdigits.pt\n" in done.stdout
    options = re.findall(r"^  (--[a-z-]+)", done.stdout, re.MULTILINE)
    assert set(options) == {
        "--form", "--rank", "--energy", "--params", "--macs", "--latency", "--max-drop", "--data", "--allocation",
        "--minimise", "--execution", "--sensitivity", "--finetune", "--distill", "--resume", "--seed", "--device",
        "--out", "--force", "--json",
    }  # fmt: skip


def test_nothing_is_loaded_that_is_slow_to_load_and_not_needed(tmp_path):
    slow = {
        "torch._dynamo", "torch._inductor", "sympy", "scipy", "sklearn", "pandas", "seaborn", "matplotlib.pyplot",
    }  # fmt: skip
    code = (
        "import sys, analysis.decompose\n"
        f"code = analysis.decompose.main([{str(small(tmp_path / 'net.pt'))!r}])\n"
        f"print(code, {slow} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "0 set()\n")


def test_the_examples_in_the_help_are_commands():
    parsers = {"analysis.decompose": decompose.parser(), "gconv.train": gconv.train.parser()}
    examples = re.findall(r"^  python -m (\S+) ([^(\n]+)", decompose.parser().format_help(), re.MULTILINE)
    assert len(examples) == 7
    for command, arguments in examples:
        parsers[command].parse_args(shlex.split(arguments))


def test_results_are_replaced_together_or_not_at_all(monkeypatch):
    path = small()
    assert run(path, "--form", "gc", "--rank", 1, "--out", "o").code == 0
    before = {name: Path("o", name).read_bytes() for name in RESULTS}
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: pytest.fail("no room"))
    with pytest.raises(pytest.fail.Exception):
        run(path, "--form", "g", "--rank", 1, "--out", "o", "--force")
    assert {path.name: path.read_bytes() for path in Path("o").iterdir()} == before


def test_a_converted_network_is_given_the_images_it_was_trained_on():
    path = small()
    save(load(path), path, record={"trained_on": "train and validation"})
    run(path, "--form", "gc", "--rank", 1, "--out", "o")
    assert read("o/converted.pt").record["trained_on"] == "train and validation"
