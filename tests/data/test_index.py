"""The index: its columns, the records that it reads again, and that it decodes no pixels."""

from __future__ import annotations

import copy
import multiprocessing
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from index_cases import LinesSource, make_rows, save_photo, write
from PIL import Image
from support import builtin, sample
from waiting import until

from lit_vlm.data.index import shard_cache
from lit_vlm.data.index.build import MAX_WORKER_DEATHS, build_index
from lit_vlm.data.index.sample_index import KINDS, SampleIndex, split_held_out
from lit_vlm.data.lazy_images import FileImage
from lit_vlm.data.processor import Processor
from lit_vlm.types import Fault, Record, UserError

FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(shard_cache, "SHARD_RECORDS", 10)


@pytest.fixture
def lines(tmp_path) -> Path:
    return write(tmp_path / "a.jsonl", make_rows(tmp_path, 34))


@pytest.fixture
def store(tmp_path) -> Path:
    return tmp_path / "store"


def is_same(one: SampleIndex, other: SampleIndex) -> bool:
    errors = [[(name, str(error), error.fault) for name, error in index.errors] for index in (one, other)]
    return one.compute_digest() == other.compute_digest() and errors[0] == errors[1]


class ListSource:
    """Source of a user, without `origin` and `digest_of`."""

    def __init__(self, records: list[Record], name: str = "listed", digest: str = "1") -> None:
        self.records, self.name, self.digest = records, name, digest

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        return self.records[index]


def test_columns_equal_the_counts_of_the_processor(processor, mixed):
    index = build_index([ListSource(mixed)], processor)
    for i, record in enumerate(mixed):
        (encoded,) = processor.encode_sequences(record)
        assert index.tokens[i] == encoded.num_tokens and index.squares[i] == encoded.num_tokens**2
        assert index.supervised[i] == encoded.num_supervised
        assert index.image_tokens[i] == (encoded.input_ids == processor.image_token_id).sum()
        assert index.tiles[i] == sum(len(tiles) for tiles in processor.load_tiles(record))
        assert index.images[i] == len(record.images)
        assert (index.height[i], index.width[i]) == (record.images[0].size if record.images else (0, 0))
        assert KINDS[index.kind[i]] is record.kind and index.get_language(i) is record.language
        assert index.get_record(i) is record
    assert len(set(index.columns["digest"].tolist())) == len(mixed)


def test_columns_of_a_preference_pair_count_both_answers(processor):
    (source,) = builtin("preference", n=3)
    index = build_index([source], processor)
    for i in range(3):
        chosen, rejected = processor.encode_sequences(source[i])
        prompt, *answers = processor.encode_segments(source[i])
        shared = prompt.num_tokens
        assert index.tokens[i] == shared + sum(answer.num_tokens for answer in answers)
        assert index.squares[i] == chosen.num_tokens**2 + rejected.num_tokens**2 - shared**2
        assert index.longest[i] == max(chosen.num_tokens, rejected.num_tokens)
        assert index.chosen[i] == chosen.num_supervised
        assert index.supervised[i] == chosen.num_supervised + rejected.num_supervised
        assert np.array_equal(chosen.input_ids[: shared + 1], rejected.input_ids[: shared + 1])
        assert not prompt.supervised.any() and chosen.supervised.tolist().index(True) == shared + 1


def test_a_second_build_is_equal_and_reads_nothing(lines, store, processor):
    first = build_index([LinesSource(lines)], processor, store=store)
    again = LinesSource(lines)
    assert is_same(first, build_index([again], processor, store=store))
    assert again.reads == [] and len(first) == 34


def test_indexes_from_memory_workers_and_store_are_equal(lines, store, processor, tmp_path):
    write(lines, [{"no": "turns"}, {"turns": ["q", "a"], "images": [["gone.jpg", 0]]}], "a")
    in_memory = build_index([LinesSource(lines), *builtin("caption", n=25)], processor)
    for workers in (1, 2):
        stored = build_index(
            [LinesSource(lines), *builtin("caption", n=25)], processor, store=store / str(workers), workers=workers
        )
        assert is_same(in_memory, stored)
    spread = build_index([LinesSource(lines), *builtin("caption", n=25)], processor, workers=3)
    assert is_same(in_memory, spread)
    assert [(name, error.origin, error.fault) for name, error in in_memory.errors] == [
        ("lines", "a.jsonl:35", Fault.malformed),
        ("lines", "a.jsonl:36", Fault.missing),
    ]
    assert in_memory.position[in_memory.source_ids == 1].tolist() == list(range(25))


def test_only_the_new_shards_of_a_grown_file_are_read(lines, store, processor, tmp_path):
    build_index([LinesSource(lines)], processor, store=store)
    write(lines, [{"turns": ["One more?", "Yes."]}] * 9, "a")
    grown = LinesSource(lines)
    index = build_index([grown], processor, store=store)
    assert grown.reads == list(range(30, 43)) and is_same(index, build_index([LinesSource(lines)], processor))


def test_progress_counts_records(lines, store, processor):
    progress: list[tuple[str, int, int]] = []
    build_index([LinesSource(lines)], processor, store=store, on_progress=lambda *done: progress.append(done))
    assert progress == [("lines", 10, 34), ("lines", 20, 34), ("lines", 30, 34), ("lines", 34, 34)]


def test_no_pixel_is_decoded(lines, store, processor, monkeypatch):
    monkeypatch.setattr(FileImage, "load", lambda self: pytest.fail("decoded"))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    assert len(build_index([LinesSource(lines)], processor, store=store)) == 34


@pytest.mark.parametrize("orientation", range(1, 9))
def test_image_sizes_are_those_of_the_upright_image(tmp_path, processor, orientation):
    save_photo(tmp_path / "a.jpg", width=90, height=60, orientation=orientation)
    path = write(tmp_path / "a.jsonl", [{"turns": ["q", "a"], "images": [["a.jpg", 0]]}])
    index = build_index([LinesSource(path)], processor)
    assert (index.height[0], index.width[0]) == ((60, 90) if orientation < 5 else (90, 60))


def test_another_template_tokenizer_or_image_setting_makes_another_index(lines, store, processor):
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_start|>", "<|im_start|> ")
    larger = copy.deepcopy(processor.tokenizer)
    larger.add_tokens(["Answer number"])
    others = [
        Processor(tokenizer, processor.images),
        Processor(larger, processor.images),
        Processor(processor.tokenizer, replace(processor.images, max_tiles=2)),
        Processor(processor.tokenizer, replace(processor.images, grid_pinpoints=processor.images.grid_pinpoints[:2])),
    ]
    assert Processor(copy.deepcopy(processor.tokenizer), processor.images).digest == processor.digest
    assert len({other.digest for other in (processor, *others)}) == 5
    for other in (processor, *others):
        source = LinesSource(lines)
        build_index([source], other, store=store)
        assert len(source.reads) == 34


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-100],
        lambda data: data[: len(data) // 2] + b"\xff" * 512 + data[len(data) // 2 + 512 :],
        lambda data: b"<html>",
    ],
    ids=["empty", "torn", "overwritten", "foreign"],
)
def test_a_damaged_shard_is_rebuilt(lines, store, processor, damage):
    whole = build_index([LinesSource(lines)], processor, store=store)
    file = max((store / "shards").iterdir())
    file.write_bytes(damage(file.read_bytes()))
    source = LinesSource(lines)
    assert is_same(whole, build_index([source], processor, store=store))
    assert 4 <= len(source.reads) <= 10


def test_a_shard_under_the_name_of_another_is_rebuilt(lines, store, processor):
    whole = build_index([LinesSource(lines)], processor, store=store)
    one, other, *_ = sorted((store / "shards").iterdir())
    other.write_bytes(one.read_bytes())
    assert is_same(whole, build_index([LinesSource(lines)], processor, store=store))


def test_a_damaged_manifest_is_rebuilt(lines, store, processor):
    build_index([LinesSource(lines)], processor, store=store)
    (manifest,) = (store / "sources").glob("*.json")
    manifest.write_text('["half of a')
    source = LinesSource(lines)
    assert len(build_index([source], processor, store=store)) == 34 and source.reads == []


def test_a_changed_image_is_found_by_a_recheck(lines, store, processor, tmp_path):
    before = build_index([LinesSource(lines)], processor, store=store)
    save_photo(tmp_path / "1.jpg", width=20, height=100, seed=9)
    assert is_same(before, build_index([LinesSource(lines)], processor, store=store))  # not rechecked
    after = build_index([LinesSource(lines)], processor, store=store, recheck=True)
    fresh = build_index([LinesSource(lines)], processor)
    assert is_same(after, fresh) and not is_same(after, before)
    assert is_same(after, build_index([LinesSource(lines)], processor, store=store))


def test_a_repaired_image_is_found_without_a_recheck(lines, store, processor, tmp_path):
    write(lines, [{"turns": ["q", "a"], "images": [["later.jpg", 0]]}, {"no": "turns"}], "a")
    assert len(build_index([LinesSource(lines)], processor, store=store).errors) == 2
    save_photo(tmp_path / "later.jpg")
    source = LinesSource(lines)
    index = build_index([source], processor, store=store)
    assert [error.fault for _, error in index.errors] == [Fault.malformed] and len(index) == 35
    assert set(source.reads) == set(range(30, 36))  # only its shard


def test_errors_of_a_users_source_have_its_name_and_position(processor, store):
    records = [sample("q", "a", seed=1), replace(sample("q", "a", (56, 56), seed=2), images=())]
    index = build_index([ListSource(records)], processor, store=store)
    ((name, error),) = index.errors
    assert (name, error.origin, error.fault) == ("listed", "listed[1]", Fault.placeholders)
    other = build_index([ListSource(records[:1] * 5, "other")], processor, store=store)  # the same digest, another name
    assert len(other) == 5


def test_an_unwritable_store_is_reported(lines, processor, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be kept in .*data\.index_dir"):
        build_index([LinesSource(lines)], processor, store=tmp_path / "file" / "store")


def test_a_killed_build_resumes(lines, store, processor):
    build = partial(build_index, [LinesSource(lines, seconds=0.15)], processor, store=store, workers=2)
    process = FORK.Process(target=build)
    process.start()
    until(lambda: any((store / "shards").glob("*.arrow")), pause=0.01)
    process.kill()
    process.join()
    done = sum(1 for _ in (store / "shards").glob("*.arrow"))
    assert 0 < done < 4
    source = LinesSource(lines)
    index = build_index([source], processor, store=store)  # and no orphan process holds the lock
    assert len(source.reads) <= 34 - 10 * (done - 1) - 4 and is_same(
        index, build_index([LinesSource(lines)], processor)
    )


def test_two_concurrent_processes_read_each_record_once(lines, store, processor):
    build = partial(build_index, [LinesSource(lines, seconds=0.01)], processor, store=store)
    processes = [FORK.Process(target=build) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert Counter(lines.with_suffix(".reads").read_text().split()) == Counter(map(str, range(34)))


def test_a_dead_worker_costs_only_its_shard(lines, store, processor, tmp_path):
    index = build_index([LinesSource(lines, kill_until=tmp_path / "once")], processor, store=store, workers=2)
    assert (tmp_path / "once").exists() and is_same(index, build_index([LinesSource(lines)], processor))


def test_workers_that_keep_dying_end_the_build(lines, store, processor, tmp_path):
    with pytest.raises(UserError, match=rf"died {MAX_WORKER_DEATHS} times in a row.*data\.index_workers"):
        build_index([LinesSource(lines, kill_until=tmp_path / "always")], processor, store=store, workers=2)
    source = LinesSource(lines)
    build_index([source], processor, store=store)
    assert len(source.reads) == 10  # the shards of the others are stored


def test_errors_of_workers_are_raised(lines, processor):
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.chat_template = (
        "{{ raise_exception('never') if messages | length > 1 and messages[0]['content'][0]['type'] == 'image' }}"
        + str(tokenizer.chat_template)
    )
    with pytest.raises(UserError, match="refuses a conversation"):
        build_index([LinesSource(lines)], Processor(tokenizer, processor.images), workers=2)


def _make_index(groups: list[int]) -> SampleIndex:
    digests = np.random.default_rng(0).permutation(len(groups)).astype(np.uint64)
    columns = {"group": np.array(groups, np.uint64), "digest": digests}
    return SampleIndex([ListSource([])], np.zeros(len(groups), np.int16), columns)


def test_split_keeps_records_of_one_image_together():
    index = _make_index([7] * 30 + [*range(100, 170)])  # the first group is larger than what is held out
    training, held_out = split_held_out(index, 0.1)
    assert len(held_out) == 10 and 7 not in held_out.group and not set(held_out.group) & set(training.group)
    assert len(training) + len(held_out) == 100


def test_split_separates_records_of_the_only_image():
    training, held_out = split_held_out(_make_index([7] * 50), 0.1)
    assert sorted(held_out.columns["digest"].tolist()) == [0, 1, 2, 3, 4] and len(training) == 45


def test_split_holds_out_the_same_records_in_any_order(processor):
    (source,) = builtin("caption", n=60)
    index = build_index([source], processor)
    turned = build_index([ListSource([source[i] for i in reversed(range(60))])], processor)
    held = [set(split_held_out(each, 0.2)[1].columns["digest"].tolist()) for each in (index, turned)]
    assert held[0] == held[1] and len(held[0]) == 12
