"""Records and files that the tests of the sources are made of."""

import io
import json

from lit_vlm.config.schema import SourceConfig
from lit_vlm.data.sources import open_source

HUMAN = {"from": "human", "value": "<image>\n무엇이 보이나요?"}
GPT = {"from": "gpt", "value": "꽃이 보입니다."}
USER = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
ANSWER = {"role": "assistant", "content": "A flower."}


def png(image):
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def write(path, records):
    """A JSON list or JSONL; a record that is text already is written as it is."""
    lines = [record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records]
    path.write_text("\n".join(lines) + "\n" if path.suffix == ".jsonl" else f"[\n{', '.join(lines)}\n]", "utf-8")
    return path


def open_(path, cache=None, **options):
    return open_source("mine", SourceConfig(path=str(path), **options), max_image_pixels=1_000_000, cache=cache)


def only(folder, record, **options):
    return open_(write(folder / "train.jsonl", [record]), **options)[0]


def llava(*turns, **keys):
    return {"conversations": list(turns), **keys}


def contents(sample):
    return [message.content for message in sample.messages]
