"""Made rows of benchmarks in their published layout: pictures of one or more coloured shapes, and questions about them.

The benchmarks themselves are not redistributed (CC BY-NC 4.0 and others), so tests use these.
"""

import base64
import csv
import hashlib
import io
import json
import random
import re
from pathlib import Path

import datasets
from PIL import Image, ImageColor, ImageDraw

COLOURS = {
    "빨간": ("red", "#d22"),
    "파란": ("blue", "#22d"),
    "초록": ("green", "#2a2"),
    "노란": ("yellow", "#dd2"),
    "검은": ("black", "#111"),
}
LETTERS = "ABCD"
DTC_CATEGORIES = ("document", "table", "chart")
MMSTAR_CATEGORIES = {"coarse perception": "image emotion", "math": "geometry", "logical reasoning": "diagram reasoning"}
OCR_TYPES = ("Regular Text Recognition", "Doc-oriented VQA", "Handwritten Mathematical Expression Recognition")


def draw_shapes(colour: str, count: int, side: int = 96) -> Image.Image:
    """Draw some circles of one colour on white."""
    image = Image.new("RGB", (side, side), "white")
    pen = ImageDraw.Draw(image)
    for number in range(count):
        x, y = side // 3 * (number % 3), side // 3 * (number // 3)
        pen.ellipse((x + 3, y + 3, x + side // 3 - 3, y + side // 3 - 3), fill=colour)
    return image


def draw_text(text: str) -> Image.Image:
    image = Image.new("RGB", (120, 40), "white")
    ImageDraw.Draw(image).text((8, 12), text, fill="black")
    return image


class Maker:
    """Maker of questions with four choices about shapes; the same seed makes the same rows."""

    def __init__(self, seed: int, side: int) -> None:
        self.random, self.side = random.Random(seed), side

    def make(self, korean: bool) -> tuple[Image.Image, str, list[str], int]:
        """Return a picture, a question, four choices and the place of the right one."""
        name = self.random.choice(list(COLOURS))
        word, rgb = COLOURS[name]
        count = self.random.randint(1, 9)
        image = draw_shapes(rgb, count, self.side)
        if self.random.random() < 0.5:
            others = self.random.sample([number for number in range(1, 10) if number != count], 3)
            choices = [f"{number}개" if korean else str(number) for number in (count, *others)]
            question = "그림에 원이 몇 개 있습니까?" if korean else "How many circles are there?"
        else:
            others = self.random.sample([other for other in COLOURS if other != name], 3)
            choices = [f"{one}색" if korean else COLOURS[one][0] for one in (name, *others)]
            question = "그림의 원은 무슨 색입니까?" if korean else "Which colour are the circles?"
        right = choices[0]
        self.random.shuffle(choices)
        return image, question, choices, choices.index(right)


def make_rows(benchmark: str, num: int, seed: int = 0, side: int = 96) -> list[dict]:
    """Make rows in the layout of a benchmark, with PIL images."""
    maker = Maker(seed, side)
    return [row for number in range(num) for row in MAKERS[benchmark](maker, number)][:num]


def make_dtcbench(maker, number):
    image, question, choices, right = maker.make(korean=True)
    named = {f"choice_{letter.lower()}": choice for letter, choice in zip(LETTERS, choices, strict=True)}
    category = DTC_CATEGORIES[number % 3]
    yield {
        "index": number,
        "question": question,
        **named,
        "answer": LETTERS[right],
        "category": category,
        "image": image,
    }


def make_mmbench(maker, number, korean=False):
    """One question with its rotations: index + 1,000,000 per rotation, as CircularEval reads them."""
    image, question, choices, right = maker.make(korean)
    for turn in range(4):
        turned = choices[turn:] + choices[:turn]
        yield {
            "index": number + turn * 1_000_000,
            "question": question,
            "hint": None,
            **dict(zip(LETTERS, turned, strict=True)),
            "answer": LETTERS[turned.index(choices[right])],
            "category": "object_localization",
            "image": image,
            "source": "made",
            "l2-category" if korean else "L2-category": "finegrained_perception",
            "comment": None,
            "split": "dev",
        }


def make_seed(maker, number, korean=False):
    image, question, choices, right = maker.make(korean)
    named = {f"choice_{letter.lower()}": choice for letter, choice in zip(LETTERS, choices, strict=True)}
    row = {"question_id": str(number), "question": question, **named, "answer": LETTERS[right]}
    if korean:
        yield row | {"data_type": ("Instance Counting", "Scene Understanding")[number % 2], "image": image}
    else:
        yield row | {"data_type": ("image", "image", "video")[number % 3], "image": [image]}


def make_mmstar(maker, number, korean=False):
    image, question, choices, right = maker.make(korean)
    options = ", ".join(f"{letter}: {choice}" for letter, choice in zip(LETTERS, choices, strict=True))
    category = list(MMSTAR_CATEGORIES)[number % 3]
    row = {"index": number, "question": f"{question}\nOptions: {options}", "answer": LETTERS[right]}
    yield row | {"category": category, "l2_category": MMSTAR_CATEGORIES[category], "image": image}


def make_llava_w(maker, number):
    image, question, choices, right = maker.make(korean=True)
    category = ("conv", "detail", "complex")[number % 3]
    reference = f"{choices[right]}입니다."
    yield {
        "image": image,
        "image_id": str(number),
        "question": question,
        "caption": "흰 바탕에 원이 있다.",
        "gpt_answer": reference,
        "category": category,
    }


def make_ocrbench(maker, number):
    text = maker.random.choice(("abcd", "bcda", "cdab"))
    kind = OCR_TYPES[number % 3]
    question = "what is written in the image?"
    dataset = "HME100k" if number % 3 == 2 else "made"
    yield {"dataset": dataset, "question": question, "question_type": kind, "answer": [text], "image": draw_text(text)}


def make_pope(maker, number):
    name = maker.random.choice(list(COLOURS))
    word, rgb = COLOURS[name]
    asked = word if maker.random.random() < 0.5 else COLOURS[maker.random.choice(list(COLOURS))][0]
    yield {
        "id": str(number),
        "question_id": str(number),
        "question": f"Is there a {asked} circle in the image?",
        "answer": "yes" if asked == word else "no",
        "image_source": "made",
        "image": draw_shapes(rgb, maker.random.randint(1, 9), maker.side),
        "category": ("adversarial", "popular", "random")[number % 3],
    }


def make_kreta(maker, number):
    image, question, choices, right = maker.make(korean=True)
    row = {"question": question, **dict(zip(LETTERS, choices, strict=True)), "answer": LETTERS[right], "image": image}
    yield row | {"topic_difficulty": ("System1", "System2")[number % 2]}


def make_k_viscuit(maker, number):
    image, question, choices, right = maker.make(korean=False)
    yield {"question": question, "options": choices, "answer": right, "image": image}


def make_koffvqa(maker, number):
    image, question, choices, right = maker.make(korean=True)
    rubric = f"답이 '{choices[right]}'이면 10점, 아니면 0점"
    yield {"index": str(number), "question": question, "answer": rubric, "category": "인식", "image": image}


def make_cord(maker, number):
    text = maker.random.choice(("abcd", "bcda"))
    quad = {"x1": 8, "y1": 12, "x2": 40, "y2": 12, "x3": 40, "y3": 24, "x4": 8, "y4": 24}
    truth = {
        "valid_line": [{"words": [{"text": text, "quad": quad}]}],
        "meta": {"image_size": {"width": 120, "height": 40}},
    }
    yield {"image": draw_text(text), "ground_truth": json.dumps(truth)}


def make_grounding(maker, number):
    image = draw_shapes("#d22", 1, maker.side)
    yield {
        "image": image,
        "question": "빨간 원을 찾아 주세요.",
        "answer": "<obj>원</obj><bbox>0.03, 0.03, 0.3, 0.3</bbox>",
    }


def make_captions(maker, number):
    image, _, _, _ = maker.make(korean=True)
    yield {"image_id": str(number), "image": image, "captions": ["흰 바탕에 원이 있다.", "색이 같은 원들."]}


MAKERS = {
    "koffvqa": make_koffvqa,
    "cord_popeval": make_cord,
    "grounding_markup": make_grounding,
    "xm3600_ko": make_captions,
    "kreta": make_kreta,
    "k_viscuit": make_k_viscuit,
    "k_dtcbench": make_dtcbench,
    "k_mmbench": lambda maker, number: make_mmbench(maker, number, korean=True),
    "k_seed": lambda maker, number: make_seed(maker, number, korean=True),
    "k_mmstar": lambda maker, number: make_mmstar(maker, number, korean=True),
    "k_llava_w": make_llava_w,
    "mmbench": make_mmbench,
    "seed_image": make_seed,
    "mmstar": make_mmstar,
    "ocrbench": make_ocrbench,
    "pope": make_pope,
}


def read_shapes(image: Image.Image) -> tuple[str, int]:
    """Read a picture of `draw_shapes`: the Korean name of the colour, and the number of circles."""
    step = image.width // 3
    cells = [image.getpixel((step * (number % 3) + step // 2, step * (number // 3) + step // 2)) for number in range(9)]
    filled = [cell for cell in cells if cell != (255, 255, 255)]
    names = {ImageColor.getrgb(rgb): name for name, (_, rgb) in COLOURS.items()}
    return names.get(filled[0], "?") if filled else "?", len(filled)


def answer_request(body: dict) -> str:
    """Answer a chat request about a made row: right in two of three, as a letter, a sentence, or a word."""
    (message,) = body["messages"]
    text = "".join(part.get("text", "") for part in message["content"])
    url = next(part["image_url"]["url"] for part in message["content"] if part["type"] == "image_url")
    image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")
    choice = int(hashlib.sha256(image.tobytes() + text.encode()).hexdigest(), 16)
    if "<ocr>" in text:
        return "<char>abcd</char><bbox>0.05, 0.25, 0.35, 0.65</bbox>"
    if "찾아 주세요" in text:
        return "<obj>원</obj><bbox>0.03, 0.03, 0.3, 0.3</bbox>" if choice % 2 else "왼쪽 위에 있습니다."
    if "written in" in text:
        return "abcd" if choice % 3 else "The text is 'abcd efgh'."
    name, count = read_shapes(image)
    if text.startswith("Is there a"):
        is_right = COLOURS.get(name, ("?",))[0] in text
        return ("yes" if is_right else "no") if choice % 3 else "Yes."
    options = dict(re.findall(r"\b([A-D])[:.] ?([^\n,]+)", text))
    wanted = {f"{count}개", str(count), f"{name}색", COLOURS.get(name, ("?",))[0]}
    right = next((letter for letter, option in options.items() if option.strip() in wanted), "A")
    wrong = "ABCD"[("ABCD".index(right) + 1) % 4]
    return (
        right,
        f"({right})",
        f"정답은 {right}입니다.",
        right,
        right,
        wrong,
        right,
        options.get(right, right),
        right,
    )[choice % 9]


def write_parquet(rows: list[dict], path: Path) -> Path:
    """Write rows as the hub's data sets are: images as bytes, with the features of `datasets` in the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = datasets.Image()
    features = {
        name: ([image] if isinstance(value, list) else image) for name, value in rows[0].items() if name == "image"
    }
    table = {name: [encode_images(row[name]) if name == "image" else row[name] for row in rows] for name in rows[0]}
    data = datasets.Dataset.from_dict(table)
    data.cast(datasets.Features({**data.features, **features})).to_parquet(path)
    return path


def write_tsv(rows: list[dict], path: Path) -> Path:
    """Write rows as TSV with the pictures in base64."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(
            {**row, "image": base64.b64encode(encode_images(row["image"])["bytes"]).decode()} for row in rows
        )
    return path


def encode_images(value):
    if isinstance(value, list):
        return [encode_images(one) for one in value]
    buffer = io.BytesIO()
    value.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}
