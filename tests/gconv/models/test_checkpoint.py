"""Checkpoints: what was saved comes back to the bit in a fresh process, and a bad file is one line, never executed."""

from __future__ import annotations

import os
import pickle
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gconv import FORMS, Sampling
from gconv.functional.form_base import FilterShape
from gconv.groups.point_groups import group
from gconv.kernels.dispatch import KERNELS
from gconv.models import checkpoint
from gconv.models.checkpoint import layer_choices, load, read, save
from gconv.models.networks import Model, ModelSpec
from gconv.models.zoo import MODELS, build_model, create_model
from gconv.nn.execution import auto_execution
from gconv.nn.separable_conv import SeparableGConv2d
from gconv.system.errors import InputError

LEARNED = {"weight", "bias", "mix", "spatial", "running_mean", "running_var", "num_batches_tracked"}
P4, SHAPE = group("p4"), FilterShape(10, 10, 4, 3)  # a size at which machines differ
CENTRAL_ENTRY = b"PK\x01\x02"  # starts every entry of a zip archive's directory; its offsets 10 and 38 are used below


def converted(model: Model, **layers: tuple[Any, ...] | None) -> Model:
    """With these layers (``__`` for a dot) factored into (form, rank[, execution]), or made full for None."""
    for name, choice in layers.items():
        path = name.replace("__", ".")
        layer = model.get_submodule(path)
        model.set_submodule(path, layer.to_dense() if choice is None else SeparableGConv2d.from_dense(layer, *choice))
    return model


NETWORKS: dict[str, Callable[[], Model]] = {
    **{name: lambda name=name: create_model(name, width=2) for name in MODELS},
    "options": lambda: create_model("p4cnn", group="pmm", width=3, separable="gc_in", in_channels=2, classes=4),
    "p4cnn-converted": lambda: converted(
        create_model("p4cnn", width=3),
        conv2=("g", 4),
        conv3=("g", 2, "factorized"),
        conv4=("gc", 3),
        conv5=("gc", 9, "dense"),
        conv6=("gc_in", 2),
        conv7=("gc_in", 12, "dense"),
    ),
    "g-p4cnn-converted": lambda: converted(
        create_model("g-p4cnn", width=2), conv2=None, conv3=("gc", 1), conv4=("g", 1, "factorized"), conv7=None
    ),
    "p4m-resnet44-converted": lambda: converted(
        create_model("p4m-resnet44", width=2),
        stage1__0__conv1=("g", 2),
        stage2__0__conv1=("gc_in", 3),
        stage2__0__shortcut=("gc", 1),
        stage3__6__conv2=("gc", 2, "dense"),
    ),
    "own-frame": lambda: converted(
        create_model("p4cnn", group="pmm", width=2, separable="gc_turned"),
        conv2=("g_turned", 2),
        conv3=("g_turned", 3, "factorized"),
        conv4=("gc_turned", 4, "dense"),
        conv5=None,
    ),
    "float64": lambda: create_model("gc-p4cnn", width=2).double(),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def networks(folder) -> dict[str, tuple[Model, Tensor]]:
    """Every network after one look at some images in train mode, and an image; all saved in ``folder``."""
    torch.manual_seed(1)
    made = {}
    for name, create in NETWORKS.items():
        model = create()
        images = torch.rand(3, *model.input_shape, dtype=model.fc.weight.dtype)
        model.train()(images)
        save(model.eval(), folder / f"{name}.pt")
        made[name] = model, images
    torch.save({name: images for name, (_, images) in made.items()}, folder / "images")
    return made


@pytest.fixture(scope="module")
def rebuilt_elsewhere(networks, folder) -> dict[str, Tensor]:
    """The class scores of every file, loaded in a process that knows nothing else."""
    code = """
import sys, torch, gconv
torch.set_num_threads(int(sys.argv[1]))
with torch.no_grad():
    scores = {name: gconv.load(f"{name}.pt")(images) for name, images in torch.load("images").items()}
torch.save(scores, "scores")
"""
    paths = os.pathsep.join([str(Path(checkpoint.__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", code, str(torch.get_num_threads())]
    subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": paths}, check=True)
    return torch.load(folder / "scores")


@pytest.fixture
def good(tmp_path) -> Path:
    """A small sound checkpoint, to be spoilt."""
    save(create_model("gc-p4cnn", width=1), tmp_path / "good.pt", record={"seed": 3})
    return tmp_path / "good.pt"


def refused(path: Path) -> str:
    """The message with which ``load`` refuses a file: one line that names it."""
    with pytest.raises(InputError) as caught:
        load(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def state_unless_refused(path: Path) -> dict[str, Tensor] | None:
    try:
        return dict(load(path).state_dict())
    except InputError:
        return None


def equal(a: Any, b: Any) -> bool:
    """Whether two pieces of plain data are the same, tensors to the bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


# --- there and back


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_comes_back_to_the_bit(networks, folder, name):
    model, images = networks[name]
    back = load(folder / f"{name}.pt")
    assert (back.spec, repr(back)) == (model.spec, repr(model))
    assert equal(dict(back.state_dict()), dict(model.state_dict()))
    assert not any(module.training for module in back.modules())
    with torch.no_grad():
        assert torch.equal(back(images), model(images))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_file_alone_rebuilds_the_network_in_a_fresh_process(networks, rebuilt_elsewhere, name):
    model, images = networks[name]
    with torch.no_grad():
        assert equal(rebuilt_elsewhere[name], model(images))


@pytest.mark.parametrize("name", NETWORKS)
def test_only_what_was_learned_is_stored_in_every_mode(networks, folder, name):
    evaluated, _ = networks[name]
    stored = torch.load(folder / f"{name}.pt", weights_only=True)["state_dict"]
    assert {key.rpartition(".")[2] for key in stored} <= LEARNED
    assert stored.keys() == evaluated.state_dict().keys() == NETWORKS[name]().train().state_dict().keys()


SHIPPED = sorted((Path(__file__).parents[3] / "checkpoints").rglob("*.pt"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_files_of_version_1_give_the_scores_of_their_weights(path):
    """They are read here as version 1 was: every tensor is copied into a network in single precision.

    The execution in these files is what was the default when they were written, and is left to the machine now.
    """
    content = torch.load(path, weights_only=True)
    assert content["version"] == 1
    model = build_model(ModelSpec.from_dict(content["model"])).eval()
    as_written = {name: choice["execution"] for name, choice in content["layers"].items() if choice["form"]}
    set_executions(model, as_written)
    assert layer_choices(model) == content["layers"]
    model.load_state_dict(content["state_dict"])
    back = load(path)
    assert all(back.get_submodule(name).execution == "auto" for name in as_written)
    images = torch.rand(2, *model.input_shape)
    with torch.no_grad():
        scores = model(images)
        torch.testing.assert_close(back(images), scores, rtol=1e-5, atol=1e-5 * scores.abs().max().item())
        set_executions(back, as_written)
        assert equal(back(images), scores)
    assert all(parameter.requires_grad for parameter in back.parameters())


def set_executions(model, executions):
    for name, execution in executions.items():
        model.get_submodule(name).execution = execution


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("asked", [None, "auto", "dense", "factorized", "irrep"])
@pytest.mark.parametrize("form", FORMS)
def test_an_execution_in_a_file_before_version_3_stays_only_if_somebody_chose_it(tmp_path, form, asked, version):
    """They have the one that a layer ran in. It was chosen if the user asked for it, or ``auto`` never gives it."""
    for stored in FORMS[form].executions:
        path = tmp_path / f"{stored}.pt"
        request = {} if asked is None else {"conversion": {"request": {"execution": asked}}}
        save(create_model("p4cnn", width=1, separable=form), path, record=request)
        content = torch.load(path, weights_only=True)
        assert all(choice["execution"] == "auto" for choice in content["layers"].values())
        for choice in content["layers"].values():
            choice["execution"] = stored
        torch.save({**content, "version": version}, path)
        by_auto = {auto_execution(FORMS[form], P4, SHAPE, 1, Sampling(), kernel) for kernel in KERNELS}
        chosen = stored == asked or stored not in by_auto
        expected = {stored} if chosen else {"auto"}
        back = load(path)
        assert {layer.execution for layer in back.modules() if isinstance(layer, SeparableGConv2d)} == expected


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("name", ["float64", "p4cnn-converted"])
def test_the_dtype_of_a_file_of_version_1(networks, folder, tmp_path, name, half):
    """It was that of the last layer, and single where that was stored in half precision."""
    content = torch.load(folder / f"{name}.pt", weights_only=True)
    for entry in ("settings", "frozen", "rounded"):
        del content[entry]
    if half:
        state = content["state_dict"]
        content["state_dict"] = {key: t.half() if t.is_floating_point() else t for key, t in state.items()}
    torch.save({**content, "version": 1}, tmp_path / "old.pt")
    given, back = networks[name][0], load(tmp_path / "old.pt")
    single = half or name != "float64"
    assert {p.dtype for p in back.parameters()} == {torch.float32 if single else torch.float64}
    assert half or equal(dict(back.state_dict()), dict(given.state_dict()))


def test_a_network_can_be_saved_and_loaded_again_and_again(networks, folder, tmp_path):
    for name in ("p4cnn-converted", "p4m-resnet44-converted"):
        save(load(folder / f"{name}.pt"), tmp_path / "again.pt")
        assert (tmp_path / "again.pt").read_bytes() == (folder / f"{name}.pt").read_bytes()


def test_half_precision_rounds_to_11_bits_and_comes_back_as_float32(networks, tmp_path):
    model, images = networks["p4cnn-converted"]
    save(model, tmp_path / "half.pt", half=True)
    back = load(tmp_path / "half.pt")
    for key, tensor in model.state_dict().items():
        rounded = back.state_dict()[key]
        assert rounded.dtype == tensor.dtype
        torch.testing.assert_close(rounded, tensor, rtol=2**-11, atol=1e-7)
    assert not torch.equal(back.conv1.weight, model.conv1.weight)
    assert back(images).dtype == torch.float32


def test_record_and_resume_come_back(tmp_path):
    model = create_model("p4cnn", width=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    model(torch.rand(2, 1, 28, 28)).sum().backward()
    optimizer.step()
    record = {"dataset": "größer", "seed": 3, "none": None, "yes": True, "history": [{"epoch": 1, "loss": 0.1}, {}]}
    resume = {"optimizer": optimizer.state_dict(), "epochs_done": 1}
    save(model, tmp_path / "net.pt", record=record, resume=resume)
    back = read(tmp_path / "net.pt")
    assert equal(back.record, record)
    assert equal(back.resume, resume)
    save(model, tmp_path / "net.pt")
    back = read(tmp_path / "net.pt")
    assert (back.record, back.resume) == ({}, None)


# --- bad files


def test_a_missing_file_a_directory_and_a_name_too_long(tmp_path):
    assert "does not exist" in refused(tmp_path / "no.pt")
    assert "does not exist" in refused(tmp_path / "no/such/folder.pt")
    assert "is a directory" in refused(tmp_path)
    assert "File name too long" in refused(tmp_path / ("x" * 300))


@pytest.mark.parametrize(
    "content", [b"", b"\0", b"just a text\n" * 1000, b"PK\x05\x06" + bytes(18), b"\x80\x02}q\0.", b"\x89PNG\r\n\x1a\n"]
)
def test_a_file_that_is_no_checkpoint(tmp_path, content):
    (tmp_path / "file.pt").write_bytes(content)
    refused(tmp_path / "file.pt")


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.1, 0.5, 0.75, 0.9, 0.99, 0.999, 0.9999])
def test_a_truncated_file(good, kept):
    content = good.read_bytes()
    good.write_bytes(content[: int(kept * len(content))])
    assert "damaged or cut off" in refused(good)


@pytest.mark.parametrize("seed", range(4))
def test_a_flipped_bit_is_noticed_or_changes_nothing(good, seed):
    content, state = good.read_bytes(), dict(load(good).state_dict())
    start_of_directory = content.index(CENTRAL_ENTRY)
    draw = random.Random(seed)
    noticed = 0
    for start in (0, start_of_directory):
        for _ in range(60):
            spoilt = bytearray(content)
            spoilt[draw.randrange(start, len(content))] ^= 1 << draw.randrange(8)
            good.write_bytes(spoilt)
            found = state_unless_refused(good)
            noticed += found is None
            assert found is None or equal(found, state)
    assert 30 < noticed < 120  # most of the file is padding, dates and permissions, but far from all


@pytest.mark.parametrize(("offset", "flag"), [(10, 8), (10, 12), (38, 0x10)], ids=["deflated", "bzip2", "directory"])
def test_an_entry_with_a_wrong_mark_is_noticed(good, offset, flag):
    content = good.read_bytes()
    at = content.index(CENTRAL_ENTRY)
    while at >= 0:
        spoilt = bytearray(content)
        spoilt[at + offset] ^= flag
        good.write_bytes(spoilt)
        assert "is damaged" in refused(good)
        at = content.find(CENTRAL_ENTRY, at + 1)


class Bomb:
    """Unpickling it as pickle does makes a directory."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.marker,)


def _planted(place: str) -> Callable[[Bomb, Path], None]:
    def write(bomb: Bomb, path: Path) -> None:
        save(create_model("p4cnn", width=1), path)
        torch.save({**torch.load(path, weights_only=True), place: {"note": bomb}}, path)

    return write


BOMBS: dict[str, Callable[[Bomb, Path], None]] = {
    "pickle": lambda bomb, path: path.write_bytes(pickle.dumps(bomb)) and None,
    "torch": torch.save,
    "torch-legacy": lambda bomb, path: torch.save(bomb, path, _use_new_zipfile_serialization=False),
    "in-record": _planted("record"),
    "in-resume": _planted("resume"),
}


@pytest.mark.parametrize("write", BOMBS.values(), ids=BOMBS)
def test_nothing_in_a_file_is_executed(tmp_path, write):
    marker, path = tmp_path / "executed", tmp_path / "bomb.pt"
    write(Bomb(marker), path)
    refused(path)
    assert not marker.exists()


def test_the_bomb_works(tmp_path):
    torch.save(Bomb(tmp_path / "executed"), tmp_path / "bomb.pt")
    torch.load(tmp_path / "bomb.pt", weights_only=False)
    assert (tmp_path / "executed").is_dir()


def test_a_bare_state_dict_is_no_checkpoint(tmp_path):
    torch.save(create_model("p4cnn", width=1).state_dict(), tmp_path / "state.pt")
    assert "is not a gconv checkpoint; give a file that gconv.save" in refused(tmp_path / "state.pt")


def _set(*path: str, to: Any) -> Callable[[dict[str, Any]], None]:
    """An edit of a checkpoint's content: the item at that path becomes ``to``."""

    def edit(content: dict[str, Any]) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = to

    return edit


def _drop(*path: str) -> Callable[[dict[str, Any]], None]:
    def edit(content: dict[str, Any]) -> None:
        for key in path[:-1]:
            content = content[key]
        del content[path[-1]]

    return edit


NAN, INFINITE = torch.full((1,), float("nan")), torch.full((1,), float("inf"))
SPOILT: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "other format": (_set("format", to="x"), "is not a gconv checkpoint"),
    "newer version": (_set("version", to=4), "has checkpoint version 4; accepted: 1 to 3"),
    "version zero": (_set("version", to=0), "has checkpoint version 0"),
    "no version": (_drop("version"), "has checkpoint version None"),
    "no model": (_drop("model"), "inconsistent"),
    "model is a list": (_set("model", to=[1]), "inconsistent"),
    "unknown model": (_set("model", "name", to="p5cnn"), "unknown model 'p5cnn'"),
    "unknown group": (_set("model", "group", to="p6"), "unknown group 'p6'"),
    "another group": (_set("model", "group", to="p4m"), "inconsistent"),
    "unknown field": (_set("model", "depth", to=3), "inconsistent"),
    "no widths": (_set("model", "widths", to=[]), "widths of gc-p4cnn are []"),
    "widths are no list": (_set("model", "widths", to=None), "inconsistent"),
    "another width": (_set("model", "widths", to=[2]), "conv1.bias is [1]; its architecture has [2]"),
    "width zero": (_set("model", "widths", to=[0]), "width is 0"),
    "other classes": (_set("model", "classes", to=3), "fc.weight is [10, 1]; its architecture has [3, 1]"),
    "no layers": (_set("layers", to=None), "inconsistent"),
    "a layer less": (_drop("layers", "conv3"), "conv3"),
    "a layer more": (_set("layers", "conv9", to={"form": None}), "conv9"),
    "layer is no dict": (_set("layers", "conv3", to="gc"), "inconsistent"),
    "unknown form": (_set("layers", "conv3", "form", to="x"), "unknown form 'x'"),
    "unknown execution": (_set("layers", "conv3", "execution", to="x"), "unknown execution 'x'"),
    "another form": (_set("layers", "conv3", to={"form": None}), "conv3.weight"),
    "another rank": (_set("layers", "conv3", "rank", to=2), "conv3.mix is [1, 1, 1, 4]; its architecture"),
    "rank out of range": (_set("layers", "conv3", "rank", to=99), "rank 99 is out of range"),
    "rank is text": (_set("layers", "conv3", "rank", to="2"), "rank '2'"),
    "no rank": (_drop("layers", "conv3", "rank"), "inconsistent"),
    "no weights": (_set("state_dict", to={}), "inconsistent"),
    "weights are a list": (_set("state_dict", to=[]), "inconsistent"),
    "a weight less": (_drop("state_dict", "bn2.bias"), "bn2.bias"),
    "a weight more": (_set("state_dict", "extra", to=NAN), "extra"),
    "weight of another shape": (_set("state_dict", "conv1.bias", to=torch.zeros(2)), "conv1.bias is [2];"),
    "weight is no tensor": (_set("state_dict", "conv1.bias", to=[0.0]), "conv1.bias"),
    "NaN weight": (_set("state_dict", "conv1.bias", to=NAN), "NaN or infinite entries in conv1.bias"),
    "infinite weight": (_set("state_dict", "bn1.weight", to=INFINITE), "NaN or infinite entries in bn1.weight"),
    "infinite statistics": (_set("state_dict", "bn7.running_var", to=INFINITE), "entries in bn7.running_var"),
    "no settings": (_drop("settings"), "inconsistent: 'settings'"),
    "a setting that is none": (_set("settings", to={"bn1": {"forward": 3}}), "bn1 has no setting forward"),
    "a setting of nothing": (_set("settings", to={"bn9": {"eps": 3.0}}), "bn9"),
    "a setting that is a tensor": (_set("settings", to={"bn1": {"eps": NAN}}), "bn1 has no setting eps"),
    "a setting to go on training": (_set("settings", to={"bn1": {"training": True}}), "bn1 has no setting training"),
    "frozen is no list": (_set("frozen", to=None), "inconsistent"),
    "frozen is no parameter": (_set("frozen", to=["bn1.running_var"]), "running_var"),
    "rounded to nothing": (_set("rounded", to={"fc.weight": "torch.load"}), "inconsistent: 'torch.load'"),
    "record is a number": (_set("record", to=3), "inconsistent"),
    "no record": (_drop("record"), "inconsistent"),
}


@pytest.mark.parametrize(("edit", "what"), SPOILT.values(), ids=SPOILT)
def test_content_that_does_not_fit_together(good, edit, what):
    content = torch.load(good, weights_only=True)
    edit(content)
    torch.save(content, good)
    assert what in refused(good)


# --- writing


@pytest.mark.parametrize(
    ("error", "seen"),
    [(OSError(28, "No space left on device"), InputError), *((e, e) for e in (RuntimeError, KeyboardInterrupt))],
)
def test_a_failure_while_writing_leaves_the_old_file_and_no_other(good, monkeypatch, error, seen):
    def write_half(path: Path, content: memoryview) -> None:
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
        halves.append(os.listdir(good.parent))
        raise error

    halves, before = [], good.read_bytes()
    monkeypatch.setattr(Path, "write_bytes", write_half)
    with pytest.raises(seen):
        save(create_model("p4cnn", width=2), good)
    assert len(halves[0]) == 2
    assert os.listdir(good.parent) == [good.name]
    assert good.read_bytes() == before


def test_where_nothing_can_be_written(good):
    model = create_model("p4cnn", width=1)
    for path in (good / "net.pt", good.parent):
        with pytest.raises(InputError, match=f"^cannot write {path}: "):
            save(model, path)
    assert os.listdir(good.parent) == [good.name]


@pytest.mark.parametrize("name", ["net", "net.gconv.pt", "new/folder/net.pt"])
def test_any_name_will_do(tmp_path, name):
    save(create_model("p4cnn", width=1), str(tmp_path / name))
    assert load(str(tmp_path / name)).spec.widths == (1,)


def test_loading_and_factoring_leave_the_random_numbers_alone(folder) -> None:
    state = torch.random.get_rng_state()
    layer = load(folder / "p4cnn-converted.pt").get_submodule("conv3")
    SeparableGConv2d.from_dense(layer, "g", 1).to_dense()
    assert torch.equal(torch.random.get_rng_state(), state)


def test_half_precision_keeps_what_it_cannot_hold(tmp_path) -> None:
    model = create_model("p4cnn", width=1)
    with torch.no_grad():
        model.bn1.running_var.fill_(1e6)
    save(model, tmp_path / "half.pt", half=True)
    assert load(tmp_path / "half.pt").bn1.running_var.item() == 1e6


def test_sound_files_of_other_kinds_are_not_called_damaged(tmp_path) -> None:
    torch.jit.save(torch.jit.script(nn.ReLU()), tmp_path / "script.pt")
    with zipfile.ZipFile(tmp_path / "arrays.npz", "w") as archive:
        archive.writestr("x.npy", b"0")
    for name, kind in {"script.pt": "a TorchScript program", "arrays.npz": "an archive of another kind"}.items():
        with pytest.raises(InputError, match=f"{name} is {kind}; accepted: a checkpoint of gconv.save"):
            read(tmp_path / name)
