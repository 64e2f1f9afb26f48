"""pyproject.toml, constraints.txt, environment.yml and the Makefile say the same, and `make` installs once."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.lowest_versions import lowest_versions

ROOT = Path(__file__).resolve().parents[1]
CONDA_NAMES = {"pytorch": "torch"}  # conda-forge's name: PyPI's, where they differ
MAX_BYTES = 4_000_000

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def declared() -> dict[str, SpecifierSet]:
    """Every dependency of pyproject.toml, extras included: canonical name to range."""
    table = project()
    extras = table["optional-dependencies"]
    assert set(extras) == {"export", "notebooks", "dev"}
    requirements = [Requirement(line) for group in (table["dependencies"], *extras.values()) for line in group]
    names = [canonicalize_name(requirement.name) for requirement in requirements]
    assert len(names) == len(set(names)), "a dependency is declared twice"
    return {name: requirement.specifier for name, requirement in zip(names, requirements, strict=True)}


def pins() -> dict[str, str]:
    """constraints.txt: canonical name to the text of the pin."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(requirement.name): str(requirement.specifier) for requirement in requirements}


def conda() -> dict[str, SpecifierSet]:
    """environment.yml without python, pip and the project itself: canonical PyPI name to range."""
    entries = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    requirements = [Requirement(entry) for entry in entries if isinstance(entry, str)]
    return {
        canonicalize_name(CONDA_NAMES.get(requirement.name, requirement.name)): requirement.specifier
        for requirement in requirements
    }


@pytest.mark.parametrize("name", sorted(declared()))
def test_dependency_is_pinned_inside_its_range(name: str) -> None:
    pin = pins().get(name, "")
    assert re.fullmatch(r"==[^*+]+", pin), f"constraints.txt has no plain pin for {name}: run `make constraints`"
    assert Version(pin.removeprefix("==")) in declared()[name]


def test_every_constraint_is_an_exact_version_without_local_suffix() -> None:
    loose = {name: pin for name, pin in pins().items() if not re.fullmatch(r"==[^*+]+", pin)}
    assert not loose


def test_the_lowest_versions_are_the_lower_bounds_and_the_torch_that_is_tested() -> None:
    lowest = {canonicalize_name(pin.name): str(pin.specifier) for pin in map(Requirement, lowest_versions())}
    assert lowest.pop("torch") == pins()["torch"]
    bounds = {name: str(specifier).replace(">=", "==") for name, specifier in declared().items()}
    assert lowest == {name: bound for name, bound in bounds.items() if name != "torch"}


@pytest.mark.parametrize("line", ['"scipy"', '"scipy<2"', '"scipy>=1.11,<2"', '"scipy[extra]>=1.11"'])
def test_a_range_without_one_lower_bound_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    (tmp_path / "pyproject.toml").write_text(f"[project]\ndependencies = [{line}]\noptional-dependencies = {{}}\n")
    monkeypatch.setattr("tests.lowest_versions.ROOT", tmp_path)
    with pytest.raises(ValueError, match="lower bound alone"):
        lowest_versions()


def test_environment_yml_has_the_ranges_of_pyproject() -> None:
    environment = conda()
    assert environment.pop("python") == SpecifierSet(project()["requires-python"])
    assert environment.pop("pip") == SpecifierSet()
    assert environment == declared()


def test_environment_yml_installs_this_project_and_nothing_else_through_pip() -> None:
    entries = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert [entry for entry in entries if not isinstance(entry, str)] == [{"pip": ["-e ."]}]


def test_only_the_two_packages_are_shipped() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert {pattern.removesuffix(".*") for pattern in setuptools["packages"]["find"]["include"]} == {
        "gconv",
        "analysis",
    }
    assert set(setuptools["package-data"]["*"]) == {"*.pyi", "py.typed"}


def test_readme_names_the_two_commands() -> None:
    readme = (ROOT / "README.md").read_text()
    assert "make demo" in readme
    assert "make test" in readme


@pytest.mark.skipif(
    shutil.which("git") is None or not (ROOT / ".git").exists(), reason="not a git checkout: nothing is tracked"
)
def test_no_tracked_file_is_large() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    sizes = {name: (ROOT / name).lstat().st_size for name in listed.split("\0") if name and (ROOT / name).is_file()}
    assert {name: size for name, size in sizes.items() if size > MAX_BYTES} == {}


def make(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run make as a user would, even when the tests themselves run under make."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS", "PYTHON"))}
    return subprocess.run(["make", *arguments], cwd=cwd, env=env, capture_output=True, text=True, check=False)


@needs_make
def test_targets_depend_on_the_stamp_and_the_stamp_on_what_decides_the_install() -> None:
    database = make("-pnrR", "help", cwd=ROOT).stdout
    rules = dict(re.findall(r"^([\w./]+):[ \t]*(.*)$", database, flags=re.MULTILINE))
    for target in ("demo", "test", "check"):
        assert rules[target].split() == [".venv/.installed"]
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "gconv" / "kernels" / "csrc").iterdir()}
    decides = {"pyproject.toml", "constraints.txt", "Makefile", "setup.py"} | sources
    assert set(rules[".venv/.installed"].split()) == decides


@needs_make
def test_bare_make_lists_the_targets() -> None:
    done = make(cwd=ROOT)
    assert done.returncode == 0
    for target in ("demo", "test", "test-lowest", "check", "clean"):
        assert re.search(rf"^ +{target} +\S", done.stdout, flags=re.MULTILINE)


# A stand-in for Python: says how old it is, makes virtual environments of itself, and logs what pip is asked to do.
STAND_IN = """#!/bin/sh
case "$1 $2" in
  -c*) test ! -e "{root}/too-old" ;;
  "-m venv") for venv; do :; done; mkdir -p "$venv/bin" && cp "$0" "$venv/bin/python" ;;
  "-m pip") echo "$@" >> "{root}/pip.log"; test ! -e "{root}/offline" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "lowest_versions.py", tmp_path / "tests")
    python = tmp_path / "python"
    python.write_text(STAND_IN.format(root=tmp_path))
    python.chmod(0o755)
    return tmp_path


def installs(checkout: Path) -> list[str]:
    log = checkout / "pip.log"
    return log.read_text().splitlines() if log.exists() else []


@needs_make
def test_make_installs_with_the_constraints_once(checkout: Path) -> None:
    for _ in range(2):
        done = make("install", f"PYTHON={checkout}/python", cwd=checkout)
        assert done.returncode == 0, done.stderr
    [command] = installs(checkout)
    assert command.endswith("-c constraints.txt -e .[dev,export,notebooks]")


@needs_make
def test_the_lowest_versions_are_installed_once(checkout: Path) -> None:
    for _ in range(2):
        done = make(".venv-lowest/.installed", f"PYTHON={checkout}/python", cwd=checkout)
        assert done.returncode == 0, done.stderr
    [command] = installs(checkout)
    assert command.endswith("-c .venv-lowest/constraints.txt -e .[dev,export,notebooks]")


@needs_make
def test_make_installs_again_after_the_constraints_change(checkout: Path) -> None:
    python = f"PYTHON={checkout}/python"
    make("install", python, cwd=checkout)
    stamp = (checkout / ".venv" / ".installed").stat()
    os.utime(checkout / "constraints.txt", ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 10**9))
    assert make("install", python, cwd=checkout).returncode == 0
    assert len(installs(checkout)) == 2


@needs_make
def test_a_failed_install_is_tried_again(checkout: Path) -> None:
    python = f"PYTHON={checkout}/python"
    (checkout / "offline").touch()
    assert make("install", python, cwd=checkout).returncode != 0
    assert not (checkout / ".venv" / ".installed").exists()
    (checkout / "offline").unlink()
    assert make("install", python, cwd=checkout).returncode == 0
    assert (checkout / ".venv" / ".installed").exists()


@needs_make
@pytest.mark.parametrize(("target", "venv"), [("install", ".venv"), (".venv-lowest/.installed", ".venv-lowest")])
def test_an_old_python_is_refused_in_one_line(checkout: Path, target: str, venv: str) -> None:
    (checkout / "too-old").touch()
    done = make(target, f"PYTHON={checkout}/python", cwd=checkout)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert len(said) == 1
    assert "3.11" in said[0]
    assert f"{checkout}/python" in said[0]
    assert not (checkout / venv).exists()
