"""Stand-in for lmms-eval's process: it asks an endpoint what lmms-eval asks about K-DTCBench, and writes what lmms-eval writes.

Prompts are those of `lmms_eval_runs.json`, which lmms-eval itself gave on the same made rows
(tests/outside/record_lmms_eval.py). A request without an answer gets lmms-eval's text for it. The score is that of the first
character, as in the recorded runs (tests/evaluation/test_harness.py). With HARNESS_FAULT=crash it ends as after an error.
"""

import base64
import json
import os
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import yaml

RUNS = json.loads((Path(__file__).parent / "lmms_eval_runs.json").read_text(encoding="utf-8"))["runs"]
FAILED = "[LMMS_EVAL_REQUEST_FAILED after 2 retries] "


def ask(url, prompt, image, max_tokens):
    data = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    content = [{"type": "image_url", "image_url": {"url": data}}, {"type": "text", "text": prompt}]
    body = {
        "messages": [{"role": "user", "content": content}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "model": "model",
    }
    request = urllib.request.Request(f"{url}/chat/completions", json.dumps(body).encode())
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request) as response:
            return json.load(response)["choices"][0]["message"]["content"]
    except OSError as error:  # also a status that says so
        return FAILED + str(error)


def main():
    found = dict(zip(sys.argv, sys.argv[1:], strict=False))
    if os.environ.get("HARNESS_FAULT") == "crash":
        print("Traceback (most recent call last):\nValueError: a column of the wrong type")
        return  # with status 0, too
    place = Path(found["--output_path"]) / "model"
    place.mkdir(parents=True)
    results = {task: run(task, found, place) for task in found["--tasks"].split(",")}
    (place / "20260101_000000_results.json").write_text(json.dumps({"results": results}), encoding="utf-8")


def run(task, found, place):
    """Ask about the rows of a task, write the samples and return the scores."""
    model = dict(pair.split("=", 1) for pair in found["--model_args"].split(","))
    settings = yaml.safe_load((Path(found["--include_path"]) / f"{task}.yaml").read_text(encoding="utf-8"))
    (path,) = settings["dataset_kwargs"]["data_files"].values()
    rows = pq.read_table(path).to_pylist()
    recorded = RUNS[task.removeprefix("lit_vlm_")]["samples"]
    samples = [recorded[row["index"]] for row in rows]
    max_tokens = int(found.get("--gen_kwargs", "max_new_tokens=1024").partition("=")[2])
    arguments = [
        (model["base_url"], one["input"], row["image"]["bytes"], max_tokens)
        for one, row in zip(samples, rows, strict=True)
    ]
    with ThreadPoolExecutor(int(model["num_concurrent"])) as pool:
        answers = list(pool.map(lambda given: ask(*given), arguments))
    hits = [answer.strip()[:1] == sample["target"] for answer, sample in zip(answers, samples, strict=True)]
    lines = [
        json.dumps(sample | {"doc_id": number, "filtered_resps": answer})
        for number, (sample, answer) in enumerate(zip(samples, answers, strict=True))
    ]
    (place / f"20260101_000000_samples_{task}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {"alias": task, "dtcbench_acc,none": sum(hits) / len(hits)}


if __name__ == "__main__":
    main()
