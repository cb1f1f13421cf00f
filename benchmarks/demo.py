"""The demo's page in Chromium: its weight, its first paint, and the delay that it adds to the first token of an answer.

    python -m benchmarks.demo runs/tiny/4_dpo/hf

Needs Debian's chromium and Playwright (`make setup-dev`). It starts task=demo on this machine.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from typing import Any

import httpx2

from benchmarks.served import ROOT, find_free_ports, wait_for_server

REPEATS = 15
QUESTION = "무엇이 보이나요?"


def measure_demo(folder: str) -> dict[str, Any]:
    """Start the demo of a model folder and measure its page: bytes, and milliseconds as medians."""
    (port,) = find_free_ports(1)
    command = [sys.executable, str(ROOT / "run.py"), "task=demo", f"init_from={folder}", f"serve.port={port}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for_server(port, process)
        return measure_page(f"http://127.0.0.1:{port}/")
    finally:
        process.terminate()
        process.wait()


def measure_page(url: str) -> dict[str, Any]:
    """Measure the page at a URL in Chromium."""
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium")
    if program is None:
        raise SystemExit("no chromium here: apt-get install chromium")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        weights, paints = [], []
        for _ in range(REPEATS):  # each in a profile of its own, without a cache
            page = browser.new_context().new_page()
            sizes: list[int] = []
            page.on("response", lambda response, sizes=sizes: sizes.append(len(response.body())))
            page.goto(url)
            page.wait_for_selector("#main:not([hidden])")
            paints.append(page.evaluate("performance.getEntriesByType('paint')[0].startTime"))
            weights.append(sum(sizes))
            page.context.close()
        direct, shown = measure_first_tokens(browser.new_page(), url)
        browser.close()
    return {
        "page_bytes": max(weights),
        "first_paint_ms": statistics.median(paints),
        "endpoint_first_token_ms": direct,
        "page_first_token_ms": shown,
    }


def measure_first_tokens(page: Any, url: str) -> tuple[float, float]:
    """Measure the median time to the first text of an answer, in ms: from the endpoint, and in the page. They alternate."""
    page.goto(url)
    page.wait_for_selector("#main:not([hidden])")
    model = httpx2.get(f"{url}v1/models").json()["data"][0]["id"]
    direct, shown = [], []
    for _ in range(REPEATS + 1):
        direct.append(measure_endpoint(url, model))
        page.click("#reset")
        page.fill("#question", QUESTION)
        shown.append(
            page.evaluate(
                """() => new Promise((resolve) => {
                    const start = performance.now();
                    const watcher = new MutationObserver(() => {
                        if (!document.querySelector(".answer .text")?.textContent) return;
                        watcher.disconnect();
                        resolve(performance.now() - start);
                    });
                    watcher.observe(document.getElementById("log"), { childList: true, subtree: true });
                    document.getElementById("send").click();
                })"""
            )
        )
        page.wait_for_selector("#stop", state="hidden")
    return statistics.median(direct[1:]), statistics.median(shown[1:])  # the first answers warm the model up


def measure_endpoint(url: str, model: str) -> float:
    """Measure the time to the first text of a streamed answer, in ms."""
    messages = [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]
    body = {"model": model, "messages": messages, "stream": True, "max_tokens": 512}
    start, first = time.perf_counter(), None
    with httpx2.stream("POST", f"{url}v1/chat/completions", json=body, timeout=600) as response:
        for line in response.iter_lines():
            if (
                first is None
                and line.startswith("data: {")
                and json.loads(line[6:])["choices"][0]["delta"].get("content")
            ):
                first = (time.perf_counter() - start) * 1000
    return first if first is not None else float("nan")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    print(json.dumps(measure_demo(sys.argv[1]), indent=1))
