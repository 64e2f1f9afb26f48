"""On a GPU: the same as on a CPU, in every memory format and precision, also recorded as a graph. Skipped without."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gconv
from gconv.functional.expansion import channels_last, is_strictly_channels_last, on_tensor_cores
from gconv.functional.forms import FORMS
from gconv.nn.batchnorm import GroupBatchNorm2d

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

FORMATS = [torch.contiguous_format, torch.channels_last]
NAMES = ["p4cnn", "g-p4cnn-small", "gc-p4cnn", "p4m-resnet44", "gc-p4m-resnet44"]


@pytest.fixture(params=[False, True], ids=["fp32", "tf32"])
def tf32(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    allowed: bool = request.param
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
    return allowed


def layers() -> list[tuple[str, str, str | None]]:
    separable = [("p4m", form.name, how) for form in FORMS.values() for how in form.executions]
    return [("p4", "full", None), ("p4", "lifting", None), *separable]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("group", "kind", "execution"), layers())
def test_layers_and_their_gradients_are_those_of_the_cpu(
    group: str, kind: str, execution: str | None, format: torch.memory_format
) -> None:
    if kind == "lifting":
        layer: nn.Module = gconv.LiftingConv2d(3, 4, 3, padding=1, group=group, dtype=torch.float64)
        x = torch.randn(2, 3, 7, 7, dtype=torch.float64)
    else:
        order = gconv.group(group).order
        x = torch.randn(2, 3, order, 7, 7, dtype=torch.float64)
        if kind == "full":
            layer = gconv.GConv2d(3, 4, 3, padding=1, group=group, dtype=torch.float64)
        else:
            layer = gconv.SeparableGConv2d(
                3, 4, 3, padding=1, group=group, form=kind, rank=2, execution=execution, dtype=torch.float64
            )

    def result(x: Tensor, device: str) -> list[Tensor]:
        layer.to(device).train().zero_grad()
        x = x.detach().to(device).requires_grad_()
        y = layer(x if x.dim() == 5 else x.contiguous(memory_format=format))
        y.square().sum().backward()
        with torch.no_grad():
            scored = layer.eval()(x)
        return [t.detach().cpu() for t in (y, scored, x.grad, *(p.grad for p in layer.parameters())) if t is not None]

    for got, expected in zip(result(x, "cuda"), result(x, "cpu"), strict=True):
        assert (got - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("relu", [False, True])
def test_batch_norm_is_that_of_the_cpu(format: torch.memory_format, relu: bool) -> None:
    maps = torch.randn(4, 8 * 3, 5, 6, dtype=torch.float64)

    def result(device: str) -> list[Tensor]:
        norm = GroupBatchNorm2d(3, dtype=torch.float64, device=device)
        with torch.no_grad():
            for number, parameter in enumerate(norm.parameters()):
                parameter += torch.arange(3, device=device) * (number + 1)
        planar = maps.to(device).contiguous(memory_format=format).requires_grad_()
        y = norm(gconv.functional.expansion.from_group_major(planar, 8), relu)
        y.pow(3).sum().backward()
        found = (y, planar.grad, *(p.grad for p in norm.parameters()), norm.running_mean, norm.running_var)
        return [t.detach().cpu() for t in found if t is not None]

    for got, expected in zip(result("cuda"), result("cpu"), strict=True):
        assert (got - expected).norm() <= 1e-12 * expected.norm()


def test_maps_are_channels_last_on_tensor_cores_only(tf32: bool) -> None:
    images = torch.rand(2, 3, 8, 8, device="cuda")
    assert on_tensor_cores(images) == is_strictly_channels_last(channels_last(images)) == tf32
    assert is_strictly_channels_last(channels_last(images.half()))
    with torch.autocast("cuda", torch.bfloat16):
        assert is_strictly_channels_last(channels_last(images))
    assert not on_tensor_cores(images.double()) and not on_tensor_cores(images.cpu())


@pytest.mark.parametrize("name", NAMES)
def test_networks_score_as_on_the_cpu(name: str, tf32: bool) -> None:
    net = scored(name)
    images = torch.rand(3, *net.input_shape)
    with torch.no_grad():
        expected = net.double()(images.double())
        net.float().cuda()
        for network in (net, gconv.fuse(net), gconv.to_plain(net)):
            got = network(images.cuda()).cpu()
            assert (got - expected).norm() <= (2e-2 if tf32 else 1e-4) * expected.norm()
            with torch.autocast("cuda", torch.bfloat16):
                rough = network(images.cuda()).cpu()
            assert (rough - expected).norm() <= 0.2 * expected.norm()


@pytest.mark.parametrize("name", ["p4cnn", "gc-p4cnn"])
def test_a_fused_network_follows_its_parameters(name: str) -> None:
    net = gconv.fuse(scored(name).cuda())
    images = torch.rand(3, *net.input_shape, device="cuda")

    def halve(net: gconv.Model) -> None:
        net.fc.weight.mul_(0.5)  # type: ignore[operator, union-attr]

    def load(net: gconv.Model) -> None:
        net.load_state_dict({key: value * 0.9 for key, value in net.state_dict().items()})

    def replace(net: gconv.Model) -> None:
        net.fc.weight = nn.Parameter(net.fc.weight + 1)

    def move(net: gconv.Model) -> None:
        net.cpu().cuda()

    def hook(net: gconv.Model) -> None:
        net.fc.register_forward_hook(lambda *_: torch.ones(3, 10, device="cuda"))

    changes: list[Callable[[gconv.Model], None]] = [lambda net: None, halve, load, replace, move, hook]
    with torch.no_grad():
        for change in changes:
            change(net)
            got, expected = net(images), net.layer_by_layer(images)
            assert (got - expected).norm() <= 2e-2 * expected.norm()
    assert net.executor.program is not None


@pytest.mark.parametrize("direction", ["inference", "training"])
@pytest.mark.parametrize("name", ["p4cnn", "gc-p4m-resnet44"])
def test_a_pass_can_be_recorded_as_a_graph(name: str, direction: str, tf32: bool) -> None:
    training = direction == "training"
    net = scored(name).cuda().train(training)
    images = torch.rand(4, *net.input_shape, device="cuda")
    static = images.clone()

    def step() -> Tensor:
        with torch.set_grad_enabled(training):
            scores: Tensor = net(static)
        if training:
            net.zero_grad(set_to_none=False)
            scores.square().sum().backward()
        return scores.detach()

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scores = step()
    static.copy_(images.flip(0))
    graph.replay()
    again = step()
    assert (scores - again).norm() <= 2e-2 * again.norm()
    assert scores.isfinite().all() and scores.std() > 0


def scored(name: str) -> gconv.Model:
    """A network in eval mode whose batch norm has seen images."""
    net = gconv.create_model(name)
    with torch.no_grad():
        for _ in range(3):
            net.train()(torch.rand(8, *net.input_shape))
    return net.eval()
