"""Filter banks of every kind of network: which layers are read, as what, and which are left out and why."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from analysis import filter_banks
from analysis.filters.banks import FilterBank
from gconv import GROUPS, GConv2d, InputError, LiftingConv2d, SeparableGConv2d, create_model, group, save
from gconv.functional.expansion import expand
from gconv.functional.forms import FORMS

DATA = Path(__file__).parents[2] / "data"
READ = "only Conv2d layers and group convolutions are read"

every_group = pytest.mark.parametrize("on", GROUPS)
turning = pytest.mark.parametrize("on", [name for name in GROUPS if name != "z2"])


class GrouPyStyle(nn.Module):
    """What GrouPy's layers look like from outside; no group, and no name that says one."""

    def __init__(self, out_channels, in_channels, s_in, k, s_out=None):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, s_in, k, k))
        if s_out is not None:
            self.input_stabilizer_size, self.output_stabilizer_size = s_in, s_out


def summary(banks):
    return [(bank.name, bank.kind, bank.group.name, tuple(bank.weight.shape)) for bank in banks]


def plain(layer):
    """An ordinary convolution with the layer's expanded filter."""
    weight = expand(layer.weight.detach(), layer.tables.expansion)
    conv = nn.Conv2d(*weight.shape[1::-1], weight.shape[-1])
    conv.weight = nn.Parameter(weight)
    return conv


def groupy_state():
    with np.load(DATA / "peers" / "groupy_p4cnn_state_dict.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


@every_group
def test_layers_of_this_package(on):
    network = nn.Sequential(
        LiftingConv2d(3, 4, 5, group=on),
        *(SeparableGConv2d(4, 4, 3, group=on, form=form, rank=1) for form in FORMS),
        nn.Sequential(GConv2d(4, 2, 3, group=on), GConv2d(2, 2, 1, group=on)),
        nn.Conv2d(2 * group(on).order, 5, 1),
    )
    banks = filter_banks(network)
    s, n = group(on).order, len(FORMS)
    kinds = ["lifting", *FORMS, "full", "full", "planar"] if s > 1 else ["planar"] * (n + 4)
    assert [bank.kind for bank in banks] == kinds
    assert [bank.name for bank in banks] == ["0", *map(str, range(1, n + 1)), f"{n + 1}.0", f"{n + 1}.1", str(n + 2)]
    assert [bank.lifting for bank in banks] == [s > 1, *[False] * (n + 3)]
    assert [bank.group.name for bank in banks] == [on] * (n + 3) + ["z2"]
    for bank in banks[:-1]:
        layer = network.get_submodule(bank.name)
        assert bank.weight.dtype == torch.float64
        assert not bank.weight.requires_grad
        assert bank.weight.equal(layer.weight.double())
        assert bank.residual == 0
        assert bank.form == (layer.form.name if isinstance(layer, SeparableGConv2d) else None)
    assert banks[-1].weight.shape == (5, 2 * s, 1, 1, 1)
    assert banks.skipped == []
    assert banks.inferred is None
    assert summary(filter_banks(network, group=on)) == summary(banks)


def test_a_layer_alone_is_a_network():
    assert summary(filter_banks(GConv2d(2, 3, 3, group="p4"))) == [("GConv2d", "full", "p4", (3, 2, 4, 3, 3))]
    assert summary(filter_banks(nn.Conv2d(2, 3, 3))) == [("Conv2d", "planar", "z2", (3, 2, 1, 3, 3))]


def test_plain_networks_and_the_layers_left_out():
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 5, groups=8),
        nn.Conv2d(8, 4, 3, groups=2),
        nn.Conv2d(4, 8, 1),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 2, 3)),
        nn.Conv2d(8, 2, (3, 1)),
        nn.ConvTranspose2d(2, 4, 3),
        nn.Conv1d(2, 4, 3),
        nn.Conv3d(2, 4, 3),
        nn.LazyConv2d(4, 3),
        nn.Conv2d(2, 4, 3, device="meta"),
        nn.Conv2d(2, 4, 3, dtype=torch.complex64),
        nn.Linear(4, 4),
    )
    banks = filter_banks(network)
    assert summary(banks) == [
        ("0", "planar", "z2", (8, 3, 1, 3, 3)),
        ("2", "grouped", "z2", (8, 1, 1, 5, 5)),
        ("3", "grouped", "z2", (4, 4, 1, 3, 3)),
        ("4", "planar", "z2", (8, 4, 1, 1, 1)),
        ("5", "planar", "z2", (2, 8, 1, 3, 3)),
    ]
    assert [bank.channel_groups for bank in banks] == [1, 8, 2, 1, 1]
    for bank in banks:
        assert bank.weight.squeeze(2).equal(network.get_submodule(bank.name).weight.double())
    assert {layer.name: layer.reason for layer in banks.skipped} == {
        "6": "its kernels are 3x1; only square kernels are read",
        "7": f"it is a ConvTranspose2d; {READ}",
        "8": f"it is a Conv1d; {READ}",
        "9": f"it is a Conv3d; {READ}",
        "10": "its weights do not exist yet: the layer is lazy or on the meta device",
        "11": "its weights do not exist yet: the layer is lazy or on the meta device",
        "12": "its weights are complex64; accepted: float16, bfloat16, float32, float64",
    }


def test_a_custom_layer_with_plain_weights_is_named_not_guessed_at():
    class Custom(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 2, 3, 3))

    (skipped,) = filter_banks(nn.Sequential(Custom())).skipped
    assert (skipped.name, skipped.reason) == ("0", f"it is a Custom with a 4-dimensional weight; {READ}")


@pytest.mark.parametrize("name", ["z2cnn", "c-z2cnn", "resnet44"])
def test_planar_models_are_planar(name):
    model = create_model(name, width=4)
    banks = filter_banks(model)
    assert {bank.name for bank in banks} == {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert {bank.group.name for bank in banks} == {"z2"}


def test_a_network_without_convolutions_has_no_banks():
    assert filter_banks(nn.Sequential(nn.Linear(3, 3), nn.ReLU())) == []
    assert filter_banks({"fc.weight": torch.ones(3, 3)}) == []
    assert filter_banks(nn.Linear(3, 3), group="p4") == []


@pytest.mark.parametrize(("s", "on"), [(4, "p4"), (8, "p4m")])
def test_groupy_style_layers(s, on):
    network = nn.Sequential(GrouPyStyle(2, 3, 1, 3), nn.ReLU(), GrouPyStyle(2, 2, s, 3), nn.Conv2d(2, 5, 1))
    banks = filter_banks(network)
    assert summary(banks) == [
        ("0", "lifting", on, (2, 3, 1, 3, 3)),
        ("2", "full", on, (2, 2, s, 3, 3)),
        ("3", "planar", "z2", (5, 2, 1, 1, 1)),
    ]
    assert banks[1].weight.equal(network[2].weight.double())
    assert banks.inferred == f"{on}, by the size of the weights' group axis"
    assert filter_banks(network, group=on).inferred is None


@pytest.mark.parametrize(("s", "on"), [(4, "p4"), (8, "p4m")])
def test_a_groupy_lifting_layer_may_say_its_order(s, on):
    network = nn.Sequential(GrouPyStyle(2, 3, 1, 3, s_out=s))
    assert summary(filter_banks(network)) == [("0", "lifting", on, (2, 3, 1, 3, 3))]


def test_a_groupy_state_dict():
    state = groupy_state()
    banks = filter_banks(state)
    names = [f"conv{i}" for i in range(1, 7)] + ["top"]
    assert [bank.name for bank in banks] == names
    assert [bank.kind for bank in banks] == ["lifting"] + ["full"] * 6
    assert {bank.group.name for bank in banks} == {"p4"}
    assert all(bank.weight.equal(state[f"{bank.name}.weight"].double()) for bank in banks)
    # The shapes would do for pmm as well.
    assert {bank.group.name for bank in filter_banks(state, group="pmm")} == {"pmm"}


@every_group
def test_the_bare_state_dict_of_our_networks(on):
    model = nn.Sequential(LiftingConv2d(1, 2, 3, group=on), GConv2d(2, 3, 3, group=on))
    expected = summary(filter_banks(model))
    assert summary(filter_banks(model.state_dict(), group=on)) == expected
    assert summary(filter_banks(model.double().state_dict(), group=on.upper())) == expected


@pytest.mark.parametrize(
    "weights", [{"a.weight": (2, 2, 2, 3, 3)}, {"l.weight": (2, 2, 1, 3, 3), "a.weight": (2, 2, 2, 3, 3)}]
)
def test_a_group_axis_of_two_is_asked_about(weights):
    state = {name: torch.randn(shape) for name, shape in weights.items()}
    with pytest.raises(InputError, match=r"has a group axis of 2, .* --group or group=; accepted: p2, pm$"):
        filter_banks(state)
    assert {bank.group.name for bank in filter_banks(state, group="pm")} == {"pm"}


def test_lifting_layers_take_the_group_that_follows_or_else_the_last():
    sizes = [1, 4, 1, 8, 1]
    state = {f"{n}.weight": torch.randn(2, 2, s, 3, 3) for n, s in enumerate(sizes)}
    assert [bank.group.name for bank in filter_banks(state)] == ["p4", "p4", "p4m", "p4m", "p4m"]
    with pytest.raises(
        InputError, match=r"0 have no group axis: give the group, .* accepted: z2, p2, p4, pm, pmm, p4m"
    ):
        filter_banks({"0.weight": torch.randn(2, 2, 1, 3, 3)})
    assert [bank.kind for bank in filter_banks({"0.weight": torch.randn(2, 2, 1, 3, 3)}, group="p2")] == ["lifting"]
    assert [bank.kind for bank in filter_banks({"0.weight": torch.randn(2, 2, 1, 3, 3)}, group="z2")] == ["planar"]


def test_what_a_state_dict_holds_besides():
    state = {
        "video.weight": torch.randn(2, 2, 3, 3, 3),
        "audio.weight": torch.randn(2, 2, 5),
        "positions": torch.randn(2, 1, 2, 4),
        "wide.weight": torch.randn(2, 2, 3, 5),
        "empty.weight": torch.randn(2, 0, 3, 3),
        "quantised.weight": torch.ones(2, 2, 3, 3, dtype=torch.int8),
        "scaled.weight": torch.ones(2, 2, 3, 3, dtype=torch.float8_e4m3fn),
        "norm.weight": torch.randn(2),
        "steps": torch.tensor(3),
        "half.weight": torch.randn(2, 3, 3, 3).half(),
        "weight": torch.randn(2, 3, 3, 3).bfloat16(),
        "epoch": 3,
    }
    banks = filter_banks(state)
    assert [bank.name for bank in banks] == ["half", "weight"]
    assert banks[0].weight.squeeze(2).equal(state["half.weight"].double())
    assert {layer.name: layer.reason for layer in banks.skipped} == {
        "video": "no group here has 3 elements, the size of its third axis; it may be a 3-D convolution",
        "audio": "its weight has 3 dimensions, like that of a 1-D convolution",
        "positions": "it has 4 dimensions, but only tensors called weight or filter are read",
        "wide": "its kernels are 3x5; only square kernels are read",
        "empty": "its weight has no entries",
        "scaled": "its weights are float8_e4m3fn; accepted: float16, bfloat16, float32, float64",
        "quantised": "its weights are int8; accepted: float16, bfloat16, float32, float64",
    }


def test_state_dicts_of_escnn():
    """In eval mode the expanded filter is there, in training only coefficients of a basis that is somewhere else."""
    layer = LiftingConv2d(1, 3, 3, group="p4")
    state = {
        "0.weights": torch.randn(12),
        "0._basisexpansion.block_expansion_('irrep_0', 'regular').sampled_basis": torch.randn(3, 4, 1, 9),
    }
    (skipped,) = filter_banks(state).skipped
    assert (skipped.name, skipped.reason.endswith("only after eval()")) == ("0", True)
    banks = filter_banks({**state, "0.filter": plain(layer).weight})
    assert summary(banks) == [("0", "lifting", "p4", (3, 1, 1, 3, 3))]
    assert banks.skipped == []


@turning
def test_an_exported_network_is_recognised(on):
    layers = [LiftingConv2d(1, 4, 3, group=on), GConv2d(4, 4, 3, group=on), GConv2d(4, 2, 1, group=on)]
    network = nn.Sequential(*map(plain, layers), nn.Conv2d(2 * group(on).order, 2, 1))
    banks = filter_banks(network)
    assert summary(banks)[:3] == [
        (str(n), *row[1:]) for n, row in enumerate(summary(filter_banks(nn.Sequential(*layers))))
    ]
    assert banks[3].kind == "planar"
    assert banks.inferred == f"{on}, channel-major, recognised in plain weights"
    assert filter_banks(network.state_dict()).inferred == banks.inferred
    for bank, layer in zip(banks, layers, strict=False):
        torch.testing.assert_close(bank.weight, layer.weight.detach().double(), rtol=0, atol=0)
        assert bank.residual == 0
    assert {bank.group.name for bank in filter_banks(network, group="z2")} == {"z2"}


def test_an_exported_escnn_network():
    banks = filter_banks(DATA / "foreign" / "escnn_p4cnn_exported.pt")
    assert summary(banks) == [
        ("0", "lifting", "p4", (10, 1, 1, 3, 3)),
        ("3", "full", "p4", (10, 10, 4, 3, 3)),
        ("19", "full", "p4", (10, 10, 4, 4, 4)),
    ]
    assert all(0 < bank.residual < 1e-6 for bank in banks)
    with pytest.raises(InputError, match=r"not have the structure of p4m: the rows of 19 .* residual of 0\.7"):
        filter_banks(DATA / "foreign" / "escnn_p4cnn_exported.pt", group="p4m")


def test_plain_convolutions_beside_group_layers_stay_planar():
    network = nn.Sequential(GConv2d(2, 2, 3, group="p4"), plain(GConv2d(2, 2, 3, group="p4m")))
    assert [bank.group.name for bank in filter_banks(network)] == ["p4", "z2"]
    assert [bank.group.name for bank in filter_banks(network, group="p4")] == ["p4", "z2"]


def test_grouped_convolutions_are_not_searched_for_structure():
    conv = plain(LiftingConv2d(1, 2, 3, group="p4"))
    depthwise = nn.Conv2d(8, 8, 3, groups=8)
    depthwise.weight = conv.weight
    assert [bank.kind for bank in filter_banks(depthwise)] == ["grouped"]


@pytest.mark.parametrize(
    ("source", "on", "message"),
    [
        (GConv2d(1, 1, 3, group="p4"), "p4m", "GConv2d is a layer on p4, which contradicts the given group p4m"),
        (GrouPyStyle(1, 1, 4, 3), "p4m", "GrouPyStyle has a group axis of 4, which contradicts the given group p4m"),
        (nn.Conv2d(8, 8, 3), "p4", "residual of 0."),
        (nn.Conv2d(8, 7, 3), "p4", "no layer has a multiple of 4 outputs"),
        (nn.Conv2d(8, 8, 3), "p5", "unknown group 'p5'; accepted: z2, p2, p4, pm, pmm, p4m"),
        (torch.ones(3), None, "a Tensor has no filters; give a network, a state dict, or a file"),
        ({}, None, "the dictionary holds no tensors"),
        ({"conv.weight": torch.full((2, 2, 3, 3), torch.nan)}, None, "NaN or infinite entries in conv.weight"),
        ("nowhere.pt", None, "nowhere.pt does not exist"),
    ],
)
def test_bad_input_is_one_line(source, on, message):
    with pytest.raises(InputError) as error:
        filter_banks(source, group=on)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_weights_that_are_not_finite_are_an_error():
    for layer in (GConv2d(2, 2, 3, group="p4"), nn.Conv2d(2, 2, 3)):
        with torch.no_grad():
            layer.weight[0, 0, 0] = torch.inf
        with pytest.raises(InputError, match="the network has NaN or infinite entries in 0; weights must be finite"):
            filter_banks(nn.Sequential(layer))


def test_a_file_is_as_good_as_its_network(tmp_path):
    model = create_model("gc-p4cnn", width=2)
    save(model, tmp_path / "net.pt")
    for source in (tmp_path / "net.pt", str(tmp_path / "net.pt")):
        for ours, theirs in zip(filter_banks(model), filter_banks(source), strict=True):
            assert ours.weight.equal(theirs.weight)
            assert (ours.name, ours.kind, ours.group) == (theirs.name, theirs.kind, theirs.group)


def test_a_bank_needs_only_its_first_three_fields():
    bank = FilterBank("conv", torch.ones(2, 2, 4, 3, 3), group("p4"))
    assert (bank.kind, bank.lifting, bank.residual) == ("full", False, 0)
