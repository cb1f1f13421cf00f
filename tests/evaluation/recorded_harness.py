"""Stand-in for lmms-eval's process that asks an endpoint what lmms-eval asked, and writes what lmms-eval wrote.

Prompts, answers and scores are those of `lmms_eval_runs.json`, which lmms-eval itself gave on the same made rows
(tests/outside/record_lmms_eval.py). An answer that differs from the recorded one is an error. A request without an answer gets
lmms-eval's text for it. With HARNESS_FAULT=crash in the environment it ends as lmms-eval does after an error.
"""

import base64
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pyarrow.parquet as pq
import yaml

RUNS = json.loads((Path(__file__).parent / "lmms_eval_runs.json").read_text(encoding="utf-8"))["runs"]
FAILED = "[LMMS_EVAL_REQUEST_FAILED after 2 retries] "


def read_arguments(arguments):
    found = dict(zip(arguments, arguments[1:], strict=False))
    model = dict(pair.split("=", 1) for pair in found["--model_args"].split(","))
    return found["--tasks"], Path(found["--include_path"]), Path(found["--output_path"]), model


def ask(client, sample, image):
    url = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": sample["input"]}]
    messages = [{"role": "user", "content": content}]
    try:
        answer = client.chat.completions.create(model="model", messages=messages, max_tokens=1024, temperature=0)
    except openai.OpenAIError as error:
        return FAILED + str(error)
    text = answer.choices[0].message.content
    assert text == sample["filtered_resps"], (text, sample)
    return text


def main():
    task, folder, output, model = read_arguments(sys.argv[1:])
    recorded = RUNS[task.removeprefix("lit_vlm_")]
    settings = yaml.safe_load((folder / f"{task}.yaml").read_text(encoding="utf-8"))
    (path,) = settings["dataset_kwargs"]["data_files"].values()
    rows = pq.read_table(path).to_pylist()
    print(f"{len(rows)} rows")
    if os.environ.get("HARNESS_FAULT") == "crash":
        print("Traceback (most recent call last):\nValueError: a column of the wrong type")
        return  # with status 0, too
    samples = [recorded["samples"][row["index"]] for row in rows]
    client = openai.OpenAI(base_url=model["base_url"], api_key="none", max_retries=0)
    images = [row["image"]["bytes"] for row in rows]
    with ThreadPoolExecutor(int(model["num_concurrent"])) as pool:
        answers = list(pool.map(ask, [client] * len(rows), samples, images))
    results = recorded["results"]
    if len(rows) != len(recorded["samples"]):  # the rule of K-DTCBench, the only set whose rows the tests take away
        hits = [sample["dtcbench_acc"]["pred"] == sample["target"] for sample in samples]
        results = {task: {"alias": task, "dtcbench_acc,none": sum(hits) / len(hits)}}
    place = output / "model"
    place.mkdir(parents=True)
    (place / "20260101_000000_results.json").write_text(json.dumps({"results": results}), encoding="utf-8")
    lines = [
        json.dumps(sample | {"doc_id": number, "filtered_resps": answer})
        for number, (sample, answer) in enumerate(zip(samples, answers, strict=True))
    ]
    (place / f"20260101_000000_samples_{task}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
