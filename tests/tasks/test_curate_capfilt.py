"""Tests of curate.method=capfilt: web and synthetic texts of a small BLIP, and the source that is made of those that stay."""

import json

import pytest
from run_helpers import make_llava_record, read_lines, run_curate, save_photos, write_data_choice, write_records
from small_matchers import make_blip

from lit_vlm.config import ConfigError, parse
from lit_vlm.data.sources import open_source
from lit_vlm.model.image_text import BlipCaptioner, load_blip_matcher
from lit_vlm.types import UserError

CAPFILT, QUESTION = "curate.method=capfilt", "<image>\nDescribe it."
PICTURES = ["china.jpg", "flower.png", "astronaut.jpg", "고양이.png"]
TEXTS = ["건물 사진", "노란 꽃", "우주복을 입은 사람", "회색 고양이"]  # what the small captioner draws has Hangul


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    return make_blip(tmp_path_factory.mktemp("blip"))


@pytest.fixture
def mixture(tmp_path):
    """Four captions, one of a picture that is missing, one with two answers, and a record of text."""
    photos = save_photos(tmp_path / "photos")
    rows = [make_llava_record(QUESTION, text, id=name, image=name) for name, text in zip(PICTURES, TEXTS, strict=True)]
    rows.append(make_llava_record(QUESTION, "not there", id="missing", image="none.jpg"))
    rows.append(make_llava_record(QUESTION, "one", "and?", "two", id="turns", image="china.jpg"))
    source = {"path": str(write_records(tmp_path / "one.json", rows)), "image_root": str(photos), "kind": "caption"}
    return tmp_path, [*write_data_choice(tmp_path, sources={"one": source}, validation={"fraction": 0}), CAPFILT]


def ask(blip, min_score=0.0):
    return [
        f"curate.model={blip / 'retrieval'}",
        f"curate.capfilt.captioner={blip / 'captions'}",
        f"curate.capfilt.min_score={min_score}",
    ]


def open_new_source(job_overrides, output):
    overrides = [text for text in job_overrides if not text.startswith("curate.")]
    config = parse(["task=curate", *overrides]).config.data.sources["one"]
    config.generated = str(output / "one.generated.jsonl")
    return open_source("one", config, max_image_pixels=10**8)


def test_the_new_source_has_the_texts_that_the_filter_keeps_with_the_records_pictures(mixture, blip, capsys):
    folder, overrides = mixture
    output = run_curate(folder, *overrides, *ask(blip))
    every = list(open_new_source(overrides, output))
    assert [sample.id for sample in every] == [
        f"{name}-{origin}" for name in PICTURES for origin in ("web", "synthetic")
    ]
    assert [sample.messages[-1].text for sample in every[::2]] == TEXTS
    assert all(sample.messages[0].text.strip() == "Describe it." and len(sample.images) == 1 for sample in every)
    matcher = load_blip_matcher(blip / "retrieval", "x")
    scores = {
        sample.id: float(matcher.score([sample.images[0].load()], [sample.messages[-1].text])[0]) for sample in every
    }
    ordered = sorted(scores.values())
    middle = (ordered[3] + ordered[4]) / 2
    output = run_curate(folder, *overrides, *ask(blip, middle), "run_name=filtered")
    kept = [sample.id for sample in open_new_source(overrides, output)]
    assert kept == [name for name, score in scores.items() if score > middle] and len(kept) == 4
    lines = read_lines(output / "left_out.jsonl")
    assert {f"{PICTURES[line['position']]}-{line['text']}" for line in lines} == set(scores) - set(kept)
    own = json.loads((output / "one.selection.json").read_text())["left_out"]
    assert sum(last - first + 1 for first, last in own) == sum(line["text"] == "web" for line in lines)
    page, said = (output / "page.html").read_text("utf-8"), " ".join(capsys.readouterr().out.split())
    assert "<svg" in page and ">threshold<" in page and "web texts" in page and "synthetic texts" in page
    assert "data.sources.one.generated=" in said and "not in the new source: 1." in said and "none.jpg" in said
    assert (folder / "photos").exists()


def test_an_interrupted_pass_goes_on_with_the_same_captions(mixture, blip, monkeypatch):
    folder, overrides = mixture
    asked, batches, caption = [*overrides, *ask(blip), "curate.batch_size=3"], [], BlipCaptioner.caption

    def fail_later(self, images, seeds):
        if batches:
            raise KeyboardInterrupt
        batches.append(caption(self, images, seeds))
        return batches[-1]

    monkeypatch.setattr(BlipCaptioner, "caption", fail_later)
    with pytest.raises(KeyboardInterrupt):
        run_curate(folder, *asked)
    later = []
    monkeypatch.setattr(
        BlipCaptioner, "caption", lambda self, images, seeds: later.append(len(images)) or caption(self, images, seeds)
    )
    output = run_curate(folder, *asked)
    assert later == [1]  # the fourth picture; the missing one is not captioned
    texts = {sample.id: sample.messages[-1].text for sample in open_new_source(overrides, output)}
    whole = run_curate(folder, *asked, f"data.index_dir={folder / 'fresh'}", "curate.batch_size=1", "run_name=whole")
    again = {sample.id: sample.messages[-1].text for sample in open_new_source(overrides, whole)}
    assert again == texts and [texts[f"{name}-synthetic"] for name in PICTURES[:3]] == batches[0]


def test_without_a_captioner_the_web_texts_alone_are_filtered(mixture, blip):
    folder, overrides = mixture
    output = run_curate(folder, *overrides, f"curate.model={blip / 'retrieval'}", "curate.capfilt.min_score=0")
    assert [sample.id for sample in open_new_source(overrides, output)] == [f"{name}-web" for name in PICTURES]


def test_a_synthetic_text_in_another_language_than_the_record_leaves(mixture, blip, monkeypatch, capsys):
    folder, overrides = mixture
    monkeypatch.setattr(BlipCaptioner, "caption", lambda self, images, seeds: ["a photo"] * len(images))
    output = run_curate(folder, *overrides, *ask(blip))
    assert [sample.id for sample in open_new_source(overrides, output)] == [f"{name}-web" for name in PICTURES]
    assert "in another language than the record's, which leave whatever their score: 4." in " ".join(
        capsys.readouterr().out.split()
    )


def test_other_folders_and_sources_without_captions_are_errors(mixture, blip):
    folder, overrides = mixture
    with pytest.raises(
        UserError,
        match=r"curate.model=.*BlipForConditionalGeneration.*Give a local folder of a BlipForImageTextRetrieval",
    ):
        run_curate(folder, *overrides, f"curate.model={blip / 'captions'}")
    with pytest.raises(
        UserError, match="curate.capfilt.captioner=.*Give a local folder of a BlipForConditionalGeneration"
    ):
        run_curate(
            folder, *overrides, f"curate.model={blip / 'retrieval'}", f"curate.capfilt.captioner={blip / 'retrieval'}"
        )
    with pytest.raises(UserError, match="no record of the kinds chart has one picture and one answer"):
        run_curate(folder, *overrides, f"curate.model={blip / 'retrieval'}", "curate.capfilt.kinds=[chart]")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "curate.model is not set"),
        (["curate.model=x", "curate.capfilt.kinds=[captoin]"], "Did you mean caption"),
        (["curate.model=x", "data.sources.mine.generated=x.jsonl"], "from the records' own turns"),
        (["curate.model=x", "curate.capfilt.min_score=0.2", "curate.method=prune"], "curate.method=capfilt only"),
    ],
)
def test_settings_of_capfilt_are_checked_before_anything_is_read(overrides, message):
    with pytest.raises(ConfigError, match=message):
        parse(["task=curate", "data=llava_json", "data.sources.mine.path=x.json", CAPFILT, *overrides])
