"""The built-in data is exact, deterministic, bilingual, and disjoint from held-out data."""

import importlib.util
import pickle
import unicodedata

import numpy as np
import pytest

from lit_vlm.data.markup import parse_markup, parse_mentions
from lit_vlm.data.synthetic import PATHS, BuiltinSource, generate_corpus, scenes
from lit_vlm.data.synthetic.vocabulary import (
    COLOURS,
    SHAPES,
    WORDS_EN,
    WORDS_KO,
    add_particle,
    format_caption,
    has_final_consonant,
)
from lit_vlm.evaluation.metrics import compute_score
from lit_vlm.types import (
    ControlToken,
    ImagePlaceholder,
    Language,
    LazyImage,
    PreferencePair,
    Role,
    Sample,
    SampleKind,
    Source,
    UserError,
)

LANGUAGES = (Language.ko, Language.en)
EVERY = [(path, language, hard) for path in PATHS for language in LANGUAGES for hard in (False, True)]
parametrize_all = pytest.mark.parametrize(("path", "language", "hard"), EVERY)


def make_source(path, language=Language.ko, num_samples=12, **settings) -> BuiltinSource:
    return BuiltinSource("mine", path, language=language, num_samples=num_samples, **settings)


def get_messages(record):
    return record.messages if isinstance(record, Sample) else (*record.prompt, record.chosen, record.rejected)


def get_content(record) -> tuple:
    """Return the pixels and the texts."""
    return tuple(image.load().tobytes() for image in record.images), tuple(m.text for m in get_messages(record))


def get_question(record) -> tuple:
    asked = record.prompt if isinstance(record, PreferencePair) else record.messages[:1]
    return get_content(record)[0], tuple(message.text for message in asked)


def get_foreground(picture) -> np.ndarray:
    """Return the mask [H, W] of the pixels that differ from the background."""
    return (np.asarray(picture.load()) != picture.background).any(-1)


@parametrize_all
def test_every_kind_builds_and_renders_in_both_languages(path, language, hard):
    for record in make_source(path, language, hard=hard):
        messages = get_messages(record)
        assert record.language is language
        assert path == SampleKind.preference or record.kind == path
        slots = [piece for message in messages for piece in message.content if isinstance(piece, ImagePlaceholder)]
        assert slots == [ImagePlaceholder(index) for index in range(len(record.images))]
        assert messages[0].content[: len(slots)] == tuple(slots)
        assert [m.role for m in messages[:2]] == [Role.user, Role.assistant]
        for image in record.images:
            assert isinstance(image, LazyImage)
            loaded = image.load()
            assert (loaded.height, loaded.width) == image.size
            assert loaded.mode == "RGB"
            assert get_foreground(image).any()


@parametrize_all
def test_texts_are_nfc_and_their_control_tokens_are_those_of_the_parsed_markup(path, language, hard):
    for record in make_source(path, language, hard=hard):
        for message in get_messages(record):
            assert message.text == unicodedata.normalize("NFC", message.text)
            pieces = [piece for piece in message.content if not isinstance(piece, ImagePlaceholder)]
            parsed = parse_markup(message.text)
            assert [p for p in pieces if isinstance(p, ControlToken)] == [
                p for p in parsed if isinstance(p, ControlToken)
            ]


@parametrize_all
def test_a_sample_is_a_function_of_settings_and_index(path, language, hard):
    source = make_source(path, language, hard=hard)
    again = pickle.loads(pickle.dumps(make_source(path, language, num_samples=40, hard=hard)))
    for index in (7, 0):
        assert source[index].id == again[index].id
        assert get_content(source[index]) == get_content(again[index])
    assert get_content(source[0]) != get_content(make_source(path, language, hard=hard, seed=1)[0])


@pytest.mark.parametrize("path", PATHS)
def test_held_out_samples_are_never_training_samples(path):
    train = {get_question(record) for record in make_source(path, num_samples=300)}
    held_out = make_source(path, num_samples=150, held_out=True)
    assert not any(get_question(record) in train for record in held_out)
    assert not {record.id for record in held_out} & {record.id for record in make_source(path, num_samples=300)}


def test_no_text_question_is_both_held_out_and_trained_on():
    for language in LANGUAGES:
        train = {get_question(record) for record in make_source("text", language, num_samples=4000)}
        held_out = {get_question(record) for record in make_source("text", language, num_samples=1000, held_out=True)}
        assert len(held_out) > 50
        assert not train & held_out


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("path", ["grounding", "referring", "ocr"])
def test_boxes_lie_in_the_image_and_contain_their_object(path, language, hard):
    for record in make_source(path, language, num_samples=30, hard=hard):
        foreground = get_foreground(record.images[0])
        height, width = foreground.shape
        mentions = [mention for message in record.messages for mention in parse_mentions(message.text)]
        assert mentions
        for _, _, boxes in mentions:
            for box in boxes:
                assert 0 <= box.x1 < box.x2 <= 1
                assert 0 <= box.y1 < box.y2 <= 1
                left, top, right, bottom = (
                    round(v * n) for v, n in zip((box.x1, box.y1, box.x2, box.y2), (width, height) * 2, strict=True)
                )
                inside = foreground[top:bottom, left:right]
                assert inside.mean() > 0.1
                # The mark reaches all four sides of its box, so the box is tight.
                assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
        if path == "ocr":  # nothing is written outside the boxes
            for _, _, (box,) in mentions:
                foreground[
                    round(box.y1 * height) : round(box.y2 * height), round(box.x1 * width) : round(box.x2 * width)
                ] = 0
            assert not foreground.any()


def test_grounding_boxes_are_multiples_of_one_tenth():
    for hard in (False, True):
        for record in make_source("grounding", num_samples=40, hard=hard):
            ((_, _, (box,)),) = parse_mentions(record.messages[1].text)
            assert all(abs(10 * v - round(10 * v)) < 1e-9 for v in (box.x1, box.y1, box.x2, box.y2))


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("path", ["word", "number", "ocr", "document", "arithmetic", "table", "chart"])
def test_no_text_is_cut_off_by_the_border(path, language, hard):
    for record in make_source(path, language, num_samples=60, hard=hard):
        for picture in record.images:
            for mark in picture.marks:
                left, top, right, bottom = mark.box
                assert left >= 0 and top >= 0 and right <= picture.width and bottom <= picture.height


def test_hangul_glyphs_are_rendered():
    ink = {word: bytes(scenes.load_font(24).getmask(word)) for word in WORDS_KO}
    assert len(set(ink.values())) == len(WORDS_KO)
    # A font without a glyph renders its box for missing glyphs, the same as for a private character.
    missing = bytes(scenes.load_font(24).getmask("\ue000\ue000"))
    assert missing not in ink.values()


def test_the_error_of_a_missing_font_names_the_package_to_install(monkeypatch):
    scenes.find_font_file.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps koreanize-matplotlib==0.1.1"):
        scenes.find_font_file()
    monkeypatch.undo()
    assert scenes.find_font_file().is_file()


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("language", LANGUAGES)
def test_a_rejected_answer_is_wrong_and_a_chosen_one_right(language, hard):
    kinds, boxless = set(), 0
    for pair in make_source("preference", language, num_samples=150, hard=hard):
        assert pair.prompt[-1].role is Role.user
        assert compute_score(pair.kind, pair.chosen.text, pair.chosen.text) == 1.0
        assert compute_score(pair.kind, pair.rejected.text, pair.chosen.text) == 0.0
        kinds.add(pair.kind)
        boxless += pair.kind is SampleKind.grounding and not parse_mentions(pair.rejected.text)
    assert kinds == {SampleKind.caption, SampleKind.word, SampleKind.number, SampleKind.grounding, SampleKind.text}
    assert boxless


@parametrize_all
def test_the_reference_answer_scores_one(path, language, hard):
    for record in make_source(path, language, hard=hard):
        for message in get_messages(record)[1::2]:
            assert compute_score(record.kind, message.text, message.text) == 1.0


def test_particles_follow_the_final_consonant():
    assert [add_particle(word, "은") for word in ("원", "십자가", "별")] == ["원은", "십자가는", "별은"]
    assert [add_particle(word, "이") for word in ("사각형", "십자가")] == ["사각형이", "십자가가"]
    assert [add_particle(word, "을") for word in ("별", "바다")] == ["별을", "바다를"]
    assert [add_particle(name, "이에요") for name in ("서연", "민수")] == ["서연이에요", "민수예요"]
    # il, i, sam, sa, o, yuk, chil, pal, gu, sip
    assert [has_final_consonant(str(n)) for n in range(1, 11)] == [
        True,
        False,
        True,
        False,
        False,
        True,
        True,
        True,
        False,
        True,
    ]


def test_captions_are_sentences_of_their_language():
    things = [(COLOURS[1], SHAPES[4]), (COLOURS[0], SHAPES[0])]
    assert format_caption(things[:1], Language.en) == "an orange cross"
    assert format_caption(things, Language.en) == "an orange cross and a red circle"
    assert format_caption(things, Language.ko) == "주황색 십자가와 빨간 원"


def test_languages_alternate_when_the_language_is_auto():
    assert [record.language for record in make_source("word", Language.auto, num_samples=4)] == [*LANGUAGES, *LANGUAGES]


@pytest.mark.parametrize(("language", "words"), [(Language.ko, WORDS_KO), (Language.en, WORDS_EN)])
def test_kind_word_has_eight_words(language, words):
    assert {record.messages[1].text for record in make_source("word", language, num_samples=300)} == set(words[:8])


def test_the_digest_changes_with_every_setting():
    changes = [
        {},
        {"language": Language.en},
        {"num_samples": 13},
        {"hard": True},
        {"seed": 1},
        {"held_out": True},
    ]
    digests = {make_source("word", **change).digest for change in changes} | {make_source("number").digest}
    assert len(digests) == len(changes) + 1
    assert make_source("word").digest == make_source("word").digest


def test_the_error_of_an_unknown_path_lists_the_choices():
    with pytest.raises(UserError, match=r"data\.sources\.mine\.path: 'captoin'.*caption, word, number"):
        make_source("captoin")
    with pytest.raises(UserError, match="num_samples=0"):
        make_source("caption", num_samples=0)


def test_a_builtin_source_follows_the_source_protocol():
    source: Source = make_source("caption", num_samples=3)
    assert len(source) == 3
    assert len(list(source)) == 3
    for index in (-1, 3):
        with pytest.raises(IndexError):
            source[index]


def test_the_corpus_holds_both_languages_and_no_control_tokens():
    texts = list(generate_corpus(per_task=3))
    assert texts == list(generate_corpus(per_task=3))
    joined = "\n".join(texts)
    assert "무슨 색인가요?" in joined and "What color" in joined
    assert "<bbox>" not in joined and "<image>" not in joined
