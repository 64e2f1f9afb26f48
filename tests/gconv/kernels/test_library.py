"""Loading the compiled library: what fits is used, what does not is named, and without it all is as before."""

from __future__ import annotations

import ast
import ctypes
import re
import shutil
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils import _python_dispatch

from gconv import GConv2d, GroupBatchNorm2d, SeparableGConv2d, gconv2d
from gconv.functional.expansion import channels_last, from_group_major
from gconv.kernels import library, sources
from gconv.kernels.library import INSTRUCTIONS, UnfitLibraryError, find_library, is_supported
from gconv.system.errors import InputError
from tests.gconv.kernels.comparing import built, forms, kernel_of_pass

ROOT = Path(__file__).resolve().parents[3]
COMPILER = shutil.which("cc")
compiles = pytest.mark.skipif(COMPILER is None, reason="there is no C compiler")


@pytest.fixture
def anew(monkeypatch):
    """Looks for the library again; afterwards the one from before counts."""
    monkeypatch.delenv("GCONV_KERNEL", raising=False)
    monkeypatch.delenv("GCONV_REQUIRE_KERNEL", raising=False)
    return find_library.__wrapped__


@pytest.fixture
def edited(monkeypatch, tmp_path):
    """Sources with one more int in the structure that C and Python share, which nobody has built."""
    folder = tmp_path / "csrc"
    shutil.copytree(sources.FOLDER, folder)
    header = folder / "layer.h"
    text = header.read_text(encoding="utf-8")
    assert "int products, in_basis" in text
    header.write_text(text.replace("int products, in_basis", "int one_more, products, in_basis"), encoding="utf-8")
    monkeypatch.setattr(library, "digest", lambda: sources.digest(folder))


class OneMore(ctypes.Structure):
    _fields_ = (*library.Layer._fields_, ("one_more", ctypes.c_int))


# --- what does not fit


@built
def test_a_library_of_other_sources_is_not_used_and_named_with_the_remedy(anew, edited):
    with pytest.warns(RuntimeWarning, match=re.escape(str(library.PATH))) as warned:
        found = anew()
    assert found.library is None
    assert "was built from other sources" in found.why_not
    assert f"cd {ROOT} && {sys.executable} setup.py build_ext --inplace" in found.why_not
    assert found.why_not in str(warned[0].message)


@built
def test_a_layer_gives_the_right_output_beside_such_a_library(monkeypatch, anew, edited):
    layer = SeparableGConv2d(4, 4, 3, group="p4", form="gc").eval()
    x = from_group_major(channels_last(torch.randn(1, 16, 5, 5)), 4)
    with pytest.warns(RuntimeWarning, match="not used"):
        found = anew()
    monkeypatch.setattr(library, "find_library", lambda: found)
    assert not is_supported(x)
    expected = gconv2d(x, layer.weight, layer.bias, layer.group, layer.sampling)
    torch.testing.assert_close(layer(x), expected)


@built
@pytest.mark.parametrize(
    ("name", "value"),
    [("INTERFACE", 1), ("Layer", OneMore), ("PRODUCT_ENTRIES", 11), ("MAX_K", 17), ("MAX_ORDER", 12)],
)
def test_what_the_two_sides_share_is_compared(monkeypatch, name, value):
    library.load(library.PATH)
    monkeypatch.setattr(library, name, value)
    with pytest.raises(UnfitLibraryError, match="its sizes are"):
        library.load(library.PATH)


@compiles
def test_a_library_without_a_function_is_of_another_version(tmp_path):
    source = tmp_path / "old.c"
    source.write_text("int gconv_forward(void) { return 0; }\n", encoding="utf-8")
    path = tmp_path / "old.so"
    subprocess.run([COMPILER, "-shared", "-fPIC", "-o", path, source], check=True)
    with pytest.raises(UnfitLibraryError, match="another version: it has no function gconv_"):
        library.load(path)


def test_a_file_that_is_no_library_is_not_used(tmp_path, monkeypatch, anew):
    path = tmp_path / "_compiled.so"
    monkeypatch.setattr(library, "PATH", path)
    assert anew().why_not.startswith(f"{path} was not built")
    path.write_bytes(b"no library")
    with pytest.warns(RuntimeWarning, match="cannot be loaded"):
        assert anew().library is None


@pytest.mark.parametrize("there", [True, False])
def test_a_required_library_that_does_not_fit_is_an_error(monkeypatch, tmp_path, anew, there):
    path = tmp_path / "_compiled.so"
    monkeypatch.setattr(library, "PATH", path)
    if there:
        path.write_bytes(b"no library")
    monkeypatch.setenv("GCONV_REQUIRE_KERNEL", "1")
    with pytest.raises(InputError, match=f"GCONV_REQUIRE_KERNEL is 1, but {re.escape(str(path))}"):
        anew()


# --- what is called


def prototypes():
    """Every exported function of the C sources: its name, the type of its result and those of its arguments."""
    for path in sources.sources():
        text = re.sub(r"/\*.*?\*/", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        for result, name, arguments in re.findall(r"EXPORT ([\w ]+?\*?)\s*gconv_(\w+)\(([^)]*)\)", text):
            yield name, result, [] if arguments == "void" else [" ".join(one.split()) for one in arguments.split(",")]


def ctype(declared):
    """How ctypes passes what C declares so."""
    if "*" in declared:
        kinds = {"struct layer": ctypes.POINTER(library.Layer), "size_t": ctypes.POINTER(ctypes.c_size_t)}
        kinds |= {"int": ctypes.POINTER(ctypes.c_int), "char": ctypes.c_char_p}
        words = declared.removeprefix("const ").partition("*")[0].strip()
        return kinds.get(words, ctypes.c_void_p)
    kinds = {"int": ctypes.c_int, "size_t": ctypes.c_size_t, "double": ctypes.c_double, "void": None}
    return kinds[declared.split()[0]]


@built
def test_every_function_is_called_with_the_types_that_it_has():
    functions = library.load(library.PATH).functions
    found = set()
    for name, result, arguments in prototypes():
        assert functions[name].restype is ctype(result), name
        assert functions[name].argtypes == [ctype(argument) for argument in arguments], name
        found.add(name)
    assert found == set(functions)


def test_no_memory_is_said(monkeypatch):
    functions = {"forward": lambda *_: 1}
    monkeypatch.setattr(library, "require_library", lambda: library.Library(functions, ("any",), 0, True))
    with pytest.raises(MemoryError, match="gconv::forward"):
        library.launch("forward", 1)


# --- which instruction set


@built
def test_a_variable_picks_the_best_instruction_set(monkeypatch, anew):
    processor = anew().library.processor
    for number, name in enumerate(INSTRUCTIONS):
        monkeypatch.setenv("GCONV_KERNEL", name)
        if name in processor:
            assert anew().library.instructions == number
        else:
            with pytest.raises(InputError, match=f"GCONV_KERNEL is {name}, which this processor does not have"):
                anew()
    monkeypatch.setenv("GCONV_KERNEL", "none")
    assert anew() == (None, "GCONV_KERNEL is none")


def test_an_unknown_kernel_is_refused_in_one_line(monkeypatch, anew):
    monkeypatch.setenv("GCONV_KERNEL", "sse")
    with pytest.raises(InputError, match=r"^GCONV_KERNEL is 'sse'; accepted: any, avx2, avx512, none$"):
        anew()


# --- without it


@forms
def test_without_a_library_all_is_as_before(only, form):
    layer = SeparableGConv2d(2, 3, 3, group="p4", form=form, execution="irrep")
    norm = GroupBatchNorm2d(3)
    x = from_group_major(channels_last(torch.randn(2, 8, 5, 5)), 4)
    with_it = [norm.train(mode)(layer(x)) for mode in (True, False)]
    only(None)
    norm.reset_running_stats()
    assert kernel_of_pass(layer, x) is None
    for now, before in zip([norm.train(mode)(layer(x)) for mode in (True, False)], with_it, strict=True):
        torch.testing.assert_close(now, before)
    assert SeparableGConv2d(9, 9, 3, group="p4m", form=form).resolved_execution == "factorized"


@built
def test_function_transforms_and_derivatives_along_work():
    layer = SeparableGConv2d(2, 3, 3, group="p4", form="gc").eval()
    norm = GroupBatchNorm2d(3).eval()
    x = from_group_major(channels_last(torch.randn(2, 8, 5, 5)), 4)
    direction = torch.randn_like(x)

    def run(x):
        return norm(layer(x))

    with torch.no_grad():
        expected = run(x)
        each = torch.func.vmap(lambda one: run(one[None])[0])(x.contiguous())
        torch.testing.assert_close(each, expected)
        shift = (run(x + 1e-2 * direction) - run(x - 1e-2 * direction)) / 2e-2
    y, along = torch.func.jvp(run, (x,), (direction,))
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(along, shift, rtol=1e-3, atol=1e-3)


# --- names that are private to PyTorch, and may go away

PRIVATE = {  # all that gconv/kernels uses; and whether the kernel can run without
    "torch.autograd._profiler_enabled": (torch.autograd, "_profiler_enabled", True),
    "forward_ad._current_level": (forward_ad, "_current_level", False),
    "torch._C._functorch.peek_interpreter_stack": (torch._C._functorch, "peek_interpreter_stack", False),
    "torch._C._len_torch_dispatch_stack": (torch._C, "_len_torch_dispatch_stack", False),
    "torch.utils._python_dispatch._get_current_dispatch_mode": (_python_dispatch, "_get_current_dispatch_mode", True),
    "torch.utils._python_dispatch.TorchDispatchMode": (_python_dispatch, "TorchDispatchMode", True),
}


def private_names(path):
    """The names of a file that are private to PyTorch: with a part that begins with an underscore."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("torch"):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield ast.unparse(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr":
            yield f"{ast.unparse(node.args[0])}.{ast.literal_eval(node.args[1])}" if len(node.args) == 3 else ""


def test_the_list_of_private_names_is_complete():
    paths = (ROOT / "gconv" / "kernels").glob("*.py")
    names = {
        name for path in paths for name in private_names(path) if re.match(r"(torch|forward_ad)\b.*\._(?!_)", name)
    }
    parts = {name for name in names if not any(other.startswith(f"{name}.") for other in names)}
    assert parts == set(PRIVATE)


@built
@pytest.mark.parametrize("name", PRIVATE)
def test_without_a_private_name_of_torch_the_forward_pass_runs(monkeypatch, name):
    """The library is loaded anew in a module of its own, as if PyTorch had never had the name."""
    layers = [SeparableGConv2d(4, 4, 3, group="p4", form="gc"), GConv2d(30, 30, 3, group="p4"), GroupBatchNorm2d(4)]
    x = from_group_major(channels_last(torch.randn(1, 16, 5, 5)), 4)
    wide = from_group_major(channels_last(torch.randn(1, 120, 5, 5)), 4)
    maps = [x, wide, x]
    with torch.no_grad():
        expected = [layer.eval()(given) for layer, given in zip(layers, maps, strict=True)]
        *place, can_run = PRIVATE[name]
        monkeypatch.delattr(*place)
        spec = util.spec_from_file_location("gconv.kernels.library_anew", library.__file__)
        module = util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert module.is_supported(x) == can_run
        for room in ("separable_conv", "small_conv", "batch_norm"):
            monkeypatch.setattr(f"gconv.kernels.{room}.is_supported", module.is_supported, raising=False)
        monkeypatch.setattr("gconv.nn.base.is_supported", module.is_supported)
        monkeypatch.setattr("gconv.nn.batchnorm.is_supported", module.is_supported)
        monkeypatch.setattr(library, "is_supported", module.is_supported)
        for layer, given, y in zip(layers, maps, expected, strict=True):
            torch.testing.assert_close(layer(given), y)


# --- compilers


@pytest.mark.skipif(shutil.which("clang") is None, reason="there is no clang")
def test_a_library_of_clang_fits_and_uses_the_threads_of_pytorch(tmp_path):
    path = tmp_path / "_compiled.so"
    digest = f'-DGCONV_SOURCES="{sources.digest()}"'
    files = [str(file) for file in sources.sources() if file.suffix == ".c"]
    subprocess.run(["clang", "-O0", "-shared", "-fPIC", digest, *files, "-lm", "-o", str(path)], check=True)
    assert library.load(path).threaded == library.load(library.PATH).threaded
