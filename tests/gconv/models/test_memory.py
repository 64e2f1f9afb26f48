"""The peak memory of a pass against sums done by hand."""

import itertools
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gconv import GConv2d
from gconv.functional.expansion import from_group_major
from gconv.models.memory import forward_memory, training_memory

few = settings(max_examples=20, deadline=None)
widths = st.lists(st.integers(1, 50), min_size=2, max_size=6)


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def chain(sizes, dtype):
    layers = [nn.Linear(a, b, dtype=dtype) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*layers)


@few
@given(sizes=widths, batch=st.integers(1, 4), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_a_chain_holds_an_input_and_an_output(sizes, batch, dtype):
    # The input of the first layer is the caller's; of the others input and output are alive together.
    own = [0, *(batch * size * dtype.itemsize for size in sizes[1:])]
    expected = max(a + b for a, b in itertools.pairwise(own))
    assert forward_memory(chain(sizes, dtype), torch.randn(batch, sizes[0], dtype=dtype)) == expected


@few
@given(channels=st.lists(st.integers(1, 4), min_size=2, max_size=4), padding=st.integers(0, 1))
def test_convolutions_and_activations(channels, padding):
    parts, maps, n = [], [0], 8
    for a, b in itertools.pairwise(channels):
        parts += [nn.Conv2d(a, b, 3, padding=padding, dtype=torch.float64), nn.ReLU()]
        n += 2 * padding - 2
        maps += [2 * b * n * n * 8] * 2
    images = torch.randn(2, channels[0], 8, 8, dtype=torch.float64)
    assert forward_memory(nn.Sequential(*parts), images) == max(a + b for a, b in itertools.pairwise(maps))


def test_what_is_needed_again_stays_alive():
    def branches(x):
        a = x * 2  # 1 map
        b = a.repeat(1, 3)  # 1 + 3
        c = b.sum(1, keepdim=True)  # and 1 / 10
        return a + c

    x = torch.randn(1, 10, dtype=torch.float64)
    assert forward_memory(Function(branches), x) == 80 + 240 + 8 + 80


def test_what_is_dropped_is_free_again():
    def one_after_the_other(x):
        for _ in range(5):
            x.repeat(3, 1)
        return x.repeat(2, 1)

    x = torch.randn(1, 10, dtype=torch.float64)
    assert forward_memory(Function(one_after_the_other), x) == 240


def test_what_is_returned_and_kept_counts():
    x = torch.randn(1, 10, dtype=torch.float64)
    kept = []
    assert forward_memory(Function(lambda x: kept.extend(x + n for n in range(7))), x) == 7 * 80


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.view(2, 5),
        lambda x: x.unflatten(1, (2, 5)).transpose(1, 2)[:, 1:],
        lambda x: x.relu_(),
        lambda x: x.add_(1).flatten(),
        lambda x: x,
    ],
)
def test_views_and_operations_in_place_take_nothing(function):
    assert forward_memory(Function(function), torch.randn(1, 10)) == 0


def test_a_view_keeps_all_that_it_is_of():
    def view_of_a_part(x):
        part = x.repeat(5, 1)[0]
        return part + 1

    assert forward_memory(Function(view_of_a_part), torch.randn(1, 10, dtype=torch.float64)) == 400 + 80


def test_broadcast_results_count_what_they_store():
    x = torch.randn(1, 10, dtype=torch.float64)
    assert forward_memory(Function(lambda x: (x + 1).expand(1000, 10)), x) == 80


def test_gaps_between_entries_count():
    every_other = Function(lambda x: torch.empty_strided((10,), (2,), dtype=torch.float64))
    assert forward_memory(every_other, torch.randn(1)) == 8 * 19


def test_operations_with_several_results():
    x = torch.randn(1, 10, dtype=torch.float64)
    assert forward_memory(Function(lambda x: x.sort(1)), x) == 80 + 80  # values and whole numbers
    assert forward_memory(Function(lambda x: (x + 1).split(3, 1)), x) == 80


def test_weights_and_gradients_do_not_count():
    layer = nn.Linear(100, 1).double()
    assert forward_memory(layer, torch.randn(1, 100, dtype=torch.float64)) == 8
    deep = nn.Sequential(*(nn.Sequential(nn.Linear(5, 5), nn.Sigmoid()) for _ in range(10)))
    # Beside the input and the output of a part what its block was given is alive.
    assert forward_memory(deep, torch.randn(1, 5, requires_grad=True)) == 3 * 5 * 4
    assert all(p.grad is None for p in deep.parameters())


def test_a_second_pass_takes_the_same():
    model, x = chain([5, 9, 2], torch.float32), torch.randn(3, 5)
    assert len({forward_memory(model, x) for _ in range(4)}) == 1


@pytest.mark.parametrize("on", ["p4", "p4m"])
def test_a_group_convolution_holds_its_expanded_filter(on):
    layer = GConv2d(2, 3, 3, group=on, bias=False, dtype=torch.float64)
    s = layer.group.order
    expanded = 8 * 3 * s * 2 * s * 9
    output = 8 * 3 * s * 8 * 8
    x = from_group_major(torch.randn(1, s * 2, 10, 10, dtype=torch.float64), s)  # as layers give maps: not copied
    # Gathered, then copied into the order of the convolution; or beside the output.
    assert forward_memory(layer.train(), x) == max(2 * expanded, expanded + output)
    small = from_group_major(torch.randn(1, s * 2, 3, 3, dtype=torch.float64), s)
    assert forward_memory(layer, small) == 2 * expanded


def test_a_function_that_fails_leaves_no_trace():
    with pytest.raises(RuntimeError):
        forward_memory(nn.Linear(3, 3), torch.randn(2, 2))
    assert torch.is_grad_enabled()
    assert forward_memory(Function(F.relu), torch.randn(1, 4)) == 16


# --- a forward and a backward pass


@few
@given(a=st.integers(1, 40), classes=st.integers(2, 8), batch=st.integers(1, 6))
def test_a_linear_layer_in_training(a, classes, batch):
    layer, scores = nn.Linear(a, classes, dtype=torch.float64), 8 * batch * classes
    expected = max(
        3 * scores + 8 + 8,  # log-probabilities, their gradient and that of the scores; the loss and its gradient
        scores + 8 + 8 + 8 * classes * a + 8 * classes,  # the gradients of scores, weight and bias
    )
    assert training_memory(layer, torch.randn(batch, a, dtype=torch.float64)) == expected


@few
@given(a=st.integers(1, 40), hidden=st.integers(1, 40), batch=st.integers(1, 6))
def test_two_layers_in_training(a, hidden, batch):
    parts = [nn.Linear(a, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, 3, bias=False)]
    scores, map_, first, second = 8 * batch * 3, 8 * batch * hidden, 8 * hidden * a, 8 * 3 * hidden
    expected = 16 + max(  # the loss and its gradient, and:
        2 * map_ - 16,  # what goes into the activation and what comes out, before there is a loss
        map_ + 3 * scores,  # beside the hidden map, which is kept, what the loss of one layer takes
        map_ + scores + second + map_,  # the gradients of scores, second weight and hidden map
        3 * map_ + second,  # the hidden map and its gradients after and before the activation
        map_ + second + first,  # the gradients that are left, and that of the hidden map
    )
    assert training_memory(nn.Sequential(*parts).double(), torch.randn(batch, a, dtype=torch.float64)) == expected


def test_what_is_kept_for_the_backward_pass_counts():
    """Of ten sigmoids a forward pass without gradients holds two maps, one for training all ten, and three more."""
    deep = nn.Sequential(nn.Linear(1, 1000), *(nn.Sigmoid() for _ in range(10)), nn.Linear(1000, 2)).double()
    images = torch.randn(4, 1, dtype=torch.float64)
    assert forward_memory(deep, images) == 2 * 32_000
    assert 10 * 32_000 < training_memory(deep, images) < 14 * 32_000


def test_gradients_count_and_are_left_on_the_model():
    model = nn.Linear(2000, 3, dtype=torch.float64).eval()
    images = torch.randn(1, 2000, dtype=torch.float64)
    weight = 8 * 3 * 2000
    first = training_memory(model, images)
    assert weight < first < 1.1 * weight
    assert model.weight.grad is not None
    assert model.training
    assert training_memory(model, images) == first
    model.weight.requires_grad_(False)
    assert training_memory(model, images) < 500


FAULTS = """
import resource, torch, gconv
model, images = gconv.load({path!r}), torch.rand(16, 1, 28, 28)
def faults(passes):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(passes):
        model(images)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
with torch.inference_mode():
    faults(10)
    print(faults(10))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="how glibc keeps memory")
def test_a_network_that_was_loaded_runs_without_page_faults():
    """Otherwise there are some 25,000, in nine processes of ten; now a thousand, of memory that is new."""
    path = Path(__file__).parents[3] / "checkpoints" / "p4cnn-w30-rotmnist-regen.pt"
    for _ in range(2):
        run = [sys.executable, "-c", FAULTS.format(path=str(path))]
        assert int(subprocess.run(run, capture_output=True, check=True).stdout) < 3000
