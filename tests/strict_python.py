"""The command line of a fresh Python in which a warning is an error, as in the tests themselves."""

from __future__ import annotations

import sys

# Older versions of matplotlib, as they are imported, call pyparsing by names that it deprecated later.
OLDER = ("matplotlib._fontconfig_pattern", "matplotlib._mathtext")
IGNORED = (option for module in OLDER for option in ("-W", f"ignore::DeprecationWarning:{module}"))
STRICT_PYTHON = (sys.executable, "-W", "error", *IGNORED)
