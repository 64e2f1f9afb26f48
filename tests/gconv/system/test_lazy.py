"""A public name is what the package's stub says, whatever was imported before it and with every lazy_loader."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from itertools import permutations
from pathlib import Path

import pytest

from tests.strict_python import STRICT_PYTHON

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = ("gconv", "analysis")
# Of a package whose function `count` is in a submodule of that name, and `total` in another one.
IMPORTS = ("import box.count", "from box import count", "from box.count import helper", "import box.total")


def python(*arguments: str, folder: Path = ROOT, **environment: str) -> str:
    path = os.pathsep.join([str(folder), *sys.path])
    ran = subprocess.run(
        [*STRICT_PYTHON, *arguments],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.fixture
def box(tmp_path: Path) -> Path:
    package = tmp_path / "box"
    (package / "inner").mkdir(parents=True)
    (package / "inner" / "__init__.py").touch()
    (package / "__init__.py").write_text(
        "from gconv.system.lazy import attach_public_names\n"
        "__getattr__, __dir__, __all__ = attach_public_names(__name__, __file__)\n"
    )
    (package / "__init__.pyi").write_text("from .count import count as count\nfrom .inner.sums import total as total\n")
    (package / "count.py").write_text(
        "def count(): return 'counted'\ndef helper(): return 'helped'\nif __name__ == '__main__': print(helper())\n"
    )
    (package / "inner" / "sums.py").write_text("def total(): return 'added'\n")
    (package / "total.py").write_text(
        "import box\nprint('total is a command') if __name__ == '__main__' else None\nassert box.total() == 'added'\n"
    )
    return tmp_path


@pytest.mark.parametrize("eager", ["", "1"])
def test_in_any_order_the_name_is_the_function(box: Path, eager: str) -> None:
    code = f"""
import sys, importlib
orders = {[list(order) for order in permutations(IMPORTS)]!r}
for order in orders:
    for line in order:
        exec(line)
        import box
        assert box.count() == "counted" and box.total() == "added", order
    assert sys.modules["box.count"].helper() == importlib.import_module("box.count").helper() == "helped"
    assert type(box.inner) is type(sys) and sorted(box.__all__) == sorted(dir(box)) == ["count", "total"]
    for name in [name for name in sys.modules if name.partition(".")[0] == "box"]:
        del sys.modules[name]
"""
    python("-c", code, folder=box, EAGER_IMPORT=eager)


def test_the_submodules_are_commands_too(box: Path) -> None:
    assert python("-m", "box.count", folder=box) == "helped\n"
    assert python("-m", "box.total", folder=box) == "total is a command\n"


def test_a_public_name_can_be_replaced(box: Path) -> None:
    """A test may put a stand-in there, and a program another module than the submodule of that name."""
    code = "import sys, box; box.count = print; assert box.count is print; box.total = sys; assert box.total is sys"
    python("-c", code, folder=box)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_what_the_stub_says_behind_imports_of_all_commands(package: str) -> None:
    stub = ast.parse((ROOT / package / "__init__.pyi").read_text())
    places = [
        (alias.name, node.module)
        for node in ast.walk(stub) if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]  # fmt: skip
    modules = sorted(path.stem for path in (ROOT / package).glob("[!_]*.py"))
    assert modules
    assert {name for name, _ in places} & set(modules), "nothing is tried that has two meanings"
    code = (
        "\n".join(f"import {package}.{name}" for name in modules)
        + f"""
from importlib import import_module
for name, module in {places!r}:
    expected = getattr(import_module("{package}." + module), name)
    assert getattr({package}, name) is expected, name
for name in {modules!r}:
    assert import_module("{package}." + name).__name__ == "{package}." + name
"""
    )
    python("-c", code)
