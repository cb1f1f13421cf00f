"""Tests of the rules of text quality, each with captions that break it and captions that do not."""

import pytest

from lit_vlm.config.choices import TextRule
from lit_vlm.curation.text_quality import find_text_faults
from lit_vlm.types import Language

SENTENCE = "a brown dog runs over the green field"


@pytest.mark.parametrize(
    ("text", "language", "faults"),
    [
        ("a dog", Language.en, ["too_short"]),
        ("two dogs", Language.en, []),
        ("개", Language.ko, ["too_short"]),
        ("빨간 원", Language.ko, []),
        ("best best best best shoes", Language.en, ["repeated"]),
        ("so so very, very good shoes", Language.en, []),
        (f"{SENTENCE} and {SENTENCE}", Language.en, ["repeated"]),
        (f"{SENTENCE} and a cat sleeps beside the old wooden door", Language.en, []),
        ("=== >>> *** shoes ***", Language.en, ["symbols"]),
        ("price: $19.99 (was $29.99)", Language.en, []),
        ("갈색 buy now cheap shoes online today", Language.ko, ["wrong_script"]),
        ("갈색 개가 Seoul 거리를 달린다", Language.ko, []),
        ("коричневая собака бежит", Language.en, ["wrong_script"]),
        ("café in Zürich", Language.en, []),
        ("회색 고양이가 있다", Language.en, ["wrong_script"]),
        ("회색 고양이가 있다", Language.auto, []),
        ("коричневая собака бежит", Language.auto, ["wrong_script"]),
        ("", Language.en, ["too_short"]),
    ],
)
def test_a_caption_breaks_the_rules_that_it_breaks_and_no_other(text, language, faults):
    assert [rule.value for rule in find_text_faults(text, language)] == faults
    assert all(name in TextRule.__members__ for name in faults)
