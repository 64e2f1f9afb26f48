"""Fine-tuning: the loss is the one that is documented, the teacher stays as it is, and a stopped run goes on."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import gconv
from analysis.fitting.distillation import Distillation, DistilledLoss, finetune
from gconv.system.errors import InputError


@pytest.fixture
def networks():
    torch.manual_seed(0)
    teacher = gconv.create_model("p4cnn", width=2)
    student = copy.deepcopy(teacher)
    student.set_submodule("conv2", gconv.SeparableGConv2d.from_dense(teacher.conv2, "gc", 1))
    student.set_submodule("conv4", gconv.SeparableGConv2d.from_dense(teacher.conv4, "g", 1))
    return student, teacher


@pytest.fixture
def train():
    generator = torch.Generator().manual_seed(0)
    return gconv.Split(torch.rand(30, 1, 28, 28, generator=generator), torch.arange(30) % 10)


def slow_loss(scores, wanted, labels, how):
    """Sums written out, in float64."""
    total = 0.0
    for score, target, label in zip(scores, wanted, labels, strict=True):
        hard = -torch.log_softmax(score, 0)[label]
        p = torch.softmax(target / how.temperature, 0)
        q = torch.softmax(score / how.temperature, 0)
        soft = sum(a * torch.log(a / b) for a, b in zip(p, q, strict=True))
        total = total + (1 - how.weight) * hard + how.weight * how.temperature**2 * soft
    return total / len(labels)


class Fixed(torch.nn.Module):
    def __init__(self, scores):
        super().__init__()
        self.scores = scores

    def forward(self, images):
        return self.scores


@settings(max_examples=20, deadline=None)
@given(st.floats(0, 1), st.floats(0.5, 20), st.integers(0, 100))
def test_the_loss_is_that_of_the_docstring(weight, temperature, seed):
    generator = torch.Generator().manual_seed(seed)
    scores, wanted = torch.randn(2, 4, 5, generator=generator, dtype=torch.float64) * 3
    labels = torch.tensor([0, 4, 2, 2])
    how = Distillation(weight, temperature)
    with DistilledLoss(Fixed(scores), Fixed(wanted), [], how) as loss:
        got = loss(torch.empty(4, 1), scores, labels)
    torch.testing.assert_close(got, slow_loss(scores, wanted, labels, how), rtol=1e-10, atol=1e-12)


def test_the_teachers_own_scores_cost_nothing(networks, train):
    _, teacher = networks
    scores = teacher.eval()(train.images)
    with DistilledLoss(copy.deepcopy(teacher), teacher, [], Distillation(weight=1.0)) as loss:
        assert loss(train.images, scores, train.labels).item() == pytest.approx(0, abs=1e-6)


def test_the_target_layers_adds_the_relative_error_of_every_layer(networks, train):
    student, teacher = (network.double().eval() for network in networks)
    images, labels, names = train.images.double(), train.labels, ("conv2", "conv4")
    outputs = {network: {} for network in (student, teacher)}
    hooks = [
        network.get_submodule(name).register_forward_hook(lambda m, i, o, kept=kept, name=name: kept.update({name: o}))
        for network, kept in outputs.items()
        for name in names
    ]
    scores, wanted = student(images), teacher(images)
    for hook in hooks:
        hook.remove()
    errors = [
        (outputs[student][name] - outputs[teacher][name]).square().sum() / outputs[teacher][name].square().sum()
        for name in names
    ]
    how = Distillation(weight=0.7, target="layers")
    expected = slow_loss(scores, wanted, labels, how) + 0.7 * sum(errors) / len(names)
    with DistilledLoss(student, teacher, names, how) as loss:
        torch.testing.assert_close(loss(images, student(images), labels), expected, rtol=1e-9, atol=0)
    assert not any(module._forward_hooks for network in networks for module in network.modules())


def test_without_weight_the_teacher_is_not_asked(networks, train):
    student, teacher = networks
    teacher.forward = None  # would raise
    with DistilledLoss(student, teacher, [], Distillation(weight=0.0)) as loss:
        scores = student(train.images)
        torch.testing.assert_close(loss(train.images, scores, train.labels), F.cross_entropy(scores, train.labels))


@pytest.mark.parametrize("target", ["scores", "layers"])
def test_the_teacher_stays_as_it_is_and_the_student_learns(networks, train, target):
    student, teacher = networks
    teacher.train()
    before = copy.deepcopy(teacher.state_dict())
    start = copy.deepcopy(student.state_dict())
    how = Distillation(target=target)
    recipe = finetune(student, teacher, ["conv2", "conv4"], train, epochs=3, distillation=how)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(module.training for module in teacher.modules())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert any(not torch.equal(value, start[name]) for name, value in student.state_dict().items())
    assert not any(module._forward_hooks for network in networks for module in network.modules())
    losses = [row["train_loss"] for row in recipe["history"]]
    assert losses[-1] < losses[0]
    assert recipe["distillation"] == {"weight": 0.9, "temperature": 4.0, "target": target}
    assert recipe["epochs"] == 3


def test_the_teachers_batch_norm_uses_its_running_statistics(networks, train):
    """In training mode it would answer by the statistics of the batch, and move them."""
    student, teacher = networks
    teacher.train()
    expected = copy.deepcopy(teacher).eval()(train.images)
    with DistilledLoss(student, teacher, [], Distillation(weight=1.0)) as loss:
        assert loss(train.images, expected, train.labels).item() == pytest.approx(0, abs=1e-6)


def test_the_seed_decides_and_a_stopped_run_goes_on_to_the_same_bits(networks, train):
    student, teacher = networks
    runs = {}
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        runs[name] = copy.deepcopy(student)
        finetune(runs[name], teacher, [], train, epochs=3, seed=seed)

    class Stopped(Exception):
        pass

    kept = {}

    def stop(row, resume):
        kept["resume"], kept["student"] = copy.deepcopy(resume), copy.deepcopy(interrupted.state_dict())
        if row["epoch"] == 2:
            raise Stopped

    interrupted = copy.deepcopy(student)
    with pytest.raises(Stopped):
        finetune(interrupted, teacher, [], train, epochs=3, after_epoch=stop)
    continued = copy.deepcopy(student)
    continued.load_state_dict(kept["student"])
    recipe = finetune(continued, teacher, [], train, epochs=3, resume=kept["resume"])
    assert [row["epoch"] for row in recipe["history"]] == [3]

    def same(one, other):
        pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
        return all(torch.equal(a, b) for a, b in pairs)

    assert same(runs["first"], runs["again"])
    assert same(runs["first"], continued)
    assert not same(runs["first"], runs["other"])


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ({"weight": -0.1}, "weight .* 0 to 1"),
        ({"weight": 1.1}, "weight .* 0 to 1"),
        ({"weight": float("nan")}, "weight .* 0 to 1"),
        ({"temperature": 0}, "temperature .* above 0"),
        ({"temperature": float("inf")}, "temperature .* above 0"),
        ({"temperature": float("nan")}, "temperature .* above 0"),
        ({"target": "logits"}, "logits.*accepted: scores, layers"),
    ],
)
def test_a_loss_out_of_range_is_refused(what, words):
    with pytest.raises(InputError, match=words):
        Distillation(**what)
