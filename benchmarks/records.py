"""Runs that leave one JSON record each: those without one are done, so a benchmark can be stopped and continued."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from gconv.files import atomic_path


class Recorded(Protocol):
    """A run that knows where its record lies."""

    @property
    def path(self) -> Path: ...


_Run = TypeVar("_Run", bound=Recorded)


def complete(runs: Iterable[_Run], record: Callable[[_Run], dict[str, Any]], shown: str) -> None:
    """Do every run that has no record yet and write it down; what is under the key ``shown`` goes to the screen."""
    for run in runs:
        if run.path.exists():
            continue
        document = record(run)
        run.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(run.path) as path:
            path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        print(run.path.name, document["parameters"], document[shown], flush=True)
