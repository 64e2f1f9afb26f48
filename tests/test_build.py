"""Building the compiled kernels: what a failure leaves behind, and a wheel in a clean environment."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from gconv.kernels.library import PATH

ROOT = Path(__file__).resolve().parents[1]
compiles = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
BROKEN = "int gconv_forward(void) { return }\n"


def setup(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("GCONV_")} | variables
    command = [sys.executable, "setup.py", *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """This repository, with one small C file in place of the kernels."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    kernels = tmp_path / "gconv" / "kernels"
    (kernels / "csrc").mkdir(parents=True)
    shutil.copy(ROOT / "gconv" / "kernels" / "sources.py", kernels)
    for folder in (kernels, kernels.parent):
        (folder / "__init__.py").touch()
    (kernels / "csrc" / "small.c").write_text("int gconv_forward(void) { return 0; }\n", encoding="utf-8")
    return tmp_path


@compiles
@pytest.mark.parametrize("failure", ["syntax", "compiler"])
@pytest.mark.parametrize(
    ("arguments", "variables", "is_error"),
    [
        (["build_ext", "--inplace"], {}, True),
        (["build"], {"GCONV_REQUIRE_KERNEL": "1"}, True),
        (["build"], {}, False),  # as when somebody without a compiler installs the package
    ],
)
def test_a_failed_build_leaves_no_older_library(checkout, failure, arguments, variables, is_error):
    library = checkout / "gconv" / "kernels" / "_compiled.so"
    assert setup(checkout, "build_ext", "--inplace").returncode == 0
    assert library.exists()
    source = checkout / "gconv" / "kernels" / "csrc" / "small.c"
    source.write_text(BROKEN if failure == "syntax" else source.read_text() + "\n", encoding="utf-8")
    os.utime(source, (2e9, 2e9))  # newer than the library, also by a coarse clock
    if failure == "compiler":
        variables = {**variables, "CC": "no-such-compiler", "LDSHARED": "no-such-compiler -shared"}
    done = setup(checkout, *arguments, **variables)
    assert (done.returncode != 0) == is_error, done.stderr
    assert not library.exists()
    assert not list((checkout / "build").rglob("_compiled.so"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this repository with the library that is there, as compiling takes long."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("gconv", "analysis"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    built = folder / "build" / "lib" / "gconv" / "kernels"
    built.mkdir(parents=True)
    shutil.copyfile(PATH, built / PATH.name)
    os.utime(built / PATH.name, (2e9, 2e9))  # newer than the sources
    done = setup(
        folder, "-q", "build", "--build-lib", "build/lib", "bdist_wheel", "--skip-build", GCONV_REQUIRE_KERNEL="1"
    )
    assert done.returncode == 0, done.stderr
    [path] = (folder / "dist").iterdir()
    return path


@pytest.mark.skipif(not PATH.exists(), reason="there is no compiled library")
def test_a_wheel_is_for_all_pythons_and_its_kernels_run_in_a_clean_environment(wheel, tmp_path):
    platform = re.sub(r"[-.]", "_", sysconfig.get_platform())
    assert wheel.name == f"gconv_separable-0.1.0-py3-none-{platform}.whl"
    clean = tmp_path / "clean"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", clean], check=True)
    python = clean / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(subprocess.run([python, "-c", where], capture_output=True, text=True, check=True).stdout.strip())
    # Its dependencies are those that are here. This file leads to them, and not to what is installed as editable.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", wheel], check=True)
    env = {name: value for name, value in os.environ.items() if not name.startswith(("GCONV_", "PYTHON"))}
    code = (
        "import json, torch, gconv, gconv.kernels.config as config;"
        "net = gconv.create_model('gc-p4cnn-small').eval(); net(torch.zeros(1, 1, 28, 28));"
        "print(json.dumps(config.configuration()))"
    )
    done = subprocess.run([python, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    known = json.loads(done.stdout)
    assert known["kernel"]["used"]
    assert Path(known["library"]) == packages / "gconv" / "kernels" / PATH.name
