"""The command line of a fresh Python in which a warning is an error, as in the tests themselves."""

from __future__ import annotations

import sys

# Older versions of matplotlib call pyparsing by names that it deprecated later.
STRICT_PYTHON = (sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning:pyparsing.util")
