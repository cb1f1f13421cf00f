"""Tests of task=prefer: a model of three questions and four images generates pairs, and DPO trains on them."""

import json
import shutil
import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw
from run_helpers import make_llava_record, run, write_records

from lit_vlm.config import ConfigError, parse
from lit_vlm.config.choices import Format, Markup
from lit_vlm.config.schema import SourceConfig
from lit_vlm.data.sources import open_source
from lit_vlm.preferences import generator
from lit_vlm.preferences.answer_log import AnswerLog
from lit_vlm.tasks.prefer import generate_preferences
from lit_vlm.types import ControlToken, Language, SampleKind, UserError

COLOURS = {"red": "빨간 원", "blue": "파란 원", "green": "초록 원", "black": "검은 원"}
DATA = ["data=llava_json", "data.sources.mine.markup=on", "data.validation.fraction=0"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """Folder with data.json, its images, and hf/: a model that was trained on them for some seconds."""
    model_folder = tmp_path_factory.mktemp("prefer")
    records = []
    for name, answer in COLOURS.items():
        picture = Image.new("RGB", (56, 56), "white")
        ImageDraw.Draw(picture).ellipse((8, 8, 48, 48), fill=name)
        picture.save(model_folder / f"{name}.png")
        boxes = f"<obj>{answer}</obj><bbox>0.1, 0.1, 0.9, 0.9</bbox>"
        records += [
            make_llava_record("<image>\n무엇?", answer, id=f"what {name}", image=f"{name}.png"),
            make_llava_record("<image>\n<gro>\n어디?", boxes, id=f"where {name}", image=f"{name}.png"),
            make_llava_record("<image>\n어디?", answer, id=f"plain {name}", image=f"{name}.png"),
        ]
    data = write_records(model_folder / "data.json", records)
    steps = [
        "trainer.max_steps=60",
        "stage.learning_rate=1e-2",
        "stage.adam_betas=[0.9,0.98]",
        "data.global_batch_size=12",
    ]
    overrides = [*DATA, f"data.sources.mine.path={data}", "data.tiling=base", "callbacks=[export]", *steps]
    run_output = run("stage=sft", *overrides, f"run_dir={model_folder / 'runs'}", "run_name=model")
    shutil.move(run_output.hf, model_folder / "hf")
    return model_folder


@pytest.fixture
def make_pairs(model_folder, tmp_path, monkeypatch):
    """Return a function that runs `task=prefer` in an empty folder and returns the rows of pairs.jsonl."""
    monkeypatch.chdir(tmp_path)

    def run_prefer(*overrides):
        base = [
            "task=prefer",
            f"init_from={model_folder / 'hf'}",
            *DATA,
            f"data.sources.mine.path={model_folder / 'data.json'}",
        ]
        generate_preferences(
            parse([*base, "trainer=tiny", "prefer.temperature=2", "prefer.max_new_tokens=40", *overrides])
        )
        path = tmp_path / "pairs.jsonl"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    return run_prefer


def read_answer_lines(tmp_path):
    text = (tmp_path / "pairs_files" / "answers.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_pairs_are_generated_read_back_and_trained_on(make_pairs, model_folder, tmp_path, capsys):
    rows = make_pairs("prefer.kinds=[response,control]", "prefer.num_samples=6", "prefer.temperature=1.7")
    output = capsys.readouterr().out
    kinds = [row["pair"] for row in rows]
    assert kinds.count("response") >= 4 and kinds.count("control") >= 2
    for row in rows:
        assert row["scores"]["chosen"] > row["scores"]["rejected"]
    assert "prompts for control pairs" in output and f"data.sources.mine.image_root={model_folder}" in output

    settings = SourceConfig(
        format=Format.preference, kind="preference", path="pairs.jsonl", image_root=str(model_folder)
    )
    source = open_source("mine", settings, max_image_pixels=10**6)
    samples = open_source(
        "mine", SourceConfig(path=str(model_folder / "data.json"), markup=Markup.on), max_image_pixels=10**6
    )
    by_id = {sample.id: sample for sample in (samples[n] for n in range(len(samples)))}
    for row, pair in zip(rows, (source[n] for n in range(len(source))), strict=True):
        sample = by_id[row["id"].split("/")[1]]
        assert (pair.prompt, pair.kind, pair.language) == (sample.messages[:-1], sample.kind, sample.language)
        assert np.array_equal(np.asarray(pair.images[0].load()), np.asarray(sample.images[0].load()))
        assert pair.chosen != pair.rejected
        if row["pair"] == "control":
            assert pair.kind is SampleKind.grounding and ControlToken("<gro>") in pair.prompt[0].content
            assert ControlToken("<bbox>") in pair.chosen.content and ControlToken("<bbox>") not in pair.rejected.content

    overrides = [
        "data=preference",
        "data.sources.mine.path=pairs.jsonl",
        f"data.sources.mine.image_root={model_folder}",
    ]
    overrides += ["stage=dpo", "stage.learning_rate=1e-3", "data.global_batch_size=4", "data.tiling=base"]
    run_output = run(
        *overrides, "data.validation.fraction=0", f"init_from={model_folder / 'hf'}", "trainer.log_every_n_steps=1"
    )
    assert run_output.read_column("train/loss")[0] == pytest.approx(np.log(2), abs=1e-5)
    assert run_output.manifest["status"] == "finished"


def test_an_interrupted_task_resumes_and_batching_changes_nothing(make_pairs, tmp_path, monkeypatch):
    undisturbed = make_pairs()
    for path in (tmp_path / "pairs.jsonl", tmp_path / "pairs_files"):
        path.rename(path.with_name(f"old_{path.name}"))

    add, sample_answers, batch_sizes = AnswerLog.add, generator.sample_answers, []

    def add_or_interrupt(self, line):
        if len(self.lines) == 3:
            raise KeyboardInterrupt
        add(self, line)

    monkeypatch.setattr(AnswerLog, "add", add_or_interrupt)
    alone = "data.tokens_per_micro_batch=130"  # several batches, where there was one before
    with pytest.raises(SystemExit) as exited:
        make_pairs(alone)
    assert exited.value.code == 130 and not (tmp_path / "pairs.jsonl").exists()
    with open(tmp_path / "pairs_files" / "answers.jsonl", "a", encoding="utf-8") as stream:
        stream.write('{"key": "mine/11", "answ')  # torn

    monkeypatch.setattr(AnswerLog, "add", add)
    monkeypatch.setattr(
        generator,
        "sample_answers",
        lambda *arguments: batch_sizes.append(len(arguments[2])) or sample_answers(*arguments),
    )
    assert make_pairs(alone) == undisturbed
    assert sum(batch_sizes) == 12 - 3 and len(batch_sizes) > 1
    batch_sizes.clear()
    assert make_pairs() == undisturbed and not batch_sizes  # finished


def test_a_finished_file_is_reported_and_other_settings_are_refused(make_pairs, tmp_path, capsys):
    rows, before = make_pairs(), (tmp_path / "pairs.jsonl").stat()
    make_pairs()
    assert "finished already" in capsys.readouterr().out and (tmp_path / "pairs.jsonl").stat() == before
    with pytest.raises(UserError, match=r"another question: they differ in prefer\.num_samples, prefer\.temperature"):
        make_pairs("prefer.num_samples=2", "prefer.temperature=1")
    assert [row["id"] for row in make_pairs("prefer.num_samples=7", "overwrite=true")] != [] and len(rows)
    assert len(read_answer_lines(tmp_path)[0]["answers"]) == 7


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs_files/mine.txt"])
def test_files_of_other_origin_are_not_touched(make_pairs, tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=r"prefer\.output=\.\.\."):
        make_pairs()
    assert (tmp_path / name).read_text() == "mine"


def test_truncated_answers_are_counted_and_never_used(make_pairs, tmp_path, capsys):
    with pytest.raises(UserError, match="Not one pair"):
        make_pairs("prefer.max_new_tokens=1")
    assert {row["state"] for line in read_answer_lines(tmp_path) for row in line["answers"]} == {"cut"}
    output = capsys.readouterr().out
    assert "cut" in output and "too few answers" in output and "48" in output


def test_the_reference_answer_can_be_the_chosen_one(make_pairs):
    without = make_pairs("prefer.temperature=2.5")
    rows = make_pairs("prefer.temperature=2.5", "prefer.reference_as_chosen=true", "overwrite=true")
    reference_rows = [row for row in rows if row["answers"]["chosen"] == "reference" and "what" in row["id"]]
    assert reference_rows and len(rows) > len(without)
    assert [row for row in rows if row["answers"]["chosen"] == "sample"] == without
    for row in reference_rows:
        assert row["chosen"][0]["content"] == COLOURS[row["id"].split()[1].removesuffix("/response")]
        assert row["scores"] == {"chosen": 1.0, "rejected": 0.0} and row["answers"]["rejected"] == "sample"


def test_generated_images_are_saved_next_to_the_pairs(model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sources = [f"data.sources.{name}.num_samples=3" for name in ("caption_ko", "number_en")]
    choice = tmp_path / "conf" / "data" / "two.yaml"
    choice.parent.mkdir(parents=True)
    choice.write_text(
        "sources:\n  caption_ko: {format: builtin, path: caption, language: ko}\n"
        "  number_en: {format: builtin, path: number, language: en}\n"
    )
    overrides = [
        "--config-dir",
        str(tmp_path / "conf"),
        "task=prefer",
        f"init_from={model_folder / 'hf'}",
        "data=two",
        *sources,
    ]
    generate_preferences(
        parse([*overrides, "prefer.reference_as_chosen=true", "prefer.max_new_tokens=40", "data.validation.fraction=0"])
    )
    settings = SourceConfig(format=Format.preference, kind="preference", path="pairs.jsonl")
    pairs = open_source("mine", settings, max_image_pixels=10**6)
    assert len(pairs) == 6 and {pairs[n].kind for n in range(6)} == {SampleKind.caption, SampleKind.number}
    generated = open_source(
        "caption_ko",
        SourceConfig(format=Format.builtin, path="caption", language=Language.ko, num_samples=3),
        max_image_pixels=1,
    )
    assert np.array_equal(np.asarray(pairs[0].images[0].load()), np.asarray(generated[0].images[0].load()))


def test_a_user_class_can_be_the_judge(make_pairs, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_judge", raising=False)
    (tmp_path / "own_judge.py").write_text(
        "class Short:\n"
        "    def grade(self, asked):\n"
        "        return [None if '<obj>' in answer else 1 / (1 + len(answer)) for sample, answer in asked]\n"
    )
    rows = make_pairs("prefer.scorer=judge", "prefer.judge=own_judge.Short", "prefer.temperature=1.8")
    lines = read_answer_lines(tmp_path)
    for line in (line for line in lines if line["outcome"] == {"response": "pair"}):
        graded = sorted(len(row["text"]) for row in line["answers"] if row["state"] == "graded")
        (row,) = line["pairs"]
        assert row in rows and row["scores"] == {"chosen": 1 / (1 + graded[0]), "rejected": 1 / (1 + graded[-1])}
    assert rows and "ungraded" in {row["state"] for line in lines for row in line["answers"]}


def test_answers_without_a_grade_are_counted_as_ungraded(make_pairs, model_folder, capsys):
    with pytest.raises(UserError, match="Not one pair"):
        make_pairs("prefer.scorer=judge", f"prefer.judge={model_folder / 'hf'}")
    assert "ungraded" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["init_from=null"], "init_from is not set: task=prefer asks a finished model"),
        (["prefer.scorer=exakt"], "expected one of exact, judge"),
        (["prefer.kinds=[reply]"], "prefer.kinds"),
        (["prefer.kinds=[]"], "prefer.kinds: is empty"),
        (["prefer.output=pairs.csv"], "prefer.output: must end in .jsonl"),
        (["prefer.num_samples=0"], "prefer.num_samples: must be above 0"),
        (["prefer.temperature=nan"], "prefer.temperature: must be above 0"),
        (["prefer.top_p=1.5"], "prefer.top_p: must be above 0 and at most 1"),
        (["prefer.min_margin=2"], "prefer.min_margin: must be within 0 and 1, found 2.0."),
        (["prefer.scorer=judge"], "prefer.judge is not set"),
        (["prefer.judge=a.B"], "is asked with prefer.scorer=judge only"),
        (["data.sources.mine.kind=preference"], "preference pairs already"),
    ],
)
def test_errors_are_reported_before_anything_is_read(overrides, message):
    base = ["task=prefer", "init_from=runs/x/3/hf", *DATA, "data.sources.mine.path=data.json"]
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        parse([*base, *overrides])


def test_records_that_cannot_be_used_as_prompts_are_reported(make_pairs, model_folder, tmp_path, monkeypatch):
    pairs = write_records(tmp_path / "given.jsonl", [{"prompt": "?", "chosen": "a", "rejected": "b"}])
    for file, needed in (
        (pairs, "preference pairs already"),
        (
            write_records(tmp_path / "open.jsonl", [{"messages": [{"role": "user", "content": "?"}]}]),
            "it must be the assistant's",
        ),
    ):
        overrides = ["data.sources.mine.format=auto", f"data.sources.mine.path={file}", "data.sources.mine.markup=auto"]
        with pytest.raises(UserError, match=needed):
            make_pairs(*overrides)
    with pytest.raises(UserError, match="does not exist"):
        make_pairs(f"init_from={tmp_path / 'none' / 'hf'}")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one process"):
        make_pairs()
    assert [path.name for path in (tmp_path / "pairs_files").iterdir()] == ["bad_records.jsonl"]  # of open.jsonl
