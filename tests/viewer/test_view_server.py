"""The viewer without a browser: filters, records with tiles and mask, pairs, bad records, and what cannot be asked for."""

import io
import json
from dataclasses import replace

import httpx2
import numpy as np
import pytest
from PIL import Image

from lit_vlm.config.schema import SourceConfig
from lit_vlm.data.index.sample_index import COLUMNS, KINDS, LANGUAGES, LENGTH_POLICY_COLUMNS, SampleIndex
from lit_vlm.data.selection import identify_rows, write_selection
from lit_vlm.data.sources import open_source
from lit_vlm.tasks.view import read_curated_lists
from lit_vlm.types import Language, RecordError, SampleKind, UserError
from lit_vlm.viewer.flags import FlaggedSource, RecordFlags
from lit_vlm.viewer.samples import SampleFilter, SampleTable, find_duplicates


def get(viewer, path, **values):
    response = httpx2.get(f"{viewer.url}view/{path}", params=values, timeout=60)
    assert response.status_code == 200, response.text
    return response


def list_all(viewer, **values):
    found = get(viewer, "samples", limit=200, **values).json()
    return found["total"], found["rows"]


def test_samples_are_filtered_by_source_kind_language_length_and_duplicates(viewer):
    index = viewer.table.parts["training"]
    assert list_all(viewer)[0] == len(index) == 10 * 64 + 2
    total, rows = list_all(viewer, kind="ocr", language="ko")
    assert total == 64 and {(row["source"], row["kind"], row["language"]) for row in rows} == {("ocr_ko", "ocr", "ko")}
    assert list_all(viewer, source="mine")[0] == 2 and list_all(viewer, source="none of these")[0] == 0
    low, high = int(np.quantile(index.tokens, 0.3)), int(np.quantile(index.tokens, 0.6))
    total, rows = list_all(viewer, min_tokens=low, max_tokens=high)
    assert total == ((index.tokens >= low) & (index.tokens <= high)).sum() > 0
    assert all(low <= row["tokens"] <= high for row in rows)
    assert [row["source"] for row in list_all(viewer, source="mine", duplicates=True)[1]] == ["mine", "mine"]
    pages = [get(viewer, "samples", kind="ocr", offset=offset, limit=50).json()["rows"] for offset in (0, 50, 100, 150)]
    samples = [row["sample"] for page in pages for row in page]
    assert len(samples) == 128 and samples == sorted(set(samples))


def test_bad_records_are_listed_by_their_fault(viewer):
    faults = get(viewer, "settings").json()["parts"]["training"]["faults"]
    assert faults == {"missing": 1, "malformed": 1}
    (row,) = get(viewer, "errors", fault="missing").json()["rows"]
    assert row["source"] == "mine" and "mine.json" in row["origin"] and "none.png" in row["reason"]
    assert get(viewer, "errors").json()["total"] == 2


def test_a_record_has_the_tokens_mask_and_tiles_of_training(viewer, processor):
    index = viewer.table.parts["training"]
    for kind in ("grounding", "multi_image", "text"):
        row = list_all(viewer, kind=kind)[1][3]
        record = index.get_record(row["sample"])
        found = get(viewer, "record", sample=row["sample"]).json()
        (sequence,) = processor.encode_sequences(record)
        (shown,) = found["sequences"]
        assert sum(run["num_tokens"] for run in shown["runs"]) == sequence.num_tokens == row["tokens"]
        mask = np.concatenate([[run["supervised"]] * run["num_tokens"] for run in shown["runs"]])
        assert (mask == sequence.supervised).all()
        images = sum(run["num_tokens"] for run in shown["runs"] if run["type"] == "image")
        assert images == (sequence.input_ids == processor.image_token_id).sum()
        tiles = processor.load_tiles(record)
        assert [picture["tiles"] for picture in found["pictures"]] == [len(each) for each in tiles]
        for number, each in enumerate(tiles):
            for tile, pixels in enumerate(each):
                data = get(viewer, "tile", sample=row["sample"], image=number, tile=tile).content
                assert (np.asarray(Image.open(io.BytesIO(data))) == pixels.transpose(1, 2, 0)).all()


def test_control_tokens_differ_from_text_that_looks_like_them(viewer):
    (row, _) = list_all(viewer, source="mine")[1]
    runs = get(viewer, "record", sample=row["sample"]).json()["sequences"][0]["runs"]
    assert any("<script>x</script> <gro>" in run["text"] for run in runs if run["type"] == "text" and run["supervised"])
    row = list_all(viewer, source="grounding_ko")[1][0]
    runs = get(viewer, "record", sample=row["sample"]).json()["sequences"][0]["runs"]
    assert any("<gro>" in run["text"] for run in runs if run["type"] == "control")


def test_a_pair_shows_both_answers(viewer):
    row = list_all(viewer, source="preference_ko")[1][0]
    pair = viewer.table.parts["training"].get_record(row["sample"])
    chosen, rejected = get(viewer, "record", sample=row["sample"]).json()["sequences"]
    assert (chosen["name"], rejected["name"]) == ("chosen", "rejected")
    assert chosen["text"].endswith(pair.chosen.text) and rejected["text"].endswith(pair.rejected.text)
    supervised = "".join(run["text"] for run in rejected["runs"] if run["supervised"])
    assert pair.rejected.text in supervised and pair.prompt[-1].text not in supervised


def test_a_flagged_record_is_in_a_selection_file_that_training_leaves_out(viewer, tmp_path, processor):
    def set_flag(sample, flagged, part="training"):
        body = {"part": part, "sample": sample, "flagged": flagged}
        return httpx2.post(f"{viewer.url}view/flags", json=body, timeout=60)

    first, second = list_all(viewer, source="mine")[1]
    assert not first["flagged"] and get(viewer, "flags").json() == {"num_flagged": 0, "settings": []}
    path = tmp_path / "flags" / "mine.selection.json"
    answer = set_flag(second["sample"], True).json()
    assert answer == {"num_flagged": 1, "settings": [f"data.sources.mine.selection={path}"]}
    assert [row["position"] for row in list_all(viewer, flagged=True)[1]] == [second["position"]]
    assert get(viewer, "record", sample=second["sample"]).json()["flagged"] is True
    options = {"max_image_pixels": 10**8, "seed": 0, "cache": tmp_path / "cache"}
    config = SourceConfig(path=str(tmp_path / "mine.json"), format="llava")
    kept = open_source("mine", replace(config, selection=str(path)), **options)
    assert [kept.origin(number) for number in range(len(kept))] == [f"mine.json[{number}]" for number in (0, 2, 3)]
    # flags of an earlier start are there again, beside what the source's own selection leaves out
    again = RecordFlags(tmp_path / "flags", {"mine": FlaggedSource(open_source("mine", config, **options))})
    assert again.get_flagged("mine").tolist() == [1]
    more = RecordFlags(
        tmp_path / "more", {"mine": FlaggedSource(open_source("mine", config, **options), frozenset({0}))}
    )
    more.set_flag("mine", 1, True)
    assert (
        len(open_source("mine", replace(config, selection=str(tmp_path / "more" / "mine.selection.json")), **options))
        == 2
    )
    assert set_flag(second["sample"], False).json()["num_flagged"] == 0 and not path.exists()
    # a record of a source that no selection applies to, and one that is not there
    other = list_all(viewer, source="text_en")[1][0]
    assert other["flagged"] is None and set_flag(other["sample"], True).status_code == 400
    assert set_flag(10**9, True).status_code == 404 and set_flag(-1, True).status_code == 400
    foreign = httpx2.post(
        f"{viewer.url}view/flags",
        json={"sample": first["sample"], "flagged": True},
        headers={"Sec-Fetch-Site": "cross-site"},
    )
    assert foreign.status_code == 403 and not path.exists()


def test_what_is_not_there_is_refused_with_a_reason(viewer, monkeypatch):
    for path, values, status in (
        ("record", {"sample": 10**9}, 404),
        ("record", {"sample": 0, "part": "held_out"}, 404),
        ("record", {"sample": -1}, 400),
        ("record", {"sample": 0, "part": "elsewhere"}, 400),
        ("image", {"sample": 0, "image": 7}, 404),
        ("tile", {"sample": 0, "image": 0, "tile": 99}, 404),
        ("samples", {"limit": 10**6}, 400),
        ("samples", {"min_tokens": "many"}, 400),
    ):
        response = httpx2.get(f"{viewer.url}view/{path}", params=values)
        assert response.status_code == status and response.json()["error"]["message"], (path, values, response.text)
    row = list_all(viewer, source="mine")[1][0]

    def fail(self, sample):
        raise RecordError("mine.json[0]", "its image is gone")

    monkeypatch.setattr(SampleIndex, "get_record", fail)
    response = httpx2.get(f"{viewer.url}view/record", params={"sample": row["sample"]})
    assert response.status_code == 422 and "its image is gone" in response.json()["error"]["message"]


def make_large_index(num_samples):
    """Make an index of this many samples whose records are never read."""
    rng = np.random.default_rng(0)
    columns = {name: np.zeros(num_samples, dtype) for name, dtype in {**COLUMNS, **LENGTH_POLICY_COLUMNS}.items()}
    columns["tokens"] = rng.integers(20, 4000, num_samples, dtype=np.int32)
    columns["kind"] = rng.integers(0, len(KINDS), num_samples, dtype=np.uint8)
    columns["language"] = rng.integers(0, 2, num_samples, dtype=np.uint8)
    columns["position"] = np.arange(num_samples, dtype=np.uint32)
    columns["digest"] = rng.integers(0, 2**63, num_samples, dtype=np.uint64)

    class Unread:
        name = "large"

        def __getitem__(self, position):
            raise AssertionError("a record was read")

    return SampleIndex([Unread()], np.zeros(num_samples, np.int16), columns)


def test_no_record_is_read_to_filter_a_large_mixture(processor):
    table = SampleTable({"training": make_large_index(300_000)}, processor)
    total, rows = table.list_samples(SampleFilter(kind=SampleKind.ocr, language=Language.ko, min_tokens=3000), 100, 50)
    assert len(rows) == 50 and all(row["kind"] == "ocr" and row["tokens"] >= 3000 for row in rows)
    index = table.parts["training"]
    expected = (index.kind == KINDS.index("ocr")) & (index.language == LANGUAGES.index("ko")) & (index.tokens >= 3000)
    assert total == expected.sum()
    assert table.describe()["training"]["samples"] == 300_000


def test_duplicates_are_all_entries_that_are_not_unique():
    digests = np.array([5, 1, 5, 2, 9, 1, 5], dtype=np.uint64)
    assert find_duplicates(digests).tolist() == [True, True, True, False, False, True, True]
    assert not find_duplicates(np.zeros(0, dtype=np.uint64)).any()


def test_records_that_curation_found_are_a_filter_and_say_why(table, tmp_path):
    whole = table.flags.get_sources()["mine"]
    line = {"source": "mine", "position": 1, "origin": "mine.json[1]", "evidence": "same_pixels", "similarity": 0.93}
    line["same_as"] = {"source": "mine", "position": 0, "origin": "mine.json[0]"}
    folder = write_curated(tmp_path / "curate" / "duplicates", whole, [1], "duplicates", [line])
    other = {
        "source": "ocr_ko",
        "position": 5,
        "origin": "x",
        "certainty": "likely",
        "picture": None,
        "left_out": False,
    }
    write_curated(tmp_path / "curate" / "contamination", whole, [], "contamination", [other])
    lists = read_curated_lists([], tmp_path / "curate", table.flags.get_sources())
    shown = SampleTable(table.parts, table.processor, table.flags, lists)
    assert shown.describe()["training"]["curated"] == {"contamination": 1, "duplicates": 1}
    total, (row,) = shown.list_samples(SampleFilter(curated="duplicates"), 0, 50)
    assert total == 1 and (row["source"], row["position"]) == ("mine", 1)
    reasons = shown.describe_sample("training", row["sample"])["curated"]
    assert reasons == {"duplicates": ["evidence same pixels, similarity 0.93, same as mine.json[0]"]}
    total, (row,) = shown.list_samples(SampleFilter(curated="contamination", language="ko"), 0, 50)
    assert total == 1 and (row["source"], row["position"]) == ("ocr_ko", 5)
    assert shown.list_samples(SampleFilter(curated="none such"), 0, 50) == (0, [])
    # lists of other records: refused by name, and left out where they were only lying there
    rows = json.loads((tmp_path / "mine.json").read_text(encoding="utf-8"))
    (tmp_path / "mine.json").write_text(json.dumps(rows[:3]), encoding="utf-8")
    config, options = (
        SourceConfig(path=str(tmp_path / "mine.json"), format="llava"),
        {"max_image_pixels": 10**8, "seed": 0, "cache": tmp_path / "cache2"},
    )
    changed = {"mine": open_source("mine", config, **options)}
    with pytest.raises(UserError, match="it was made of 4 records"):
        read_curated_lists([str(folder)], tmp_path / "curate", changed)
    assert read_curated_lists([], tmp_path / "curate", changed) == {}
    with pytest.raises(UserError, match="give a folder that task=curate wrote"):
        read_curated_lists([str(tmp_path)], tmp_path / "curate", changed)


def write_curated(folder, source, left_out, method, lines):
    """Write what task=curate writes of one source."""
    folder.mkdir(parents=True)
    write_selection(folder / "mine.selection.json", source, identify_rows(source), np.array(left_out), [method])
    (folder / "left_out.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (folder / "summary.json").write_text(json.dumps({"request": {"curate": {"method": method}}}), encoding="utf-8")
    return folder
