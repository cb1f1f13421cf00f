"""The length policy: which records are shortened or quarantined; the columns describe the shortened records."""

from __future__ import annotations

import numpy as np
import pytest
from index_cases import LinesSource, save_photo, write
from support import builtin, sample

from lit_vlm.config.choices import OnOverlong
from lit_vlm.data.index.build import build_index
from lit_vlm.data.index.lengths import apply_length_policy
from lit_vlm.data.index.sample_index import SampleIndex
from lit_vlm.types import Fault, ImagePlaceholder, PreferencePair

PLENTY = 10**6


class ListSource:
    def __init__(self, *records) -> None:
        self.records, self.name, self.digest = records, "listed", "1"

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        return self.records[index]


def columns_match(index: SampleIndex, processor) -> bool:
    """Return whether the columns are those of the records as they are trained on."""
    for i in range(len(index)):
        cost = processor.compute_cost(index.get_record(i))
        counted = {
            "tokens": cost.num_tokens,
            "image_tokens": cost.num_image_tokens,
            "supervised": cost.num_supervised,
            "chosen": cost.num_chosen,
            "squares": cost.squares,
            "longest": cost.max_context_tokens,
            "tiles": cost.num_tiles,
            "images": cost.num_images,
            "height": cost.size[0],
            "width": cost.size[1],
        }
        if any(index.columns[name][i] != value for name, value in counted.items()):
            return False
    return True


def get_reasons(index: SampleIndex) -> list[str]:
    assert all(error.fault is Fault.overlong for _, error in index.errors)
    return [str(error) for _, error in index.errors]


def test_records_that_fit_are_unchanged(processor, mixed):
    index = build_index([ListSource(*mixed)], processor)
    assert (
        apply_length_policy(index, processor, policy=OnOverlong.cut_turn, max_tokens=PLENTY, max_tiles=PLENTY) is index
    )


def test_quarantine_reports_the_length_the_limit_and_the_setting(processor, mixed):
    index = build_index([ListSource(*mixed)], processor)
    most = int(np.sort(index.tokens)[-2])
    fitted = apply_length_policy(index, processor, policy=OnOverlong.quarantine, max_tokens=most, max_tiles=PLENTY)
    (reason,) = get_reasons(fitted)
    longest = int(index.tokens.argmax())
    for part in (
        f"listed[{longest}]",
        f"{index.tokens.max():,} tokens",
        f"allows {most:,}",
        "data.tokens_per_micro_batch",
    ):
        assert part in reason
    assert "data.on_overlong=fewer_tiles or data.on_overlong=cut_turn" in reason
    assert fitted.length_policy_counts == {("listed", "quarantine"): 1} and len(fitted) == len(index) - 1
    assert columns_match(fitted, processor) and not index.errors
    few = apply_length_policy(index, processor, policy=OnOverlong.quarantine, max_tokens=PLENTY, max_tiles=2)
    assert all("image tiles and data.tiles_per_micro_batch allows 2" in reason for reason in get_reasons(few))


def test_fewer_tiles_keeps_the_largest_number_of_tiles_that_fits(processor):
    record = sample("What is this?", "A long picture.", (150, 70))
    index = build_index([ListSource(record, sample("q", "a"))], processor)
    reached = set()
    for limit in range(int(index.tokens[0]) - 1, 0, -7):
        fitted = apply_length_policy(
            index, processor, policy=OnOverlong.fewer_tiles, max_tokens=limit, max_tiles=PLENTY
        )
        if fitted.errors:
            assert "fewer tiles cannot mend it" in get_reasons(fitted)[0] and limit < index.tokens[0]
            break
        most = int(fitted.most_tiles[0])
        assert fitted.tokens[0] <= limit and fitted.most_tiles[1] == -1 and columns_match(fitted, processor)
        assert fitted.length_policy_counts == {("listed", "fewer_tiles"): 1}
        more = processor.images.compute_layout(150, 70, max_tiles=most + 1).num_tokens
        assert index.tokens[0] - index.image_tokens[0] + more > limit  # one tile more would not have fitted
        reached.add(most)
    assert 0 in reached and len(reached) > 1
    tiles = apply_length_policy(index, processor, policy=OnOverlong.fewer_tiles, max_tokens=PLENTY, max_tiles=3)
    assert 1 <= tiles.tiles[0] <= 3 and columns_match(tiles, processor)


def test_fewer_tiles_applies_to_preference_pairs(processor, tmp_path):
    save_photo(tmp_path / "a.jpg", width=170, height=170)
    row = {"turns": ["Which?", "The first one."], "rejected": "No.", "images": [["a.jpg", 0]]}
    index = build_index([LinesSource(write(tmp_path / "a.jsonl", [row]))], processor)
    most_tokens = int(index.tokens[0]) - 1
    fitted = apply_length_policy(
        index, processor, policy=OnOverlong.fewer_tiles, max_tokens=most_tokens, max_tiles=PLENTY
    )
    assert isinstance(fitted.get_record(0), PreferencePair) and fitted.most_tiles[0] >= 0
    assert fitted.tokens[0] <= most_tokens and columns_match(fitted, processor)


def test_max_length_applies_to_one_answer_with_its_prompt(processor, tmp_path):
    """A pair is two rows of tokens; each must fit the positions of the language model by itself."""
    row = {"turns": ["Which?", "The first one, and many words more."], "rejected": "No.", "images": []}
    index = build_index([LinesSource(write(tmp_path / "a.jsonl", [row]))], processor)
    longest = processor.compute_cost(index.get_record(0)).max_context_tokens
    assert longest < int(index.tokens[0])
    options = {"policy": OnOverlong.quarantine, "max_tokens": PLENTY, "max_tiles": PLENTY}
    assert len(apply_length_policy(index, processor, max_length=longest, **options)) == 1
    (error,) = get_reasons(apply_length_policy(index, processor, max_length=longest - 1, **options))
    assert f"{longest} tokens in a row and data.max_length" in error and f"allows {longest - 1}" in error


def test_records_with_several_images_cannot_lose_tiles(processor, mixed):
    index = build_index([ListSource(mixed[3])], processor)
    most = int(index.tokens[0]) - 1
    fitted = apply_length_policy(index, processor, policy=OnOverlong.fewer_tiles, max_tokens=most, max_tiles=PLENTY)
    assert len(fitted) == 0 and len(get_reasons(fitted)) == 1


@pytest.fixture
def turns(tmp_path):
    """Source of one record: four turns about three images, of which the second is listed first."""
    for number in range(3):
        save_photo(tmp_path / f"{number}.jpg", width=60 + 30 * number, seed=number)
    words = [text for i in range(4) for text in (f"Question {i}?", f"The answer {i}, with some words.")]
    images = [["1.jpg", 4], ["0.jpg", 0], ["2.jpg", 4]]
    return LinesSource(write(tmp_path / "a.jsonl", [{"turns": words, "images": images}]))


def test_cut_turn_drops_whole_turns_and_their_images(processor, turns):
    index = build_index([turns], processor)
    reached = set()
    for limit in range(int(index.tokens[0]) - 1, 0, -10):
        fitted = apply_length_policy(index, processor, policy=OnOverlong.cut_turn, max_tokens=limit, max_tiles=PLENTY)
        if fitted.errors:
            assert "leaving out turns cannot mend it" in get_reasons(fitted)[0]
            break
        record = fitted.get_record(0)
        assert fitted.tokens[0] <= limit and columns_match(fitted, processor)
        assert len(record.messages) == fitted.turns[0] and fitted.length_policy_counts == {("lines", "cut_turn"): 1}
        assert record.messages[-1].text.startswith("The answer")
        slots = [piece.index for m in record.messages for piece in m.content if isinstance(piece, ImagePlaceholder)]
        assert sorted(slots) == list(range(len(record.images)))
        if len(record.messages) < 6:
            assert [image.path for image in record.images] == ["0.jpg"]
        reached.add(int(fitted.turns[0]))
    assert reached <= {2, 4, 6} and 2 in reached


def test_pairs_and_single_turns_cannot_be_cut(processor):
    sources = [ListSource(sample("q", "an answer that is long", seed=1)), *builtin("preference", n=2)]
    index = build_index(sources, processor)
    fitted = apply_length_policy(index, processor, policy=OnOverlong.cut_turn, max_tokens=5, max_tiles=PLENTY)
    assert len(fitted) == 0 and fitted.length_policy_counts == {
        ("listed", "quarantine"): 1,
        ("preference", "quarantine"): 2,
    }
    assert len(get_reasons(fitted)) == 3


def test_only_long_records_are_read_again(processor, turns, tmp_path):
    write(turns.path, [{"turns": ["q", "a"]}] * 5, "a")
    source = LinesSource(turns.path)
    index = build_index([source], processor)
    source.reads.clear()
    limits = {"max_tokens": int(index.tokens[0]) - 1, "max_tiles": PLENTY}
    assert len(apply_length_policy(index, processor, policy=OnOverlong.cut_turn, **limits)) == 6 and source.reads == [0]
    source.reads.clear()
    apply_length_policy(index, processor, policy=OnOverlong.fewer_tiles, **limits)
    apply_length_policy(index, processor, policy=OnOverlong.quarantine, **limits)
    assert source.reads == []


def test_a_record_whose_image_was_deleted_is_an_error(processor, turns, tmp_path):
    index = build_index([turns], processor)
    (tmp_path / "0.jpg").unlink()
    most = int(index.tokens[0]) - 1
    fitted = apply_length_policy(index, processor, policy=OnOverlong.cut_turn, max_tokens=most, max_tiles=PLENTY)
    assert [error.fault for _, error in fitted.errors] == [Fault.missing]
