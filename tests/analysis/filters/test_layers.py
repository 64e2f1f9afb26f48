"""State dicts: our layers are read as what they are, and others never silently as what they may not be."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn

from analysis import filter_banks, load_source, redundancy
from analysis.filters.layers import Skipped, notes_of
from gconv import FORMS, GROUPS, GConv2d, LiftingConv2d, SeparableGConv2d, group, save
from gconv.models.zoo import create_model

every_form = pytest.mark.parametrize("form", FORMS)
every_group = pytest.mark.parametrize("name", GROUPS)


def same(ours, theirs):
    """Whether two lists of banks agree to the last bit."""
    assert [(b.name, b.kind, b.group, b.form) for b in ours] == [(b.name, b.kind, b.group, b.form) for b in theirs]
    assert all(one.weight.equal(other.weight) for one, other in zip(ours, theirs, strict=True))
    return True


def separable_network(form, name, dtype=torch.float32):
    return nn.Sequential(
        LiftingConv2d(2, 3, 3, group=name, dtype=dtype),
        SeparableGConv2d(3, 3, 3, group=name, form=form, rank=1, dtype=dtype),
        SeparableGConv2d(3, 2, 3, group=name, form=form, rank=2 if form == "gc" else 1, dtype=dtype, bias=False),
        GConv2d(2, 2, 1, group=name, dtype=dtype),
    )


@every_form
@every_group
def test_the_state_dict_of_a_separable_network_gives_the_filters_of_the_network(form, name):
    network = separable_network(form, name)
    banks = filter_banks(network.state_dict())
    assert same(banks, filter_banks(network))
    assert (banks.skipped, banks.inferred, banks.assumptions) == ([], None, [])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@every_form
def test_in_every_precision(form, dtype):
    network = separable_network(form, "p4m").to(dtype)
    banks = filter_banks(network.state_dict())
    widened = filter_banks(copy.deepcopy(network).to(torch.promote_types(dtype, torch.float32)))
    assert same(banks, widened)


FILES = {
    "zip": lambda network, path: torch.save(network.state_dict(), path),
    "old format": lambda network, path: torch.save(network.state_dict(), path, _use_new_zipfile_serialization=False),
    "nested": lambda network, path: torch.save({"epoch": 3, "model": network.state_dict()}, path),
    "wrapped": lambda network, path: torch.save(nn.DataParallel(network).state_dict(), path),
    "moving average": lambda network, path: torch.save(copy.deepcopy(network.state_dict()), path),
}


@pytest.mark.parametrize("write", FILES.values(), ids=FILES)
def test_files_of_state_dicts_keep_what_the_layers_are(write, tmp_path):
    network = separable_network("gc_in", "pmm")
    write(network, tmp_path / "weights.pt")
    assert same(filter_banks(tmp_path / "weights.pt"), filter_banks(network))
    assert same(filter_banks(load_source(tmp_path / "weights.pt")), filter_banks(network))


def test_the_content_of_a_checkpoint_is_read_as_its_network(tmp_path):
    network = create_model("gc-p4cnn", width=3)
    save(network, tmp_path / "network.pt")
    assert same(filter_banks(torch.load(tmp_path / "network.pt")), filter_banks(network))


def test_what_is_kept_beside_the_tensors_changes_neither_names_nor_loading():
    network, other = (separable_network("gc", "p4") for _ in range(2))
    state = network.state_dict()
    assert list(state) == [
        *("0.bias", "0.weight", "1.bias", "1.mix", "1.spatial", "2.mix", "2.spatial", "3.bias", "3.weight"),
    ]
    for given in (state, dict(state), OrderedDict(state)):
        other.load_state_dict(given)
        assert all(tensor.equal(state[key]) for key, tensor in other.state_dict().items())
    into: dict = {}
    network.state_dict(destination=into)
    assert list(into) == list(state)


@every_form
@pytest.mark.parametrize(("o", "i"), [(3, 3), (3, 2), (2, 3)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["z2", "p4", "p4m"])
def test_factors_alone_are_read_only_if_one_form_fits(form, o, i, bias, name):
    layer = SeparableGConv2d(i, o, 3, group=name, form=form, rank=1, bias=bias)
    copied = dict(nn.Sequential(layer).state_dict())  # without what stands beside the tensors
    banks = filter_banks(copied)
    if banks:  # whatever is read is right
        (bank,) = banks
        assert bank.weight.equal(layer.weight.detach().double())
        assert bank.group == group(name)
    else:
        (skipped,) = banks.skipped
        assert skipped.name == "0"
        assert form in skipped.reason or name == "z2"  # where g_turned is g
        assert "the state dict does not say which" in skipped.reason
    # From their shapes alone: gc_in with unequal channels and a bias, and nothing is transformed on z2.
    told = (form == "gc_in" and bias and o != i) or (name == "z2" and (form in ("g", "g_turned") or (bias and o != i)))
    assert bool(banks) == told


def test_factors_that_fit_no_form_are_skipped():
    state = {
        "a.mix": torch.randn(3, 1, 3, 4),
        "a.spatial": torch.randn(3, 2, 3, 3),
        "b.mix": torch.randn(3, 1, 3, 4, dtype=torch.complex64),
        "b.spatial": torch.randn(3, 1, 3, 3),
        "c.weight": torch.randn(2, 2, 4, 3, 3),
    }
    banks = filter_banks(state)
    assert [bank.name for bank in banks] == ["c"]
    reasons = {layer.name: layer.reason for layer in banks.skipped}
    assert reasons["a"].endswith("[3, 1, 3, 4] and [3, 2, 3, 3], do not have the shapes of any separable form")
    assert reasons["b"].startswith("its weights are complex64; accepted: float16")


def test_skipped_factors_still_tell_the_order_of_a_lifting_layer():
    network = nn.Sequential(LiftingConv2d(1, 3, 3, group="p4m"), SeparableGConv2d(3, 3, 3, group="p4m", form="gc"))
    banks = filter_banks(dict(network.state_dict()))
    assert [(bank.name, bank.kind, bank.group.name) for bank in banks] == [("0", "lifting", "p4m")]


# -------------------------------------------------------------------------------------- what may be another layer's

OTHERS = {
    "transposed": lambda: nn.ConvTranspose2d(8, 3, 3),
    "transposed, wide": lambda: nn.ConvTranspose2d(3, 8, 3, stride=2),
    "transposed, grouped": lambda: nn.ConvTranspose2d(8, 4, 3, groups=2, bias=True),
    "3-D": lambda: nn.Conv3d(2, 3, 3),
    "3-D of depth 4": lambda: nn.Conv3d(2, 3, 4),
    "3-D of depth 8": lambda: nn.Conv3d(2, 3, 8),
    "3-D, transposed": lambda: nn.ConvTranspose3d(2, 3, (4, 3, 3)),
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_other_convolutions_are_skipped_alive_and_as_bare_tensors(make):
    network = nn.Sequential(nn.Conv2d(2, 2, 3), make())
    for source in (network, network.state_dict()):
        banks = filter_banks(source)
        assert [bank.name for bank in banks] == ["0"]
        assert [layer.name for layer in banks.skipped] == ["1"]


@pytest.mark.parametrize("name", ["up.deconv", "transposed", "ConvTranspose2d_1"])
def test_names_tell_transposed_convolutions(name):
    banks = filter_banks({f"{name}.weight": torch.randn(3, 3, 3, 3), "conv.weight": torch.randn(3, 3, 3, 3)})
    assert [bank.name for bank in banks] == ["conv"]
    assert "transposed" in banks.skipped[0].reason


def test_one_layer_of_three_dimensions_puts_the_others_in_doubt():
    state = {
        "a.weight": torch.randn(2, 1, 3, 3, 3),
        "b.weight": torch.randn(2, 2, 4, 3, 3),
        "c.weight": torch.randn(2, 2, 1, 3, 3),
    }
    banks = filter_banks(state)
    assert banks == []
    assert "size of its third axis" in banks.skipped[0].reason
    assert all("third axis of a; give the group" in layer.reason for layer in banks.skipped[1:])


@pytest.mark.parametrize("size", [4, 8])
def test_cubic_kernels_are_read_if_the_group_is_given(size):
    state = {"a.weight": torch.randn(2, 2, size, size, size)}
    (skipped,) = filter_banks(state).skipped
    assert "as deep as they are wide; give the group" in skipped.reason
    name = {4: "p4", 8: "p4m"}[size]
    assert [bank.group.name for bank in filter_banks(state, group=name)] == [name]
    # A kernel of another size beside them is no cube.
    banks = filter_banks({**state, "b.weight": torch.randn(2, 2, size, 3, 3)})
    assert [bank.group.name for bank in banks] == [name, name]


def test_what_a_state_dict_does_not_say_is_said():
    planar, generator = torch.randn(3, 3, 3, 3), torch.randn(2, 2, 4, 3, 3)
    (said,) = filter_banks({"a.weight": planar}).assumptions
    assert "not transposed" in said
    assert "3-D" not in said
    (said,) = filter_banks({"a.weight": generator}).assumptions
    assert "not 3-D" in said
    assert "transposed" not in said
    (said,) = filter_banks({"a.weight": planar, "b.weight": generator}).assumptions
    assert "not 3-D" in said
    assert "not transposed" in said
    table = redundancy({"a.weight": planar}, draws=0)
    assert any("not transposed" in note for note in table.notes)
    assert table.to_dict()["assumptions"] == table.assumptions
    live = nn.Sequential(nn.Conv2d(3, 3, 3), GConv2d(2, 2, 3, group="p4"))
    assert filter_banks(live).assumptions == []


def test_recognised_structure_needs_no_assumption():
    from gconv.functional.expansion import Tables, expand

    layer = GConv2d(2, 2, 3, group="p4")
    weight = expand(layer.weight.detach(), Tables.build(group("p4"), 3).expansion)
    banks = filter_banks({"a.weight": weight})
    assert [bank.group.name for bank in banks] == ["p4"]
    assert banks.assumptions == []


# ------------------------------------------------------------------------------------------------------ what is printed


def test_printed_banks_are_a_short_table():
    network = create_model("p4m-resnet44")
    banks = filter_banks(network)
    text = repr(banks)
    assert len(text) < 60 * (len(banks) + 2)
    assert str(banks) == text
    lines = text.splitlines()
    total = sum(bank.weight.numel() for bank in banks)
    assert lines[0] == f"{len(banks)} filter banks, {total:,} entries"
    assert lines[1].split() == ["layer", "kind", "group", "weight"]
    for line, bank in zip(lines[2:], banks, strict=True):
        assert line.split() == [bank.name, bank.kind, bank.group.name, "x".join(map(str, bank.weight.shape))]
    for bank in banks[:2]:
        assert len(repr(bank)) < 100
        assert bank.name in repr(bank)
        assert str(list(bank.weight.shape)) in repr(bank)
    assert len(repr(banks[:3])) < 400


def test_printed_banks_say_what_was_inferred_assumed_and_skipped():
    state = {"<a>.weight": torch.randn(2, 2, 4, 3, 3), "b.weight": torch.randn(2, 2, 3)}
    banks = filter_banks(state)
    for text in (repr(banks), banks._repr_html_()):
        for note in ("group inferred: p4", "does not name the types", "skipped b: its weight has 3 dimensions"):
            assert note in text
    assert "<a>" not in banks._repr_html_()
    assert repr(filter_banks(nn.Linear(2, 2))) == "0 filter banks, 0 entries"
    assert notes_of([Skipped("a", "x"), Skipped("b", "y"), Skipped("c", "x")]) == ["skipped a, c: x", "skipped b: y"]
