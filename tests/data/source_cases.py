"""Records and files for the tests of the sources."""

import io
import json

from lit_vlm.config.schema import SourceConfig
from lit_vlm.data.sources import open_source

HUMAN = {"from": "human", "value": "<image>\n무엇이 보이나요?"}
GPT = {"from": "gpt", "value": "꽃이 보입니다."}
USER = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
ANSWER = {"role": "assistant", "content": "A flower."}


def encode_png(image):
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def write(path, records):
    """Write a JSON list or JSONL; a record that is already text is written unchanged."""
    lines = [record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records]
    path.write_text("\n".join(lines) + "\n" if path.suffix == ".jsonl" else f"[\n{', '.join(lines)}\n]", "utf-8")
    return path


def open_path(path, cache=None, **options):
    return open_source("mine", SourceConfig(path=str(path), **options), max_image_pixels=1_000_000, cache=cache)


def read_record(folder, record, **options):
    return open_path(write(folder / "train.jsonl", [record]), **options)[0]


def make_llava(*turns, **keys):
    return {"conversations": list(turns), **keys}


def get_contents(sample):
    return [message.content for message in sample.messages]
