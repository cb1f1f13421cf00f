"""W&B's public `sweeps`, in a separate environment, still makes the recorded decisions."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

HERE = Path(__file__).parent
RECORDED = HERE.parent / "sweep" / "hyperband_of_wandb.json"


@pytest.mark.skipif("LIT_VLM_OUTSIDE" not in os.environ, reason="it installs a package: set LIT_VLM_OUTSIDE=1")
@pytest.mark.long
def test_the_recorded_decisions_equal_those_of_sweeps_0_2_0(tmp_path):
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "sweeps==0.2.0"], check=True)
    out = tmp_path / "recorded.json"
    subprocess.run([python, "-W", "ignore", HERE / "record_hyperband.py", out], check=True)
    assert out.read_text(encoding="utf-8") == RECORDED.read_text(encoding="utf-8")
