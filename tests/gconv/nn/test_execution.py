"""What ``execution="auto"`` stands for: on machines of every class, in passes of every kind, and in files."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import pytest
import torch

from gconv import FORMS, GROUPS, GConv2d, Sampling, SeparableGConv2d, cost, create_model, group, load, save
from gconv.functional.expansion import channels_last, from_group_major
from gconv.functional.form_base import FilterShape
from gconv.functional.mixing import DirectMixing, IrrepMixing, basis_of
from gconv.kernels.dispatch import KERNELS, in_basis_pays
from gconv.kernels.library import find_library, kernel_class
from gconv.nn.execution import auto_execution
from tests.gconv.kernels.comparing import built, kernel_of_pass

HERE = ["none", *(find_library().library.processor if find_library().library else ())]
IRREP_FORMS = [name for name, form in FORMS.items() if "irrep" in form.executions]
every_form = pytest.mark.parametrize("form", FORMS)
irrep_forms = pytest.mark.parametrize("form", IRREP_FORMS)


def separable(form, channels=10, on="p4", **how):
    return SeparableGConv2d(channels, channels, 3, group=on, form=form, **{"padding": 1} | how)


def map_for(layer, size=5):
    """In the layout that the compiled kernel takes."""
    order = layer.group.order
    x = from_group_major(channels_last(torch.randn(1, layer.in_channels * order, size, size)), order)
    return x.to(layer.mix.dtype)


def run_as(layer, x):
    """How a pass ran: by the kernel or without, and in which execution."""
    seen = []
    kinds = {DirectMixing: "factorized", IrrepMixing: "irrep", torch.Tensor: "factorized"}
    filters, expanded = type(layer.form).filters, SeparableGConv2d._expanded

    def watched_filters(*arguments, **options):
        made = filters(*arguments, **options)
        seen.append(kinds[type(made[0])])
        return made

    def watched_expansion(*arguments):
        seen.append("dense")
        return expanded(*arguments)

    watching = patch.object(type(layer.form), "filters", watched_filters)
    with watching, patch.object(SeparableGConv2d, "_expanded", watched_expansion):
        kernel = kernel_of_pass(layer, x)
    if kernel is not None:
        assert not seen
        return "kernel", "irrep" if kernel.in_basis else "factorized"
    return "no kernel", seen[0]


# --- the rule


@pytest.mark.parametrize("kernel", KERNELS)
@every_form
def test_auto_is_the_rule_of_the_kernel_where_there_is_one_and_else_that_of_pytorch(form, kernel):
    found = set()
    for on in GROUPS:
        for channels in (1, 3, 8, 10, 64, 100):
            for stride in (1, 2):
                shape = FilterShape(channels, channels, group(on).order, 3)
                execution = auto_execution(FORMS[form], group(on), shape, 1, Sampling(stride, 1, 1), kernel)
                pays = in_basis_pays(group(on), channels, channels, stride, kernel)
                assert (pays is None) == (kernel == "none")
                if pays is None:
                    pays = basis_of(group(on)).pays(channels, channels)
                expected = "irrep" if pays and form in IRREP_FORMS else FORMS[form].default_execution
                assert execution == expected
                found.add(execution)
    assert found == ({"factorized", "irrep"} if form in IRREP_FORMS else {FORMS[form].default_execution})


@irrep_forms
@pytest.mark.parametrize("size", [(16, Sampling()), (3, Sampling(1, 3, 1)), (3, Sampling(1, 0, 2))])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_size_that_the_kernel_does_not_take_is_under_the_rule_without_it(form, size, kernel):
    k, sampling = size
    p4m = group("p4m")
    few, many = (auto_execution(FORMS[form], p4m, FilterShape(n, n, 8, k), 1, sampling, kernel) for n in (8, 64))
    assert (few, many) == ("factorized", "irrep")


# --- what a layer says, and does


@every_form
def test_auto_is_the_default_and_what_is_set_stays(form):
    for layer in (separable(form), separable(form, execution=None), separable(form, execution="auto")):
        assert layer.execution == "auto"
        assert repr(layer).endswith("execution=auto)")
    given = separable(form)
    for layer in (
        SeparableGConv2d.like(given, form, 1),
        SeparableGConv2d.from_dense(given, form, 1, None),
        SeparableGConv2d.from_factors(given, form, given.mix, given.spatial),
    ):
        assert layer.execution == "auto"
        for execution in FORMS[form].executions:
            layer.execution = execution
            assert layer.execution == layer.resolved_execution == execution
        layer.execution = "auto"
        assert layer.resolved_execution == separable(form).resolved_execution
    full = GConv2d(2, 2, 3, group="p4")
    assert full.execution == full.resolved_execution == "dense"


@every_form
@pytest.mark.parametrize(("on", "channels"), [("p4", 4), ("p4", 10), ("p4m", 8), ("p4m", 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_layer_runs_as_it_says(form, on, channels, dtype):
    layer = separable(form, channels, on, dtype=dtype).eval()
    x = map_for(layer)
    with torch.no_grad():
        by, execution = run_as(layer, x)
    if by == "kernel" and form not in IRREP_FORMS:  # which runs the full filter (GConv2d)
        assert layer.runs_in_irreps
        execution = "dense"
    assert execution == layer.resolved_execution
    if dtype == torch.float64:
        assert by == "no kernel"
    if form in IRREP_FORMS and dtype == torch.float32:
        assert by == ("no kernel" if kernel_class() == "none" else "kernel")


@contextmanager
def exporting():
    """What an exported program is made of: it may run where there is no kernel."""
    yes = {"new": lambda: True}
    with patch("torch.compiler.is_compiling", **yes), patch("torch.compiler.is_exporting", **yes, create=True):
        yield


WAYS = {
    "float64": ({"dtype": torch.float64}, nullcontext, lambda x: x),
    "autocast": ({}, lambda: torch.autocast("cpu", torch.bfloat16), lambda x: x),
    "dilation": ({"dilation": 2}, nullcontext, lambda x: x),
    "padding": ({"padding": 3}, nullcontext, lambda x: x),
    "another layout": ({}, nullcontext, lambda x: x.contiguous()),
    "exporting": ({}, exporting, lambda x: x),
    "a subclass of tensors": ({}, nullcontext, lambda x: x.as_subclass(type("Own", (torch.Tensor,), {}))),
}


@built
@irrep_forms
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_a_pass_that_the_kernel_does_not_run_resolves_auto_without_it(form, way, grad):
    """p4 of 10 channels mixes directly in PyTorch's operations, which is twice as fast there."""
    how, context, change = WAYS[way]
    for on, channels, execution in (("p4", 10, "factorized"), ("p4m", 64, "irrep")):
        layer = separable(form, channels, on, **how).eval()
        with torch.set_grad_enabled(grad), context():
            by, found = run_as(layer, change(map_for(layer)))
        assert (by, found) == ("no kernel", execution)


@built
@irrep_forms
def test_passes_with_and_without_the_kernel_take_turns(form):
    layer = separable(form, 16).eval()
    x = map_for(layer)
    with torch.no_grad():
        first = layer(x)
        assert run_as(layer, x) == ("kernel", layer.resolved_execution)
        with torch.autocast("cpu", torch.bfloat16):
            assert run_as(layer, x) == ("no kernel", "factorized")
        assert layer(x).equal(first)
        layer.execution = "factorized"
        torch.testing.assert_close(layer(x), first)
        layer.execution = "auto"
        assert layer(x).equal(first)


@every_form
@pytest.mark.parametrize("kernel", KERNELS)
def test_macs_are_those_of_the_class_that_is_asked_for(form, kernel):
    layer = separable(form)
    shape = layer.filter_shape
    auto = auto_execution(layer.form, layer.group, shape, 1, layer.sampling, kernel)
    assert layer.macs(kernel=kernel) == layer.macs("auto", kernel) == layer.macs(auto)
    assert layer.macs() == layer.macs(layer.resolved_execution) == layer.macs(kernel=kernel_class())
    for execution in layer.form.executions:
        layer.execution = execution
        assert layer.macs(kernel=kernel) == layer.macs() == layer.macs(execution)


# --- files: what is saved under one class and loaded under another


ELSEWHERE = """
import json, sys
import torch
import gconv
from gconv.kernels.library import kernel_class
found = {"class": kernel_class()}
for form in gconv.FORMS:
    net = gconv.load(f"{form}.pt")
    layers = [m for m in net.modules() if isinstance(m, gconv.SeparableGConv2d)]
    counted = gconv.cost(net, net.input_shape)
    torch.manual_seed(0)
    with torch.no_grad():
        scores = net(torch.rand(1, *net.input_shape)).tolist()
    found[form] = [
        [layer.execution for layer in layers], [layer.resolved_execution for layer in layers],
        counted.macs_executed, counted.kernel, scores,
    ]
    gconv.save(net, f"{form}-again.pt")
json.dump(found, sys.stdout)
"""


@pytest.mark.parametrize("kernel", sorted({HERE[0], HERE[-1], *HERE[2:3]}))
def test_a_file_is_left_to_the_machine_that_reads_it(tmp_path, kernel):
    """Where one layer is not told, and one is told to run dense."""
    nets = {form: create_model("p4cnn", separable=form).eval() for form in FORMS}
    for form, net in nets.items():
        net.conv3.execution = "dense"
        save(net, tmp_path / f"{form}.pt")
    path = os.pathsep.join(filter(None, (os.getcwd(), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "PYTHONPATH": path, "GCONV_KERNEL": kernel, "GCONV_REQUIRE_KERNEL": "0"}
    command = [sys.executable, "-c", ELSEWHERE]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found.pop("class") == kernel
    assert list(found) == list(FORMS)
    torch.manual_seed(0)
    image = torch.rand(1, 1, 28, 28)
    for form, (executions, resolved, macs, counted_for, scores) in found.items():
        net = nets[form]
        layers = [layer for layer in net.modules() if isinstance(layer, SeparableGConv2d)]
        assert executions == ["auto", "dense", "auto", "auto", "auto", "auto"]
        assert resolved == [
            "dense" if told == "dense" else auto_execution(FORMS[form], *sizes_of(layer), kernel)
            for told, layer in zip(executions, layers, strict=True)
        ]
        assert (macs, counted_for) == (cost(net, net.input_shape, kernel=kernel).macs_executed, kernel)
        with torch.no_grad():
            expected = net(image)
        torch.testing.assert_close(torch.tensor(scores), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
        again = load(tmp_path / f"{form}-again.pt")
        assert [again.get_submodule(f"conv{n}").execution for n in range(2, 8)] == executions


def sizes_of(layer):
    return layer.group, layer.filter_shape, layer.rank, layer.sampling
