"""``python -m analysis.decompose``: the whole road, and one line for everything that can be wrong on it."""

import contextlib
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

import gconv.data
import gconv.train
from analysis import conversion, convert, decompose, plots, report
from gconv import Split, create_model, evaluate, load, read, save
from gconv.checkpoint import layer_choices

PROG = decompose.PROG
SHIPPED = Path(__file__).parents[2] / "checkpoints" / "p4cnn-rotdigits.pt"
RESULTS = ["converted.pt", "report.json", "spectra.png"]


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


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """In an empty folder, without the time that measuring takes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "_LATENCY_SECONDS", 0)


@pytest.fixture(scope="module")
def digits():
    return gconv.data.load_dataset("rotdigits")


@pytest.fixture
def few(digits, monkeypatch):
    """``--data rotdigits`` with fewer images; those for training make two steps."""

    def first(split, count):
        return Split(split.images[:count], split.labels[:count])

    sizes = {"train": 300, "validation": 60, "test": 60}
    data = dataclasses.replace(digits, **{name: first(getattr(digits, name), count) for name, count in sizes.items()})
    monkeypatch.setattr(gconv.data, "load_dataset", {"rotdigits": data}.__getitem__)
    return data


# --- the shipped network, once


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("shipped") / "new" / "folders"


@pytest.fixture(scope="module")
def shipped(out):
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
    assert document["request"] == {"form": "gc_in", "rank": 2, "energy": None}


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
    assert written["request"] == {"form": "auto", "rank": None, "energy": 0.95}


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
        model = create_model("p4cnn", width=2)
        with torch.no_grad():
            model.conv5.weight[0, 0, 0, 0, 0] = value
        save(model, path)

    return write


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "bad.pt does not exist"),
        (Path.mkdir, "bad.pt is a directory; accepted: a checkpoint file"),
        (Path.touch, "bad.pt is not a checkpoint, or it is damaged or cut off"),
        (lambda path: path.write_text("hello"), "bad.pt is not a checkpoint, or it is damaged or cut off"),
        (truncated, "bad.pt is not a checkpoint, or it is damaged or cut off"),
        (bit_flipped, "bad.pt is damaged"),
        (lambda path: path.write_bytes(pickle.dumps(Bomb())), "bad.pt is not a checkpoint"),
        (lambda path: torch.save({"format": "gconv-checkpoint", "record": Bomb()}, path), "nothing in it was executed"),
        (lambda path: torch.save({"weight": torch.zeros(3)}, path), "bad.pt is not a gconv checkpoint; accepted"),
        (spoilt(float("nan")), "bad.pt has NaN or infinite entries in conv5.weight; accepted: finite weights"),
        (spoilt(float("-inf")), "bad.pt has NaN or infinite entries in conv5.weight; accepted: finite weights"),
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
    message = "no group-to-group layer to separate; accepted: a p2 to p4m network"
    assert message in refused(small(name="z2cnn"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *[(f"--rank {no}", f"argument --rank: '{no}' is not a whole number of at least 1") for no in (0, -1, "a", 1.5)],
        ("--rank 99", "rank 99 is above the largest of form auto here; accepted: 1 to 8"),
        ("--rank 99 --form g", "rank 99 is above the largest of form g here; accepted: 1 to 4"),
        ("--energy 0", "--energy is 0; accepted: a share above 0 and up to 1"),
        *[(f"--energy {no}", f"argument --energy: '{no}' is not a number from 0 to 1") for no in (-1, "a", 1.5, 99)],
        ("--energy nan", "argument --energy: 'nan' is not a number from 0 to 1"),
        ("--rank 1 --energy 0.5", "argument --energy: not allowed with argument --rank"),
        ("--form cg", "unknown form 'cg'; accepted: auto, g, gc, gc_in"),
        ("--data mnist", "unknown data set 'mnist'; accepted: rotdigits, rotmnist-regen, rotmnist"),
        ("--device tpu", "unknown device 'tpu'; accepted: auto, cpu, cuda"),
        ("--finetune 3", "--finetune needs training images; accepted: --data NAME with it"),
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
    message = "no GPU is available to PyTorch here; accepted: --device cpu or auto"
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
    message = "GCONV_DATA is 'nowhere', not a directory; accepted: a directory of data files, or unset"
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
@pytest.mark.parametrize(("where", "what"), [(plots, "plot_spectra"), (Figure, "savefig"), (json, "dumps")])
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

    monkeypatch.setattr("gconv.checkpoint.save", saves_another)
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
    for option in ("--form", "--rank", "--energy", "--data", "--finetune", "--out", "--force", "--json", "--device"):
        assert option in done.stdout


def test_the_examples_in_the_help_are_commands():
    parsers = {"analysis.decompose": decompose.parser(), "gconv.train": gconv.train.parser()}
    examples = re.findall(r"^  python -m (\S+) ([^(\n]+)", decompose.parser().format_help(), re.MULTILINE)
    assert len(examples) == 5
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
