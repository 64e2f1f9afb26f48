"""What a fused network runs in place of its layers: the same scores, and never those of a network that is no more."""

from copy import deepcopy

import pytest
import torch
from torch import nn

import gconv
from analysis import convert
from gconv import MODELS, create_model
from gconv.deploy.fingerprint import Fingerprint
from gconv.deploy.fuse import fuse
from gconv.deploy.program import Program
from gconv.nn.batchnorm import GroupBatchNorm2d


def network(name="p4cnn", **changes):
    """A small network whose batch norms know some maps, and images."""
    torch.manual_seed(0)
    net = create_model(name, width=changes.pop("width", 3), **changes)
    images = torch.rand(3, *net.input_shape)
    for module in net.modules():
        if isinstance(module, GroupBatchNorm2d):
            module.momentum = 1.0
    net.train()(images)
    return net.eval(), images


def fused(name="p4cnn", **changes):
    """The same, fused."""
    net, images = network(name, **changes)
    return fuse(net), images


def layers(net, images):
    """The slow twin: layer by layer."""
    with torch.no_grad():
        return net.layer_by_layer(images)


def frozen(net, images):
    with torch.no_grad():
        return net(images)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch", [1, 2, 33])
def test_the_scores_are_those_of_the_layers(name, batch):
    net, images = fused(name)
    images = torch.rand(batch, *images.shape[1:])
    torch.testing.assert_close(frozen(net, images), layers(net, images), rtol=1e-5, atol=1e-5)
    irreps = any(getattr(m, "runs_in_irreps", False) and m.kernel_size != (1, 1) for m in net.modules())
    plain = net.spec.separable in (None, "c", "g") and not irreps  # the others do not run as ordinary convolutions
    assert (net.executor.program is not None) == plain


@pytest.mark.parametrize("group", ["p2", "pm", "pmm", "p4", "p4m"])
def test_on_any_group_and_with_converted_layers(group):
    net, _ = convert(create_model("p4cnn", width=3, group=group).eval(), "gc", rank=2, execution="dense")
    net, images = fuse(net), torch.rand(2, 1, 28, 28)
    torch.testing.assert_close(frozen(net, images), layers(net, images), rtol=1e-5, atol=1e-5)
    assert net.executor.program is not None


def test_it_is_made_once():
    net, images = fused()
    frozen(net, images)
    made = net.executor.program
    frozen(net, images)
    assert net.executor.program is made


def by_data(net):
    net.conv3.weight.data.mul_(2)


def by_numpy(net):
    net.fc.weight.detach().numpy()[0] += 1


def by_a_new_parameter(net):
    net.conv2.bias = nn.Parameter(net.conv2.bias.detach() + 1)


def by_no_bias(net):
    net.conv2.bias = None


def by_a_state(net):
    net.load_state_dict({name: 1.1 * value for name, value in net.state_dict().items()})


def by_another_layer(net):
    net.conv4 = gconv.GConv2d(3, 3, 3, group="p4")


def by_a_larger_pool(net):
    net.group_pool = gconv.GroupMeanPool()


CHANGES = (by_data, by_numpy, by_a_new_parameter, by_no_bias, by_a_state, by_another_layer, by_a_larger_pool)


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_network_gives_its_new_scores(change):
    net, images = fused()
    before = frozen(net, images)
    with torch.no_grad():
        change(net)
    net.eval()
    expected = layers(net, images)
    assert not torch.allclose(before, expected)
    torch.testing.assert_close(frozen(net, images), expected, rtol=1e-5, atol=1e-5)


def test_a_changed_statistic_is_seen():
    net, images = fused("p4m-resnet44", width=2)
    frozen(net, images)
    made = net.executor.program
    frozen(net, images)
    assert net.executor.program is made
    net.bn.running_mean += 1
    torch.testing.assert_close(frozen(net, images), layers(net, images), rtol=1e-5, atol=1e-5)


def test_a_layer_that_is_watched_runs():
    net, images = fused()
    frozen(net, images)
    seen = []
    handle = net.conv3.register_forward_hook(lambda module, given, out: seen.append(tuple(out.shape)))
    frozen(net, images)
    assert seen == [(3, 3, 4, 10, 10)]
    handle.remove()
    frozen(net, images)
    assert net.executor.program is not None and len(seen) == 1


def test_a_layer_that_runs_factorized_does():
    net, images = fused("gc-p4cnn")
    for layer in net.modules():
        if isinstance(layer, gconv.SeparableGConv2d):
            layer.execution = "dense"
    frozen(net, images)
    assert net.executor.program is not None
    net.conv2.execution = "factorized"
    frozen(net, images)
    assert net.executor.program is None


def test_gradients_doubles_and_training_go_through_the_layers():
    net, images = fused()
    net(images).sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    frozen(net.double(), images.double())
    frozen(net.float().train(), images)
    assert net.executor.program is None


def test_the_network_keeps_its_gradients():
    net, images = fused()
    frozen(net, images)
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_a_wrong_image_is_refused_as_ever():
    net, _ = fused()
    with pytest.raises(gconv.InputError, match="shape"):
        frozen(net, torch.rand(2, 3, 28, 28))


@pytest.mark.parametrize("batch", [2, 40])
def test_what_is_not_a_number_stays_so(batch):
    net, images = fused()
    images = torch.rand(batch, *images.shape[1:])
    images[1] = float("nan")
    assert frozen(net, images).isnan().any(1).tolist() == layers(net, images).isnan().any(1).tolist()
    with torch.no_grad():
        net.conv3.weight[0, 0] = float("nan")
    assert frozen(net, images.nan_to_num()).isnan().all()


def test_a_copy_makes_its_own():
    net, images = fused()
    frozen(net, images)
    twin = deepcopy(net)
    assert twin.executor.program is None and set(twin.state_dict()) == set(net.state_dict())
    with torch.no_grad():
        twin.fc.bias.add_(1)
    torch.testing.assert_close(frozen(twin, images), frozen(net, images) + 1)


def test_a_network_that_is_not_fused_has_none():
    net = create_model("p4cnn", width=2).eval()
    frozen(net, torch.rand(1, 1, 28, 28))
    assert net.executor is None


def test_without_onednn_it_is_the_plain_network(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    net, images = fused()
    images = torch.rand(40, *images.shape[1:])
    torch.testing.assert_close(frozen(net, images), layers(net, images), rtol=1e-5, atol=1e-5)
    assert Program(net).plain is not None and Program(net).batched is None


def test_batches_run_with_relu_inside_the_convolutions():
    net, _ = fused()
    made = Program(net)
    inside = [type(module).__name__ for module in made.batched.modules()].count("_ConvReLU")
    assert inside == 6  # of seven convolutions the second has its ReLU behind the pooling
    assert {id(p) for p in made.batched.parameters()} == {id(p) for p in made.plain.parameters()}


@pytest.mark.parametrize("by_value", [True, False])
def test_a_fingerprint_sees_what_is_changed(by_value):
    net, _ = fused()
    made = Fingerprint(net, by_value=by_value)
    assert made.matches(net) and not made.matches(deepcopy(net))
    with torch.no_grad():
        net.conv2.weight.mul_(1)
    assert made.matches(net) == by_value  # the values are the same, but only one kind has looked at them
    made = Fingerprint(net, by_value=by_value)
    net.load_state_dict({name: 2 * value for name, value in net.state_dict().items()})
    assert not made.matches(net)


def by_a_forward_of_its_own(net):
    layer = net.conv3
    layer.forward = lambda x, **kwargs: 2 * type(layer).forward(layer, x, **kwargs)


def by_a_subclass(net):
    class Doubled(type(net.conv3)):
        def forward(self, x, **kwargs):
            return 2 * super().forward(x, **kwargs)

    net.conv3.__class__ = Doubled


def by_a_hook(net):
    net.conv3.register_forward_hook(lambda layer, given, output: 2 * output)


def by_a_hook_before(net):
    net.conv3.register_forward_pre_hook(lambda layer, given: (2 * given[0],))


def by_a_global_hook(net):
    twice = torch.nn.modules.module.register_module_forward_hook(
        lambda layer, given, output: 2 * output if layer is net.conv3 else None
    )
    return twice.remove


OTHER_FUNCTIONS = (by_a_forward_of_its_own, by_a_subclass, by_a_hook, by_a_hook_before, by_a_global_hook)


@pytest.mark.parametrize("when", ["before fusing", "after fusing", "after a pass"])
@pytest.mark.parametrize("change", OTHER_FUNCTIONS)
def test_a_layer_that_computes_something_else_is_called(change, when):
    net, images = network()
    before = layers(net, images)
    if when != "before fusing":
        net = fuse(net)
    if when == "after a pass":
        frozen(net, images)
    undo = change(net) or (lambda: None)
    try:
        expected = layers(net, images)
        assert not torch.allclose(before, expected, rtol=1e-3)
        net = fuse(net) if when == "before fusing" and change is not by_a_global_hook else net
        torch.testing.assert_close(frozen(net, images), expected, rtol=1e-5, atol=1e-6)
        if change is not by_a_global_hook:
            with pytest.raises(gconv.InputError, match="conv3 has "):
                gconv.to_plain(net)
    finally:
        undo()
