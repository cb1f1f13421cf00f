"""Throughput of two servers with ten clients at once: this project's and `transformers serve`. Used by benchmarks.generation."""

from __future__ import annotations

import base64
import io
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lit_vlm.types import ImagePlaceholder, Sample

ROOT = Path(__file__).resolve().parents[1]
CLIENTS = 10
# transformers' server needs torchvision. Without CUDA two of its operators are missing, which are never called, and its
# decoder of images, for which Pillow stands in here.
BOOTSTRAP = """
import io, sys, numpy, torch
from PIL import Image
library = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import torchvision.io
def decode_image(data, **_):
    pixels = numpy.array(Image.open(io.BytesIO(data.numpy().tobytes())).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)
torchvision.io.decode_image = decode_image
from transformers.cli.transformers import main
sys.argv[0] = "transformers"
main()
"""


def measure_servers(folder: str, samples: Sequence[Sample], max_new_tokens: int) -> dict[str, Any]:
    """Measure answers per second and the median seconds to the first token of each server.

    Both run as one process with one thread of torch.
    """
    torchvision = str(Path(sys.prefix) / "torchvision")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": torchvision}
    ports = find_free_ports(2)
    commands = {
        "transformers serve": [
            *(sys.executable, "-c", BOOTSTRAP, "serve", folder, "--device", "cpu", "--dtype", "float32"),
            *("--port", str(ports[0])),
        ],
        "task=serve": [
            *(sys.executable, str(ROOT / "run.py"), "task=serve", f"init_from={folder}", f"serve.port={ports[1]}"),
            "serve.model_name=model",
        ],
    }
    names = {"transformers serve": folder, "task=serve": "model"}
    contents = [make_content(sample) for sample in samples]
    return {
        name: measure_server(command, port, names[name], contents, max_new_tokens, environment)
        for (name, command), port in zip(commands.items(), ports, strict=True)
    }


def measure_server(
    command: list[str],
    port: int,
    model: str,
    contents: Sequence[list[dict[str, Any]]],
    max_new_tokens: int,
    environment: dict[str, str],
) -> dict[str, float]:
    import openai

    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=3600)
    try:
        wait_for_server(port, process)

        def ask(content: list[dict[str, Any]]) -> float:
            """Ask for one streamed answer; return the seconds to its first text."""
            start, first = time.perf_counter(), None
            messages: Any = [{"role": "user", "content": content}]
            for chunk in client.chat.completions.create(
                model=model, messages=messages, max_tokens=max_new_tokens, temperature=0, stream=True
            ):
                if first is None and chunk.choices and chunk.choices[0].delta.content:
                    first = time.perf_counter() - start
            return first if first is not None else time.perf_counter() - start

        ask(contents[0])
        start = time.perf_counter()
        with ThreadPoolExecutor(CLIENTS) as pool:
            waits = list(pool.map(ask, contents))
        seconds = time.perf_counter() - start
    finally:
        process.terminate()
        process.wait()
    return {"answers_per_second": len(contents) / seconds, "seconds_to_first_token": statistics.median(waits)}


def make_content(sample: Sample) -> list[dict[str, Any]]:
    """Make the content of the question in OpenAI's form, with images as data URLs."""
    parts: list[dict[str, Any]] = []
    for piece in sample.messages[0].content:
        if isinstance(piece, ImagePlaceholder):
            buffer = io.BytesIO()
            sample.images[piece.index].load().save(buffer, "PNG")
            url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
            parts.append({"type": "image_url", "image_url": {"url": url}})
        else:
            parts.append({"type": "text", "text": getattr(piece, "token", piece)})
    return parts


def find_free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def wait_for_server(port: int, process: subprocess.Popen, seconds: float = 600.0) -> None:
    import httpx2

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            raise SystemExit(f"the server on port {port} ended with status {process.returncode}")
        try:
            if httpx2.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                return
        except httpx2.HTTPError:
            time.sleep(0.2)
    raise SystemExit(f"the server on port {port} did not start")
