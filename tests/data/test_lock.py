"""The lock file mixture.lock is readable, and changes since it was written are reported in words."""

import copy

import numpy as np
import pytest
from made_index import make_index

from lit_vlm.data.packing.mixture_lock import compare_locks, describe_source, read_lock, write_lock
from lit_vlm.types import UserError

LOCK = {
    "sources": {
        "mix665k": {
            "format": "llava",
            "path": "/data/믹스.json",
            "revision": None,
            "records": 665_298,
            "usable": 665_290,
            "tokens": 600_000_000,
            "digest": "ab12",
            "weight": 2.0,
            "count": None,
        },
        "kollava": {"format": "llava", "records": 581_000, "digest": "cd34", "weight": 1.0},
    },
    "processor": "ef56",
    "shares": {"ko": 0.5, "text_only": None, "kinds": {"ocr": 0.2}},
    "seed": 0,
    "global_batch_size": 128,
    "versions": {"lit_vlm": "0.1.0", "numpy": "2.4.6"},
}


def change_lock(*path: str, to) -> dict:
    lock = copy.deepcopy(LOCK)
    inner = lock
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = to
    return lock


def test_a_lock_is_read_back_unchanged(tmp_path):
    path = tmp_path / "run" / "mixture.lock"
    write_lock(path, LOCK)
    assert read_lock(path) == LOCK
    text = path.read_text(encoding="utf-8")
    assert "믹스" in text
    assert text.index('"mix665k"') < text.index('"kollava"') < text.index('"processor"')
    write_lock(path, read_lock(path))
    assert path.read_text(encoding="utf-8") == text
    assert [child.name for child in path.parent.iterdir()] == ["mixture.lock"]


def test_the_same_lock_has_no_difference(tmp_path):
    write_lock(tmp_path / "mixture.lock", LOCK)
    assert compare_locks(read_lock(tmp_path / "mixture.lock"), LOCK) == []


@pytest.mark.parametrize(
    ("path", "to", "message"),
    (
        (("sources", "mix665k", "records"), 665_300, "mix665k: 665,298 records then, 665,300 now"),
        (("sources", "mix665k", "usable"), 665_000, "mix665k: 665,290 usable records then, 665,000 now"),
        (("sources", "mix665k", "tokens"), 7, "mix665k: 600,000,000 tokens then, 7 now"),
        (("sources", "mix665k", "digest"), "00", "mix665k: what its records say changed"),
        (("sources", "mix665k", "path"), "/old", 'mix665k: path was "/data/믹스.json", is "/old"'),
        (("sources", "mix665k", "revision"), "v2", 'mix665k: revision was not given, is "v2"'),
        (("sources", "kollava", "weight"), 3.0, "kollava: weight was 1.0, is 3.0"),
        (("sources", "kollava", "max_tiles"), 4, "kollava: max_tiles was not given, is 4"),
        (("sources", "new"), {"records": 1}, "new: it is trained on now, and was not then"),
        (("processor",), "00", "the tokenizer, the chat template or the image settings changed"),
        (("seed",), 1, "seed was 0, is 1"),
        (("global_batch_size",), 64, "data.global_batch_size was 128, is 64"),
        (("shares", "ko"), None, "data.share.ko was 0.5, is not given"),
        (("shares", "kinds", "ocr"), 0.3, "data.share.kinds.ocr was 0.2, is 0.3"),
        (("versions", "numpy"), "3.0", 'versions.numpy was "2.4.6", is "3.0"'),
    ),
)
def test_each_difference_is_reported_in_words(path, to, message):
    assert compare_locks(LOCK, change_lock(*path, to=to)) == [message]


def test_a_removed_source_is_reported():
    lock = copy.deepcopy(LOCK)
    del lock["sources"]["kollava"]
    assert compare_locks(LOCK, lock) == ["kollava: it was trained on then, and is not now"]


def test_lists_and_tuples_are_equal():
    assert compare_locks({"sources": {}, "order": (1, 2)}, {"sources": {}, "order": [1, 2]}) == []


@pytest.mark.parametrize("text", (None, "", "{", "[]", "{}", '{"version": 99, "sources": {}}', '{"version": 1}'))
def test_an_invalid_lock_file_is_reported(tmp_path, text):
    path = tmp_path / "mixture.lock"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"mixture\.lock: "):
        read_lock(path)


def test_the_description_of_a_source_changes_with_its_content_and_its_order():
    index = make_index({"a": 5, "b": 5})
    facts = describe_source(index, 1)
    assert (facts["usable"], facts["tokens"]) == (5, int(index.tokens[5:].sum()))
    assert describe_source(make_index({"a": 5, "b": 5}), 1) == facts
    for order in ([0, 1, 2, 3, 4, 6, 5, 7, 8, 9], [5, 6, 7, 8]):
        assert describe_source(index.select(np.array(order)), 1)["digest"] != facts["digest"]
    assert describe_source(index.select(np.arange(5, 10)), 1) == facts  # independent of other sources
