"""The rooms of the two packages: which may import which, how long a module may be, and where its tests lie."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From low to high. A module imports from its own room and from the rooms before it. Modules that lie in no room are the
# commands of their package: the last entry. The whole of gconv is below the whole of analysis.
ROOMS = (
    "gconv.system",
    "gconv.groups",
    "gconv.functional",
    "gconv.kernels",
    "gconv.nn",
    "gconv.models",
    "gconv.interop",
    "gconv.deploy",
    "gconv.training",
    "gconv.experiments",
    "gconv",
    "analysis.filters",
    "analysis.measures",
    "analysis.fitting",
    "analysis.allocation",
    "analysis.latency",
    "analysis.conversion",
    "analysis.plots",
    "analysis.sweep",
    "analysis",
)
PACKAGES = ("gconv", "analysis")

MODULE_LINES = 350
FUNCTION_LINES = 60


class Arrow(NamedTuple):
    """One import: ``source`` imports from ``target``, both modules, in line ``line`` of the source."""

    source: str
    target: str
    line: int

    def __str__(self) -> str:
        return f"{self.source}, line {self.line}, imports {self.target}"


def modules(root: Path) -> dict[str, Path]:
    """The modules of the packages in ``root``, by their dotted names; a package has the name of its folder."""
    paths = [path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))]
    return {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def origin(node: ast.ImportFrom, name: str, is_package: bool) -> str:
    """The absolute name of the module that ``from … import`` in module ``name`` reads."""
    if not node.level:
        return node.module or ""
    parts = name.split(".")
    folder = parts[: len(parts) + is_package - node.level]
    return ".".join([*folder, *([node.module] if node.module else [])])


def arrows(root: Path) -> list[Arrow]:
    """Every import of our own modules, wherever it stands: at the top, in a function or under ``TYPE_CHECKING``."""
    found = modules(root)
    result = []
    for name, path in found.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = origin(node, name, path.name == "__init__.py")
                inside = [f"{base}.{alias.name}" for alias in node.names]
                targets = [target if target in found else base for target in inside]
            else:
                continue
            ours = {target for target in targets if target.split(".")[0] in PACKAGES}
            result += [Arrow(name, target, node.lineno) for target in sorted(ours)]
    return result


def floor(module: str) -> int:
    """The place of a module's room in the order."""
    room = ".".join(module.split(".")[:2])
    return ROOMS.index(room if room in ROOMS else module.split(".")[0])


def wrong_arrows(root: Path) -> list[str]:
    """The imports that lead to a higher room, to a whole package (which has all rooms in it) or to nothing."""
    found = modules(root)
    return [
        str(arrow)
        for arrow in arrows(root)
        if arrow.target not in found or arrow.target in PACKAGES or floor(arrow.source) < floor(arrow.target)
    ]


def circles(root: Path) -> list[list[str]]:
    """The groups of modules that import one another, directly or through others."""
    targets: dict[str, set[str]] = {name: set() for name in modules(root)}
    for arrow in arrows(root):
        targets[arrow.source].add(arrow.target)

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            new = targets.get(waiting.pop(), set()) - seen
            seen |= new
            waiting += new
        return seen

    reach = {name: reached(name) for name in targets}
    groups = {
        tuple(sorted(other for other in seen if name in reach.get(other, set())))
        for name, seen in reach.items()
        if name in seen
    }
    return [list(group) for group in sorted(groups)]


def test_no_import_leads_to_a_higher_room() -> None:
    assert wrong_arrows(ROOT) == []


def test_no_circle_of_imports() -> None:
    assert circles(ROOT) == []


def test_every_folder_is_a_room() -> None:
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in modules(ROOT).values()}
    assert folders == set(ROOMS)


def test_the_documentation_lists_the_rooms_in_their_order() -> None:
    text = (ROOT / "docs" / "layout.md").read_text(encoding="utf-8")
    assert tuple(room.replace("/", ".") for room in re.findall(r"^\| `([\w/]+)` \|", text, re.MULTILINE)) == ROOMS


def test_the_walk_sees_the_imports_that_are_known() -> None:
    """A walk that found nothing would call every tree right."""
    found = {(arrow.source, arrow.target) for arrow in arrows(ROOT)}
    assert ("gconv.functional.expansion", "gconv.groups.point_groups") in found
    assert ("analysis.filters.banks", "gconv.system.errors") in found
    assert len(found) > 150


WRONG_TREES = {
    "a lower room imports a higher one": {"gconv/groups/a.py": "from gconv.nn.b import x", "gconv/nn/b.py": "x = 1"},
    "in a function": {"gconv/groups/a.py": "def f():\n    import gconv.nn.b", "gconv/nn/b.py": ""},
    "for types alone": {
        "gconv/groups/a.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from gconv.nn import b",
        "gconv/nn/b.py": "",
    },
    "by a relative path": {"gconv/groups/a.py": "from ..nn.b import x", "gconv/nn/b.py": "x = 1"},
    "gconv imports analysis": {"gconv/train.py": "from analysis.filters.b import x", "analysis/filters/b.py": "x = 1"},
    "a room imports a command": {"gconv/training/a.py": "from gconv import train", "gconv/train.py": ""},
    "a room imports its whole package": {"gconv/training/a.py": "import gconv"},
    "a module that is not there": {"gconv/training/a.py": "from .b import x"},
}
CIRCLES = {
    "of two": {"gconv/nn/a.py": "from .b import x", "gconv/nn/b.py": "from .a import y"},
    "of three, one import in a function": {
        "gconv/nn/a.py": "from . import b",
        "gconv/nn/b.py": "from gconv.nn.c import x",
        "gconv/nn/c.py": "def f():\n    from .a import y",
    },
    "of one": {"gconv/nn/a.py": "from gconv.nn.a import x"},
}


def build(root: Path, tree: dict[str, str]) -> None:
    for name, text in {"gconv/__init__.py": "", "gconv/nn/__init__.py": "", "analysis/__init__.py": "", **tree}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize("tree", WRONG_TREES.values(), ids=WRONG_TREES.keys())
def test_a_wrong_arrow_is_found(tmp_path: Path, tree: dict[str, str]) -> None:
    build(tmp_path, tree)
    assert len(wrong_arrows(tmp_path)) == 1


@pytest.mark.parametrize("tree", CIRCLES.values(), ids=CIRCLES.keys())
def test_a_circle_is_found(tmp_path: Path, tree: dict[str, str]) -> None:
    build(tmp_path, tree)
    assert circles(tmp_path) == [sorted(name.removesuffix(".py").replace("/", ".") for name in tree)]


def test_a_right_tree_is_left_in_peace(tmp_path: Path) -> None:
    build(
        tmp_path,
        {
            "gconv/nn/a.py": "from .b import x\nfrom gconv.groups import c",
            "gconv/nn/b.py": "from gconv.groups.c import y",
            "gconv/groups/c.py": "import json",
            "analysis/sweep.py": "from gconv.nn.a import x",
        },
    )
    assert wrong_arrows(tmp_path) == []
    assert circles(tmp_path) == []


# Lengths


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """The functions and methods of a file, by name, with their lengths in lines; docstrings do not count."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            text = (first.end_lineno or 0) - first.lineno + 1 if ast.get_docstring(node) else 0
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - node.lineno + 1 - text


def too_long(root: Path) -> set[str]:
    paths = [path for folder in (*PACKAGES, "benchmarks") for path in (root / folder).rglob("*.py")]
    result = set()
    for path in paths:
        name = str(path.relative_to(root))
        if len(path.read_text(encoding="utf-8").splitlines()) > MODULE_LINES:
            result.add(name)
        result |= {f"{name} {function}" for function, lines in functions(path) if lines > FUNCTION_LINES}
    return result


def test_modules_and_functions_are_short() -> None:
    assert too_long(ROOT) == set()


def test_a_long_module_and_a_long_function_are_found(tmp_path: Path) -> None:
    function = "def f():\n" + "    x = 1\n" * FUNCTION_LINES
    build(
        tmp_path, {"gconv/a.py": "x = 1\n" * (MODULE_LINES + 1), "gconv/b.py": function, "gconv/c.py": function[:-10]}
    )
    assert too_long(tmp_path) == {"gconv/a.py", "gconv/b.py f"}


# Where tests lie

# What several modules, or a whole room, do together.
OF_SEVERAL_MODULES = {
    "tests/analysis/test_shipped.py",
    "tests/gconv/experiments/test_kill.py",
    "tests/gconv/interop/test_peers.py",
    "tests/gconv/kernels/test_gpu.py",
    "tests/gconv/nn/test_compile.py",
    "tests/gconv/nn/test_module_behaviour.py",
    "tests/gconv/training/test_full_disk.py",
}


def misplaced_tests(root: Path) -> set[str]:
    """The test files that are named after no module, in the folder that mirrors the module's.

    ``tests/gconv/nn/test_conv.py`` and ``tests/gconv/nn/test_conv_strides.py`` belong to ``gconv/nn/conv.py``, and
    ``tests/gconv/nn/test_nn.py`` to the room.
    """
    result = set()
    for package in (*PACKAGES, "benchmarks"):
        for path in sorted((root / "tests" / package).rglob("test_*.py")):
            folder = root / path.parent.relative_to(root / "tests")
            subject = path.stem.removeprefix("test_")
            subjects = {folder.name, *(module.stem for module in folder.glob("*.py"))}
            if not any(subject == name or subject.startswith(f"{name}_") for name in subjects):
                result.add(str(path.relative_to(root)))
    return result


def test_every_test_file_is_named_after_a_module() -> None:
    assert misplaced_tests(ROOT) == OF_SEVERAL_MODULES


def test_a_misplaced_test_is_found(tmp_path: Path) -> None:
    right = {"nn/test_conv.py", "nn/test_conv_strides.py", "nn/test_nn.py", "test_train_command.py"}
    wrong = {"nn/test_train.py", "test_conv.py", "models/test_conv.py", "nn/test_convolution.py"}
    tests = {f"tests/gconv/{name}": "" for name in right | wrong}
    build(tmp_path, {"gconv/nn/conv.py": "", "gconv/train.py": "", **tests})
    assert misplaced_tests(tmp_path) == {f"tests/gconv/{name}" for name in wrong}


# What tests touch

# How often the tests reach for a private name of ours. This number may fall, and never rise.
PRIVATE_NAMES = 24

# Names with an underscore that others gave: PyTorch has no public list of a module's hooks; named tuples, ctypes and
# IPython have methods and fields of such names.
OF_OTHERS = re.compile(r"_(forward|forward_pre|backward)_hooks|_replace|_fields_?|_asdict|_make|_repr_html_")
OTHERS = re.compile(r"(torch|np|numpy|matplotlib|plt|sys|os|threading|self|cls)\._")
PRIVATE = re.compile(r"_[A-Za-z]\w*")
BY_STRING = ("getattr", "setattr", "delattr", "object")  # what names an attribute by a string; the last is mock's


def private_names(text: str) -> list[str]:
    """The private names that a test imports, reads or replaces, except its own and those of others."""
    tree = ast.parse(text)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and PRIVATE.fullmatch(node.attr) and not OF_OTHERS.fullmatch(node.attr):
            found += [] if OTHERS.match(ast.unparse(node)) else [node.attr]
        elif isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in (*PACKAGES, "benchmarks"):
            found += [alias.name for alias in node.names if PRIVATE.fullmatch(alias.name)]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in BY_STRING:
            words = [word.value for word in node.args if isinstance(word, ast.Constant) and isinstance(word.value, str)]
            found += [word for word in words if PRIVATE.fullmatch(word.split(".")[-1])]
    return found


def test_tests_touch_few_private_names() -> None:
    counts = {
        str(path.relative_to(ROOT)): len(private_names(path.read_text(encoding="utf-8")))
        for path in sorted((ROOT / "tests").rglob("*.py"))
    }
    assert sum(counts.values()) <= PRIVATE_NAMES, {name: count for name, count in counts.items() if count}


@pytest.mark.parametrize(
    "text",
    [
        "layer._cache",
        "from gconv.nn.conv import _norm",
        "monkeypatch.setattr(layer, '_cache', None)",
        "monkeypatch.setattr('gconv.nn.conv._norm', None)",
        "mock.patch.object(layer, '_cache')",
    ],
)
def test_a_private_name_is_found(text: str) -> None:
    assert len(private_names(text)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "self._seen",
        "from torch.nn.modules.batchnorm import _BatchNorm",
        "torch._dynamo.reset()",
        "few._replace(a=1)",
        "x['_high']",
        "layer.__class__",
    ],
)
def test_a_name_that_is_not_private_or_not_ours_is_not_counted(text: str) -> None:
    assert private_names(text) == []
