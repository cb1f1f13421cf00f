"""Synthetic tasks about written text: word, number, ocr, document, arithmetic."""

from __future__ import annotations

from lit_vlm.data.markup import build_text_mention
from lit_vlm.data.synthetic.scenes import Picture, Scene, SceneRng, Text, measure_ink
from lit_vlm.data.synthetic.vocabulary import (
    COLOURS,
    NAMES_EN,
    NAMES_KO,
    NUM_WORDS,
    SHAPES,
    Colour,
    add_particle,
    format_phrase,
    get_cities,
    get_names,
    get_words,
)
from lit_vlm.types import ContentPart, ControlToken, Language

_OCR = ControlToken("<ocr>")
_ZEROS = str.maketrans("123456789", "000000000")


def make_word(rng: SceneRng) -> Scene:
    """Make a word to read: one of eight, large; hard: one of sixteen, small."""
    text = rng.choose(get_words(rng.language, 2 * NUM_WORDS if rng.hard else NUM_WORDS))
    question = rng.choose(
        rng.select_language(("단어를 읽어 주세요.", "무슨 단어인가요?"), ("Read the word.", "What does it say?"))
    )
    return _make_line_scene(rng, text, text, question, size=rng.sample_int(22, 25), jitter=3)


def make_number(rng: SceneRng) -> Scene:
    """Make a number to read, 10 to 99."""
    text = str(rng.sample_int(10, 99))
    question = rng.choose(
        rng.select_language(("수를 읽어 주세요.", "몇인가요?"), ("Read the number.", "What number is it?"))
    )
    return _make_line_scene(rng, text, text, question, size=rng.sample_int(38, 41), jitter=4)


def make_arithmetic(rng: SceneRng) -> Scene:
    """Make a written sum or difference."""
    low, high = (10, 49) if rng.hard else (1, 9)
    a, b = rng.sample_int(low, high), rng.sample_int(low, high)
    if rng.random() < 0.5:
        text, answer = f"{a}+{b}", a + b
    else:
        a, b = max(a, b), min(a, b)
        text, answer = f"{a}-{b}", a - b
    question = rng.choose(
        rng.select_language(("계산해 주세요.", "답은 무엇인가요?"), ("Solve it.", "What is the answer?"))
    )
    return _make_line_scene(rng, text, str(answer), question, size=rng.sample_int(22, 26), jitter=6)


def make_ocr(rng: SceneRng) -> Scene:
    """Make an OCR task: every text with its ink box; one or two lines, hard: three or four."""
    height, width = rng.choose_image_size()
    num = rng.sample_int(3, 4) if rng.hard else rng.sample_int(1, 2)
    choices = (*get_words(rng.language), *(str(rng.sample_int(10, 99)) for _ in range(4)))
    sizes = (15, 19) if rng.hard else (17, 20)
    lines = [
        rng.make_text(
            text, rng.sample_int(*sizes), (2, row * height // num + 2, width - 2, (row + 1) * height // num - 2)
        )
        for row, text in enumerate(rng.choose_distinct(choices, num))
    ]
    picture = Picture(height, width, rng.sample_background(), tuple(lines))
    answer: list[ContentPart] = []
    for line in lines:
        answer += ("\n",) if answer else ()
        answer += build_text_mention(line.text, picture.to_fractions(line.box))
    return Scene((picture,), [((_OCR,), tuple(answer))], lines)


def make_document(rng: SceneRng) -> Scene:
    """Make a question about a form with a name and a date; hard: with two more fields and full labels."""
    height, width = rng.choose_image_size()
    fields = _make_fields(rng)
    texts = [f"{label}{': ' if rng.hard else ' '}{value}" for label, value, _ in fields]
    x, y, rgb = rng.sample_int(1, 6 if rng.hard else 2), rng.sample_int(2, 6), rng.sample_text_colour()
    size = _find_fitting_size(texts, 15 if rng.hard else 13, width - x - 1)
    step = (height - 8) // len(fields)
    lines = tuple(Text(text, size, x, y + row * step, rgb) for row, text in enumerate(texts))
    _, value, question = rng.choose(fields)
    return Scene((Picture(height, width, rng.sample_background(), lines),), [((question,), (value,))], fields)


def _find_fitting_size(texts: list[str], size: int, width: int) -> int:
    """Find the largest font size, at most `size`, at which all texts fit into `width` pixels."""
    # All digits have the same width; with zeros instead, the many dates are measured once. One pixel for the digit's own ink.
    texts = [text.translate(_ZEROS) for text in texts]
    while size > 6 and max(measure_ink(text, size)[2] + 1 for text in texts) > width:
        size -= 1
    return size


def _make_fields(rng: SceneRng) -> list[tuple[str, str, str]]:
    """Make the fields of a form: (label, value, question) of each line."""
    month, day = rng.sample_int(1, 12), rng.sample_int(1, 28)
    date = f"{rng.sample_int(2020, 2029)}-{month:02}-{day:02}" if rng.hard else f"{month}/{day}"
    name = rng.choose(get_names(rng.language))
    fields = [
        rng.select_language(("이름", name, "이름은 무엇인가요?"), ("Name", name, "What is the name?")),
        rng.select_language(("날짜", date, "날짜는 언제인가요?"), ("Date", date, "What is the date?")),
    ]
    if rng.hard:
        city, amount = rng.choose(get_cities(rng.language)), f"{rng.sample_int(1, 9)},{rng.sample_int(0, 9)}00"
        fields += [
            rng.select_language(("도시", city, "도시는 어디인가요?"), ("City", city, "What is the city?")),
            rng.select_language(
                ("금액", f"{amount}원", "금액은 얼마인가요?"), ("Total", f"${amount}", "What is the total?")
            ),
        ]
    return fields


def _make_line_scene(rng: SceneRng, text: str, answer: str, question: str, size: int, jitter: int) -> Scene:
    """Make a scene with one line of text. Hard: small and anywhere; it is blurred in the base view and sharp in the tiles."""
    height, width = rng.choose_image_size()
    area = (1, 1, width - 1, height - 1)
    line: Text = (
        rng.make_text(text, rng.sample_int(16, 20), area)
        if rng.hard
        else rng.make_text(text, size, area, jitter=jitter)
    )
    return Scene((Picture(height, width, rng.sample_background(), (line,)),), [((question,), (answer,))], (answer,))


_SUMS = tuple((a, b) for a in range(1, 21) for b in range(1, 21))
_HARD_SUMS = tuple((a, b) for a in range(10, 100) for b in range(10, 100))
_THINGS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
_GREETINGS = {
    Language.ko: tuple((name, form) for name in NAMES_KO for form in ("안녕하세요", "반갑습니다", "좋은 아침이에요")),
    Language.en: tuple((name, form) for name in NAMES_EN for form in ("Hello", "Hi", "Good morning")),
}


def make_text(rng: SceneRng) -> Scene:
    """Make a question and its answer; `facts` is one wrong answer.

    A held-out question is never a training question of the same difficulty. Of the hard sums, those of two numbers up to 20
    may be easy training questions.
    """
    chance = rng.random()
    question, answer, wrong = (
        _make_sum(rng) if chance < 0.5 else _make_translation(rng) if chance < 0.8 else _make_greeting(rng)
    )
    return Scene((), [((question,), (answer,))], (wrong,))


def _make_sum(rng: SceneRng) -> tuple[str, str, str]:
    """Make a sum or difference: (question, answer, wrong answer)."""
    a, b = rng.choose_from_world(_HARD_SUMS if rng.hard else _SUMS)
    off = rng.sample_int(1, 3)
    if a >= b and rng.random() < 0.5:
        question = rng.select_language(f"{a} 빼기 {add_particle(str(b), '은')} 얼마인가요?", f"What is {a} minus {b}?")
        return question, str(a - b), str(a - b + off)
    question = rng.select_language(f"{a} 더하기 {add_particle(str(b), '은')} 얼마인가요?", f"What is {a} plus {b}?")
    return question, str(a + b), str(a + b + off)


def _make_translation(rng: SceneRng) -> tuple[str, str, str]:
    """Make a translation into the language of the sample: (question, answer, wrong answer)."""
    colour, shape = rng.choose_from_world(_THINGS)
    other: Colour = rng.choose([choice for choice in COLOURS if choice is not colour])
    question = rng.select_language(
        f"한국어로 옮기세요: {format_phrase(colour, shape, Language.en)}",
        f"Into English: {format_phrase(colour, shape, Language.ko)}",
    )
    return question, format_phrase(colour, shape, rng.language), format_phrase(other, shape, rng.language)


def _make_greeting(rng: SceneRng) -> tuple[str, str, str]:
    """Make a greeting: (question, answer, wrong answer)."""
    name, form = rng.choose_from_world(_GREETINGS[rng.language])
    other = rng.choose([choice for choice in get_names(rng.language) if choice != name])
    question = rng.select_language(f"{form}, 저는 {add_particle(name, '이에요')}.", f"{form}, I am {name}.")
    return (
        question,
        rng.select_language(f"{form}, {name} 님.", f"{form}, {name}."),
        rng.select_language(f"{form}, {other} 님.", f"{form}, {other}."),
    )
