"""Tests of curate.method=prune: scores of a small CLIP, thresholds, rules of text quality, and a pass that was interrupted."""

import json

import pytest
from PIL import Image
from run_helpers import make_llava_record, read_lines, run_curate, save_photos, write_data_choice, write_records
from small_matchers import make_dual_encoder

from lit_vlm.config import ConfigError, parse
from lit_vlm.model.image_text import DualEncoder, load_scorer
from lit_vlm.types import UserError

PRUNE, CAPTIONS = (
    "curate.method=prune",
    ["a photo of a building", "노란 꽃이 있는 사진", "an astronaut in a suit", "회색 고양이"],
)
QUESTION = "<image>\n무엇이 보이나요?"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_dual_encoder("clip", tmp_path_factory.mktemp("clip"))


@pytest.fixture
def mixture(tmp_path):
    """Captions with pictures, one of a picture that is missing, one of poor text, and a record of another kind."""
    folder = save_photos(tmp_path / "photos")
    pictures = ["china.jpg", "flower.png", "astronaut.jpg", "고양이.png"]
    rows = [
        make_llava_record(QUESTION, text, id=name, image=name) for name, text in zip(pictures, CAPTIONS, strict=True)
    ]
    rows += [
        make_llava_record(QUESTION, "no such picture here", id="missing", image="none.jpg"),
        make_llava_record(QUESTION, "shoes shoes shoes shoes shoes", id="poor", image="china.jpg"),
    ]
    sources = {
        "one": {"path": str(write_records(tmp_path / "one.json", rows)), "image_root": str(folder), "kind": "caption"}
    }
    sources["other"] = {"path": str(write_records(tmp_path / "other.json", [make_llava_record("수도는?", "서울")]))}
    return tmp_path, [*write_data_choice(tmp_path, sources=sources, validation={"fraction": 0}), PRUNE]


def read_scores(folder, model):
    """Compute the scores of the four captions by the scorer alone."""
    photos = folder / "photos" if (folder / "photos" / "china.jpg").exists() else folder / "photos" / "photos"
    images = [
        Image.open(photos / name).convert("RGB") for name in ("china.jpg", "flower.png", "astronaut.jpg", "고양이.png")
    ]
    return [
        round(float(load_scorer(model, "x").score([image], [text])[0]), 4)
        for image, text in zip(images, CAPTIONS, strict=True)
    ]


def test_captions_of_the_lowest_scores_leave_and_a_histogram_shows_the_threshold(mixture, model, capsys):
    folder, overrides = mixture
    output = run_curate(folder, *overrides, f"curate.model={model}", "curate.prune.rules=[]")
    assert read_lines(output / "left_out.jsonl") == []
    said = " ".join(capsys.readouterr().out.split())
    assert "No record leaves by its score. Read a threshold off the histogram" in said and "none.jpg" in said
    page = (output / "page.html").read_text("utf-8")
    assert "<svg" in page and "cosine of picture and text" in page and ">threshold<" not in page
    output = run_curate(
        folder,
        *overrides,
        f"curate.model={model}",
        "curate.prune.rules=[]",
        "curate.prune.lowest_share=0.4",
        "run_name=share",
    )
    lines = read_lines(output / "left_out.jsonl")
    assert len(lines) == 2 and all(line["reasons"] == ["low_score"] for line in lines)  # 0.4 of the five with a picture
    assert ">threshold<" in (output / "page.html").read_text("utf-8")
    scores = read_scores(folder, model)
    assert all(
        line["score"] == pytest.approx(scores[line["position"]], abs=2e-4) for line in lines if line["position"] < 4
    )
    assert json.loads((output / "summary.json").read_text())["sources"][0]["num_bad"] == 1
    middle = (sorted(scores)[1] + sorted(scores)[2]) / 2
    output = run_curate(
        folder,
        *overrides,
        f"curate.model={model}",
        "curate.prune.rules=[]",
        f"curate.prune.min_score={middle}",
        "run_name=value",
    )
    found = {line["position"] for line in read_lines(output / "left_out.jsonl")} - {5}
    assert found == {number for number, score in enumerate(scores) if score < middle}


def test_an_interrupted_pass_scores_no_picture_twice(mixture, model, monkeypatch):
    folder, overrides = mixture
    asked, seen, score = [*overrides, f"curate.model={model}", "curate.batch_size=2"], [], DualEncoder.score

    def fail_later(self, images, texts):
        seen.extend(texts)
        if len(seen) > 2:
            raise KeyboardInterrupt
        return score(self, images, texts)

    monkeypatch.setattr(DualEncoder, "score", fail_later)
    with pytest.raises(KeyboardInterrupt):
        run_curate(folder, *asked)
    assert seen == CAPTIONS
    monkeypatch.setattr(
        DualEncoder, "score", lambda self, images, texts: seen.extend(texts) or score(self, images, texts)
    )
    seen.clear()
    run_curate(folder, *asked)
    assert sorted(seen) == sorted([*CAPTIONS[2:], "shoes shoes shoes shoes shoes"])
    seen.clear()
    run_curate(folder, *asked, "run_name=again", "curate.prune.lowest_share=0.5")
    assert seen == []


def test_rules_of_text_quality_need_no_model_and_no_picture(mixture, capsys):
    folder, overrides = mixture
    output = run_curate(folder, *overrides)
    assert [(line["position"], line["reasons"], line["score"]) for line in read_lines(output / "left_out.jsonl")] == [
        (5, ["repeated"], None)
    ]
    said = " ".join(capsys.readouterr().out.split())
    assert "No picture was compared with its text" in said and "not looked at (curate.prune.kinds): 1." in said


def test_a_source_without_pictures_and_the_folder_of_another_model_are_errors(mixture, model, tmp_path):
    folder, overrides = mixture
    with pytest.raises(UserError, match="no record of the kinds text has a picture"):
        run_curate(folder, *overrides, f"curate.model={model}", "curate.prune.kinds=[text]")
    with pytest.raises(UserError, match="no record that can be read is of the kinds chart"):
        run_curate(folder, *overrides, "curate.prune.kinds=[chart]")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "bert" / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="its model type is bert.*Give a local folder of SigLIP"):
        run_curate(folder, *overrides, f"curate.model={tmp_path / 'bert'}")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["curate.prune.rules=[]"], "nothing is asked"),
        (["curate.prune.min_score=0.2"], "needs the scores of a model"),
        (["curate.model=x", "curate.prune.min_score=0.2", "curate.prune.lowest_share=0.2"], "two thresholds"),
        (["curate.prune.kinds=[captoin]"], "Did you mean caption"),
        (["curate.model=x", "curate.method=duplicates"], "curate.model: is read with"),
    ],
)
def test_settings_of_prune_are_checked_before_anything_is_read(overrides, message):
    with pytest.raises(ConfigError, match=message):
        parse(["task=curate", "data=llava_json", "data.sources.mine.path=x.json", PRUNE, *overrides])
