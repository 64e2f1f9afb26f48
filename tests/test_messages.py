"""Error messages are built alike: "accepted:" is followed by values, never by advice."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Words that begin advice or a description. A list of values begins with a value, a number, a bracket or a name.
WORDS = r"an? \w+|the|one|two|some|finite|epochs|at|with|without|leave|none, as|give|try|--\w+"
ADVICE = re.compile(rf"accepted[\w ]*: (?:{WORDS})\b")


def advice(text: str) -> list[str]:
    """The messages in the text of a module where advice stands behind "accepted:"."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
            found.append("".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return [message for message in found if ADVICE.search(message)]


def test_accepted_is_followed_by_values() -> None:
    packages = ("gconv", "analysis", "benchmarks")
    paths = [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]
    assert len(paths) > 100
    found = {str(path.relative_to(ROOT)): advice(path.read_text(encoding="utf-8")) for path in paths}
    assert {path: messages for path, messages in found.items() if messages} == {}


@pytest.mark.parametrize(
    ("message", "is_advice"),
    [
        ("unknown model 'x'; accepted: p4cnn, resnet44", False),
        ("unknown letter; accepted: a, b", False),
        ("a map of shape [1]; accepted: [N, C, S, H, W]", False),
        ("width is 0; accepted: a whole number of at least 1", True),
        ("no GPU is here; accepted: --device cpu", True),
    ],
)
def test_advice_is_told_from_values(message: str, is_advice: bool) -> None:
    assert bool(advice(f"raise InputError({message!r})")) == is_advice
