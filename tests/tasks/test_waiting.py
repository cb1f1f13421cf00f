"""Modules that a step does not import, so that nobody waits for them; benchmarks/waiting.py measures the seconds."""

import os
import subprocess
import sys

import pytest
from run_helpers import RUN, TINY
from waiting import PATIENCE

from lit_vlm.config import parse
from lit_vlm.tasks.preflight import run_preflight
from lit_vlm.tasks.train import train

pytestmark = pytest.mark.slow

UNUSED = {"pandas", "deepspeed", "wandb", "tensorboard", "trl", "sklearn", "datasets"}
MODEL_CLASSES = {"transformers.modeling_utils", "transformers.models.llava_onevision.modeling_llava_onevision"}
LIGHTNING = {"lightning", "torchmetrics", "torch._dynamo", "scipy", "sympy"}
FORBIDDEN = {
    "a finished run": {*UNUSED, *MODEL_CLASSES, *LIGHTNING, "torch", "transformers", "tokenizers", "pyarrow"},
    "a wrong path": {*UNUSED, *MODEL_CLASSES, *LIGHTNING, "torch", "transformers", "tokenizers", "pyarrow"},
    "a second preflight": {*UNUSED, *MODEL_CLASSES, *LIGHTNING, "peft", "accelerate"},
    "a first step": {*UNUSED, "peft", "openai", "optuna", "fastapi", "matplotlib", "skimage"},
}
FEW = ["trainer.max_steps=1", "data.index_workers=1", "data.validation.max_samples=1", "overwrite=false"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """Folder of a finished run, its index, the tiny parts and the measured model."""
    folder = tmp_path_factory.mktemp("waiting")
    run_dir = f"run_dir={folder}"
    train(parse([*TINY, *FEW, run_dir, "run_name=finished"]))
    run_preflight(parse([*TINY, *FEW, run_dir, "run_name=looked", "task=preflight"]))
    return folder


def list_imports(run_dir, *overrides: str) -> tuple[set[str], str]:
    """Run `python run.py` and return the modules that it imported, and its output."""
    command = [sys.executable, "-X", "importtime", str(RUN), *TINY, *FEW, f"run_dir={run_dir}", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, cwd=run_dir, env=os.environ)
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    other = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    return {line.rpartition("|")[2].strip() for line in lines}, "\n".join([done.stdout, *other])


@pytest.mark.parametrize(
    ("step", "overrides", "words"),
    [
        ("a finished run", ["run_name=finished"], "finished already"),
        (
            "a wrong path",
            ["data=llava_json", "data.sources.mine.path=mime.json", "run_name=new"],
            "no such file or folder",
        ),
        ("a second preflight", ["task=preflight", "run_name=looked"], "would run"),
        pytest.param("a first step", ["run_name=again"], ": done.", marks=pytest.mark.slow),
    ],
)
def test_no_step_imports_what_it_does_not_use(run_dir, step, overrides, words):
    imported, output = list_imports(run_dir, *overrides)
    assert words in output
    assert "hydra" in imported and not imported & FORBIDDEN[step]
