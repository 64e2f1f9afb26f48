"""Files of weights in every format, whole and broken; live layers of escnn, stood in for and (if it is there) real."""

import math
import pickle
import random
import warnings
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from analysis import filter_banks, load_source
from gconv import (
    FORMS,
    GConv2d,
    InputError,
    LiftingConv2d,
    SeparableGConv2d,
    act,
    create_model,
    gconv2d,
    group,
    save,
)
from gconv.functional.expansion import Tables, expand
from gconv.interop.readers import LayerKind, plain_state
from gconv.models.zoo import Model

ESCNN_GROUPS = {"C1": "z2", "C2": "p2", "C4": "p4", "D1": "pm", "D2": "pmm", "D4": "p4m"}
every_escnn_group = pytest.mark.parametrize("name", ESCNN_GROUPS)


def small_state():
    return {
        "conv.weight": torch.randn(3, 2, 4, 3, 3),
        "conv.bias": torch.randn(3),
        "bn.num_batches_tracked": torch.tensor(7),
    }


def write_zip(state, path):
    torch.save(state, path)


def write_legacy(state, path):
    torch.save(state, path, _use_new_zipfile_serialization=False)


def write_safetensors(state, path):
    save_file(state, path)


FORMATS = {"net.pt": write_zip, "net.pth": write_legacy, "net.safetensors": write_safetensors}
every_format = pytest.mark.parametrize(("name", "write"), FORMATS.items(), ids=["zip", "legacy", "safetensors"])


class Planted:
    """An object that leaves a trace if a file is unpickled carelessly."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def fault(path):
    """The message of the InputError that reading this file gives; a single line that names it."""
    with pytest.raises(InputError) as error:
        load_source(path)
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message
    return message


@every_format
def test_a_state_dict_comes_back_from_every_format(tmp_path, name, write):
    state = small_state()
    write(state, tmp_path / name)
    for path in (tmp_path / name, str(tmp_path / name)):
        found = load_source(path)
        assert found.keys() == state.keys()
        assert all(found[key].equal(state[key]) for key in state)


def test_our_checkpoints_come_back_as_networks(tmp_path):
    save(create_model("p4cnn", width=2), tmp_path / "net.pt")
    assert isinstance(load_source(tmp_path / "net.pt"), Model)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": OrderedDict(state), "optimizer": {"state": {}, "param_groups": []}},
        lambda state: {"model_state_dict": state, "loss": 0.1},
        lambda state: {"model": {"state_dict": state}},
        lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
        lambda state: {"state_dict": {f"module._orig_mod.{name}": tensor for name, tensor in state.items()}},
        lambda state: {**state, "extra_state": None, "width": 3},
        lambda state: {**state, "sparse": torch.eye(2).to_sparse(), "nowhere": torch.ones(2, device="meta")},
    ],
    ids=[
        "state_dict",
        "model",
        "model_state_dict",
        "twice",
        "module.",
        "compiled",
        "not only tensors",
        "not only dense",
    ],
)
def test_wrappers_are_taken_off(tmp_path, wrap):
    state = small_state()
    torch.save(wrap(state), tmp_path / "net.pt")
    assert load_source(tmp_path / "net.pt").keys() == state.keys()
    assert [bank.name for bank in filter_banks(wrap(state))] == ["conv"]


def test_a_prefix_that_not_all_names_have_belongs_to_them(tmp_path):
    state = {"module.conv.weight": torch.ones(1), "head.weight": torch.ones(1)}
    torch.save(state, tmp_path / "net.pt")
    assert load_source(tmp_path / "net.pt").keys() == state.keys()


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors", ""])
def test_no_file(tmp_path, suffix):
    path = tmp_path / f"net{suffix}"
    assert "does not exist" in fault(path)
    path.mkdir()
    assert "is a directory" in fault(path)
    path = tmp_path / f"empty{suffix}"
    path.touch()
    fault(path)
    path.write_text("to be a network\n")
    fault(path)
    path = path / "below.pt"
    fault(path)
    fault(tmp_path / ("long" * 100 + suffix))


@every_format
def test_a_file_cut_off_is_noticed(tmp_path, name, write):
    write(small_state(), tmp_path / name)
    content = (tmp_path / name).read_bytes()
    for length in [*range(1, 64), *range(64, len(content), 97), len(content) - 1]:
        (tmp_path / name).write_bytes(content[:length])
        fault(tmp_path / name)


@every_format
def test_a_flipped_bit_is_an_error_or_a_number(tmp_path, name, write):
    """Never another exception or a warning; and in the zip format, which has checksums, never a wrong number."""
    state = small_state()
    write(state, tmp_path / name)
    content = (tmp_path / name).read_bytes()
    draw = random.Random(0)
    positions = [*range(0, len(content), 31), *draw.sample(range(len(content)), 100)]
    for position in positions:
        flipped = bytearray(content)
        flipped[position] ^= 1 << draw.randrange(8)
        (tmp_path / name).write_bytes(flipped)
        try:
            found = load_source(tmp_path / name)
        except InputError as error:
            message = str(error)
        else:
            message = None
            assert all(tensor.isfinite().all() for tensor in found.values())
            assert write is not write_zip or all(found[key].equal(state[key]) for key in state)
        assert message is None or (str(tmp_path / name) in message and "\n" not in message)


@pytest.mark.parametrize("write", [write_zip, write_legacy, lambda state, path: path.write_bytes(pickle.dumps(state))])
def test_nothing_in_a_file_is_executed(tmp_path, write):
    write({**small_state(), "planted": Planted(tmp_path / "executed")}, tmp_path / "net.pt")
    assert "nothing in it was executed" in fault(tmp_path / "net.pt")
    assert not (tmp_path / "executed").exists()


def test_a_whole_network_is_not_plain_data(tmp_path):
    torch.save(nn.Conv2d(2, 2, 3), tmp_path / "net.pt")
    assert "not plain data" in fault(tmp_path / "net.pt")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@every_format
def test_weights_must_be_finite(tmp_path, name, write, value):
    state = small_state()
    state["conv.weight"][1, 1, 1, 1, 1] = value
    write(state, tmp_path / name)
    assert "has NaN or infinite entries in conv.weight" in fault(tmp_path / name)


@pytest.mark.parametrize(
    "content",
    [{}, {"a": 1}, {"state_dict": {}}, {"model": {"state_dict": {"a": "b"}}}, [torch.ones(2)], torch.ones(2), 3, None],
    ids=str,
)
@pytest.mark.parametrize("write", [write_zip, write_legacy])
def test_files_without_tensors_by_name(tmp_path, write, content):
    write(content, tmp_path / "net.pt")
    assert "; give a state dict" in fault(tmp_path / "net.pt")


def test_a_dictionary_that_contains_itself(tmp_path):
    content = {"epoch": 3}
    content["model"] = content
    torch.save(content, tmp_path / "net.pt")
    assert "holds no tensors" in fault(tmp_path / "net.pt")


def test_a_safetensors_file_without_tensors(tmp_path):
    save_file({}, tmp_path / "net.safetensors")
    assert "holds no tensors" in fault(tmp_path / "net.safetensors")


def test_a_checkpoint_of_ours_that_is_inconsistent(tmp_path):
    save(create_model("p4cnn", width=2), tmp_path / "net.pt")
    content = torch.load(tmp_path / "net.pt", weights_only=True)
    for change in ({"version": 99}, {"model": {}}, {"state_dict": {}}):
        torch.save({**content, **change}, tmp_path / "net.pt")
        fault(tmp_path / "net.pt")


# escnn: coordinates are (x, y) with y going up; its own flip reverses x, the columns.


def turn(quarters, *, flip=False):
    angle = quarters * math.pi / 2
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return rotation @ np.diag([-1.0, 1.0]) if flip else rotation


def stand_in(name, *, turns=1, in_field="regular", out_field="regular", groups=1):
    """A module with what is read of an escnn layer, and the layer of ours whose filter it has.

    The elements of Dn are the rotations, then the same rotations of the mirror image; those of D1 are given in a frame
    turned by 90 degrees, as its flip reverses columns and that of pm rows.
    """
    on = group(ESCNN_GROUPS[name])
    n = int(name[1])
    flips = (False, True) if name[0] == "D" else (False,)
    elements = [(flip, r * 4 // n) for flip in flips for r in range(n)]
    lifting = in_field == "trivial"
    ours = (LiftingConv2d if lifting else GConv2d)(2, 3, 3, group=on).double()
    weight = expand(ours.weight.detach(), Tables.build(on, 3, lifting=lifting).expansion)
    order = torch.tensor({"D2": [0, 1, 3, 2], "D4": [0, 1, 2, 3, 6, 5, 4, 7]}.get(name, list(range(on.order))))
    weight = weight.unflatten(0, (3, on.order))[:, order].flatten(0, 1)
    if not lifting:
        weight = weight.unflatten(1, (2, on.order))[:, :, order].flatten(1, 2)
    if name == "D1":
        weight = weight.rot90(-1, (-2, -1))

    def kind(field, count):
        space = SimpleNamespace(
            name=f"{name} on the plane",
            basespace_action=lambda element: turn(turns * element[1], flip=element[0]),
        )
        representation = SimpleNamespace(name=field, is_trivial=lambda: field == "trivial")
        fibers = SimpleNamespace(elements=elements)
        return SimpleNamespace(gspace=space, fibergroup=fibers, representations=[representation] * count)

    body = {
        "__module__": "escnn.nn.modules.conv.r2convolution",
        "expand_parameters": lambda self: (weight.clone(), None),
        "in_type": kind(in_field, 2),
        "out_type": kind(out_field, 3),
        "groups": groups,
    }
    return type("R2Conv", (nn.Module,), body)(), ours


@every_escnn_group
@pytest.mark.parametrize("in_field", ["regular", "trivial"])
def test_escnn_layers_by_what_they_look_like(name, in_field):
    module, ours = stand_in(name, in_field=in_field)
    (bank,) = filter_banks(nn.Sequential(module))
    assert (bank.name, bank.group) == ("0", ours.group)
    assert bank.lifting == (in_field == "trivial" and name != "C1")
    torch.testing.assert_close(bank.weight, ours.weight.detach(), rtol=1e-12, atol=1e-12)
    assert bank.residual < 1e-14
    assert filter_banks(module, group=ours.group)[0].group == ours.group
    with pytest.raises(InputError, match="is a layer on"):
        filter_banks(module, group="p2" if name != "C2" else "p4")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"turns": 0.5}, "its group C4 on the plane does not act exactly on the pixel grid"),
        ({"out_field": "irrep_1"}, "only regular to regular and trivial to regular fields are read"),
        ({"in_field": "irrep_1"}, "only regular to regular and trivial to regular fields are read"),
        ({"groups": 2}, "its channels are in 2 groups; an escnn layer is read only without"),
    ],
)
def test_escnn_layers_left_out(options, reason):
    (skipped,) = filter_banks(stand_in("C4", **options)[0]).skipped
    assert reason in skipped.reason


def test_other_layers_of_escnn_and_those_whose_rows_differ_are_left_out():
    module, _ = stand_in("C4")
    body = dict(vars(type(module)))
    (skipped,) = filter_banks(type("R3Conv", (nn.Module,), body)()).skipped
    assert skipped.reason == "it is an escnn R3Conv; of escnn's layers only R2Conv is read"
    continuous = type(
        "R2Conv",
        (nn.Module,),
        {
            **body,
            "out_type": SimpleNamespace(
                gspace=SimpleNamespace(name="SO(2) on the plane"), fibergroup=SimpleNamespace(elements=None)
            ),
        },
    )()
    assert "does not act exactly" in filter_banks(continuous).skipped[0].reason
    other = {**body, "expand_parameters": lambda self: (torch.randn(12, 8, 3, 3), None)}
    (skipped,) = filter_banks(type("R2Conv", (nn.Module,), other)()).skipped
    assert skipped.reason.startswith("its rows do not share one generator: relative residual 0.8")
    broken = {**body, "expand_parameters": lambda self: (torch.full((12, 8, 3, 3), math.nan), None)}
    with pytest.raises(InputError, match="NaN or infinite"):
        filter_banks(type("R2Conv", (nn.Module,), broken)())


@pytest.fixture(scope="module")
def escnn():
    with warnings.catch_warnings(action="ignore"):  # it misses a package that it does not need
        return pytest.importorskip("escnn", exc_type=ImportError)


def escnn_space(escnn, name):
    n = int(name[1])
    if name == "C1":
        return escnn.gspaces.trivialOnR2()
    if name == "D1":
        return escnn.gspaces.flip2dOnR2()
    return (escnn.gspaces.rot2dOnR2 if name[0] == "C" else escnn.gspaces.flipRot2dOnR2)(n)


def our_elements(escnn, space, on):
    """Our index of every element of escnn's group, found by watching both turn a picture (seen turned for D1)."""
    picture = torch.arange(25.0).view(1, 1, 5, 5)
    upright = escnn.nn.FieldType(space, [space.trivial_repr])
    quarters = 1 if on.name == "pm" else 0
    seen = []
    for element in space.fibergroup.elements:
        moved = escnn.nn.GeometricTensor(picture, upright).transform(element).tensor.rot90(quarters, (-2, -1))
        ours = [act(on, s, picture.rot90(quarters, (-2, -1))) for s in range(on.order)]
        seen.append(next(s for s, image in enumerate(ours) if torch.allclose(image, moved)))
    return quarters, torch.tensor(seen)


@pytest.mark.filterwarnings("ignore")
@every_escnn_group
@pytest.mark.parametrize("planar", [False, True], ids=["regular", "trivial"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_live_escnn_layers_compute_what_their_bank_says(escnn, name, planar, mode):
    """Our group convolution with the bank's generator gives escnn's output, element by element."""
    space, on = escnn_space(escnn, name), group(ESCNN_GROUPS[name])
    field = space.trivial_repr if planar else space.regular_repr
    layer = escnn.nn.R2Conv(
        escnn.nn.FieldType(space, 2 * [field]), escnn.nn.FieldType(space, 3 * [space.regular_repr]), 3, bias=False
    )
    getattr(layer, mode)()
    (bank,) = filter_banks(layer)
    assert bank.group == on
    assert bank.lifting == (planar and on.order > 1)
    assert bank.residual < 1e-5
    x = torch.randn(2, layer.in_type.size, 7, 9)
    with torch.no_grad():
        theirs = layer(escnn.nn.GeometricTensor(x, layer.in_type)).tensor.unflatten(1, (3, on.order))
    quarters, order = our_elements(escnn, space, on)
    x = x.rot90(quarters, (-2, -1)).double()
    if not planar:
        x = x.unflatten(1, (2, on.order))[:, :, order.argsort()]
    ours = gconv2d(x, bank.weight, group=on)[:, :, order].rot90(-quarters, (-2, -1))
    torch.testing.assert_close(ours, theirs.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@every_escnn_group
def test_an_exported_escnn_network_gives_the_banks_of_the_live_one(escnn, name):
    space, on = escnn_space(escnn, name), group(ESCNN_GROUPS[name])
    image = escnn.nn.FieldType(space, [space.trivial_repr])
    middle = escnn.nn.FieldType(space, 3 * [space.regular_repr])
    network = escnn.nn.SequentialModule(
        escnn.nn.R2Conv(image, middle, 3), escnn.nn.ReLU(middle), escnn.nn.R2Conv(middle, middle, 5)
    ).eval()
    live = filter_banks(network)
    exported = filter_banks(network.export())
    saved = filter_banks(network.state_dict())
    for found in (exported, saved):
        assert [bank.name for bank in found] == [bank.name for bank in live]
        for bank, expected in zip(found, live, strict=True):
            assert (bank.group, bank.kind) == (on, expected.kind)
            torch.testing.assert_close(bank.weight, expected.weight)


@pytest.mark.filterwarnings("ignore")
def test_live_escnn_layers_off_the_grid_are_left_out(escnn):
    for space in (escnn.gspaces.rot2dOnR2(8), escnn.gspaces.rot2dOnR2(3), escnn.gspaces.flip2dOnR2(axis=math.pi / 4)):
        kind = escnn.nn.FieldType(space, [space.regular_repr])
        (skipped,) = filter_banks(escnn.nn.R2Conv(kind, kind, 3)).skipped
        assert "does not act exactly on the pixel grid" in skipped.reason


# ------------------------------------------------------------------------------------- what a state dict says of layers


def test_state_dicts_say_what_our_layers_are(tmp_path):
    network = nn.Sequential(LiftingConv2d(1, 2, 3, group="pm"), SeparableGConv2d(2, 2, 3, group="pm", form="gc_in"))
    kinds = {"0": LayerKind(group("pm")), "1": LayerKind(group("pm"), FORMS["gc_in"])}
    torch.save({"model": nn.DataParallel(network).state_dict()}, tmp_path / "net.pt")
    for state in (network.state_dict(), load_source(tmp_path / "net.pt")):
        assert plain_state(state, "it").layers == kinds
    assert plain_state(dict(network.state_dict()), "it").layers == {}
    assert plain_state(nn.Linear(2, 2).state_dict(), "it").layers == {}


@pytest.mark.parametrize(
    "metadata",
    [None, 3, "group", [1], {"0": None}, {"0": {"group": ["p4"], "form": 3}}, {0: {"group": "p5", "form": "rank"}}],
)
def test_metadata_that_makes_no_sense_is_ignored(metadata):
    state = OrderedDict(small_state())
    vars(state)["_metadata"] = metadata
    assert plain_state(state, "it").layers == {}
    assert plain_state({"format": "gconv-checkpoint", "layers": metadata, "state_dict": state}, "it").layers == {}
