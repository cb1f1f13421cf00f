"""Vocabulary of the synthetic data, in Korean and English: colours, shapes, words, names, and Korean particles."""

from __future__ import annotations

from typing import NamedTuple

from lit_vlm.types import Language


class Colour(NamedTuple):
    """Colour with its English and Korean names."""

    rgb: tuple[int, int, int]
    en: str
    ko: str  # before a noun
    ko_noun: str

    def get_name(self, language: Language) -> str:
        return self.ko_noun if language == "ko" else self.en


class Shape(NamedTuple):
    """Shape with its English and Korean names."""

    key: str
    en: str
    ko: str

    def get_name(self, language: Language) -> str:
        return self.ko if language == "ko" else self.en


COLOURS = (
    Colour((225, 35, 35), "red", "빨간", "빨간색"),
    Colour((250, 140, 10), "orange", "주황색", "주황색"),
    Colour((235, 215, 20), "yellow", "노란", "노란색"),
    Colour((30, 155, 60), "green", "초록색", "초록색"),
    Colour((35, 80, 225), "blue", "파란", "파란색"),
    Colour((145, 50, 190), "purple", "보라색", "보라색"),
    Colour((20, 20, 20), "black", "검은", "검은색"),
)
SHAPES = (
    Shape("circle", "circle", "원"),
    Shape("square", "square", "사각형"),
    Shape("triangle", "triangle", "삼각형"),
    Shape("star", "star", "별"),
    Shape("cross", "cross", "십자가"),
)

# The first eight are used by kind `word`; images with more text use all.
WORDS_KO = tuple("사과 나무 바다 학교 기차 우유 구름 하늘 시장 노래 여름 겨울 친구 가방 편지 시계".split())
WORDS_EN = tuple("tree book fish milk sun car bird hand lamp door rain snow ship game food ring".split())
NUM_WORDS = 8

NAMES_KO = tuple("민수 지우 서연 하준 수아 도윤 예린 준호".split())
NAMES_EN = tuple("Tom Amy Ben Kim Leo Mia Sam Eva".split())
CITIES_KO = tuple("서울 부산 대구 인천 광주 대전 울산 제주".split())
CITIES_EN = tuple("Paris Seoul Tokyo Rome Oslo Cairo Lima Bern".split())

# Digits whose Korean reading ends in a consonant: yeong, il, sam, yuk, chil, pal.
_DIGITS_WITH_FINAL = frozenset("013678")
_PARTICLES = {
    "은": ("은", "는"),
    "이": ("이", "가"),
    "을": ("을", "를"),
    "과": ("과", "와"),
    "이에요": ("이에요", "예요"),
}


def has_final_consonant(word: str) -> bool:
    """Return True if a Korean word, or a number in its Korean reading, ends in a consonant."""
    last = word[-1]
    if "가" <= last <= "힣":
        return (ord(last) - ord("가")) % 28 != 0
    return last in _DIGITS_WITH_FINAL


def get_particle(word: str, form: str) -> str:
    """Get the form of a particle after `word`; `form` is the one used after a consonant (a key of `_PARTICLES`)."""
    after_consonant, after_vowel = _PARTICLES[form]
    return after_consonant if has_final_consonant(word) else after_vowel


def add_particle(word: str, form: str) -> str:
    """Add a Korean particle to a word, in the form that fits; see `get_particle`."""
    return word + get_particle(word, form)


def format_phrase(colour: Colour, shape: Shape, language: Language) -> str:
    """Format a coloured shape without an article, such as "red circle"."""
    return f"{colour.ko} {shape.ko}" if language == "ko" else f"{colour.en} {shape.en}"


def add_article(noun: str) -> str:
    """Add the English indefinite article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def format_caption(things: list[tuple[Colour, Shape]], language: Language) -> str:
    """Format a caption of one or two shapes, from left to right."""
    phrases = [format_phrase(colour, shape, language) for colour, shape in things]
    if language == "en":
        return " and ".join(map(add_article, phrases))
    return " ".join([add_particle(word, "과") for word in phrases[:-1]] + phrases[-1:])


def get_words(language: Language, num: int = 16) -> tuple[str, ...]:
    return (WORDS_KO if language == "ko" else WORDS_EN)[:num]


def get_names(language: Language) -> tuple[str, ...]:
    return NAMES_KO if language == "ko" else NAMES_EN


def get_cities(language: Language) -> tuple[str, ...]:
    return CITIES_KO if language == "ko" else CITIES_EN
