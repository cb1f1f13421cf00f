"""Record what the published scripts of PopEval and KRETA say: python record_published_rules.py POPEVAL KRETA OUT

POPEVAL and KRETA are folders of naver/popeval (93a957ab) and tabtoyou/KRETA (c273302a). It runs in a separate environment
(`pip install shapely==1.8.5.post1 'numpy<1.24'`, Python 3.11) and imports nothing from this project. Cases are drawn with a
fixed seed; where KRETA chooses a letter at random, null is recorded.
"""

import json
import random
import sys
from pathlib import Path

WORDS = "커피 아메리카노 4,500 TOTAL total 합계 AA BANANA B 서울 서울역 역 3 ###".split()
OPTIONS = [
    ["서울", "부산", "대구", "인천"],
    ["3,000원", "3,500원", "4,000원", "없음"],
    ["Cafe Alpha", "Cafe Beta", "Bakery", "DNA"],
    ["A동", "B동", "C동", "모두"],
]
PIECES = [
    *["A", "B", "C", "D", "(A)", "(B)", "A.", "B.", "C ", "D ", "A,", "A!", "A:", "B)", "'A'", "Ａ", "B동"],
    *["정답은 A입니다", "정답은 B입니다.", "Answer: A", "Answer: C.", "Answer: (D)", "Answer:", "Answer: A B"],
    *["서울", "부산", "3,000원", "Cafe Beta", "DNA", "입니다", "because the sign says", "사진을 보면 가게 이름이"],
    *["모르겠습니다", "그래서", "option", "the", "is", "\n"],
]


def draw_corners(rng: random.Random) -> list[int]:
    """Draw four corners, x and y in turn: a rectangle or a skewed one."""
    x, y, w, h = rng.randrange(60), rng.randrange(60), rng.randrange(1, 40), rng.randrange(1, 30)
    shift = 0 if rng.random() < 0.5 else 3
    corners = [x, y, x + w, y, x + w, y + h, x, y + h]
    return [value + rng.randint(-shift, shift) for value in corners]


def draw_regions(rng: random.Random) -> tuple[list, list]:
    expected = [(draw_corners(rng), rng.choice(WORDS)) for _ in range(rng.randrange(7))]
    predicted = [(draw_corners(rng), rng.choice(WORDS[:-1])) for _ in range(rng.randrange(3))]
    for corners, text in expected:
        luck = rng.random()
        if luck < 0.35:
            predicted.append((corners, text))
        elif luck < 0.6:
            predicted.append(([v + rng.randrange(-4, 5) for v in corners], text[:-1] + rng.choice("가A3 ")))
        elif luck < 0.75:
            predicted.append((draw_corners(rng), rng.choice(WORDS[:-1])))
    rng.shuffle(predicted)
    return expected, predicted


def record_popeval(rng: random.Random, number: int) -> list[dict]:
    import popEval

    cases = []
    for _ in range(number):
        expected, predicted = draw_regions(rng)
        boxes = [
            [popEval.getPolygon([c[i : i + 2] for i in range(0, 8, 2)]) for c, _ in rows]
            for rows in (expected, predicted)
        ]
        texts = [[text for _, text in rows] for rows in (expected, predicted)]
        kept = popEval.removeDoncareBox(boxes[0], texts[0], boxes[1], texts[1], "###")
        left = popEval.removeControversialBox(*popEval.removeNoncontroversialBox(*kept))[1]
        num_expected = len("".join(kept[1]))
        counts = [num_expected - len("".join(left)), len("".join(kept[3])), num_expected]
        cases.append({"expected": expected, "predicted": predicted, "counts": counts})
    return cases


def record_kreta(rng: random.Random, number: int) -> list[dict]:
    import evaluate

    evaluate.random = type("Nothing", (), {"choice": staticmethod(lambda letters: None)})
    cases = []
    for _ in range(number):
        options = rng.choice(OPTIONS)
        answer = " ".join(rng.choice(PIECES) for _ in range(rng.randrange(7)))
        answer = answer.replace(" ", "") if rng.random() < 0.3 else answer
        texts, letters = evaluate.get_multi_choice_info(options)
        letter = evaluate.parse_multi_choice_response(answer, letters, texts)
        cases.append({"options": options, "answer": answer, "letter": letter})
    return cases


if __name__ == "__main__":
    sys.path += [sys.argv[1], str(Path(sys.argv[2]) / "eval")]
    sys.setrecursionlimit(5000)
    record = {"popeval": record_popeval(random.Random(3), 120), "kreta": record_kreta(random.Random(5), 300)}
    lines = ",\n".join(
        f'"{name}": [\n' + ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases) + "\n]"
        for name, cases in record.items()
    )
    Path(sys.argv[3]).write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
