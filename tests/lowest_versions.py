"""What `make test-lowest` installs: prints the lowest version that pyproject.toml allows of every dependency.

Of torch it prints the version in constraints.txt: its operators decide results, and one version of them is tested.
Needs the standard library only, because it runs before anything is installed.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def lowest_versions() -> list[str]:
    """Pins such as ``numpy==1.26``, one for every dependency and every extra.

    Raises:
        ValueError: a range has no lower bound, or more than that bound.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = []
    for requirement in sum(project["optional-dependencies"].values(), project["dependencies"]):
        found = re.fullmatch(r"([\w-]+)>=([\w.]+)", requirement)
        if found is None:
            raise ValueError(f"pyproject.toml: {requirement!r} has no lower bound alone; write NAME>=VERSION")
        name, version = found.groups()
        pins.append(tested(name) if name == "torch" else f"{name}=={version}")
    return pins


def tested(name: str) -> str:
    """The pin of a package in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return next(line for line in lines if line.startswith(f"{name}=="))


if __name__ == "__main__":
    print("\n".join(lowest_versions()))
