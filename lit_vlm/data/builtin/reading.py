"""Synthetic tasks about written text: word, number, ocr, document, arithmetic."""

from __future__ import annotations

from lit_vlm.data.builtin.fonts import ink
from lit_vlm.data.builtin.scenes import Dice, Picture, Scene, Text
from lit_vlm.data.builtin.words import NUM_WORDS, cities, names, words
from lit_vlm.data.markup import char
from lit_vlm.types import Content, Control

_OCR = Control("<ocr>")
_ZEROS = str.maketrans("123456789", "000000000")


def word(dice: Dice) -> Scene:
    """Make a word to read: one of eight, large; hard: one of sixteen, small."""
    text = dice.pick(words(dice.language, 2 * NUM_WORDS if dice.hard else NUM_WORDS))
    question = dice.pick(dice.say(("단어를 읽어 주세요.", "무슨 단어인가요?"), ("Read the word.", "What does it say?")))
    return _line(dice, text, text, question, size=dice.between(22, 25), jitter=3)


def number(dice: Dice) -> Scene:
    """Make a number to read, 10 to 99."""
    text = str(dice.between(10, 99))
    question = dice.pick(dice.say(("수를 읽어 주세요.", "몇인가요?"), ("Read the number.", "What number is it?")))
    return _line(dice, text, text, question, size=dice.between(38, 41), jitter=4)


def arithmetic(dice: Dice) -> Scene:
    """Make a written sum or difference."""
    low, high = (10, 49) if dice.hard else (1, 9)
    a, b = dice.between(low, high), dice.between(low, high)
    if dice.random() < 0.5:
        text, answer = f"{a}+{b}", a + b
    else:
        a, b = max(a, b), min(a, b)
        text, answer = f"{a}-{b}", a - b
    question = dice.pick(dice.say(("계산해 주세요.", "답은 무엇인가요?"), ("Solve it.", "What is the answer?")))
    return _line(dice, text, str(answer), question, size=dice.between(22, 26), jitter=6)


def ocr(dice: Dice) -> Scene:
    """Make an OCR task: every text with its ink box; one or two lines, hard: three or four."""
    height, width = dice.canvas()
    num = dice.between(3, 4) if dice.hard else dice.between(1, 2)
    choices = (*words(dice.language), *(str(dice.between(10, 99)) for _ in range(4)))
    sizes = (15, 19) if dice.hard else (17, 20)
    lines = [
        dice.write(text, dice.between(*sizes), (2, row * height // num + 2, width - 2, (row + 1) * height // num - 2))
        for row, text in enumerate(dice.some(choices, num))
    ]
    picture = Picture(height, width, dice.paper(), tuple(lines))
    answer: list[Content] = []
    for line in lines:
        answer += ("\n",) if answer else ()
        answer += char(line.text, picture.fractions(line.box))
    return Scene((picture,), [((_OCR,), tuple(answer))], lines)


def document(dice: Dice) -> Scene:
    """Make a question about a form with a name and a date; hard: with two more fields and full labels."""
    height, width = dice.canvas()
    fields = _fields(dice)
    texts = [f"{label}{': ' if dice.hard else ' '}{value}" for label, value, _ in fields]
    x, y, rgb = dice.between(1, 6 if dice.hard else 2), dice.between(2, 6), dice.dark()
    size = _fitting(texts, 15 if dice.hard else 13, width - x - 1)
    step = (height - 8) // len(fields)
    lines = tuple(Text(text, size, x, y + row * step, rgb) for row, text in enumerate(texts))
    _, value, question = dice.pick(fields)
    return Scene((Picture(height, width, dice.paper(), lines),), [((question,), (value,))], fields)


def _fitting(texts: list[str], size: int, width: int) -> int:
    """Find the largest font size, at most `size`, at which all texts fit into `width` pixels."""
    # All digits have the same width; with zeros instead, the many dates are measured once. One pixel for the digit's own ink.
    texts = [text.translate(_ZEROS) for text in texts]
    while size > 6 and max(ink(text, size)[2] + 1 for text in texts) > width:
        size -= 1
    return size


def _fields(dice: Dice) -> list[tuple[str, str, str]]:
    """Make the fields of a form: (label, value, question) of each line."""
    month, day = dice.between(1, 12), dice.between(1, 28)
    date = f"{dice.between(2020, 2029)}-{month:02}-{day:02}" if dice.hard else f"{month}/{day}"
    name = dice.pick(names(dice.language))
    fields = [
        dice.say(("이름", name, "이름은 무엇인가요?"), ("Name", name, "What is the name?")),
        dice.say(("날짜", date, "날짜는 언제인가요?"), ("Date", date, "What is the date?")),
    ]
    if dice.hard:
        city, amount = dice.pick(cities(dice.language)), f"{dice.between(1, 9)},{dice.between(0, 9)}00"
        fields += [
            dice.say(("도시", city, "도시는 어디인가요?"), ("City", city, "What is the city?")),
            dice.say(("금액", f"{amount}원", "금액은 얼마인가요?"), ("Total", f"${amount}", "What is the total?")),
        ]
    return fields


def _line(dice: Dice, text: str, answer: str, question: str, size: int, jitter: int) -> Scene:
    """Make a scene with one line of text. Hard: small and anywhere; it is blurred in the base view and sharp in the tiles."""
    height, width = dice.canvas()
    area = (1, 1, width - 1, height - 1)
    line: Text = (
        dice.write(text, dice.between(16, 20), area) if dice.hard else dice.write(text, size, area, jitter=jitter)
    )
    return Scene((Picture(height, width, dice.paper(), (line,)),), [((question,), (answer,))], (answer,))
