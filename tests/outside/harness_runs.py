"""Runs of lmms-eval in its own environment, for the tests beside this file."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request

ROOT = Path(__file__).resolve().parents[2]
LMMS_EVAL = ROOT / ".venv-outside/lmms_eval/bin/python"
VLMEVALKIT = ROOT / ".venv-outside/vlmeval/bin/python"
WITHOUT_CUDA = Path(__file__).parent / "without_cuda"  # torchvision with a CPU build of torch


def make_environment(python: Path, **more: str) -> dict[str, str]:
    """Make the environment variables of a run: no network but loopback, and a torchvision that can be imported."""
    works = subprocess.run([python, "-c", "import torchvision"], capture_output=True).returncode == 0
    offline = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "OPENAI_API_KEY": "none",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return os.environ | offline | ({} if works else {"PYTHONPATH": str(WITHOUT_CUDA)}) | more


def run_lmms_eval(tasks: list[str], include_path: Path, url: str, output: Path, **variables: str) -> dict[str, Any]:
    """Run tasks against an endpoint; returns task -> {"results": …, "samples": […]}."""
    command = [
        LMMS_EVAL,
        "-m",
        "lmms_eval",
        "--model",
        "openai",
        "--tasks",
        ",".join(tasks),
        "--include_path",
        include_path,
    ]
    command += ["--model_args", f"model_version=made,base_url={url},num_concurrent=4,max_retries=1,timeout=120"]
    command += ["--batch_size", "1", "--output_path", output, "--log_samples"]
    environment = make_environment(LMMS_EVAL, HF_HOME=str(output / "cache"), **variables)
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, cwd=output)
    written = list(output.glob("made/*_results.json"))  # made: the name of the model
    assert done.returncode == 0 and len(written) == 1, (done.stdout + done.stderr)[
        -6000:
    ]  # it exits 0 after an error, too
    scores = json.loads(written[0].read_text(encoding="utf-8"))["results"]
    return {task: {"results": scores[task], "samples": read_samples(output, task)} for task in tasks}


def read_samples(output: Path, task: str) -> list[dict[str, Any]]:
    (path,) = output.rglob(f"*_samples_{task}.jsonl")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def make_scripted_app(answer: Callable[[str, str], str]) -> FastAPI:
    """Make a chat endpoint that answers with a function of the model's name and the text of the question."""
    app = FastAPI(openapi_url=None)

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> dict[str, Any]:
        body = await request.json()
        content = body["messages"][-1]["content"]
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        text = "".join(part["text"] for part in parts if part["type"] == "text")
        message = {"role": "assistant", "content": answer(body["model"], text)}
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        return {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"], "choices": choices}

    return app
