"""Every name of ours that the texts mention is there: in README, docs, notebooks, docstrings and comments."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import io
import re
import textwrap
import tokenize
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("gconv", "analysis", "benchmarks")
FILES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "pyproject.toml", ".ci/run")

# ``:func:`fuse```, ``:class:`~gconv.nn.conv.GConv2d```
ROLE = re.compile(r":(?:mod|func|class|meth|attr|data|exc|obj|py:\w+):`~?\.?([\w.]+)(?:\(\))?`")
# gconv.fuse, analysis.plots.pareto; no part of a path, a file name or a longer name
DOTTED = re.compile(rf"(?<![\w./-])(?:{'|'.join(PACKAGES)})(?:\.[A-Za-z_]\w*)+")
# ``Recipe.epochs``, `GConv2d.to_dense()`: a class of ours and what it has
MEMBER = re.compile(r"`([A-Z]\w+(?:\.\w+)+)(?:\([^`]*\))?`")
COMMAND = re.compile(r"python3? -m ([\w.]+)")
# gconv/train.py, checkpoints/records, `moments.py`; with * as in a shell, and a final full stop is the sentence's
FOLDERS = "gconv|analysis|benchmarks|tests|notebooks|checkpoints|docs"
PATH = re.compile(rf"(?<![\w./-])((?:{FOLDERS})/[\w./*-]*[\w*]|\w+\.(?:py|pyi|ipynb|[ch]))(?![\w/])")
SPAN = re.compile(r"(`+)([^`]+)\1")
FENCE = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


class Text(NamedTuple):
    """A text, the place it was found in, and the module and the class whose names it may use without their prefix."""

    place: str
    text: str
    module: str = ""
    owner: str = ""


def docstrings(path: Path, module: str) -> Iterator[Text]:
    """The docstrings and the comments of a file."""
    source = path.read_text(encoding="utf-8")
    name = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name

    def walk(node: ast.AST, owner: str) -> Iterator[Text]:
        for child in ast.iter_child_nodes(node):
            if (
                isinstance(child, ast.Expr)
                and isinstance(child.value, ast.Constant)
                and isinstance(child.value.value, str)
            ):
                yield Text(f"{name}:{child.lineno}", child.value.value, module, owner)
            yield from walk(child, child.name if isinstance(child, ast.ClassDef) else owner)

    yield from walk(ast.parse(source), "")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield Text(f"{name}:{token.start[0]}", token.string, module)


def texts() -> Iterator[Text]:
    for path in [*(ROOT / name for name in FILES), *sorted((ROOT / "docs").rglob("*.md"))]:
        if path.exists():
            yield Text(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8"))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for number, cell in enumerate(nbformat.read(path, as_version=4).cells):
            text = f"```python\n{cell.source}\n```" if cell.cell_type == "code" else cell.source
            yield Text(f"{path.relative_to(ROOT)}, cell {number}", text)
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield from docstrings(
                path, ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            )


def member(thing: Any, name: str) -> Any:
    """What ``thing.name`` is, and None for what only the objects of a class have; AttributeError if there is none."""
    if inspect.isclass(thing) and not hasattr(thing, name):
        for base in thing.__mro__:
            if name in inspect.get_annotations(base):
                return None
            if base.__module__.split(".")[0] in PACKAGES and re.search(
                rf"\bself\.{name}\b.* = ", inspect.getsource(base)
            ):
                return None
    elif thing is None:
        raise AttributeError(name)
    if isinstance(thing, ModuleType) and not hasattr(thing, name):
        try:
            return importlib.import_module(f"{thing.__name__}.{name}")
        except ModuleNotFoundError:
            raise AttributeError(name) from None
    return getattr(thing, name)


def resolves(name: str, module: str = "", owner: str = "") -> bool:
    """Whether a dotted name leads somewhere, from the top or from the module and the class in which it is mentioned."""
    starts: list[Any] = []
    if "." in name and importlib.util.find_spec(name.split(".")[0]):
        starts.append(None)  # of ours, or of a library such as torch
    if module:
        home = importlib.import_module(module)
        starts += [home, importlib.import_module(module.rpartition(".")[0] or module)]
        starts += [getattr(home, owner)] if hasattr(home, owner) else []
    starts += [importlib.import_module("gconv"), importlib.import_module("analysis")]
    for start in starts:
        first, *rest = name.split(".")
        try:
            thing = importlib.import_module(first) if start is None else member(start, first)
            for part in rest:
                thing = member(thing, part)
        except AttributeError:
            continue
        return True
    return False


def is_command(name: str) -> bool:
    """Whether ``python -m NAME`` runs something."""
    if name.split(".")[0] not in PACKAGES:
        return True
    try:
        found = importlib.util.find_spec(name)
        if found is not None and found.submodule_search_locations is not None:
            found = importlib.util.find_spec(f"{name}.__main__")
    except ModuleNotFoundError:
        return False
    return (
        found is not None
        and found.origin is not None
        and 'if __name__ == "__main__":' in Path(found.origin).read_text()
    )


def is_there(path: str) -> bool:
    """Whether a file, or a folder, is in the repository; one without folders may be anywhere in it."""
    if "/" in path:
        return any(ROOT.glob(path)) or any(ROOT.glob(f"gconv/*/{path}"))
    return any(any((ROOT / folder).rglob(path)) for folder in FOLDERS.split("|")) or (ROOT / path).exists()


def code(text: str) -> Iterator[ast.AST]:
    """The parts of the Python code in a text; ``…`` stands for arguments that are left out."""
    for piece in [*FENCE.findall(text), *(span for _, span in SPAN.findall(FENCE.sub("", text)))]:
        try:
            yield from ast.walk(ast.parse(textwrap.dedent(piece.replace("…", "..."))))
        except SyntaxError:
            continue


def imports(text: str) -> list[str]:
    """What the code of a text imports from our packages by ``from … import``."""
    nodes = [node for node in code(text) if isinstance(node, ast.ImportFrom) and node.module]
    ours = [node for node in nodes if str(node.module).split(".")[0] in PACKAGES]
    return [f"{node.module}.{alias.name}" for node in ours for alias in node.names]


def calls(text: str) -> list[ast.Call]:
    """The calls of our functions, by their dotted names, in the code of a text."""
    return [node for node in code(text) if isinstance(node, ast.Call) and DOTTED.fullmatch(ast.unparse(node.func))]


def takes(call: ast.Call) -> bool:
    """Whether what is called has the parameters that it is given."""
    thing = importlib.import_module(ast.unparse(call.func).split(".")[0])
    for part in ast.unparse(call.func).split(".")[1:]:
        thing = member(thing, part)
    signature = inspect.signature(thing)
    values = [value for value in call.args if not isinstance(value, ast.Starred) and ast.unparse(value) != "..."]
    keywords = {word.arg: None for word in call.keywords if word.arg}
    whole = len(values) == len(call.args) and len(keywords) == len(call.keywords)
    bind = signature.bind if whole else signature.bind_partial
    try:
        bind(*values, **keywords)
    except TypeError:
        return False
    return True


def missing(text: Text) -> list[str]:
    """What a text mentions and is not there."""
    content = text.text
    names = {name for name in DOTTED.findall(content) if not name.endswith((".py", ".pyi", ".c", ".h", ".md"))}
    names |= {*ROLE.findall(content), *imports(content)}
    wrong = [name for name in sorted(names) if not resolves(name, text.module, text.owner)]
    wrong += [
        name
        for name in sorted(set(MEMBER.findall(content)))
        if resolves(name.split(".")[0], text.module, text.owner) and not resolves(name, text.module, text.owner)
    ]
    wrong += [f"python -m {name}" for name in sorted(set(COMMAND.findall(content))) if not is_command(name)]
    wrong += [path for path in sorted(set(PATH.findall(content))) if not is_there(path)]
    if not wrong:
        wrong = [ast.unparse(call) for call in calls(content) if not takes(call)]
    return wrong


def test_every_name_that_is_mentioned_is_there() -> None:
    wrong = {text.place: names for text in texts() if (names := missing(text))}
    assert wrong == {}


def test_the_texts_mention_names_of_every_kind() -> None:
    """A search that found nothing would call every text right."""
    everything = [text.text for text in texts()]
    for pattern in (ROLE, DOTTED, MEMBER, COMMAND, PATH):
        assert sum(len(pattern.findall(text)) for text in everything) >= 3, pattern
    assert sum(1 for text in everything for _ in calls(text)) >= 5


WRONG = [
    "`gconv.no_such_name`",
    "gconv.nn.conv.NoSuchLayer is one",
    "    python -m analysis.no_such_command x",
    "python -m gconv.system.errors",  # a module, and no command
    ":func:`no_such_function`",
    ":class:`~gconv.nn.conv.NoSuchLayer`",
    ":mod:`analysis.no_such_room`",
    "``Recipe.no_such_field``",
    "see gconv/no_such_file.py.",
    "see ``no_such_file.py``",
    "`gconv.GConv2d(16, 32, 3, no_such_argument=1)`",
    "`gconv.load(…, no_such_argument=1)`",
    "```python\nimport gconv\ngconv.load()\n```",
    "```python\nfrom gconv.nn.conv import NoSuchLayer\n```",
]
RIGHT = [
    "`gconv.GConv2d`, and `gconv.GConv2d(16, 32, 3, group='p4m')`, `gconv.SeparableGConv2d(…, form='gc')`",
    "python -m gconv.train, python -m gconv.experiments, python -m pytest",
    ":func:`fuse`, :class:`gconv.nn.conv.GConv2d`, :mod:`analysis.plots`",
    "``Recipe.epochs`` and ``nn.Conv2d`` and ``SeparableGConv2d.to_dense()``",
    "gconv/train.py. checkpoints/p4cnn-rotmnist-regen/epoch-*.pt",
]


@pytest.mark.parametrize("text", WRONG)
def test_what_is_not_there_is_found(text: str) -> None:
    assert missing(Text("here", text)) != []


@pytest.mark.parametrize("text", RIGHT)
def test_what_is_there_is_not_complained_about(text: str) -> None:
    assert missing(Text("here", text)) == []


def test_docstrings_and_comments_are_read(tmp_path: Path) -> None:
    path = tmp_path / "made_up.py"
    module = '"""Of :func:`x`."""\nclass A:\n    """Of :func:`y`."""\n    # of gconv.z\n    b: int\n'
    path.write_text(module + '    """Of :func:`w`."""\n')
    found = [(text.text.split()[-1], text.owner) for text in docstrings(path, "gconv")]
    assert found == [(":func:`x`.", ""), (":func:`y`.", "A"), (":func:`w`.", "A"), ("gconv.z", "")]
