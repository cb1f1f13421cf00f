"""Selections of records: a source of any format is read without the records that are left out, and only for these records."""

import json
from dataclasses import replace

import numpy as np
import pytest
from source_cases import make_llava, write
from support import builtin

from lit_vlm.config.choices import Format
from lit_vlm.config.schema import SourceConfig
from lit_vlm.data.selection import identify_rows, read_selection, write_selection
from lit_vlm.data.sources import open_source
from lit_vlm.data.subsets import PositionSubset, SourceSubset, TileLimitedSource, find_in_whole
from lit_vlm.types import Language, UserError


def open_config(config, cache=None):
    return open_source("mine", config, max_image_pixels=10**6, cache=cache)


def select(path, source, *left_out):
    write_selection(path, source, identify_rows(source), np.array(left_out), ["duplicates"])
    return str(path)


@pytest.fixture
def source(tmp_path):
    """Settings of a source of ten records without pictures, and the path of its file."""
    turns = [({"from": "human", "value": f"질문 {n}"}, {"from": "gpt", "value": f"답 {n}"}) for n in range(10)]
    path = write(tmp_path / "rows.jsonl", [make_llava(*one) for one in turns])
    return SourceConfig(path=str(path), language=Language.ko)


def list_answers(source):
    return [source[n].messages[-1].text for n in range(len(source))]


def test_a_selection_leaves_out_its_records_and_keeps_the_order(source, tmp_path):
    whole = open_config(source)
    selection = select(tmp_path / "s.json", whole, 0, 3, 4, 9)
    chosen = open_config(replace(source, selection=selection))
    assert list_answers(chosen) == [f"답 {n}" for n in (1, 2, 5, 6, 7, 8)]
    assert chosen.origin(2) == whole.origin(5)
    assert chosen.digest != whole.digest
    assert (
        len({chosen.digest, open_config(replace(source, selection=select(tmp_path / "t.json", whole, 0))).digest}) == 2
    )
    assert chosen.digest_of(0, 2) != chosen.digest_of(2, 4)


def test_fraction_and_number_of_samples_choose_among_the_selected_records(source, tmp_path):
    selection = select(tmp_path / "s.json", open_config(source), 0, 1, 2)
    few = open_config(replace(source, selection=selection, num_samples=2))
    assert list_answers(few) == ["답 3", "답 4"]
    share = open_config(replace(source, selection=selection, fraction=0.6))
    assert set(list_answers(share)) < {f"답 {n}" for n in range(3, 10)}


def test_a_selection_of_generated_records_is_read(tmp_path):
    config = SourceConfig(path="word", format=Format.builtin, language=Language.ko, num_samples=6)
    whole = open_config(config)
    chosen = open_config(replace(config, selection=select(tmp_path / "s.json", whole, 2)))
    assert list_answers(chosen) == [whole[n].messages[-1].text for n in (0, 1, 3, 4, 5)]


def test_a_copied_file_is_the_same_records_and_a_changed_one_is_refused(source, tmp_path):
    selection = select(tmp_path / "s.json", open_config(source), 5)
    text = (tmp_path / "rows.jsonl").read_text()
    (tmp_path / "copy.jsonl").write_text(text)
    assert len(open_config(replace(source, path=str(tmp_path / "copy.jsonl"), selection=selection))) == 9
    (tmp_path / "rows.jsonl").write_text(text.replace("답 7", "답 8"))
    with pytest.raises(UserError, match="changed since.*Run task=curate again"):
        open_config(replace(source, selection=selection))
    (tmp_path / "rows.jsonl").write_text(text + text)
    with pytest.raises(UserError, match="made of 10 records, and the source has 20"):
        open_config(replace(source, selection=selection))


def test_other_reader_settings_keep_a_selection(source, tmp_path):
    selection = select(tmp_path / "s.json", open_config(source), 5)
    assert len(open_config(replace(source, selection=selection, max_tiles=2, language=Language.en))) == 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: {**values, "version": 99}, "version 99"),
        (lambda values: {"a": 1}, "no version"),
        (lambda values: {**values, "left_out": [[4, 2]]}, "out of order"),
        (lambda values: {**values, "left_out": [[4, 12]]}, "within 10 records"),
        (lambda values: {key: value for key, value in values.items() if key != "passes"}, "damaged"),
    ],
)
def test_a_damaged_selection_is_refused(source, tmp_path, change, message):
    path = tmp_path / "s.json"
    select(path, open_config(source), 5)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(UserError, match=message):
        read_selection(path, "data.sources.mine.selection")


def test_a_missing_selection_and_one_that_leaves_nothing_are_refused(source, tmp_path):
    with pytest.raises(UserError, match=r"data.sources.mine.selection=.*no such file"):
        open_config(replace(source, selection=str(tmp_path / "none.json")))
    selection = select(tmp_path / "s.json", open_config(source), *range(10))
    with pytest.raises(UserError, match="leaves none of 10 records"):
        open_config(replace(source, selection=selection))


def test_a_record_of_a_subset_of_a_subset_is_found_in_the_whole_source():
    whole = builtin("caption", n=400)[0]
    share = SourceSubset(TileLimitedSource(PositionSubset(whole, np.arange(100, 400), "half"), 2), 0.5)
    found, positions = find_in_whole(share, np.arange(len(share)))
    assert found is whole and 0 < len(positions) < 300 and positions.min() >= 100
    assert [whole[int(position)].id for position in positions[:20]] == [share[number].id for number in range(20)]
