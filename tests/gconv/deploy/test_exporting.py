"""Exported files: the same class scores where this package cannot be imported."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import analysis
from gconv.deploy.export_formats import FORMATS
from gconv.deploy.exporting import export
from gconv.deploy.fuse import to_plain
from gconv.models.networks import Model
from gconv.models.zoo import create_model
from gconv.nn.batchnorm import GroupBatchNorm2d
from gconv.system.errors import InputError

BATCHES = (1, 2, 7)


def trained(net: Model) -> Model:
    """In eval mode, with batch norms that know the maps, so that no unit is dead."""
    for norm in net.modules():
        if isinstance(norm, GroupBatchNorm2d):
            norm.momentum = 1.0
            norm.weight.data.uniform_(0.5, 1.5)
            norm.bias.data.uniform_(-0.5, 0.5)
    net.train()(torch.rand(5, *net.input_shape, dtype=net.fc.weight.dtype))
    return net.eval()


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
    "resnet": lambda: create_model("p4m-resnet44", width=2, depth=8),
}


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
    return bool(FORMATS[format].missing_packages)


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

    monkeypatch.setattr("gconv.deploy.exporting.to_plain", spoilt)
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
    monkeypatch.setattr("gconv.deploy.export_formats.find_spec", lambda name: None if name == "onnxruntime" else name)
    with pytest.raises(InputError) as caught:
        export(create_model("p4cnn", width=1), tmp_path / "net.onnx", "onnx")
    assert str(caught.value) == (
        "format onnx needs onnxruntime, not installed here. Try: pip install 'gconv-separable[export]'"
    )


def test_only_networks_of_this_package_are_exported(tmp_path):
    with pytest.raises(InputError, match=r"only networks of gconv\.create_model"):
        export(nn.Linear(2, 2), tmp_path / "net.pt")
