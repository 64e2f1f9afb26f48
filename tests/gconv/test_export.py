"""Plain networks, and the files they are written to: the same class scores where this package cannot be imported."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from importlib import import_module
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import analysis
from gconv.deploy import lowering as plain
from gconv.deploy.fuse import to_plain
from gconv.export import export
from gconv.functional.forms import FORMS
from gconv.groups.point_groups import GROUPS
from gconv.models.cost import cost
from gconv.models.zoo import MODELS, Model, create_model
from gconv.nn.pooling import GroupMeanPool
from gconv.nn.separable_conv import SeparableGConv2d
from gconv.system.errors import InputError

exporting = import_module("gconv.export")  # the module; gconv.export is the function
FORMATS = ("torch", "pt2", "onnx")
BATCHES = (1, 2, 7)


def trained(net: Model) -> Model:
    """In eval mode, with batch norms that know the maps, so that no unit is dead."""
    for norm in net.modules():
        if isinstance(norm, _BatchNorm):
            norm.momentum = 1.0
            norm.weight.data.uniform_(0.5, 1.5)
            norm.bias.data.uniform_(-0.5, 0.5)
    net.train()(torch.rand(5, *net.input_shape, dtype=net.fc.weight.dtype))
    return net.eval()


def separated(net: Model, *choices: tuple[str, int, str] | None) -> Model:
    """With the layers conv2, conv3, … in these forms, ranks and executions; None is full."""
    for number, choice in enumerate(choices, start=2):
        if choice is not None:
            layer = net.get_submodule(f"conv{number}")
            net.set_submodule(f"conv{number}", SeparableGConv2d.like(layer, *choice))
    return net


def short_resnet() -> Model:
    """One block a stage in place of seven: all there is to a ResNet, in less time."""
    net = create_model("p4m-resnet44", width=2)
    net.stage1, net.stage2, net.stage3 = net.stage1[:1], net.stage2[:1], net.stage3[:1]
    return net


def off(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest entry."""
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max()).item()


NETWORKS: dict[str, Callable[[], Model]] = {
    "full": lambda: create_model("p4cnn", width=4),
    "gc": lambda: analysis.convert(create_model("p4cnn", width=4), "gc", rank=2, execution="factorized")[0],
    "gc_in": lambda: create_model("p4cnn", width=4, separable="gc_in"),
    "g": lambda: create_model("g-p4cnn", width=4),
    "converted": lambda: analysis.convert(create_model("p4cnn", width=4), rank=2)[0],
    "p4m": lambda: create_model("p4cnn", group="p4m", width=3),
    "resnet": short_resnet,
}


# The plain network


@settings(max_examples=25)
@given(data=st.data())
def test_a_plain_network_is_the_same_function(data):
    on = data.draw(st.sampled_from([name for name in GROUPS if name != "z2"]))
    net = create_model("p4cnn", group=on, width=2, in_channels=data.draw(st.integers(1, 2)))
    for number in range(2, 8):
        form = data.draw(st.sampled_from([None, *FORMS]))
        if form is not None:
            layer = net.get_submodule(f"conv{number}")
            rank = data.draw(st.integers(1, FORMS[form].max_rank(layer.filter_shape)))
            separable = SeparableGConv2d.like(layer, form, rank, data.draw(st.sampled_from(FORMS[form].executions)))
            net.set_submodule(f"conv{number}", separable)
    net = trained(net.double())
    images = torch.rand(data.draw(st.sampled_from(BATCHES)), *net.input_shape, dtype=torch.float64)
    with torch.no_grad():
        assert off(to_plain(net)(images), net(images)) < 1e-12


@pytest.mark.parametrize("name", MODELS)
def test_every_published_network_becomes_ordinary_layers(name):
    net = trained(create_model(name, width=2))
    plain = to_plain(net)
    images = torch.rand(3, *net.input_shape)
    with torch.no_grad():
        assert off(plain(images), net(images)) < 1e-5
    assert {type(module) for module in plain.modules() if any(True for _ in module.parameters(recurse=False))} <= {
        nn.Conv2d,
        nn.Linear,
        nn.BatchNorm2d,
    }
    assert all(type(module).__module__.startswith("torch.") for module in list(plain.modules())[1:])
    assert not any(module.training for module in plain.modules())
    for layer in net.modules():  # which ordinary layers mix directly
        if isinstance(layer, SeparableGConv2d) and layer.execution == "irrep":
            layer.execution = "factorized"
    assert cost(plain, net.input_shape).macs_executed == cost(net, net.input_shape).macs_executed


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank", [1, 3])
def test_forms_that_are_two_convolutions_stay_two_and_the_others_become_one(form, rank):
    net = separated(create_model("p4cnn", width=2), *[(form, rank, "factorized")] * 6)
    layers = dict(to_plain(net).named_modules())
    chained = form in ("gc", "gc_in")
    assert isinstance(layers["conv3"], nn.Conv2d) is not chained
    execution = "factorized" if chained else "dense"
    expected = cost(net, net.input_shape, execution=execution)
    assert cost(to_plain(net), net.input_shape).macs_executed == expected.macs_executed


def test_a_layer_that_runs_dense_becomes_one_convolution():
    net = separated(create_model("p4cnn", width=2), *[("gc", 2, "dense")] * 6)
    assert isinstance(to_plain(net).conv3, nn.Conv2d)


def test_a_plain_resnet_takes_images_of_other_sizes():
    net = trained(short_resnet())
    images = torch.rand(2, 3, 40, 24)
    with torch.no_grad():
        assert off(to_plain(net)(images), net(images)) < 1e-5


def test_what_is_made_does_not_depend_on_the_original_any_more():
    net = trained(create_model("gc-p4m-resnet44", width=1))
    net.train()
    before, text, random = deepcopy(net.state_dict()), repr(net), torch.get_rng_state()
    made = to_plain(net)
    assert torch.get_rng_state().equal(random)
    for tensor in made.state_dict().values():
        tensor.zero_()
    assert repr(net) == text
    assert all(module.training for module in net.modules())
    assert all(tensor.equal(before[name]) for name, tensor in net.state_dict().items())


def test_a_layer_without_a_counterpart_is_named():
    net = create_model("p4cnn", width=1)
    net.group_pool = GroupMeanPool()
    with pytest.raises(InputError, match="group_pool is a GroupMeanPool, which has no plain counterpart"):
        to_plain(net)


# The files


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exported")


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, list[Tensor]]:
    """The class scores of every network for every batch, all written to ``folder`` in every format that can be."""
    torch.manual_seed(2)
    scores, images = {}, {}
    for name, create in NETWORKS.items():
        net = trained(create())
        images[name] = [torch.rand(batch, *net.input_shape) for batch in BATCHES]
        with torch.no_grad():
            scores[name] = [net(batch) for batch in images[name]]
        for format in FORMATS:
            if not missing(format):
                assert export(net, folder / f"{name}.{format}", format) < 1e-5
    torch.save(images, folder / "images")
    return scores


def missing(format: str) -> bool:
    return any(exporting.find_spec(package) is None for package in exporting._FORMATS[format].packages)


@pytest.fixture(scope="module")
def elsewhere(expected: dict[str, list[Tensor]], folder: Path) -> dict[str, list[Tensor]]:
    """What the files give in a process that cannot import this package."""
    code = """
import sys
from pathlib import Path
sys.modules["gconv"] = sys.modules["analysis"] = None
import torch

def run(path):
    if path.suffix == ".torch":
        return torch.load(path, weights_only=False)
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    import onnxruntime
    session = onnxruntime.InferenceSession(path)
    return lambda images: torch.from_numpy(session.run(["scores"], {"images": images.numpy()})[0])

images = torch.load("images")
with torch.no_grad():
    found = {path.name: [run(path)(batch) for batch in images[path.stem]] for path in Path().glob("*.*")}
torch.save(found, "found")
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "found")


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("format", FORMATS)
def test_a_file_gives_the_class_scores_without_this_package(expected, elsewhere, name, format):
    if missing(format):
        pytest.skip(f"{format} needs packages that are not installed")
    for found, scores in zip(elsewhere[f"{name}.{format}"], expected[name], strict=True):
        assert off(found, scores) < 1e-5


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_names_neither_this_package_nor_a_folder_of_this_machine(expected, folder, format):
    for path in folder.glob(f"*.{format}"):
        data = path.read_bytes()
        assert b"gconv" not in data
        assert str(Path(torch.__file__).parent).encode() not in data


def test_a_network_in_double_precision_is_written_in_single(tmp_path):
    net = trained(create_model("p4cnn", width=2).double())
    assert export(net, tmp_path / "net.pt", "TORCH") < 1e-5
    loaded = torch.load(tmp_path / "net.pt", weights_only=False)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert net.fc.weight.dtype == torch.float64


def test_the_same_network_gives_the_same_file(tmp_path):
    net = trained(create_model("gc-p4cnn", width=2))
    for name in ("one.pt", "two.pt"):
        export(net, tmp_path / name)
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "two.pt").read_bytes()


@pytest.mark.parametrize("error", [1e-3, float("nan")])
def test_a_wrong_file_is_not_left(tmp_path, monkeypatch, error):
    net = trained(create_model("p4cnn", width=2))
    path = tmp_path / "net.pt"
    path.write_text("mine")

    def spoilt(net: Model) -> nn.Module:
        made = to_plain(net)
        made.fc.bias.data[3] += error
        return made

    monkeypatch.setattr(plain, "to_plain", spoilt)
    with pytest.raises(RuntimeError, match=r"net\.pt was not written: its class scores would be off by "):
        export(net, path)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["mine"]


def test_a_network_without_any_response_can_be_written(tmp_path):
    net = create_model("p4cnn", width=1)
    nn.init.zeros_(net.fc.weight)
    nn.init.zeros_(net.fc.bias)
    assert export(net, tmp_path / "net.pt") == 0


@pytest.mark.parametrize("format", ["", "tensorflow", None])
def test_an_unknown_format_lists_the_known_ones(tmp_path, format):
    with pytest.raises(InputError, match=f"^unknown format '{format}'; accepted: torch, pt2, onnx$"):
        export(create_model("p4cnn", width=1), tmp_path / "net", format)


def test_missing_packages_are_named_with_what_installs_them(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "find_spec", lambda name: None if name == "onnxruntime" else name)
    with pytest.raises(InputError) as caught:
        export(create_model("p4cnn", width=1), tmp_path / "net.onnx", "onnx")
    assert str(caught.value) == (
        "format onnx needs onnxruntime, not installed here; pip install 'gconv-separable[export]'"
    )


def test_only_networks_of_this_package_are_exported(tmp_path):
    with pytest.raises(InputError, match=r"only networks of gconv\.create_model"):
        export(nn.Linear(2, 2), tmp_path / "net.pt")
