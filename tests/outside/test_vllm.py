"""The exported folder in vLLM gives the answers of plain transformers, with pictures and boxes. `make test-outside` runs this."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import builtin
from transformers import AutoTokenizer

from lit_vlm.types import ImagePlaceholder, Language

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-outside/vllm/bin/python"
WITHOUT_CUDA = Path(__file__).parent / "without_cuda"  # torchvision with a CPU build of torch
TIE = 1e-4  # rounding decides the order of logits this close
# Kinds of questions: text alone, one picture, several tiles, boxes, two pictures; each in Korean and English
QUESTION_KINDS = [("text", False), ("caption", False), ("word", True), ("grounding", True), ("multi_image", False)]

pytestmark = [
    pytest.mark.outside,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not PYTHON.is_file(), reason=f"no vLLM in {PYTHON.parents[1]}; make test-outside puts it there"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The export of a short run of the second stage, enough to answer in the format of each kind."""
    runs = tmp_path_factory.mktemp("runs")
    overrides = ["experiment=tiny/2_sft", "init_from=null", "model.grid=2", "model.max_tiles=4", "run_name=short"]
    overrides += [f"run_dir={runs}", "trainer.max_steps=300", "data.validation.max_samples=1"]
    done = subprocess.run([sys.executable, str(ROOT / "run.py"), *overrides], capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return runs / "short/hf"


@pytest.fixture(scope="module")
def answers(folder, tmp_path_factory) -> dict[str, list[dict]]:
    """Answers of vLLM and of transformers to the same questions."""
    place = tmp_path_factory.mktemp("answers")
    (place / "questions.json").write_text(json.dumps(make_questions(folder, place)), encoding="utf-8")
    return {backend: run_backend(backend, folder, place) for backend in ("transformers", "vllm")}


def make_questions(folder: Path, place: Path) -> list[dict]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    questions = []
    for kind, hard in QUESTION_KINDS:
        for language in (Language.ko, Language.en):
            (source,) = builtin(kind, language=language, hard=hard, held_out=True)
            questions += [make_question(source[i], tokenizer, place / f"{kind}-{language}-{i}") for i in range(4)]
    return questions


def make_question(record, tokenizer, stem: Path) -> dict:
    parts = [
        {"type": "image"}
        if isinstance(part, ImagePlaceholder)
        else {"type": "text", "text": getattr(part, "token", part)}
        for part in record.messages[0].content
    ]
    paths = [f"{stem}-{number}.png" for number in range(len(record.images))]
    for image, path in zip(record.images, paths, strict=True):
        image.load().save(path)
    messages = [{"role": "user", "content": parts}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return {"prompt": prompt, "images": paths}


def run_backend(backend: str, folder: Path, place: Path) -> list[dict]:
    torchvision_works = subprocess.run([PYTHON, "-c", "import torchvision"], capture_output=True).returncode == 0
    environment = os.environ | ({} if torchvision_works else {"PYTHONPATH": str(WITHOUT_CUDA)})
    command = [
        PYTHON,
        Path(__file__).with_name("answers.py"),
        backend,
        folder,
        place / "questions.json",
        place / f"{backend}.json",
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, cwd=place)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return json.loads((place / f"{backend}.json").read_text(encoding="utf-8"))


def test_vllm_gives_the_same_forty_greedy_answers_as_plain_transformers(answers):
    """An answer may differ from transformers' if its two best tokens are tied, and one of forty without a tie."""
    theirs, ours = answers["transformers"], answers["vllm"]
    assert len(theirs) == len(ours) == 40
    ties, different = [], []
    for number, (a, b) in enumerate(zip(theirs, ours, strict=True)):
        if a["ids"] == b["ids"]:
            continue
        place = next(i for i, pair in enumerate(zip(a["ids"], b["ids"], strict=False)) if pair[0] != pair[1])
        is_tie = a["gaps"][place] < TIE
        (ties if is_tie else different).append((number, place, a["gaps"][place], a["text"], b["text"]))
    print(f"{40 - len(ties) - len(different)} of 40 equal; ties: {ties}; different: {different}")
    assert len(different) <= 1, different


def test_vllm_keeps_the_control_tokens_of_boxes(answers):
    """In text as in tokens: boxes in an answer of plain transformers are also in vLLM's."""
    pairs = list(zip(answers["transformers"], answers["vllm"], strict=True))
    for theirs, ours in pairs:
        if theirs["ids"] == ours["ids"]:
            assert theirs["text"].removesuffix("<|im_end|>") == ours["text"].removesuffix("<|im_end|>")
    assert sum("<obj>" in ours["text"] for _, ours in pairs) >= 4  # of eight questions about boxes
    assert any("가" <= letter <= "힣" for _, ours in pairs for letter in ours["text"])
