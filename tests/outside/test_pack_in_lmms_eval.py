"""lmms-eval itself loads the task pack and scores made rows of each set in its published layout. `make test-outside` runs this."""

import base64
import csv
import importlib.util
import io
import json
import subprocess
from pathlib import Path

import pytest
import yaml
from datasets import Dataset, Features, Image, Value
from harness_runs import LMMS_EVAL, make_environment, make_scripted_app, run_lmms_eval
from PIL import Image as Pictures

from lit_vlm.evaluation import task_pack
from lit_vlm.serving.recording_endpoint import run_in_thread

PACK = Path(task_pack.__file__).parent
pytestmark = [
    pytest.mark.outside,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        not LMMS_EVAL.is_file(), reason=f"no lmms-eval in {LMMS_EVAL.parents[1]}; make test-outside puts it there"
    ),
]

# The last words of a question -> the answer to it
ANSWERS = {
    "무엇인가요 (1)": "빨간 원입니다.",
    "무엇인가요 (2)": "It is a red circle.",
    "무엇인가요 (3)": "알 수 없는 그림입니다.",
    "가격은 (1)": "Answer: B",
    "가격은 (2)": "정답은 B입니다",
    "가격은 (3)": "(A)",
    "Which food (1)": "B",
    "Which food (2)": "정답은 B입니다.",
    "원을 찾아 주세요": "<obj>원</obj><bbox>0.1, 0.1, 0.5, 0.5</bbox>",
    "네모를 찾아 주세요": "<obj>네모</obj><bbox>0.5, 0.5, 0.1, 0.1</bbox>",
    "the red cup": "<obj>cup</obj><bbox>0.1, 0.1, 0.6, 0.6</bbox>",
    "the cup": "<obj>cup</obj><bbox>0.7, 0.7, 0.9, 0.9</bbox>",
    "한 문장으로": "빨간 원은 있다.",
    "<ocr>": "<char>백범로</char><bbox>0.1, 0.2, 0.3, 0.4</bbox>\n<char>9</char><bbox>0.5, 0.6, 0.9, 0.8</bbox>",
}


def answer(model: str, text: str) -> str:
    if model == "judge":
        return "채점할 수 없습니다." if "알 수 없는" in text else "기준을 충족합니다.\n최종 점수: 10점 만점에 8점"
    return next(given for words, given in ANSWERS.items() if words in text)


def draw(width: int = 100, height: int = 50) -> bytes:
    memory = io.BytesIO()
    Pictures.new("RGB", (width, height), "red").save(memory, "PNG")
    return memory.getvalue()


def write_parquet(path: Path, rows: list[dict], image: Image | Value) -> Path:
    data = Dataset.from_list(rows)
    data.cast(Features(data.features | {"image": image})).to_parquet(path)
    return path


def write_koffvqa(folder: Path) -> dict:
    picture = base64.b64encode(draw()).decode()
    with (folder / "KOFFVQA.tsv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, delimiter="\t")
        writer.writerow(["index", "image", "question", "answer", "category"])
        for i in range(1, 4):
            writer.writerow([i, picture, f"무엇인가요 ({i})", "빨간 원이라고 하면 10점", "객체 인식"])
    return {"dataset_path": "csv", "dataset_kwargs": {"sep": "\t", "data_files": {"test": str(folder / "KOFFVQA.tsv")}}}


def write_kreta(folder: Path) -> dict:
    options = {"A": "1,000원", "B": "2,000원", "C": "3,000원", "D": "4,000원"}
    rows = [
        {
            "index": i,
            "question": f"가격은 ({i})",
            "answer": "B",
            **options,
            "category": "Retail and Commerce",
            "image_type": "Menu",
            "topic_difficulty": "System1" if i < 3 else "System2",
            "image": base64.b64encode(draw()).decode(),
        }
        for i in range(1, 4)
    ]
    return use_parquet(write_parquet(folder / "kreta.parquet", rows, Value("string")))


def write_k_viscuit(folder: Path) -> dict:
    """Write the layout of its GitHub repository: lines of JSON, and pictures beside them."""
    (folder / "images").mkdir()
    (folder / "images/0.jpg").write_bytes(draw())
    options = ["Bungeo-ppang", "Hwangnam-ppang", "Dakjuk", "Ice cream"]
    rows = [{"question": f"Which food ({i})", "options": options, "answer": 1, "image_path": "0.jpg"} for i in (1, 2)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "annotations.jsonl").write_text(text, encoding="utf-8")
    return {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "annotations.jsonl")}}}


def write_cord(folder: Path) -> dict:
    quads = [[(10, 10), (30, 10), (30, 20), (10, 20)], [(50, 30), (90, 30), (90, 40), (50, 40)]]
    words = [
        {
            "text": text,
            "quad": {f"{axis}{i}": corner["xy".index(axis)] for i, corner in enumerate(quad, 1) for axis in "xy"},
        }
        for text, quad in zip(("백범로", "3"), quads, strict=True)
    ]
    truth = json.dumps({"valid_line": [{"words": words}], "meta": {}, "dontcare": []}, ensure_ascii=False)
    return use_parquet(
        write_parquet(folder / "cord.parquet", [{"image": {"bytes": draw()}, "ground_truth": truth}], Image())
    )


def write_icdar(folder: Path) -> dict:
    """Write the folders of ICDAR 2015 and let the script of the pack make the parquet of them."""
    pictures, texts = folder / "ch4_test_images", folder / "Challenge4_Test_Task1_GT"
    pictures.mkdir(), texts.mkdir()
    (pictures / "img_1.png").write_bytes(draw())
    truth = "\ufeff10,10,30,10,30,20,10,20,백범로\r\n50,30,90,30,90,40,50,40,###\r\n"
    (texts / "gt_img_1.txt").write_text(truth, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("prepare_icdar", PACK / "ocr_popeval/prepare_icdar.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.prepare_icdar(pictures, texts, folder / "icdar2015.parquet") == 1
    return use_parquet(folder / "icdar2015.parquet")


def write_grounding(folder: Path) -> dict:
    rows = [
        {
            "image": {"bytes": draw()},
            "question": f"{name} 찾아 주세요",
            "answer": f"<obj>{name[:-1]}</obj><bbox>0.1, 0.1, 0.5, 0.5</bbox>",
        }
        for name in ("원을", "네모를")
    ]
    return use_parquet(write_parquet(folder / "grounding.parquet", rows, Image()))


def write_refcoco(folder: Path) -> dict:
    rows = [
        {"image": {"bytes": draw(200, 100)}, "answer": ["the red cup", "the cup"], "bbox": [20.0, 10.0, 100.0, 50.0]}
    ]
    return use_parquet(write_parquet(folder / "refcoco.parquet", rows, Image()), "val")


def write_captions(folder: Path) -> dict:
    rows = [{"image_id": "1", "image": {"bytes": draw()}, "captions": ["빨간 원이 있다.", "별"]}]
    return use_parquet(write_parquet(folder / "xm3600.parquet", rows, Image()), "ko")


def use_parquet(path: Path, split: str = "test") -> dict:
    return {"dataset_path": "parquet", "dataset_kwargs": {"data_files": {split: str(path)}}}


SETS = {
    "koffvqa": write_koffvqa,
    "kreta": write_kreta,
    "k_viscuit": write_k_viscuit,
    "cord_popeval": write_cord,
    "icdar2015_popeval": write_icdar,
    "grounding_markup": write_grounding,
    "refcoco_markup": write_refcoco,
    "xm3600_ko": write_captions,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict:
    """The tasks of the pack as they are, with made rows in place of the files on the hub."""
    folder, output = tmp_path_factory.mktemp("rows"), tmp_path_factory.mktemp("lmms_eval")
    for name, write in SETS.items():
        (folder / name).mkdir()
        original = str(next(PACK.glob(f"*/{name}.yaml")))
        content = {"include": original, "task": f"made_{name}", **write(folder / name)}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    variables = {"MODEL_VERSION": "judge", "K_VISCUIT_IMAGES": str(folder / "k_viscuit/images")}
    with run_in_thread(make_scripted_app(answer)) as url:
        tasks = [f"made_{name}" for name in SETS]
        found = run_lmms_eval(tasks, folder, url, output, OPENAI_API_URL=f"{url}/chat/completions", **variables)
    return {name: found[f"made_{name}"] for name in SETS}


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        # 8 points, not Korean and therefore 0, and one that the judge did not score
        ("koffvqa", {"koffvqa_score": 40.0, "koffvqa_not_korean": 100 / 3, "koffvqa_unjudged": 1}),
        (
            "kreta",
            {"kreta_acc": 100 / 3, "kreta_acc_guess": 125 / 3, "kreta_read_letter": 200 / 3, "kreta_unread": 100 / 3},
        ),
        ("kreta", {"kreta_system1": 50.0, "kreta_system2": 0.0}),
        ("k_viscuit", {"k_viscuit_exact": 50.0, "k_viscuit_read_letter": 100.0, "k_viscuit_unread": 0.0}),
        ("cord_popeval", {"popeval_h": 75.0, "popeval_precision": 75.0, "popeval_recall": 75.0, "popeval_unread": 0.0}),
        ("icdar2015_popeval", {"popeval_h": 100.0}),  # the second line lies on unreadable text
        ("grounding_markup", {"grounding_acc_50": 50.0, "grounding_iou": 50.0, "grounding_unread": 50.0}),
        ("refcoco_markup", {"grounding_acc_50": 50.0, "grounding_iou": 50.0, "grounding_outside": 0.0}),
        ("xm3600_ko", {"caption_rouge_l": 500 / 6, "caption_not_korean": 0.0}),
    ],
)
def test_lmms_eval_scores_made_rows_of_each_set(runs, task, expected):
    results = runs[task]["results"]
    assert {name: results[f"{name},none"] for name in expected} == pytest.approx(expected)


def test_lmms_eval_finds_every_task_of_the_pack_with_its_functions(tmp_path):
    names = sorted(path.stem for path in PACK.glob("*/*.yaml"))
    code = (
        "import json, sys\nfrom lmms_eval.tasks import TaskManager\n"
        f"tasks = TaskManager(include_path={str(PACK)!r}, include_defaults=False)\n"
        "callables = {name: all(map(callable, (tasks._get_config(name)[key] for key in ('doc_to_text', 'process_results'))))"
        " for name in tasks.all_subtasks}\nprint('found', json.dumps(callables))"
    )
    done = subprocess.run(
        [LMMS_EVAL, "-c", code], capture_output=True, text=True, env=make_environment(LMMS_EVAL), cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.rpartition("found ")[2]) == dict.fromkeys(names, True)


def test_lmms_eval_sends_the_prompt_and_keeps_the_answer_of_each_row(runs):
    for name, run in runs.items():
        for sample in run["samples"]:
            assert sample["filtered_resps"] in ANSWERS.values(), name
    assert runs["cord_popeval"]["samples"][0]["input"] == "<ocr>"
    assert len(runs["refcoco_markup"]["samples"]) == 2  # one row of each expression
