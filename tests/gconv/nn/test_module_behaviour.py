"""What people do with ``nn.Conv2d`` they can do with every layer, and it gives what it gives without.

Every operation is done to every kind of layer, and to ``nn.Conv2d`` itself. Where a result is expected, it is that of
:func:`plain`: the definition of the layer, in operations of PyTorch.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, jvp, stack_module_state, vjp, vmap
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, parametrize, prune, skip_init
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from gconv import (
    FORMS,
    GConv2d,
    GroupBatchNorm2d,
    GroupMaxPool,
    GroupMeanPool,
    InputError,
    LiftingConv2d,
    SeparableGConv2d,
    SpatialMaxPool2d,
    SpatialMeanPool2d,
    create_model,
    gconv2d,
)
from gconv.functional.expansion import from_group_major, to_group_major


class Kind(NamedTuple):
    """A layer: its class, what it is made with, and the shape of its input."""

    build: Callable[..., nn.Module]
    arguments: dict[str, Any]
    shape: tuple[int, ...]

    def make(self, **more: Any) -> nn.Module:
        return self.build(**self.arguments, **more)


SIZE: dict[str, Any] = {"in_channels": 2, "out_channels": 3, "kernel_size": 3, "padding": 1}
ON_P4 = (2, 2, 4, 6, 5)
KINDS = {
    "nn.Conv2d": Kind(nn.Conv2d, SIZE, (2, 2, 6, 5)),
    "lifting": Kind(LiftingConv2d, {**SIZE, "group": "p4"}, (2, 2, 6, 5)),
    "full": Kind(GConv2d, {**SIZE, "group": "p4"}, ON_P4),
    "full, in irreps": Kind(
        GConv2d, {"in_channels": 8, "out_channels": 8, "kernel_size": 5, "group": "p4m"}, (2, 8, 8, 6, 5)
    ),
    **{
        f"{name}, {execution}": Kind(
            SeparableGConv2d, {**SIZE, "group": "p4", "form": name, "rank": 2, "execution": execution}, ON_P4
        )
        for name, form in FORMS.items()
        for execution in form.executions
    },
    "batch norm": Kind(GroupBatchNorm2d, {"num_features": 2}, ON_P4),
    "group max": Kind(GroupMaxPool, {}, ON_P4),
    "group mean": Kind(GroupMeanPool, {}, ON_P4),
    "spatial max": Kind(SpatialMaxPool2d, {"kernel_size": 2}, ON_P4),
    "spatial mean": Kind(SpatialMeanPool2d, {}, ON_P4),
}
WITH_PARAMETERS = [name for name, kind in KINDS.items() if "pool" not in kind.build.__name__.lower()]
CONVOLUTIONS = [name for name in WITH_PARAMETERS if name != "batch norm"]

every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
every_kind_with_parameters = pytest.mark.parametrize(
    "kind", [KINDS[name] for name in WITH_PARAMETERS], ids=WITH_PARAMETERS
)
every_convolution = pytest.mark.parametrize("kind", [KINDS[name] for name in CONVOLUTIONS], ids=CONVOLUTIONS)

close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)


def new(kind: Kind, **more: Any) -> nn.Module:
    """A layer in eval mode; a batch norm has statistics."""
    layer = kind.make(**more).eval()
    if isinstance(layer, GroupBatchNorm2d):
        with torch.no_grad():
            for tensor in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
                tensor.uniform_(0.5, 1.5)
    return layer


def map_for(kind: Kind, dtype: torch.dtype = torch.float32) -> Tensor:
    """A map as it lies in memory inside a network, so that the compiled kernels take part."""
    x = torch.randn(kind.shape, dtype=dtype)
    group_major = to_group_major(x).contiguous(memory_format=torch.channels_last)
    return from_group_major(group_major, x.shape[2]) if x.dim() == 5 else group_major


def plain(layer: nn.Module, x: Tensor) -> Tensor:
    """What a layer is, from its definition."""
    if isinstance(layer, nn.Conv2d):
        return F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding)
    if isinstance(layer, (LiftingConv2d, GConv2d, SeparableGConv2d)):
        return gconv2d(x, layer.weight, layer.bias, layer.group, layer.sampling)
    if isinstance(layer, GroupBatchNorm2d):
        return F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias)
    if isinstance(layer, SpatialMaxPool2d):
        return x.unfold(-2, 2, 2).unfold(-2, 2, 2).amax((-2, -1))
    if isinstance(layer, SpatialMeanPool2d):
        return x.mean((3, 4))
    return x.amax(2) if isinstance(layer, GroupMaxPool) else x.mean(2)


def gradients(run: Callable[[Tensor], Tensor], layer: nn.Module, x: Tensor) -> list[Tensor]:
    """Of the input and of the parameters."""
    with torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        y = run(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return list(torch.autograd.grad(y, [x, *layer.parameters()], weights))


def works(layer: nn.Module, x: Tensor) -> None:
    """Its output and its gradients are those of its definition, with gradients and without, twice."""
    with torch.no_grad():
        expected = plain(layer, x)
        for _ in range(2):
            close(layer(x), expected)
    close(layer(x), expected)
    for ours, theirs in zip(gradients(layer, layer, x), gradients(partial(plain, layer), layer, x), strict=True):
        close(ours, theirs)


def factors(layer: nn.Module) -> list[str]:
    """The names of its parameters without the bias."""
    return [name for name, _ in layer.named_parameters(recurse=False) if name != "bias"]


def unpickled(layer: nn.Module) -> nn.Module:
    twin: nn.Module = pickle.loads(pickle.dumps(layer))
    return twin


def saved_and_loaded(layer: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    twin: nn.Module = torch.load(file, weights_only=False)
    return twin


# Copies and moves


@every_kind
def test_as_it_is(kind: Kind) -> None:
    works(new(kind), map_for(kind))
    works(new(kind), map_for(kind).contiguous())


@every_kind
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, unpickled, saved_and_loaded])
def test_copy(kind: Kind, copied: Callable[[nn.Module], nn.Module]) -> None:
    layer, x = new(kind), map_for(kind)
    with torch.no_grad():
        y = layer(x)  # something is kept from now on
        twin = copied(layer)
        assert repr(twin) == repr(layer)
        assert twin(x).equal(y)
        works(twin, x)
        if copied is not copy.copy:
            for parameter in twin.parameters():
                parameter.fill_(0.25)
            works(twin, x)
            assert layer(x).equal(y)


def to_empty(layer: nn.Module) -> nn.Module:
    return layer.to_empty(device="cpu")


@pytest.fixture
def _used_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory has something in it, as it often has."""
    empty_like = torch.empty_like

    def used(like: Tensor, **more: Any) -> Tensor:
        found = empty_like(like, **more)
        return found if found.is_meta else found.fill_(2**20)

    monkeypatch.setattr(torch, "empty_like", used)


def on_meta(kind: Kind) -> nn.Module:
    with torch.device("meta"):
        return kind.make()


def _assigned(kind: Kind, state: dict[str, Tensor]) -> nn.Module:
    layer = on_meta(kind)
    layer.load_state_dict(state, assign=True)
    return layer


def _emptied(kind: Kind, state: dict[str, Tensor]) -> nn.Module:
    layer = kind.make(device="meta").to_empty(device="cpu")
    layer.load_state_dict(state)
    return layer


def _skipped(kind: Kind, state: dict[str, Tensor]) -> nn.Module:
    layer = skip_init(kind.build, **kind.arguments)
    layer.load_state_dict(state)
    return layer


@every_kind_with_parameters
@pytest.mark.parametrize("made", [_assigned, _emptied, _skipped])
@pytest.mark.usefixtures("_used_memory")
def test_meta_device(kind: Kind, made: Callable[[Kind, dict[str, Tensor]], nn.Module]) -> None:
    layer, x = new(kind), map_for(kind)
    twin = made(kind, layer.state_dict()).eval()
    with torch.no_grad():
        assert twin(x).equal(layer(x))
    works(twin, x)
    assert {tensor.device.type for tensor in (*twin.parameters(), *twin.buffers())} == {"cpu"}


@every_kind
def test_shapes_on_the_meta_device(kind: Kind) -> None:
    assert on_meta(kind).eval()(map_for(kind).to("meta")).shape == new(kind)(map_for(kind)).shape


@every_convolution
@pytest.mark.usefixtures("_used_memory")
def test_reset_of_a_layer_without_memory(kind: Kind) -> None:
    layer = kind.make(device="meta").to_empty(device="cpu").eval()
    layer.reset_parameters()
    works(layer, map_for(kind))


@every_kind_with_parameters
def test_a_meta_layer_with_parameters_of_another_device(kind: Kind) -> None:
    layer, x = new(kind), map_for(kind)
    tensors = (
        {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
        if "Norm" in repr(layer)
        else dict(layer.named_parameters())
    )
    close(functional_call(on_meta(kind).eval(), tensors, x), layer(x))


@pytest.mark.parametrize("name", ["p4cnn", "gc-p4cnn", "g-p4cnn", "p4m-resnet44"])
@pytest.mark.usefixtures("_used_memory")
def test_a_network_on_the_meta_device(name: str) -> None:
    net = create_model(name, width=2).eval()
    images = torch.rand(2, *net.input_shape)
    with torch.device("meta"):
        assigned, emptied = (create_model(name, width=2).eval() for _ in range(2))
    assigned.load_state_dict(net.state_dict(), assign=True)
    emptied.to_empty(device="cpu").load_state_dict(net.state_dict())
    with torch.no_grad():
        for twin in (assigned, emptied):
            assert twin(images).equal(net(images))


@every_kind
def test_dtypes(kind: Kind) -> None:
    layer, x = new(kind), map_for(kind)
    with torch.no_grad():
        layer(x)
        for dtype in (torch.bfloat16, torch.float64, torch.float32):
            layer.to(dtype)
            assert layer(x.to(dtype)).dtype == dtype
            assert {tensor.dtype for tensor in layer.parameters()} <= {dtype}
            if dtype != torch.bfloat16:
                works(layer, x.to(dtype))
        assert layer.double()(x.double()).dtype == torch.float64


@every_kind
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format, torch.preserve_format])
def test_memory_formats(kind: Kind, memory_format: torch.memory_format) -> None:
    layer, x = new(kind), map_for(kind)
    state = copy.deepcopy(layer.state_dict())
    assert layer.to(memory_format=memory_format) is layer
    works(layer, x)
    works(layer.to(torch.float64, memory_format=memory_format), x.double())
    layer.float().load_state_dict(state)
    works(layer, x.contiguous())


def test_a_network_in_channels_last() -> None:
    for name in ("p4cnn", "gc-p4cnn", "g-p4cnn", "z2cnn"):
        net = create_model(name, width=2).eval()
        images = torch.rand(2, *net.input_shape)
        with torch.no_grad():
            expected = net(images)
            moved = net.to(memory_format=torch.channels_last)
            close(moved(images.contiguous(memory_format=torch.channels_last)), expected)


@every_kind
def test_shared_memory(kind: Kind) -> None:
    layer = new(kind).share_memory()
    works(layer, map_for(kind))
    assert all(parameter.is_shared() for parameter in layer.parameters())


# Hooks and parametrisations


@every_kind
def test_forward_hooks_see_and_replace(kind: Kind) -> None:
    layer, x = new(kind), map_for(kind)
    seen: list[Tensor] = []
    with torch.no_grad():
        expected = plain(layer, 3 * x)
        layer.register_forward_pre_hook(lambda module, inputs: (3 * inputs[0],))
        layer.register_forward_hook(lambda module, inputs, output: seen.extend((*inputs, output)))
        layer.register_forward_hook(lambda module, inputs, output: 2 * output)
        for _ in range(2):
            close(layer(x), 2 * expected)
    assert seen[0].equal(3 * x)
    close(seen[1], expected)


@every_kind
def test_backward_hooks_see_the_gradients(kind: Kind) -> None:
    layer, x = new(kind), map_for(kind).requires_grad_()
    seen: dict[str, Tensor] = {}
    layer.register_full_backward_pre_hook(lambda module, grads: seen.update(before=grads[0]))
    layer.register_full_backward_hook(lambda module, inputs, outputs: seen.update(into=inputs[0], out=outputs[0]))
    y = layer(x)
    gradient = torch.randn_like(y)
    y.backward(gradient)
    (expected,) = torch.autograd.grad(plain(layer, x), x, gradient)
    assert seen["before"].equal(gradient)
    assert seen["out"].equal(gradient)
    close(seen["into"], expected)
    close(x.grad, expected)


class Doubled(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return 2 * value


@every_convolution
@pytest.mark.parametrize("how", ["weight_norm", "a user's own", "with bias"])
def test_parametrisations(kind: Kind, how: str) -> None:
    layer, x = new(kind), map_for(kind)
    names = [*factors(layer), "bias"] if how == "with bias" else factors(layer)
    for name in names:
        if how == "weight_norm":
            parametrizations.weight_norm(layer, name)
        else:
            parametrize.register_parametrization(layer, name, Doubled())
    works(layer, x)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(1.5)
        works(layer, x)
        before = layer(x)
    for name in names:
        parametrize.remove_parametrizations(layer, name)
    close(layer(x), before)
    works(layer, x)


@every_convolution
def test_pruning(kind: Kind) -> None:
    layer, x = new(kind), map_for(kind)
    names = factors(layer)
    for name in names:
        prune.l1_unstructured(layer, name, 0.5)
        assert 0.4 < float((getattr(layer, name) == 0).double().mean()) < 0.6
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(1.5)
        y = layer(x)
        close(y, plain(layer, x))
    layer(x).square().sum().backward()
    for name in names:
        gradient = getattr(layer, f"{name}_orig").grad
        assert gradient.abs().max() > 0
        assert (gradient[getattr(layer, name) == 0] == 0).all()
        prune.remove(layer, name)
    close(layer(x), y)
    works(layer, x)


# Functional calls and transforms


@every_kind_with_parameters
def test_functional_call(kind: Kind) -> None:
    layer, other, x = new(kind), new(kind), map_for(kind)
    state = other.state_dict()
    with torch.no_grad():
        right = layer(x)
        close(functional_call(layer, state, x), other(x))
        assert layer(x).equal(right)
    for ours, theirs in zip(
        gradients(lambda x: functional_call(layer, dict(other.named_parameters()), x), other, x)
        if not isinstance(layer, GroupBatchNorm2d)
        else gradients(other, other, x),
        gradients(other, other, x),
        strict=True,
    ):
        close(ours, theirs)


@every_kind_with_parameters
def test_an_ensemble_in_one_call(kind: Kind) -> None:
    layers, x = [new(kind) for _ in range(3)], map_for(kind)
    parameters, buffers = stack_module_state(layers)  # type: ignore[arg-type]
    together = vmap(lambda ps, bs: functional_call(layers[0], (ps, bs), x))(parameters, buffers)
    for layer, y in zip(layers, together, strict=True):
        close(y, layer(x))


@every_kind
def test_vmap(kind: Kind) -> None:
    layer, maps = new(kind), torch.stack([map_for(kind) for _ in range(3)], 1)
    for y, x in zip(vmap(layer, in_dims=1)(maps), maps.unbind(1), strict=True):
        close(y, plain(layer, x))


@every_kind_with_parameters
def test_gradients_of_single_images(kind: Kind) -> None:
    layer, x = new(kind), map_for(kind)
    parameters = {name: value.detach() for name, value in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(layer, parameters, image[None]).square().sum()

    together = vmap(grad(loss), (None, 0))(parameters, x)
    for number, image in enumerate(x):
        one = torch.autograd.grad(plain(layer, image[None]).square().sum(), list(layer.parameters()))
        for name, gradient in zip(parameters, one, strict=True):
            close(together[name][number], gradient, rtol=1e-3, atol=1e-4)


@every_kind
def test_jvp_and_vjp(kind: Kind) -> None:
    layer, x, direction = new(kind), map_for(kind), map_for(kind)
    y, along = jvp(layer, (x,), (direction,))
    expected = jvp(partial(plain, layer), (x,), (direction,))
    close(y, expected[0])
    close(along, expected[1])
    y, back = vjp(layer, x)
    close(back(along)[0], vjp(partial(plain, layer), x)[1](along)[0])


@every_kind
def test_double_backward(kind: Kind) -> None:
    layer, x = new(kind).double(), map_for(kind, torch.float64).requires_grad_()
    wanted = [x, *layer.parameters()]

    def second(run: Callable[[Tensor], Tensor]) -> tuple[Tensor | None, ...]:
        (first,) = torch.autograd.grad(run(x).sin().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), wanted, allow_unused=True)

    for ours, theirs in zip(second(layer), second(partial(plain, layer)), strict=True):
        close(ours, theirs, rtol=1e-9, atol=1e-9)
    single = [x.detach().float().requires_grad_(), *layer.float().parameters()]
    (first,) = torch.autograd.grad(layer(single[0]).sin().sum(), single[0], create_graph=True)
    for ours, theirs in zip(
        torch.autograd.grad(first.square().sum(), single, allow_unused=True),
        second(partial(plain, layer.double())),
        strict=True,
    ):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            close(ours.double(), theirs, rtol=1e-3, atol=1e-3)


@every_kind
def test_autocast(kind: Kind) -> None:
    layer, x = new(kind), map_for(kind)
    with torch.no_grad():
        layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            y, expected = layer(x), plain(layer, x)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)
    works(layer, x)


@every_kind
def test_checkpointing(kind: Kind) -> None:
    layer, x = new(kind), map_for(kind)
    again = gradients(lambda x: checkpoint(layer, x, use_reentrant=False), layer, x)
    for ours, theirs in zip(again, gradients(layer, layer, x), strict=True):
        close(ours, theirs)


# Training


@every_kind_with_parameters
@pytest.mark.parametrize("use_buffers", [False, True])
def test_averages_of_a_network(kind: Kind, use_buffers: bool) -> None:
    layer, other, x = new(kind), new(kind), map_for(kind)
    average = AveragedModel(layer, use_buffers=use_buffers)
    for module in (layer, other, layer, other):
        average.update_parameters(module)
    middle = copy.deepcopy(layer)
    with torch.no_grad():
        for mine, one, two in zip(middle.parameters(), layer.parameters(), other.parameters(), strict=True):
            mine.copy_((one + two) / 2)
        if isinstance(middle, GroupBatchNorm2d):  # the buffers are averaged, or the latest
            for name in ("running_mean", "running_var"):
                mean = (getattr(layer, name) + getattr(other, name)) / 2
                getattr(middle, name).copy_(mean if use_buffers else getattr(other, name))
        close(average.eval()(x), plain(middle, x))


@pytest.fixture(scope="module")
def _one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@every_kind_with_parameters
@pytest.mark.usefixtures("_one_process")
def test_distributed_data_parallel(kind: Kind) -> None:
    layer, x = new(kind), map_for(kind)
    parallel = DistributedDataParallel(layer)
    parallel.eval()
    y = parallel(x)
    close(y, plain(layer, x))
    y.square().sum().backward()
    for parameter, expected in zip(
        layer.parameters(),
        torch.autograd.grad(plain(layer, x).square().sum(), list(layer.parameters())),
        strict=True,
    ):
        close(parameter.grad, expected, rtol=1e-3, atol=1e-3)


@every_kind_with_parameters
def test_an_optimiser_and_frozen_parameters(kind: Kind) -> None:
    layer, x = new(kind), map_for(kind)
    layer.bias.requires_grad_(False)
    frozen = layer.bias.clone()
    optimiser = torch.optim.AdamW(layer.parameters(), 0.1)
    with torch.no_grad():
        before = layer(x)
    layer(x).square().sum().backward()
    optimiser.step()
    assert layer.bias.equal(frozen)
    with torch.no_grad():
        assert not layer(x).equal(before)
    layer.bias.requires_grad_(True)
    works(layer, x)


# Graphs


@every_kind
def test_fx_inside_a_network(kind: Kind) -> None:
    layer, x = new(kind), map_for(kind)
    traced = torch.fx.symbolic_trace(nn.Sequential(layer, nn.ReLU()))
    assert len(traced.graph.nodes) == 4  # the layer is one node
    expected = plain(layer, x).relu()
    close(traced(x), expected)
    for twin in (copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))):
        close(twin(x), expected)
    for ours, theirs in zip(
        gradients(traced, traced, x), gradients(lambda x: plain(layer, x).relu(), layer, x), strict=True
    ):
        close(ours, theirs)


@pytest.mark.parametrize("name", [name for name in KINDS if name != "batch norm"])  # nor is nn.BatchNorm2d traced so
def test_fx_of_a_layer(name: str) -> None:
    layer, x = new(KINDS[name]), map_for(KINDS[name])
    traced = torch.fx.symbolic_trace(layer)
    close(traced(x), plain(layer, x))
    close(copy.deepcopy(traced)(x), plain(layer, x))
    for mine, theirs in zip(gradients(traced, layer, x), gradients(layer, layer, x), strict=True):
        close(mine, theirs)


def test_fx_of_a_batch_norm_says_what_to_do() -> None:
    with pytest.raises(InputError, match=r"only inside a network; trace an nn\.Sequential of it"):
        torch.fx.symbolic_trace(GroupBatchNorm2d(2))


@every_kind
def test_fx_runs_hooks_once(kind: Kind) -> None:
    layer, x = new(kind), map_for(kind)
    layer.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
    layer.register_forward_hook(lambda module, inputs, output: 3 * output)
    close(torch.fx.symbolic_trace(nn.Sequential(layer))(x), 3 * plain(layer, 2 * x))


@every_kind
def test_fx_of_a_subclass_runs_its_method_once(kind: Kind) -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return 3 * kind.build.forward(self, 2 * x)  # type: ignore[attr-defined]

    layer, x = new(kind), map_for(kind)
    layer.__class__ = type("Scaled", (kind.build,), {"forward": forward})  # type: ignore[arg-type]
    close(torch.fx.symbolic_trace(nn.Sequential(layer))(x), 3 * plain(layer, 2 * x))


def test_fx_of_a_residual_connection() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = GConv2d(2, 2, 3, padding=1, group="p4")

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x, residual=x, relu=True)

    block, x = Block(), torch.randn(ON_P4)
    expected = F.relu(plain(block.conv, x) + x)
    close(torch.fx.symbolic_trace(block)(x), expected)
    alone = torch.fx.symbolic_trace(block.conv)
    close(alone(x, residual=x, relu=True), expected)


@pytest.mark.parametrize("name", ["p4cnn", "gc-p4cnn", "c-z2cnn", "p4m-resnet44"])
def test_fx_of_a_network(name: str) -> None:
    net = create_model(name, width=2)
    images = torch.rand(2, *net.input_shape)
    traced = torch.fx.symbolic_trace(net)
    close(copy.deepcopy(traced)(images), net(images), rtol=1e-3, atol=1e-3)
    net.eval(), traced.eval()
    with torch.no_grad():
        close(traced(images), net(images), rtol=1e-3, atol=1e-3)


@every_kind
def test_compile(kind: Kind) -> None:
    torch.compiler.reset()
    layer, x = new(kind), map_for(kind)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    close(compiled(x), plain(layer, x))
    for ours, theirs in zip(gradients(compiled, layer, x), gradients(layer, layer, x), strict=True):
        close(ours, theirs)


@every_kind
def test_export(kind: Kind) -> None:
    layer, x = new(kind), map_for(kind)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: batch},)).module()
    close(program(x), plain(layer, x))
    more = torch.cat([x, x, x])
    close(program(more), plain(layer, more))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@every_kind
def test_jit_trace(kind: Kind) -> None:
    layer, x = new(kind), map_for(kind)
    with torch.no_grad():
        close(torch.jit.trace(layer, x)(x), plain(layer, x))


@every_kind
def test_fake_tensors(kind: Kind) -> None:
    with FakeTensorMode():
        layer = kind.make()
        y = layer(torch.randn(kind.shape))
        with torch.no_grad():
            assert layer.eval()(torch.randn(kind.shape)).shape == y.shape
    layer = new(kind)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        assert layer(mode.from_tensor(map_for(kind))).shape == y.shape
    assert layer(map_for(kind)).shape == y.shape


# The first pass


def in_fake_mode(layer: nn.Module, x: Tensor) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        layer(mode.from_tensor(x))


def in_inference_mode(layer: nn.Module, x: Tensor) -> None:
    with torch.inference_mode():
        layer(x)


def on_the_meta_device(layer: nn.Module, x: Tensor) -> None:
    with torch.device("meta"):
        copy.deepcopy(layer).to("meta")(x.to("meta"))
        layer(x)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "first",
    [
        in_fake_mode,
        in_inference_mode,
        on_the_meta_device,
        lambda layer, x: vmap(layer)(x[None]),
        lambda layer, x: grad(lambda x: layer(x).sum())(x),
        lambda layer, x: jvp(layer, (x,), (x,)),
        lambda layer, x: torch.compile(layer, backend="eager")(x),
        lambda layer, x: torch.export.export(layer, (x,)),
        lambda layer, x: torch.jit.trace(layer, x),
        lambda layer, x: torch.fx.symbolic_trace(layer)(x),
    ],
    ids=["fake", "inference", "meta", "vmap", "grad", "jvp", "compile", "export", "jit", "fx"],
)
def test_the_first_pass_of_a_process_spoils_no_later_one(monkeypatch: pytest.MonkeyPatch, first: Any) -> None:
    """Some things are made in the first pass and kept for all layers. An unusual pass must not leave its own there."""
    for kind in (KINDS[name] for name in ("full", "gc, irrep", "gc_in, irrep", "batch norm")):
        monkeypatch.setattr("gconv.functional.mixing._bases", {})
        layer, x = new(kind), map_for(kind)
        first(nn.Sequential(layer), x)
        works(new(kind), x)


# State dicts


@every_kind_with_parameters
def test_prefixes_of_a_state_dict(kind: Kind) -> None:
    layer, x = new(kind), map_for(kind)
    net = nn.Sequential(nn.ModuleDict({"part": new(kind)}))
    state = layer.state_dict(prefix="0.part.")
    assert state.keys() == net.state_dict().keys()
    net.load_state_dict(state)
    with torch.no_grad():
        assert net[0]["part"](x).equal(layer(x))


@every_kind_with_parameters
def test_a_part_of_a_state_dict(kind: Kind) -> None:
    layer, other, x = new(kind), new(kind), map_for(kind)
    with torch.no_grad():
        layer(x)
    kept = {name: value.clone() for name, value in layer.state_dict().items()}
    found = layer.load_state_dict({"bias": other.bias, "else": torch.ones(2)}, strict=False)
    assert found.missing_keys == [name for name in kept if name not in ("bias", "num_batches_tracked")]
    assert found.unexpected_keys == ["else"]
    for name, value in layer.state_dict().items():
        assert value.equal(other.bias if name == "bias" else kept[name])
    works(layer, x)
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict({"bias": other.bias})
    with pytest.raises(RuntimeError, match="size mismatch for bias"):
        layer.load_state_dict({"bias": torch.ones(7)}, strict=False)
