"""``python -m gconv.info``: which versions run here, and whether layers run in the compiled kernels."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from gconv.system.cli import Parser, loading, main_args, run

PROG = "python -m gconv.info"


def parser() -> Parser:
    """The command line's options."""
    p = Parser(
        PROG,
        "Print the versions of gconv, Python and PyTorch, and whether layers run in the compiled kernels: with which\n"
        "instruction set, on how many threads, and if they do not, why.\n\n"
        "GCONV_KERNEL=any, avx2 or avx512 in the environment sets the best instruction set that kernels may use;\n"
        "GCONV_KERNEL=none turns the kernels off. GCONV_REQUIRE_KERNEL=1 makes it an error if they cannot be used.",
        f"  {PROG}\n  GCONV_KERNEL=avx2 {PROG} --json",
    )
    p.add_argument("--json", action="store_true", help="print one JSON document")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code (:func:`gconv.system.cli.run`)."""
    args = parser().parse_args(main_args(argv))
    return run(PROG, lambda: _show(args.json))


def _show(as_json: bool) -> None:
    with loading():
        from gconv.kernels.config import configuration, show_config
    if as_json:
        print(json.dumps(configuration(), indent=1))
    else:
        show_config()


if __name__ == "__main__":
    sys.exit(main())
