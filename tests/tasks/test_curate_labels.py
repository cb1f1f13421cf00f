"""Tests of curate.method=labels: planted wrong labels, what leaves, a pass that was interrupted, and sources without classes."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from run_helpers import make_llava_record, read_lines, run_curate, write_data_choice, write_records
from small_matchers import make_dual_encoder

from lit_vlm.config import ConfigError, parse
from lit_vlm.curation import labels as curated_labels
from lit_vlm.model.image_text import DualEncoder
from lit_vlm.model.tiny import make_vision_tower
from lit_vlm.types import UserError

LABELS = "curate.method=labels"
COLOURS = {"Red": (220, 40, 40), "Green": (40, 190, 60), "Blue": (40, 60, 220)}
WRONG = {3: "Blue", 24: "red.", 47: "Green"}  # 20 pictures of each colour in turn
QUESTION = "<image>\nWhat colour is it?"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_dual_encoder("clip", tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Sixty noisy pictures, twenty of each colour in turn."""
    folder, rng = tmp_path_factory.mktemp("colours"), np.random.default_rng(0)
    for number in range(60):
        colour = np.array(list(COLOURS.values())[number // 20])
        pixels = np.clip(colour + rng.normal(0, 25, (32, 32, 3)), 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return folder


def write_mixture(folder: Path, pictures: Path, **sources: list[dict]) -> list[str]:
    """Write sources of records. Returns the overrides of a search."""
    choice = {
        name: {"path": str(write_records(folder / f"{name}.json", rows)), "image_root": str(pictures)}
        for name, rows in sources.items()
    }
    return [*write_data_choice(folder, sources=choice, validation={"fraction": 0}), LABELS]


def make_colour_rows(wrong: dict[int, str] = WRONG) -> list[dict]:
    names = [wrong.get(number, list(COLOURS)[number // 20]) for number in range(60)]
    return [
        make_llava_record(QUESTION, name, id=str(number), image=f"{number}.png") for number, name in enumerate(names)
    ]


def make_captions() -> list[dict]:
    return [make_llava_record(QUESTION, f"It is number {n}.", id=f"c{n}", image=f"{n}.png") for n in range(12)]


def test_wrong_labels_are_suspected_and_leave_only_when_asked(tmp_path, pictures, model, capsys):
    overrides = write_mixture(tmp_path, pictures, colours=make_colour_rows(), captions=make_captions())
    overrides += [f"curate.model={model}"]
    output = run_curate(tmp_path, *overrides)
    lines = read_lines(output / "left_out.jsonl")
    assert {line["position"]: line["suggested"] for line in lines} == {3: "Red", 24: "Green", 47: "Blue"}
    assert {line["given"] for line in lines} == {"Blue", "Red", "Green"}  # "red." is the class Red
    assert not any(line["left_out"] for line in lines)
    assert json.loads((output / "colours.selection.json").read_text())["left_out"] == []
    said, page = " ".join(capsys.readouterr().out.split()), (output / "page.html").read_text("utf-8")
    assert "set curate.labels.min_quality=<probability>" in said
    assert "captions was not checked: of 12 different answers 0 have curate.labels.min_pictures=10 pictures" in said
    assert "given Blue, suggested Red" in page and "<img" in page and "Suspected, and stays" in page
    table = json.loads((output / "summary.json").read_text("utf-8"))["tables"]["Classes"]
    assert [(row["source"], row["records"], row["classes"], row["suspected"]) for row in table] == [
        ("colours", "60", "3", "3")
    ]
    output = run_curate(tmp_path, *overrides, "curate.labels.min_quality=1", "run_name=all")
    assert json.loads((output / "colours.selection.json").read_text())["left_out"] == [[3, 3], [24, 24], [47, 47]]
    qualities = sorted(line["quality"] for line in lines)
    middle = (qualities[0] + qualities[1]) / 2
    output = run_curate(tmp_path, *overrides, f"curate.labels.min_quality={middle}", "run_name=one")
    assert [line["left_out"] for line in read_lines(output / "left_out.jsonl")] == [True, False, False]


def test_an_interrupted_check_encodes_no_block_twice(tmp_path, pictures, model, monkeypatch):
    overrides = write_mixture(tmp_path, pictures, first=make_colour_rows(), second=make_colour_rows({}))
    overrides += [f"curate.model={model}", "curate.batch_size=64"]
    seen, embed = [], DualEncoder.embed_images

    def fail_later(self, images):
        if seen:
            raise KeyboardInterrupt
        seen.append(len(images))
        return embed(self, images)

    monkeypatch.setattr(DualEncoder, "embed_images", fail_later)
    monkeypatch.setattr(curated_labels, "BLOCK_RECORDS", 30)
    with pytest.raises(KeyboardInterrupt):
        run_curate(tmp_path, *overrides)
    assert seen == [30]
    seen.clear()
    monkeypatch.setattr(
        DualEncoder, "embed_images", lambda self, images: seen.append(len(images)) or embed(self, images)
    )
    run_curate(tmp_path, *overrides)
    assert seen == [30]  # the second half; the other source has the same pictures
    seen.clear()
    run_curate(tmp_path, *overrides, "curate.labels.min_quality=1", "run_name=again")
    assert seen == []


def test_questions_count_beside_pictures_where_the_model_reads_texts(tmp_path, pictures, model):
    """The answer depends on the question alone, so a tower for pictures cannot tell the classes apart."""
    rng = np.random.default_rng(1)
    asked = rng.permutation(np.repeat([0, 1], 30))
    rows = [
        make_llava_record(
            f"<image>\n{('Is this a picture?', 'Does it show a dog?')[one]}",
            ("Yes", "No")[one if number != 5 else 1 - one],
            id=str(number),
            image=f"{number}.png",
        )
        for number, one in enumerate(asked.tolist())
    ]
    overrides = write_mixture(tmp_path, pictures, asked=rows)
    output = run_curate(tmp_path, *overrides, f"curate.model={model}")
    assert [line["position"] for line in read_lines(output / "left_out.jsonl")] == [5]
    make_vision_tower(tmp_path / "tower", vision_use_head=True, image_size=28)
    with pytest.raises(
        UserError,
        match="asked: the features do not tell its classes apart: the accuracy is .* the largest class has 51",
    ):
        run_curate(tmp_path, *overrides, f"curate.model={tmp_path / 'tower'}", "run_name=tower")


def test_sources_without_classes_are_named_with_the_reason(tmp_path, pictures, model):
    texts = [make_llava_record("수도는?", "서울")]
    many = [make_llava_record(QUESTION, f"{n}", id=str(n), image=f"{n}.png") for n in range(6)]
    overrides = write_mixture(tmp_path, pictures, texts=texts, captions=make_captions(), many=many)
    overrides += [f"curate.model={model}", "curate.labels.max_classes=5"]
    with pytest.raises(UserError) as error:
        run_curate(tmp_path, *overrides)
    message = str(error.value)
    assert "no source has answers that are classes" in message
    assert "- texts: no record has one picture and one answer of at most 40 characters" in message
    assert (
        "- many: 6 different answers in 6 records with a short one are more than curate.labels.max_classes=5" in message
    )
    assert "- captions: 12 different answers" in message


def test_a_label_of_too_few_pictures_is_named_and_not_checked(tmp_path, pictures, model, capsys):
    rows = make_colour_rows({**WRONG, 11: "Pink", 12: "Pink"})
    rows.append(make_llava_record(QUESTION, "Red", id="missing", image="none.png"))
    overrides = write_mixture(tmp_path, pictures, colours=rows)
    output = run_curate(tmp_path, *overrides, f"curate.model={model}")
    assert {line["position"] for line in read_lines(output / "left_out.jsonl")} == set(WRONG)
    said = " ".join(capsys.readouterr().out.split())
    assert "min_pictures=10 pictures, which were not checked (2 records): Pink." in said
    assert "1 record cannot be read" in said and "none.png" in said


def test_a_missing_cleanlab_is_said_with_the_extra_that_installs_it(tmp_path, pictures, model, monkeypatch):
    monkeypatch.setattr(curated_labels, "find_spec", lambda name: None)
    overrides = write_mixture(tmp_path, pictures, colours=make_colour_rows())
    with pytest.raises(UserError, match=r"needs cleanlab: pip install -e '\.\[curate\]'"):
        run_curate(tmp_path, *overrides, f"curate.model={model}")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "curate.model is not set: curate.method=labels"),
        (["curate.model=x", "curate.labels.min_pictures=4"], "curate.labels.min_pictures: must be 5 or above"),
        (["curate.model=x", "curate.labels.min_quality=2"], "curate.labels.min_quality: must be within 0 and 1"),
        (["curate.model=x", "curate.min_cosine=0.9"], "curate.min_cosine: is read with curate.pictures=embedding only"),
        (["curate.model=x", "curate.slurm=2"], "curate.slurm: shares the hashing"),
        (
            ["curate.method=prune", "curate.labels.max_classes=5"],
            "curate.labels: is read with curate.method=labels only",
        ),
    ],
)
def test_settings_of_labels_are_checked_before_anything_is_read(overrides, message):
    with pytest.raises(ConfigError, match=message):
        parse(["task=curate", "data=llava_json", "data.sources.mine.path=x.json", LABELS, *overrides])
