"""Processes of a pipeline's stages: forks of a server that has imported modules and done nothing else."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from run_helpers import RUN
from waiting import PATIENCE, until

from lit_vlm.tasks import pipeline
from lit_vlm.tasks.stage_server import MODULES, ONE_THREAD, StageServer

FACTS = """
import gc, json, os, sys
sys.path[0] = sys.argv[1]
import numpy, torch
from importlib import import_module
asked = []  # even the question whether there is a GPU would keep a fork from using it
torch.cuda.is_available = torch.cuda.device_count = lambda: asked.append(1) or 0
for module in sys.argv[2:]:
    import_module(module)
tensors = [value for value in gc.get_objects() if type(value) in (torch.Tensor, torch.nn.Parameter)]
print(json.dumps({
    "threads": len(os.listdir("/proc/self/task")),
    "largest tensor": max((tensor.numel() for tensor in tensors), default=0),
    "cuda": torch.cuda.is_initialized() or bool(asked),
    "drawn by torch": not torch.equal(torch.Generator().manual_seed(torch.initial_seed()).get_state(), torch.get_rng_state()),
    "drawn by numpy": int(numpy.random.get_state()[2]) != numpy.random.MT19937().state["state"]["pos"],
    "models": [module for module in ("lightning", "transformers.modeling_utils") if module not in sys.modules],
}))
"""


@pytest.fixture
def server():
    with StageServer(pipeline._disable_signals, modules=()) as server:
        yield server


@pytest.fixture
def start(server, tmp_path):
    """Start a script of this text in a fork of a server without modules."""

    def start(text, *arguments):
        script = tmp_path / "script.py"
        script.write_text(text, encoding="utf-8")
        return server.start([sys.executable, str(script), *arguments])

    return start


@pytest.mark.slow
def test_the_server_has_imported_and_done_nothing_else():
    """It holds no thread, no CUDA context and no tensor but the scalar constants of libraries; nothing has drawn from a generator."""
    command = [sys.executable, "-W", "ignore", "-c", FACTS, str(RUN.parent), *MODULES]
    found = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=os.environ | ONE_THREAD)
    facts = json.loads(found.stdout)
    assert facts.pop("largest tensor") <= 1
    assert facts == {"threads": 1, "cuda": False, "drawn by torch": False, "drawn by numpy": False, "models": []}


def test_a_stage_of_the_server_runs_as_a_script_of_its_own(start, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "7")
    facts = tmp_path / "facts.txt"
    process = start(
        "import atexit, os, pathlib, sys, signal\n"
        f"atexit.register(lambda: pathlib.Path({str(facts)!r}).write_text(repr([__name__, *sys.argv[1:], sys.path[0],"
        " os.environ['OPENBLAS_NUM_THREADS'], 'JE_ARROW_MALLOC_CONF' in os.environ, os.getpid()])))\nsys.exit(3)",
        "a=1",
        "b='two words'",
    )
    assert process.wait() == process.wait() == 3
    assert eval(facts.read_text()) == ["__main__", "a=1", "b='two words'", str(tmp_path), "7", False, process.pid]


def test_exit_status_signals_and_errors_are_those_of_the_stage(start, capfd):
    assert start("pass").wait() == 0
    assert start("raise SystemExit('said')").wait() == 1
    assert start("1 / 0").wait() == 1
    killed = start("import time; time.sleep(1000)")
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    assert "said" in capfd.readouterr().err


def test_a_stop_signal_of_the_whole_job_ends_the_stage_and_not_the_server(server, start, tmp_path):
    """A scheduler sends it to every process of a job."""
    text = "import pathlib, signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
    process = start(f"{text}pathlib.Path({str(tmp_path / 'up')!r}).touch()\ntime.sleep(1000)")
    until((tmp_path / "up").exists)
    for pid in (server._process.pid, process.pid):
        os.kill(pid, signal.SIGTERM)
    assert process.wait() == 75
    assert start("pass").wait() == 0


def test_the_server_ends_with_the_pipeline(tmp_path):
    with StageServer(pipeline._disable_signals, modules=()) as server:
        (tmp_path / "script.py").write_text("pass", encoding="utf-8")
        assert server.start([sys.executable, str(tmp_path / "script.py")]).wait() == 0
        pid = server._process.pid
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.slow
def test_weights_equal_those_of_separate_processes_to_the_bit(tmp_path, monkeypatch):
    few = ["trainer.max_steps=3", "data.global_batch_size=8", "data.num_workers=0", "evaluate.exam_items=0"]
    few += ["data.validation.max_samples=1"]
    found = {}
    for name, forks in (("forked", True), ("separate", False)):
        code = f"from lit_vlm.tasks import pipeline\npipeline.can_fork_stages = lambda: {forks}\nimport runpy, sys\n"
        code += "sys.argv[:2] = [sys.argv[1]]\nrunpy.run_path(sys.argv[0], run_name='__main__')"
        command = [sys.executable, "-c", code, str(RUN), f"run_dir={tmp_path / name}", *few]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, cwd=RUN.parent)
        assert done.returncode == 0, done.stderr
        weights = sorted((tmp_path / name).glob("tiny/*/hf/model.safetensors"))
        found[name] = {path.parts[-3]: path.read_bytes() for path in weights}
    assert len(found["forked"]) == 4 and found["forked"] == found["separate"]
