"""What is saved is what was given: any change of a network comes back from the file, or the file is not written."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from analysis import convert
from gconv import GConv2d, GroupMaxPool, GroupMeanPool, InputError, create_model, group, load, read, save
from gconv.models.comparison import structural_differences, tensor_differences
from gconv.models.networks import Model
from gconv.models.zoo import MODELS

TRAINED = Path(__file__).parents[3] / "checkpoints" / "p4cnn-rotdigits.pt"


def doubled(*args: Any) -> Any:
    """A forward hook that changes what a layer gives."""
    return 2 * args[-1]


class Mine(GConv2d):
    def forward(self, x: Tensor, *, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        return 2 * super().forward(x, residual=residual, relu=relu)


class MyNetwork(Model):
    pass


class MyParameter(nn.Parameter):
    pass


class Change(NamedTuple):
    """What somebody does to a network, and what becomes of it when it is saved.

    Attributes:
        make: does it in place.
        place: what the refusal names; None where the file is to give the changed network.
        size: of the images that the changed network takes.
    """

    make: Callable[[Model], object]
    place: str | None = None
    size: int = 28


def setting(path: str, value: Any) -> Callable[[Model], None]:
    """Assign to an attribute somewhere in the network; in place of a call of ``value`` if that is a class."""
    place, _, attribute = path.rpartition(".")
    return lambda net: setattr(net.get_submodule(place), attribute, value() if isinstance(value, type) else value)


def reshape_on_the_way(net: Model) -> None:
    net.conv3.padding = 1, 1
    net.conv5.dilation = 2, 2


def sampled_otherwise(net: Model) -> None:
    net.pool.kernel_size, net.pool.stride, net.pool.padding = 3, 2, 1


def a_class_for_the_network(net: Model) -> None:
    net.__class__ = MyNetwork


def a_class_for_a_layer(net: Model) -> None:
    layer = GConv2d(10, 10, 3, group="p4")
    layer.__class__ = Mine
    net.conv3 = layer


def swapped(net: Model) -> None:
    net.bn3, net.bn4 = net.bn4, net.bn3


def with_value(value: float, name: str) -> Callable[[Model], None]:
    def make(net: Model) -> None:
        with torch.no_grad():
            net.state_dict()[name].view(-1)[-1] = value

    return make


def another_layout_in_memory(net: Model) -> None:
    net.fc.weight.data = net.fc.weight.data.t().contiguous().t()


def frozen(net: Model) -> None:
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(not name.startswith(("conv1", "bn5", "conv6")))


def head(*args: Any, **kwargs: Any) -> Callable[[Model], None]:
    def make(net: Model) -> None:
        net.fc = nn.Linear(*args, **kwargs).to(net.conv1.weight.dtype)

    return make


CHANGES: dict[str, Change] = {
    "nothing": Change(lambda net: None),
    # What a checkpoint describes.
    "eps": Change(setting("bn3.eps", 0.1)),
    "no eps": Change(setting("bn1.eps", 0)),
    "momentum": Change(setting("bn3.momentum", 0.01)),
    "cumulative statistics": Change(setting("bn3.momentum", None)),
    "statistics of the batch": Change(setting("bn6.track_running_stats", False)),
    "padding and dilation": Change(reshape_on_the_way),
    "stride": Change(setting("conv1.stride", (2, 2)), size=53),
    "another execution": Change(setting("conv3.execution", "dense")),
    "pooling": Change(sampled_otherwise),
    "another number of classes": Change(head(10, 5)),
    "the same class anew": Change(setting("group_pool", GroupMaxPool)),
    "frozen parameters": Change(frozen),
    "layers exchanged": Change(swapped),
    "half precision": Change(lambda net: net.bfloat16()),
    "two dtypes": Change(
        lambda net: net.fc.to(torch.float64 if net.fc.weight.dtype == torch.float32 else torch.float32)
    ),
    "layout in memory": Change(another_layout_in_memory),
    "a note": Change(setting("conv2.note", "mine")),
    "a gradient hook": Change(lambda net: net.conv2.register_full_backward_hook(lambda *_: None)),
    # What it does not.
    "pooling by the mean": Change(setting("group_pool", GroupMeanPool), "group_pool"),
    "no batch norm": Change(setting("bn4", nn.Identity), "bn4"),
    "a layer of another kind": Change(setting("conv7", nn.Flatten), "conv7"),
    "a subclassed layer": Change(a_class_for_a_layer, "conv3"),
    "a subclassed network": Change(a_class_for_the_network, "MyNetwork"),
    "a head without bias": Change(head(10, 5, bias=False), "fc.bias"),
    "a head of two modules": Change(
        lambda net: setattr(net, "fc", nn.Sequential(nn.Dropout(), net.fc)), "fc is of class Sequential"
    ),
    "a forward hook": Change(lambda net: net.conv1.register_forward_hook(doubled), "conv1 has forward hooks"),
    "a forward hook that always runs": Change(
        lambda net: net.bn2.register_forward_hook(doubled, always_call=True), "bn2 has forward hooks"
    ),
    "a hook of the network": Change(lambda net: net.register_forward_hook(doubled), "the network has forward hooks"),
    "a pre-hook": Change(lambda net: net.fc.register_forward_pre_hook(doubled), "fc has forward pre hooks"),
    "a pre-hook with keywords": Change(
        lambda net: net.pool.register_forward_pre_hook(lambda module, args, kwargs: None, with_kwargs=True),
        "pool has forward pre hooks",
    ),
    "another forward": Change(lambda net: setattr(net, "forward", lambda x: x.flatten(1)[:, :10]), "forward"),
    "another forward of a layer": Change(lambda net: setattr(net.fc, "forward", doubled), "fc.forward"),
    "another size of images": Change(setting("image_size", 14), "image_size"),
    "a setting that is no plain data": Change(setting("bn3.eps", torch.tensor(0.1)), "bn3.eps"),
    "another group": Change(setting("conv3.group", group("pmm")), "conv3.group"),
    "weight norm": Change(lambda net: parametrizations.weight_norm(net.fc), "fc is of class ParametrizedLinear"),
    "spectral norm": Change(lambda net: parametrizations.spectral_norm(net.conv1), "conv1"),
    "pruned": Change(lambda net: prune.l1_unstructured(net.fc, "weight", 0.5), "fc"),
    "a module less": Change(lambda net: delattr(net, "bn3"), "bn3 is missing"),
    "no module": Change(setting("bn3", type(None)), "bn3 is missing"),
    "no last layer": Change(lambda net: delattr(net, "fc"), "fc is missing"),
    "a module more": Change(setting("extra", nn.ReLU), "extra is an additional module"),
    "a module in itself": Change(lambda net: setattr(net, "itself", net), "itself is an additional module"),
    "a parameter more": Change(
        lambda net: net.conv1.register_parameter("scale", nn.Parameter(torch.ones(1))), "conv1.scale"
    ),
    "a buffer more": Change(lambda net: net.bn1.register_buffer("scale", torch.ones(1)), "bn1.scale"),
    "a buffer that is not stored": Change(
        lambda net: net.bn1.register_buffer("scale", torch.ones(1), persistent=False), "bn1"
    ),
    "a parameter less": Change(setting("bn3.bias", type(None)), "bn3.bias is missing"),
    "a statistic less": Change(setting("bn3.running_mean", type(None)), "bn3.running_mean is missing"),
    "a parameter of another kind": Change(
        lambda net: setattr(net.fc, "bias", MyParameter(net.fc.bias.detach())), "fc.bias is a MyParameter"
    ),
    "tied parameters": Change(lambda net: setattr(net.bn3, "weight", net.bn5.weight), "bn5.weight and bn3.weight"),
    "memory shared": Change(
        lambda net: setattr(net.bn3.weight, "data", net.bn5.weight.data), "bn5.weight and bn3.weight share"
    ),
    "a module twice": Change(lambda net: setattr(net, "bn3", net.bn5), "bn5 and bn3 are the same module"),
    "one part in training": Change(lambda net: net.bn3.train(), "bn3 is in training mode"),
    "NaN": Change(with_value(float("nan"), "conv1.weight"), "NaN or infinite entries in conv1.weight"),
    "infinity": Change(with_value(float("inf"), "bn2.running_var"), "NaN or infinite entries in bn2.running_var"),
    "no values": Change(lambda net: net.fc.to("meta"), "fc.weight"),
    "sparse": Change(
        lambda net: setattr(net.fc, "weight", nn.Parameter(net.fc.weight.detach().to_sparse())), "fc.weight"
    ),
    "another width in its spec": Change(
        lambda net: setattr(net, "spec", replace(net.spec, widths=(11,))), "conv1.bias has shape"
    ),
    "a spec of nothing": Change(lambda net: setattr(net, "spec", replace(net.spec, name="p5cnn")), "p5cnn"),
    "a spec of text": Change(lambda net: setattr(net, "spec", replace(net.spec, widths="10")), "widths"),
    "no spec": Change(lambda net: setattr(net, "spec", None), "create_model"),
}


@pytest.fixture(scope="module")
def networks() -> dict[str, Model]:
    """A trained network, and what conversion makes of it."""
    trained = load(TRAINED)
    converted, _ = convert(trained, "gc", rank=2)
    return {"trained": trained, "converted": converted}


def scores(net: Model, size: int) -> Tensor | str:
    """The class scores of some images, or why there are none."""
    images = torch.rand(3, 1, size, size, generator=torch.Generator().manual_seed(1)).to(net.conv1.weight.dtype)
    try:
        with torch.no_grad():
            return net(images)
    except RuntimeError as error:  # dtypes that do not go together
        return str(error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("which", ["trained", "converted"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_change_is_saved_or_refused(networks, tmp_path, change, which, dtype):
    check(deepcopy(networks[which]).to(dtype), tmp_path / "net.pt", change)


def check(net: Model, path: Path, change: Change) -> None:
    """Make a change of this network, and see that it comes back from the file or that there is none."""
    change.make(net)
    if change.place is not None:
        with pytest.raises(InputError) as refusal:
            save(net, path)
        assert change.place in str(refusal.value)
        assert "\n" not in str(refusal.value)
        assert os.listdir(path.parent) == []
        return
    save(net, path)
    back = load(path)
    given, found = scores(net, change.size), scores(back, change.size)
    assert type(found) is type(given)
    assert torch.equal(given, found) if isinstance(given, Tensor) else given == found
    assert repr(back) == repr(net)
    assert [(name, p.dtype, p.requires_grad) for name, p in net.named_parameters()] == [
        (name, p.dtype, p.requires_grad) for name, p in back.named_parameters()
    ]


def test_most_described_changes_change_the_scores(networks):
    """Else the test above would say little about them."""
    before = scores(networks["trained"], 28)
    without_effect = {
        "nothing",
        "the same class anew",
        "frozen parameters",
        "layout in memory",
        "a note",
        "another execution",
    }
    without_effect |= {"a gradient hook", "momentum", "cumulative statistics", "statistics of the batch"}
    for name, change in CHANGES.items():
        if change.place is None and change.size == 28:
            net = deepcopy(networks["trained"])
            change.make(net)
            after = scores(net, 28)
            same = (
                isinstance(after, Tensor)
                and after.shape == before.shape
                and torch.allclose(after.float(), before, rtol=1e-4)
            )
            assert same == (name in without_effect), name


@pytest.mark.parametrize(("rank", "place"), [(99, "rank 99 is out of range"), (1, "conv3.mix has shape")])
def test_a_rank_that_is_not_the_layers(networks, tmp_path, rank, place):
    check(deepcopy(networks["converted"]), tmp_path / "net.pt", Change(setting("conv3.rank", rank), place))


@pytest.fixture
def global_hook() -> Iterator[None]:
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: output)
    yield
    handle.remove()


@pytest.mark.usefixtures("global_hook")
def test_a_hook_of_all_modules(networks, tmp_path):
    check(networks["trained"], tmp_path / "net.pt", Change(lambda net: None, "registered for all modules"))


@pytest.mark.parametrize(
    ("cls", "method", "place"),
    [
        (GroupMaxPool, "forward", "group_pool runs a replaced method, GroupMaxPool.forward"),
        (nn.Linear, "forward", "fc runs a replaced method, Linear.forward"),
        (GConv2d, "forward", "conv2 runs a replaced method, GConv2d.forward"),
        (nn.Module, "__call__", "the network runs a replaced method, Module.__call__"),
        (Model, "forward", "the network runs a replaced method, Model.forward"),
        (Model, "extra_repr", "the network runs a replaced method, Model.extra_repr"),
    ],
)
@pytest.mark.parametrize("kind", [lambda self, x: x, property(lambda self: None), Mock()], ids=type)
def test_a_method_assigned_to_a_class(networks, tmp_path, monkeypatch, cls, method, place, kind):
    monkeypatch.setattr(cls, method, kind, raising=False)
    check(networks["trained"], tmp_path / "net.pt", Change(lambda net: None, place))


def test_modules_that_run_in_another_order(tmp_path):
    net = create_model("c-z2cnn", width=2)
    first = net.conv2[0]
    delattr(net.conv2, "0")
    net.conv2.add_module("0", first)
    check(net, tmp_path / "net.pt", Change(lambda net: None, "conv2 runs its modules in another order"))


@pytest.mark.parametrize("wrap", [nn.Sequential, nn.DataParallel, lambda net: net.fc, lambda net: net.state_dict()])
def test_only_whole_networks_of_ours(networks, tmp_path, wrap):
    with pytest.raises(InputError, match=r"only networks of gconv\.create_model"):
        save(wrap(networks["trained"]), tmp_path / "net.pt")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kept", ["record", "resume"])
@pytest.mark.parametrize(
    "value", [Path("x"), lambda: None, torch.nn.ReLU(), {1, object()}], ids=["path", "function", "module", "set"]
)
def test_records_that_would_not_load(networks, tmp_path, kept, value):
    with pytest.raises(InputError, match="record or resume holds objects that are not plain data"):
        save(networks["trained"], tmp_path / "net.pt", **{kept: {"note": [value]}})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", MODELS)
def test_networks_as_they_are_built_are_equal(name):
    """In training mode too, as networks are while they are trained; and in a copy."""
    net = create_model(name, width=2)
    copy = deepcopy(net)
    assert list(structural_differences(net, copy)) == []
    assert list(tensor_differences(net, copy)) == []
    assert list(tensor_differences(net, create_model(name, width=2))) != []


def test_saving_changes_nothing(networks, tmp_path):
    net = deepcopy(networks["converted"]).train()
    frozen(net)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    random = torch.get_rng_state()
    save(net, tmp_path / "net.pt")
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in net.modules())
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
    with torch.no_grad():
        net.conv1.weight.zero_()  # not one memory with what was stored
    assert load(tmp_path / "net.pt").conv1.weight.any()


def test_a_compiled_network_is_saved_as_what_was_compiled(networks, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda *args: function(*args))  # quickly
    net = deepcopy(networks["converted"])
    net.compile()
    net.conv3.compile()
    save(net, tmp_path / "net.pt")
    assert list(tensor_differences(net, load(tmp_path / "net.pt"))) == []


def test_the_users_default_device_and_dtype_make_no_difference(networks, tmp_path):
    net = networks["converted"]
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            save(net, tmp_path / "net.pt")
            back = load(tmp_path / "net.pt")
    finally:
        torch.set_default_dtype(default)
    assert list(structural_differences(net, back)) == []
    assert list(tensor_differences(net, back)) == []


def test_snapshots_in_half_precision_keep_dtype_and_settings(networks, tmp_path):
    net = deepcopy(networks["trained"]).double()
    net.bn3.eps = 0.1
    save(net, tmp_path / "net.pt", half=True)
    back = load(tmp_path / "net.pt")
    assert back.bn3.eps == 0.1
    assert back.conv1.weight.dtype == torch.float64
    assert list(tensor_differences(net, back)) != []
    assert list(tensor_differences(net, back, lambda t: t.half().to(t.dtype) if t.is_floating_point() else t)) == []


def test_the_record_of_a_changed_network_is_its_own(networks, tmp_path):
    net = deepcopy(networks["trained"])
    head(10, 3)(net)
    save(net, tmp_path / "net.pt")
    assert read(tmp_path / "net.pt").model.spec == replace(net.spec, classes=3)
    assert net.spec.classes == 10
