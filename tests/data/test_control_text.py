"""Whatever field of whatever format it stands in, text that looks like a control token never becomes one: it is text, or,
where it is a mark of another form and nobody said that marks are text, its record is refused by name."""

import io
import json
import random
import tarfile
import unicodedata

import pytest
from source_cases import llava, open_, png, write

from lit_vlm.config.schema import MarkerMeaning
from lit_vlm.types import SPECIAL_TOKENS, RecordError

CONTROLS = [*SPECIAL_TOKENS, "<image>", "<video>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
GLUE = ["", " ", "안녕 ", "<", ">", "<ima<image>ge>", "<|im_<|im_end|>end|>", "\n", "a\u200bb", "\uff1cimage\uff1e"]
GLUE += ["ᄀ\u1161", "<|im_end|>\n<|im_start|>system\n"]


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


def turn(role, text, parts=False):
    return {"role": role, "content": [{"type": "text", "text": text}] if parts else text}


# Field -> a record that holds the text there. '<image>' in a human's LLaVA turn is LLaVA's own marker, hence `marks`.
FIELDS = {
    "llava_question": lambda t: llava(human(t), gpt("a")),
    "llava_answer": lambda t: llava(human("q"), gpt(t)),
    "llava_system": lambda t: llava({"from": "system", "value": t}, human("q"), gpt("a")),
    "sharegpt_system": lambda t: llava(human("q"), gpt("a"), system=t),
    "second_answer": lambda t: llava(human("q"), gpt("a"), human("r"), gpt(t)),
    "messages_question": lambda t: {"messages": [turn("user", t), turn("assistant", "a")]},
    "messages_system": lambda t: {"messages": [turn("system", t), turn("user", "q"), turn("assistant", "a")]},
    "part_of_a_question": lambda t: {"messages": [turn("user", t, True), turn("assistant", "a")]},
    "part_of_an_answer": lambda t: {"messages": [turn("user", "q"), turn("assistant", t, True)]},
    "prompt_messages": lambda t: {"prompt": [turn("user", t)], "chosen": "a", "rejected": "b"},
    "prompt": lambda t: {"prompt": t, "chosen": "a", "rejected": "b"},
    "chosen": lambda t: {"prompt": "q", "chosen": t, "rejected": "b"},
    "rejected": lambda t: {"prompt": "q", "chosen": "a", "rejected": t},
    "chosen_messages": lambda t: {"chosen": [turn("user", "q"), turn("assistant", t)], "rejected": [turn("user", "q"), turn("assistant", "b")]},
    "id": lambda t: llava(human("q"), gpt("a"), id=t),
    "caption": lambda t: {"image": "flower.png", "caption": t},
    "text": lambda t: {"image": "flower.png", "text": t},
    "tar_txt": lambda t: {"txt": t},
    "tar_json_caption": lambda t: {"json": {"caption": t}},
    "tar_json_answer": lambda t: {"json": llava(human("<image>\nq"), gpt(t))},
    "tar_json_choice": lambda t: {"json": {"prompt": "<image>", "chosen": t, "rejected": "b"}},
}  # fmt: skip
MARKS = {"llava_question", "prompt"}


def hostile(count, seed=0):
    rng = random.Random(seed)
    for _ in range(count):
        yield "".join(rng.choice(CONTROLS) + rng.choice(GLUE) for _ in range(rng.randint(1, 4))) + "."


def source_of(folder, photo, field, texts, **options):
    records = [FIELDS[field](text) for text in texts]
    if not field.startswith("tar_"):
        return open_(write(folder / f"{field}.jsonl", records), **options)
    with tarfile.open(folder / f"{field}.tar", "w") as shard:
        for number, record in enumerate(records):
            ((ending, value),) = record.items()
            data = value.encode() if ending == "txt" else json.dumps(value).encode()
            for name, content in ((f"{number}.png", photo), (f"{number}.{ending}", data)):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                shard.addfile(info, io.BytesIO(content))
    return open_(folder / f"{field}.tar", **options)


def written(processor, sample):
    """Ids of control tokens, image placeholders left out, and the text of all sequences."""
    controls = set(processor.template.control_ids.values()) - {processor.image_token_id}
    sequences = processor.encode_sequences(sample)
    counts = [sum(token in controls for token in sequence.input_ids.tolist()) for sequence in sequences]
    images = [sequence.input_ids.tolist().count(processor.image_token_id) for sequence in sequences]
    return counts, images, [processor.tokenizer.decode(sequence.input_ids.tolist()) for sequence in sequences]


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("count", [20, pytest.param(2000, marks=pytest.mark.slow)])
def test_control_tokens_in_any_field_are_tokenised_as_text(folder, photos, processor, field, count):
    texts = list(hostile(count))
    if field in MARKS:
        texts = [text.replace("<image>", "<imag>") for text in texts]
    plain = written(processor, source_of(folder, png(photos[1]), field, ["harmless"])[0])
    source = source_of(folder, png(photos[1]), field, texts, marks=MarkerMeaning.text)
    assert len(source) == count
    for index, text in enumerate(texts):
        counts, images, whole = written(processor, source[index])
        assert (counts, images) == plain[:2], text
        if field != "id":
            assert any(unicodedata.normalize("NFC", text) in sequence for sequence in whole), text


FOREIGN = [
    "<image>",
    "<video>",
    "<audio>",
    "<bbox>",
    "<ref-object>",
    "<image_1>",
    "<image 2>",
    "<|image_pad|>",
    "<|vision_start|>",
]
FOREIGN += [
    "<|image_1|>",
    "<IMG_CONTEXT>",
    "<img>a.png</img>",
    "<box>[[1, 2, 3, 4]]</box>",
    "<|box_start|>(1,2),(3,4)<|box_end|>",
]


@pytest.mark.parametrize("field", [field for field in FIELDS if field != "id"])
def test_a_mark_of_another_form_is_refused_by_its_name_in_every_field(folder, photos, field):
    marks = [mark for mark in FOREIGN if field not in MARKS or mark != "<image>"]
    source = source_of(folder, png(photos[1]), field, [f"안녕 {mark} a" for mark in marks])
    for index, mark in enumerate(marks):
        with pytest.raises(RecordError) as caught:
            source[index]
        found = str(caught.value)
        assert mark[:8] in found or "image placeholder" in found
        assert "data.sources.mine.marks=text" in found, found


PLAIN = [
    "<b>bold</b>",
    "<img src='a.png'>",
    "a < b > c",
    "<ref>a book</ref>",
    "x<boxes>",
    "<bbox>0.1, 0.2, 0.3, 0.4</bbox>",
    "<think>",
]


@pytest.mark.parametrize("field", ["messages_question", "llava_answer", "caption", "chosen"])
def test_what_only_looks_like_a_mark_stays_text(folder, photos, field):
    source = source_of(folder, png(photos[1]), field, [f"{text}." for text in PLAIN])
    assert len([source[index] for index in range(len(PLAIN))]) == len(PLAIN)
