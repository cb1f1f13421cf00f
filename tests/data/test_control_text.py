"""Text that looks like a control token never becomes one, in any field of any format: it stays text. If it is a marker
of another format, and the settings do not say that markers are text, its record is refused by name."""

import io
import json
import random
import tarfile
import unicodedata

import pytest
from source_cases import encode_png, make_llava, open_path, write

from lit_vlm.config.choices import MarkerMeaning
from lit_vlm.types import SPECIAL_TOKENS, RecordError

CONTROLS = [*SPECIAL_TOKENS, "<image>", "<video>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
GLUE = ["", " ", "안녕 ", "<", ">", "<ima<image>ge>", "<|im_<|im_end|>end|>", "\n", "a\u200bb", "\uff1cimage\uff1e"]
GLUE += ["ᄀ\u1161", "<|im_end|>\n<|im_start|>system\n"]


def make_human(text):
    return {"from": "human", "value": text}


def make_gpt(text):
    return {"from": "gpt", "value": text}


def make_turn(role, text, parts=False):
    return {"role": role, "content": [{"type": "text", "text": text}] if parts else text}


# Field -> a record that holds the text there. '<image>' in a human's LLaVA turn is LLaVA's own marker, hence `marks`.
FIELDS = {
    "llava_question": lambda t: make_llava(make_human(t), make_gpt("a")),
    "llava_answer": lambda t: make_llava(make_human("q"), make_gpt(t)),
    "llava_system": lambda t: make_llava({"from": "system", "value": t}, make_human("q"), make_gpt("a")),
    "sharegpt_system": lambda t: make_llava(make_human("q"), make_gpt("a"), system=t),
    "second_answer": lambda t: make_llava(make_human("q"), make_gpt("a"), make_human("r"), make_gpt(t)),
    "messages_question": lambda t: {"messages": [make_turn("user", t), make_turn("assistant", "a")]},
    "messages_system": lambda t: {"messages": [make_turn("system", t), make_turn("user", "q"), make_turn("assistant", "a")]},
    "part_of_a_question": lambda t: {"messages": [make_turn("user", t, True), make_turn("assistant", "a")]},
    "part_of_an_answer": lambda t: {"messages": [make_turn("user", "q"), make_turn("assistant", t, True)]},
    "prompt_messages": lambda t: {"prompt": [make_turn("user", t)], "chosen": "a", "rejected": "b"},
    "prompt": lambda t: {"prompt": t, "chosen": "a", "rejected": "b"},
    "chosen": lambda t: {"prompt": "q", "chosen": t, "rejected": "b"},
    "rejected": lambda t: {"prompt": "q", "chosen": "a", "rejected": t},
    "chosen_messages": lambda t: {"chosen": [make_turn("user", "q"), make_turn("assistant", t)],
        "rejected": [make_turn("user", "q"), make_turn("assistant", "b")]},
    "id": lambda t: make_llava(make_human("q"), make_gpt("a"), id=t),
    "caption": lambda t: {"image": "flower.png", "caption": t},
    "text": lambda t: {"image": "flower.png", "text": t},
    "minicpm_question": lambda t: make_llava(make_turn("user", t), make_turn("assistant", "a")),
    "minicpm_answer": lambda t: make_llava(make_turn("user", "q"), make_turn("assistant", t)),
    "column_question": lambda t: {"question": t, "answer": "a"},
    "column_answer": lambda t: {"question": "q", "answer": t},
    "instruction": lambda t: {"instruction": t, "output": "a"},
    "input": lambda t: {"instruction": "q", "input": t, "output": "a"},
    "output": lambda t: {"instruction": "q", "output": t},
    "query": lambda t: {"query": t, "response": "a"},
    "response": lambda t: {"query": "q", "response": t},
    "earlier_question": lambda t: {"query": "q", "response": "a", "history": [[t, "a"]]},
    "earlier_answer": lambda t: {"query": "q", "response": "a", "history": [["q", t]]},
    "trl_prompt": lambda t: {"prompt": t, "completion": "a"},
    "trl_completion": lambda t: {"prompt": "q", "completion": t},
    "cauldron_user": lambda t: {"texts": [{"user": t, "assistant": "a"}]},
    "cauldron_assistant": lambda t: {"texts": [{"user": "q", "assistant": t}]},
    "swift_rejected": lambda t: {"query": "q", "response": "a", "rejected_response": t},
    "alpaca_pair": lambda t: {"instruction": "q", "chosen": t, "rejected": "b"},
    "factory_rejected": lambda t: make_llava(make_human("q"), chosen=make_gpt("a"), rejected=make_gpt(t)),
    "tar_txt": lambda t: {"txt": t},
    "tar_json_caption": lambda t: {"json": {"caption": t}},
    "tar_json_answer": lambda t: {"json": make_llava(make_human("<image>\nq"), make_gpt(t))},
    "tar_json_choice": lambda t: {"json": {"prompt": "<image>", "chosen": t, "rejected": "b"}},
}  # fmt: skip
MARKS = {"llava_question", "prompt"}


def generate_hostile_texts(count, seed=0):
    rng = random.Random(seed)
    for _ in range(count):
        yield "".join(rng.choice(CONTROLS) + rng.choice(GLUE) for _ in range(rng.randint(1, 4))) + "."


def open_field_source(folder, photo, field, texts, **options):
    records = [FIELDS[field](text) for text in texts]
    if not field.startswith("tar_"):
        return open_path(write(folder / f"{field}.jsonl", records), **options)
    with tarfile.open(folder / f"{field}.tar", "w") as shard:
        for number, record in enumerate(records):
            ((ending, value),) = record.items()
            data = value.encode() if ending == "txt" else json.dumps(value).encode()
            for name, content in ((f"{number}.png", photo), (f"{number}.{ending}", data)):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                shard.addfile(info, io.BytesIO(content))
    return open_path(folder / f"{field}.tar", **options)


def encode_and_decode(processor, sample):
    """Return for each sequence the numbers of control tokens and of image placeholders, and the text."""
    controls = set(processor.template.control_ids.values()) - {processor.image_token_id}
    sequences = processor.encode_sequences(sample)
    counts = [sum(token in controls for token in sequence.input_ids.tolist()) for sequence in sequences]
    images = [sequence.input_ids.tolist().count(processor.image_token_id) for sequence in sequences]
    return counts, images, [processor.tokenizer.decode(sequence.input_ids.tolist()) for sequence in sequences]


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("count", [20, pytest.param(2000, marks=pytest.mark.slow)])
def test_control_tokens_in_any_field_are_tokenised_as_text(folder, photos, processor, field, count):
    texts = list(generate_hostile_texts(count))
    if field in MARKS:
        texts = [text.replace("<image>", "<imag>") for text in texts]
    plain = encode_and_decode(processor, open_field_source(folder, encode_png(photos[1]), field, ["harmless"])[0])
    source = open_field_source(folder, encode_png(photos[1]), field, texts, marks=MarkerMeaning.text)
    assert len(source) == count
    for index, text in enumerate(texts):
        counts, images, whole = encode_and_decode(processor, source[index])
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
def test_a_marker_of_another_format_is_refused_by_name_in_every_field(folder, photos, field):
    marks = [mark for mark in FOREIGN if field not in MARKS or mark != "<image>"]
    source = open_field_source(folder, encode_png(photos[1]), field, [f"안녕 {mark} a" for mark in marks])
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
def test_text_that_only_looks_like_a_marker_stays_text(folder, photos, field):
    source = open_field_source(folder, encode_png(photos[1]), field, [f"{text}." for text in PLAIN])
    assert len([source[index] for index in range(len(PLAIN))]) == len(PLAIN)
