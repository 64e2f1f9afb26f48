"""Benchmarks whose runs leave one JSON record each.

Only runs without a record are done, so such a benchmark can be stopped and continued.
"""

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
    """A run that knows the path of its record."""

    @property
    def path(self) -> Path: ...


_Run = TypeVar("_Run", bound=Recorded)


def complete(runs: Iterable[_Run], record: Callable[[_Run], dict[str, Any]], shown: str) -> None:
    """Do every run that has no record yet, and write its record.

    Args:
        runs: the runs, in the order in which they are done.
        record: does one run and returns its record, as plain data with a key ``parameters``.
        shown: the key of the record that is printed, beside the parameters.
    """
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
    """The command line of such a benchmark; returns its exit code.

    ``run`` does all runs without a record, or of these the ones with a given part in their record's name. ``table``
    prints the table of the records. The arguments are those of :func:`complete`.
    """
    p = Parser(
        prog,
        "Do the runs that have no record yet, or print the table of those that have.",
        f"  {prog} run seed0\n  {prog} table",
    )
    p.add_argument("action", metavar="run | table")
    p.add_argument(
        "part", nargs="?", metavar="PART", help="do only the runs that have this part in the name of their record"
    )
    args = p.parse_args(argv)

    def act() -> None:
        if args.action not in ("run", "table"):
            raise one_of("action", args.action, ("run", "table"))
        if args.action == "run":
            wanted = [run for run in runs if args.part is None or args.part in run.path.name]
            if not wanted:
                raise InputError(
                    f"no run of {prog} has {args.part!r} in the name of its record; leave it out to do all"
                )
            reuse_freed_memory()
            complete(wanted, record, shown)
        elif args.part is not None:
            raise InputError(f"table shows all records; leave out {args.part!r}")
        else:
            print(table())

    return cli.run(prog, act)
