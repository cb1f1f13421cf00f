"""Tests of task=curate: duplicates and rows of benchmarks in a small mixture, and a run that trains on the selection."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image
from run_helpers import (
    make_llava_record,
    read_lines,
    run,
    run_curate,
    save_photos,
    write_data_choice,
    write_records,
)
from small_matchers import make_dual_encoder
from transformers import CLIPVisionModel

from lit_vlm.config import ConfigError, parse
from lit_vlm.curation import features
from lit_vlm.model.image_text import DualEncoder
from lit_vlm.types import UserError

QUESTION, ANSWER = "<image>\n무엇이 보이나요?", "사진이 보입니다."


def list_left_out(output):
    return [(line["source"], line["position"], line["evidence"]) for line in read_lines(output / "left_out.jsonl")]


@pytest.fixture
def mixture(tmp_path):
    """Two sources whose records are duplicates or look like it. Returns their folder and the overrides that name them."""
    folder = save_photos(tmp_path / "photos")
    china = Image.open(folder / "china.jpg").convert("RGB")
    changes = {
        "again.jpg": china.resize((320, 213)),
        "flipped.png": china.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        "painted.png": Image.fromarray(np.asarray(china)[:, :, [2, 0, 1]]),
        "pixels.png": china,
    }
    for name, image in changes.items():
        image.save(folder / name, quality=40)
    china_records = [
        make_llava_record(QUESTION, ANSWER, id=name, image=name)
        for name in ("china.jpg", "flipped.png", "painted.png", "again.jpg")
    ]
    one = [
        *china_records,
        make_llava_record("<image>\n어디인가요?", "중국입니다.", id="other turns", image="china.jpg"),
        make_llava_record("수도는?", "서울", id="text"),
        make_llava_record(QUESTION, ANSWER, id="missing", image="none.jpg"),
    ]
    two = [
        make_llava_record("<image>\n무엇이  보이나요? ", ANSWER, id="bytes", image="china.jpg"),
        make_llava_record(QUESTION, ANSWER, id="pixels", image="pixels.png"),
        make_llava_record("수도는?", "서울", id="text again"),
        make_llava_record("수도는?", "부산", id="other text"),
        make_llava_record(QUESTION, ANSWER, id="flower", image="flower.png"),
    ]
    sources = {
        name: {"path": str(write_records(tmp_path / f"{name}.json", rows)), "image_root": str(folder)}
        for name, rows in (("one", one), ("two", two))
    }
    return tmp_path, write_data_choice(tmp_path, sources=sources, validation={"fraction": 0})


def test_only_rows_with_the_same_picture_and_turns_go_within_and_across_sources(mixture, capsys):
    folder, overrides = mixture
    output = run_curate(folder, *overrides)
    assert list_left_out(output) == [
        ("one", 3, "view"),
        ("two", 0, "bytes"),
        ("two", 1, "pixels"),
        ("two", 2, "text"),
    ]
    kept = [line["same_as"]["position"] for line in read_lines(output / "left_out.jsonl")]
    assert kept == [0, 0, 0, 5]
    groups = [[one["position"] for one in line["records"]] for line in read_lines(output / "same_pictures.jsonl")]
    assert groups == [[0, 4]]
    printed = capsys.readouterr().out
    assert "1 record cannot be read" in printed and "none.jpg" in printed
    page = (output / "page.html").read_text("utf-8")
    assert page.count("data:image/") == 6 + 2 and "the same picture, other turns" in page
    summary = json.loads((output / "summary.json").read_text())
    assert summary["sources"][0] == {
        "name": "one",
        "num_records": 7,
        "num_bad": 1,
        "num_out_before": 0,
        "num_left_out": 1,
        "kept": 6,
    }


def test_pictures_and_texts_can_be_duplicates_on_their_own(mixture):
    folder, overrides = mixture
    output = run_curate(folder, *overrides, "curate.duplicates=pictures", "run_name=pictures")
    assert [one[:2] for one in list_left_out(output)] == [("one", 3), ("one", 4), ("two", 0), ("two", 1)]
    output = run_curate(folder, *overrides, "curate.duplicates=texts", "run_name=texts")
    assert [one[:2] for one in list_left_out(output)] == [
        ("one", 1),
        ("one", 2),
        ("one", 3),
        *(("two", n) for n in (0, 1, 2, 4)),
    ]
    output = run_curate(folder, *overrides, "curate.pictures=bytes", "run_name=bytes")
    assert list_left_out(output) == [("two", 0, "bytes"), ("two", 2, "text")]


def test_features_of_a_tower_find_pictures_that_are_near_and_are_kept(mixture, tmp_path_factory, monkeypatch):
    folder, overrides = mixture
    tower = make_dual_encoder("clip", tmp_path_factory.mktemp("clip"))
    asked, encoded = [*overrides, "curate.pictures=embedding", f"curate.model={tower}"], []
    embed = DualEncoder.embed_images
    monkeypatch.setattr(DualEncoder, "embed_images", lambda self, images: encoded.extend(images) or embed(self, images))
    output = run_curate(folder, *asked, "curate.min_cosine=-1")
    assert len(encoded) == 4 + 3  # pictures of each source, each once
    evidence = {one[:2]: one[2] for one in list_left_out(output)}
    assert evidence[("one", 1)] == evidence[("one", 3)] == evidence[("two", 4)] == "embedding"
    run_curate(folder, *asked, "curate.min_cosine=0.5", "run_name=other")
    assert len(encoded) == 4 + 3
    vision = tmp_path_factory.mktemp("tower")
    CLIPVisionModel.from_pretrained(tower).save_pretrained(vision)
    shutil.copy(tower / "preprocessor_config.json", vision)
    output = run_curate(
        folder,
        *overrides,
        "curate.pictures=embedding",
        f"curate.model={vision}",
        "curate.min_cosine=-1",
        "run_name=tower",
    )
    assert ("one", 1, "embedding") in list_left_out(output)


def test_a_run_trains_on_the_selected_records(mixture):
    folder, overrides = mixture
    output = run_curate(folder, *overrides)
    selections = [f"data.sources.{name}.selection={output / name}.selection.json" for name in ("one", "two")]
    done = run(
        *("stage=sft", *overrides, *selections, "data.on_bad_record=quarantine", "data.max_quarantined=0.5"),
        *(f"run_dir={folder / 'runs'}", "run_name=trained", "trainer.max_steps=1", "data.tiling=base"),
    )
    lock = json.loads((done.dir / "mixture.lock").read_text())
    assert sum(source["records"] for source in lock["sources"].values()) == 7 + 5 - 4


def test_a_second_search_adds_to_a_selection(mixture):
    folder, overrides = mixture
    first = run_curate(folder, *overrides, "curate.duplicates=texts", "run_name=texts")
    selection = f"data.sources.one.selection={first / 'one'}.selection.json"
    second = run_curate(folder, *overrides, selection)
    assert list_left_out(second) == [("two", 0, "bytes"), ("two", 1, "pixels"), ("two", 2, "text")]
    chosen = json.loads((second / "one.selection.json").read_text())
    assert chosen["left_out"] == [[1, 3]] and chosen["passes"] == ["duplicates", "duplicates"]


def test_an_interrupted_search_decodes_no_picture_twice(mixture, monkeypatch):
    folder, overrides = mixture
    decoded = []
    reduce_picture = features.reduce_picture

    def count(picture):
        decoded.append(picture.size)
        return reduce_picture(picture)

    monkeypatch.setattr(features, "reduce_picture", count)
    output = run_curate(folder, *overrides)
    found, num_decoded = list_left_out(output), len(decoded)
    assert num_decoded == 4 + 3  # of each source, each file once
    run_curate(folder, *overrides)
    assert len(decoded) == num_decoded
    os.utime(folder / "photos" / "flower.png", ns=(1, 1))
    assert list_left_out(run_curate(folder, *overrides)) == found
    assert len(decoded) == num_decoded + 1
    for path in (folder / "runs" / "index" / "curation").glob("*.npy"):
        path.write_bytes(path.read_bytes()[:100])  # cut off
    assert list_left_out(run_curate(folder, *overrides)) == found


def test_hashes_of_another_version_are_named_and_not_read(mixture, monkeypatch, capsys):
    folder, overrides = mixture
    with monkeypatch.context() as changed:
        changed.setattr(features, "HASH_VERSION", features.HASH_VERSION - 1)
        run_curate(folder, *overrides)
    assert "older version" not in capsys.readouterr().out
    kept = {path: path.read_bytes() for path in (folder / "runs/index/curation").glob("*.npy")}
    assert len(kept) == 2 * 2
    output = run_curate(folder, *overrides)
    said = " ".join(capsys.readouterr().out.split())
    assert (
        f"the hashes of 2 blocks of records are of an older version than {features.HASH_VERSION} and were not read"
        in said
    )
    assert all(path.read_bytes() == content for path, content in kept.items())
    assert len(list((folder / "runs/index/curation").glob("*.npy"))) == 2 * len(kept)
    assert run_curate(folder, *overrides) == output and "older version" not in capsys.readouterr().out


def test_the_output_of_another_search_is_not_replaced(mixture):
    folder, overrides = mixture
    run_curate(folder, *overrides)
    with pytest.raises(UserError, match="another search: it differs in curate"):
        run_curate(folder, *overrides, "curate.duplicates=pictures")
    assert run_curate(folder, *overrides, "curate.duplicates=pictures", "overwrite=true")


def test_a_mixture_without_a_readable_record_is_an_error(tmp_path):
    records = [make_llava_record(QUESTION, ANSWER, id="missing", image="none.jpg")]
    path = write_records(tmp_path / "rows.json", records)
    with pytest.raises(UserError, match="no record can be read"):
        run_curate(tmp_path, "data=llava_json", f"data.sources.mine.path={path}")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["curate.method=contamination"], "evaluate.files is not set"),
        (["curate.method=contamination", "evaluate.files=x", "benchmarks=[mmsta]"], "Did you mean mmstar"),
        (["benchmarks=[mmstar]"], "curate.method=contamination only"),
        (["curate.pictures=embedding", "curate.min_cosine=0.9"], "curate.model is not set"),
        (["curate.pictures=embedding", "curate.model=x"], "curate.min_cosine is not set"),
        (["curate.min_cosine=0.9"], "curate.pictures=embedding only"),
        (["curate.pictures=embedding", "curate.method=personal"], "curate.method=duplicates only"),
        (["curate.method=contamination", "evaluate.files=x", "curate.pictures=bytes"], "always compares bytes, pixels"),
        (["curate.method=contamination", "evaluate.files=x", "curate.pictures=embedding"], "curate.model is not set"),
        (
            ["curate.method=contamination", "evaluate.files=x", "curate.min_cosine=0.9"],
            "curate.pictures=embedding only",
        ),
        (
            ["curate.method=contamination", "evaluate.files=x", "curate.duplicates=texts"],
            "curate.method=duplicates only",
        ),
        (["curate.min_overlap=0.5"], "curate.method=contamination only"),
        (["curate.min_similarity=0.5"], "curate.duplicates=texts only"),
    ],
)
def test_settings_of_curate_are_checked_before_anything_is_read(overrides, message):
    with pytest.raises(ConfigError, match=message):
        parse(["task=curate", "data=llava_json", "data.sources.mine.path=x.json", *overrides])


def test_records_with_personal_data_are_left_out_and_no_list_or_page_shows_the_data(tmp_path, capsys):
    number, card = "971013-9019902", "4242-4242-4242-4242"  # nobody's: born in 1897, and a test card
    rows = [
        make_llava_record("이름은?", "모릅니다.", id="plain"),
        make_llava_record("번호를 읽어 주세요.", f"{number} 입니다", id="number"),
        make_llava_record("<image>\n카드 번호는?", card, id="card", image="none.jpg"),
    ]
    source = {"path": str(write_records(tmp_path / "one.json", rows))}
    overrides = write_data_choice(tmp_path, sources={"one": source}, validation={"fraction": 0})
    output = run_curate(tmp_path, *overrides, "curate.method=personal")
    lines = read_lines(output / "left_out.jsonl")
    assert [(line["position"], line.get("registration_number"), line.get("card_number")) for line in lines] == [
        (1, 1, None),
        (2, None, 1),  # pictures are not read, so a missing one does not matter
    ]
    for path in output.iterdir():
        text = path.read_text("utf-8", errors="replace")
        assert number not in text and card not in text
    assert "••••••-•••••••" in (output / "page.html").read_text("utf-8")
    said = " ".join(capsys.readouterr().out.split())
    assert "records with a registration number: 1" in said and "Only texts were looked at." in said
    assert "data.sources.one.selection=" in said
