"""``python -m gconv.info`` as its user meets it."""

import json
import os
import subprocess
import sys

from gconv.info import main
from gconv.kernels.config import configuration


def test_it_prints_what_is_there(capsys):
    assert main([]) == 0
    assert "compiled kernels" in capsys.readouterr().out
    assert main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out) == configuration()


def test_help_does_not_load_pytorch():
    code = (
        "import sys, gconv.info\ntry: gconv.info.main(['--help'])\nexcept SystemExit: sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_an_unknown_kernel_is_refused_in_one_line():
    env = {**os.environ, "GCONV_KERNEL": "sse"}
    done = subprocess.run([sys.executable, "-m", "gconv.info"], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "python -m gconv.info: error: GCONV_KERNEL is 'sse'; accepted: any, avx2, avx512, none\n"
