"""lmms-eval and VLMEvalKit score the same stored answers. `make test-outside` runs this.

lmms-eval's own command asks a replay endpoint; its verdicts must be those that `benchmarks.harnesses` gets from its functions.
"""

import io
import json
from pathlib import Path

import pytest
import yaml
from datasets import Dataset, Features, Image
from harness_runs import LMMS_EVAL, VLMEVALKIT, run_lmms_eval
from PIL import Image as Pictures

from benchmarks.harness_answers import MAKERS, make_answers
from benchmarks.harnesses import RESULTS, ROTATION, compare, compute_score, make_item
from lit_vlm.serving.answer_log import ChatAnswerLog, LoggedAnswer, RequestFolder
from lit_vlm.serving.recording_endpoint import AnswerRecorder, RecordingMode, create_recording_app, run_in_thread

pytestmark = [
    pytest.mark.outside,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(
        not (LMMS_EVAL.is_file() and VLMEVALKIT.is_file()),
        reason="no lmms-eval or VLMEvalKit; make test-outside puts them there",
    ),
]
TASKS = {  # the harness's own task, and the split of the set
    "k_dtcbench": ("dtcbench/dtcbench.yaml", "test"),
    "k_seed": ("seedbench/seedbench_ko.yaml", "test"),
    "k_mmstar": ("mmstar/mmstar_ko.yaml", "val"),
    "k_mmbench": ("mmbench/mmbench_ko_dev.yaml", "dev"),
}
# Its Korean task always asks a judge; the English one has a variant that does not, with the same columns.
WITHOUT_JUDGE = """metric_list:
  - metric: gpt_eval_score
    aggregation: !function lmms_eval.tasks.mmbench.en_utils.mmbench_aggregate_dev_results_static
    higher_is_better: true
"""


def write_tasks(folder: Path) -> None:
    """Write the rows with pictures as parquet, and a YAML of each set that includes the harness's own task."""
    (tasks,) = LMMS_EVAL.parents[1].glob("lib/python*/site-packages/lmms_eval/tasks")
    memory = io.BytesIO()
    Pictures.new("RGB", (8, 8), "red").save(memory, "PNG")
    for name, (original, split) in TASKS.items():
        rows = [
            {key: value for key, value in row.items() if key not in ("form", "prediction")}
            | {"image": {"bytes": memory.getvalue()}}
            for row in make_answers(name)
        ]
        data = Dataset.from_list(rows)
        path = folder / f"{name}.parquet"
        data.cast(Features(data.features | {"image": Image()})).to_parquet(path)
        content = {
            "include": str(tasks / original),
            "task": f"made_{name}",
            "dataset_path": "parquet",
            "dataset_name": None,
        }
        content |= {"dataset_kwargs": {"data_files": {split: str(path)}}, "test_split": split}
        text = yaml.safe_dump(content) + (WITHOUT_JUDGE if name == "k_mmbench" else "")
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


def find_answer(text: str) -> str:
    """Find the stored answer to a prompt by its question and its options."""
    items = [(row, make_item(name, row)) for name in MAKERS for row in make_answers(name)]
    found = [
        row["prediction"]
        for row, item in items
        if item["question"] in text
        and sorted(places := [text.index(option) for option in item["options"].values()]) == places
    ]
    assert len(set(found)) == 1, (text, found)
    return found[0]


@pytest.fixture(scope="module")
def lmms_eval(tmp_path_factory) -> dict:
    """Results and samples of lmms-eval on the replayed answers."""
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder)
    names = [f"made_{name}" for name in TASKS]
    requests, log = RequestFolder(folder / "requests"), ChatAnswerLog(folder / "answers.jsonl")
    collector = AnswerRecorder(log, RecordingMode.collect, requests=requests, placeholder="?")
    with run_in_thread(create_recording_app(collector)) as url:
        run_lmms_eval(names, folder, url, tmp_path_factory.mktemp("collected"))
    for key, request in requests.read():
        parts = request["messages"][-1]["content"]
        log.add(LoggedAnswer(key, find_answer("".join(part.get("text", "") for part in parts))))
    replayer = AnswerRecorder(log, RecordingMode.replay)
    with run_in_thread(create_recording_app(replayer)) as url:
        found = run_lmms_eval(names, folder, url, tmp_path_factory.mktemp("replayed"))
    assert replayer.counts.refused == 0 and replayer.counts.from_log == sum(len(make_answers(name)) for name in TASKS)
    return {name: found[f"made_{name}"] for name in TASKS}


@pytest.fixture(scope="module")
def compared() -> dict:
    sets = {name: [make_item(name, row) for row in make_answers(name)] for name in MAKERS}
    return compare(sets, {"lmms_eval": LMMS_EVAL, "vlmevalkit": VLMEVALKIT})


def test_the_committed_verdicts_are_those_of_both_harnesses(compared):
    assert compared == json.loads(RESULTS.read_text(encoding="utf-8"))


@pytest.mark.parametrize(("name", "metric"), [("k_dtcbench", "dtcbench_acc"), ("k_seed", "seed_image")])
def test_replayed_answers_get_the_same_verdicts_by_first_character(lmms_eval, compared, name, metric):
    rows = compared["sets"][name]
    samples = [sample[metric] for sample in lmms_eval[name]["samples"]]
    assert [sample["pred"] for sample in samples] == [row["lmms_eval"]["letter"] for row in rows]
    score = compute_score(name, [(row, row["lmms_eval"]) for row in rows])
    assert lmms_eval[name]["results"][f"{metric},none"] == pytest.approx(score)


def test_replayed_answers_get_the_same_verdicts_in_k_mmstar(lmms_eval, compared):
    rows = compared["sets"]["k_mmstar"]
    samples = [sample["average"]["score"] == 1 for sample in lmms_eval["k_mmstar"]["samples"]]
    assert samples == [row["lmms_eval"]["hit"] for row in rows]


def test_replayed_answers_get_the_same_score_in_circular_k_mmbench(lmms_eval, compared):
    rows = compared["sets"]["k_mmbench"]
    score = compute_score("k_mmbench", [(row, row["lmms_eval"]) for row in rows])
    assert lmms_eval["k_mmbench"]["results"]["gpt_eval_score,none"] == pytest.approx(100 * score)
    assert len(rows) == 4 * sum(row["index"] < ROTATION for row in rows)
