"""Runs that leave one JSON record each: those without one are done, so a benchmark can be stopped and continued."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from gconv.system import cli
from gconv.system.cli import Parser
from gconv.system.errors import InputError, one_of
from gconv.system.files import atomic_path
from gconv.system.memory import reuse_freed_memory


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


def command(
    prog: str,
    argv: Sequence[str] | None,
    *,
    runs: Iterable[_Run],
    record: Callable[[_Run], dict[str, Any]],
    shown: str,
    table: Callable[[], str],
) -> int:
    """What the command line of such a benchmark does: ``run``, all or those with a part of a name, or ``table``."""
    p = Parser(
        prog,
        "Do the runs that have no record yet, or print the table of those that have.",
        f"  {prog} run seed0\n  {prog} table",
    )
    p.add_argument("action", metavar="run | table")
    p.add_argument("part", nargs="?", metavar="PART", help="run only those whose record has this in its name")
    args = p.parse_args(argv)

    def act() -> None:
        if args.action not in ("run", "table"):
            raise one_of("action", args.action, ("run", "table"))
        if args.action == "run":
            wanted = [run for run in runs if args.part is None or args.part in run.path.name]
            if not wanted:
                raise InputError(f"no record of {prog} has {args.part!r} in its name")
            reuse_freed_memory()
            complete(wanted, record, shown)
        elif args.part is not None:
            raise InputError(f"table is of all records; leave out {args.part!r}")
        else:
            print(table())

    return cli.run(prog, act)
