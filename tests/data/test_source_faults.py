"""Faulty datasets: each fault is reported with its line and the remedy."""

import json
import re
import sys
import unicodedata

import pytest
from source_cases import ANSWER, GPT, HUMAN, USER, make_llava, open_path, read_record, write

from lit_vlm.config.choices import Format
from lit_vlm.config.schema import SourceConfig
from lit_vlm.data.sources import open_source
from lit_vlm.types import Fault, RecordError, UserError

_connections: list[str] | None = None


def _record_event(event, args):
    if _connections is not None and event.startswith("socket."):
        _connections.append(event)


sys.addaudithook(_record_event)  # a hook cannot be removed: `_connections` switches it on and off


# Faults of records

QUESTION = {"from": "human", "value": "q"}
LLAVA_FAULTS = [
    (make_llava({"from": "human", "value": "<image><image>"}, GPT, image="a.png"),
     "train.jsonl:1: 2 image placeholders but 1 image; each '<image>' needs one. "
     "Fix the record, or set such records aside with data.on_bad_record=quarantine."),
    (make_llava(QUESTION, GPT, image="a.png"), "0 image placeholders but 1 image; each '<image>' needs one"),
    (make_llava(HUMAN, GPT), "1 image placeholder but 0 images; each '<image>' needs one"),
    (make_llava(), "conversations is empty"),
    ({"id": "1", "text": "x"}, "missing 'conversations'; found 'id', 'text', format=llava needs 'conversations'"),
    ({"conversations": "x"}, "conversations is text; it must be a list"),
    (make_llava("x"), "conversations[0] is text; it must be an object with 'from' and 'value'"),
    (make_llava({"from": "human"}, GPT), "conversations[0].value is null; it must be text"),
    (make_llava({"from": "human", "value": 3}, GPT), "conversations[0].value is a number; it must be text"),
    (make_llava({"value": "q"}, GPT), "conversations[0].from is null; it must be text"),
    (make_llava({"from": "bot", "value": "q"}, GPT), "conversations[0].from is 'bot'; it must be 'human', 'gpt' or"),
    (make_llava(QUESTION, QUESTION, GPT), "message 2 is the user's; user and assistant must take turns, user first"),
    (make_llava(GPT, QUESTION, GPT), "message 1 is the assistant's; user and assistant must take turns, user first"),
    (make_llava(QUESTION, GPT, QUESTION), "the last message is the user's; it must be the assistant's"),
    (make_llava({"from": "system", "value": "s"}), "the last message is the system's; it must be the assistant's"),
    (make_llava(QUESTION, {"from": "gpt", "value": " \n"}), "message 2, the assistant's, is empty"),
    (make_llava(QUESTION, {"from": "gpt", "value": "\ud800"}), r"holds '\ud800', half of a surrogate pair"),
    (make_llava(HUMAN, GPT, image=5), "an image is a number; it must be a path, encoded bytes or {bytes, path}"),
    (make_llava(HUMAN, GPT, image=""), "image '' is no file name"),
    (make_llava(HUMAN, GPT, image="a", images=["b"]), "both 'images' and 'image' are given"),
    (make_llava(HUMAN, GPT, image="http://x/a.png"), "URLs are never fetched while training. Download the image beforehand"),
    ([1], "the record is a list; it must be an object"),
    ("{'a': 1}", "train.jsonl:1: not JSON at column 2: Expecting property name"),
    ("[" * 100_000, "not readable as JSON"),
    ('{"a": ' + "9" * 5000 + "}", "not readable as JSON"),
]  # fmt: skip


@pytest.mark.parametrize(("record", "words"), LLAVA_FAULTS, ids=range(len(LLAVA_FAULTS)))
def test_each_fault_of_a_llava_record_is_reported(folder, record, words):
    path = folder / "train.jsonl"
    path.write_text(record if isinstance(record, str) else json.dumps(record))
    source = open_path(path, format=Format.llava)
    with pytest.raises(RecordError) as caught:
        source[0]
    assert caught.value.origin == "train.jsonl:1" and words in str(caught.value)
    assert "data.on_bad_record=quarantine" in str(caught.value) or "Download" in str(caught.value)


def make_content(*parts):
    return {"messages": [{"role": "user", "content": list(parts)}, ANSWER]}


MESSAGE_FAULTS = [
    ({**make_content({"type": "image"}, {"type": "image"}), "images": ["a"]},
     "2 image placeholders but 1 image; each image part without a path needs one"),
    ({**make_content({"type": "text", "text": "q"}), "images": ["a"]}, "0 image placeholders but 1 image"),
    (make_content({"type": "video"}), "messages[0].content[0] is of type 'video'; a part is an object of type 'text'"),
    (make_content("q"), "messages[0].content[0] is text; a part is an object"),
    (make_content({"type": "text", "text": None}), "messages[0].content[0].text is null; it must be text"),
    (make_content({"type": "image", "url": "https://x/a.png"}), "URLs are never fetched while training"),
    (make_content({"type": "image_url", "image_url": {"url": "http://x/a.png"}}), "URLs are never fetched while training"),
    (make_content({"type": "image_url", "image_url": "data:image/png,abc"}), "data URL 'data:image/png' is not base64"),
    (make_content({"type": "image_url", "image_url": "data:image/png;base64,a?"}), "is not base64"),
    (make_content({"type": "image_url"}), "messages[0].content[0] has no image_url.url"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role is 'tool'; it must be 'system', 'user' or"),
    ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content is a number; it must be text"),
    ({"messages": [USER, {"role": "assistant", "content": [{"type": "image"}]}], "images": ["a", "b"]},
     "messages[1].content[0] is an image in the assistant's message; images belong to the user's"),
    ({"messages": [USER, {"role": "assistant", "content": []}], "images": ["a"]}, "message 2, the assistant's, is"),
    ({"messages": []}, "messages is empty"),
    ({"images": ["a"]}, "missing 'messages'; found 'images', format=messages needs 'messages'"),
]  # fmt: skip


@pytest.mark.parametrize(("record", "words"), MESSAGE_FAULTS, ids=range(len(MESSAGE_FAULTS)))
def test_each_fault_of_messages_is_reported(folder, record, words):
    with pytest.raises(RecordError) as caught:
        read_record(folder, record, format=Format.messages)
    assert str(caught.value).startswith("train.jsonl:1: ") and words in str(caught.value)


def make_turns(*texts):
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]


PAIR_FAULTS = [
    ({"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen and rejected are equal"),
    ({"prompt": "q", "chosen": "가", "rejected": unicodedata.normalize("NFD", "가")}, "chosen and rejected are equal"),
    ({"chosen": make_turns("q", "a"), "rejected": make_turns("q", "a")}, "chosen and rejected are equal"),
    ({"prompt": "q", "chosen": "", "rejected": "a"}, "message 2, the assistant's, is empty"),
    ({"prompt": "q", "chosen": "a", "rejected": " "}, "message 2, the assistant's, is empty"),
    ({"prompt": "q", "chosen": "a"}, "missing 'rejected'; found 'prompt', 'chosen', format=preference needs"),
    ({"chosen": "a", "rejected": "b"}, "missing 'prompt'; found 'chosen', 'rejected'"),
    ({"chosen": make_turns("q", "a"), "rejected": make_turns("r", "b")}, "chosen and rejected begin with different messages"),
    ({"chosen": make_turns("q", "a", "r", "c"), "rejected": make_turns("q", "b", "r", "d")}, "chosen has 3 messages after"),
    ({"prompt": "q", "chosen": 1, "rejected": "b"}, "chosen is a number; it must be text or a list of messages"),
    ({"prompt": "q", "chosen": make_turns("a"), "rejected": "b"}, "message 2 is the user's"),
    ({"prompt": make_turns("q", "a"), "chosen": "b", "rejected": "c"}, "message 3 is the assistant's"),
    ({"prompt": "<image><image>", "image": "a", "chosen": "b", "rejected": "c"}, "2 image placeholders but 1 image"),
    ({"prompt": "q", "images": ["a", "b"], "chosen": "b", "rejected": "c"}, "0 image placeholders but 2 images"),
    ({"prompt": 3, "chosen": "b", "rejected": "c"}, "prompt is a number; it must be text"),
]  # fmt: skip


@pytest.mark.parametrize(("record", "words"), PAIR_FAULTS, ids=range(len(PAIR_FAULTS)))
def test_each_fault_of_a_preference_pair_is_reported(folder, record, words):
    with pytest.raises(RecordError) as caught:
        read_record(folder, record, format=Format.preference)
    assert str(caught.value).startswith("train.jsonl:1: ") and words in str(caught.value)


URLS = """
http://127.0.0.1:9/a.png https://x/a ftp://x/a sftp://x/a s3://x/a gs://x/a hf://x/a az://c/a hdfs://x/a git://x/a ssh://x/a
file:///etc/passwd file:/etc/passwd HTTP://x hTtPs://x/a http:x/a https:/x/a http://[::1]:9/a http://0x7f000001/a
http://2130706433/a http://169.254.169.254/latest/meta-data/ http://user:word@x/a http://x\\@y/a ws://x/a gopher://x/a
jar:http://x/a!/b zip://a::http://x/b simplecache::http://x/a http+unix://%2Fvar%2Frun/a blob:http://x/a
//x/a.png www.example.com/a.png \\\\x\\a.png data:image/png,http://x/a
""".split() + [" HTTP://x", "\thttps://x/a"]  # fmt: skip
_NAMED = re.compile(r"URLs are never fetched while training|leads out of|not found in|is not base64|no file name")


def test_records_with_urls_open_no_connection(folder):
    global _connections
    assert len(URLS) >= 30
    for url in URLS:
        records = [
            make_llava(HUMAN, GPT, image=url),
            {"messages": [USER, ANSWER], "images": [url]},
            {"messages": [USER, ANSWER], "images": [{"bytes": None, "path": url}]},
            {"prompt": "<image>", "chosen": "a", "rejected": "b", "image": url},
            make_content({"type": "image", "url": url}),
            make_content({"type": "image_url", "image_url": {"url": url}}),
            make_content({"type": "input_image", "image_url": url}),
            {"image": url, "caption": "x"},
        ]
        for record in records:
            _connections = []
            with pytest.raises(RecordError, match=_NAMED) as caught:
                read_record(folder, record).images[0].load()
            assert _connections == []
            if re.match(r"\s*(https?|ftp|s3|hf|file)://", url, re.IGNORECASE):
                assert caught.value.fault is Fault.url
    _connections = None


# Faults of whole sources


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[\n {"a": 1},\n {"가": x}]', "line 3, column 8"),
        ('[{"a": 1}', "Expecting ',' at line 1, column 10"),
        ('[{"a": 1},]', "line 1, column 11"),
        ('[{"a": 1}] x', "Extra data behind the list at line 1, column 12"),
        ('{"a": 1}', "Expecting '[' at line 1, column 1"),
        ("", "Expecting '[' at line 1, column 1"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_malformed_json_list_is_refused_with_line_and_column(folder, text, words):
    (folder / "train.json").write_text(text, "utf-8")
    with pytest.raises(UserError) as caught:
        open_path(folder / "train.json")
    assert not isinstance(caught.value, RecordError)
    assert "train.json: not a JSON list of records" in str(caught.value) and words in str(caught.value)


@pytest.mark.parametrize("name", ["bad.parquet", "bad.arrow"])
def test_a_malformed_table_is_refused(folder, name):
    (folder / name).write_bytes(b"PAR1 no table PAR1")
    with pytest.raises(UserError, match=f"{name}: cannot be read as"):
        open_path(folder / name)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.parquet"])
def test_a_source_without_records_is_refused(folder, name):
    if name == "a.parquet":
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.table({"messages": pa.array([], pa.string())}), folder / name)
    else:
        (folder / name).write_text("[ ]" if name == "a.json" else "\n \n")
    with pytest.raises(UserError, match=r"data\.sources\.mine\.path=.*: no records in it"):
        open_path(folder / name)


def assert_refused(words, **options):
    with pytest.raises(UserError) as caught:
        open_source("mine", SourceConfig(**options), max_image_pixels=10**6)
    assert words in str(caught.value)


def test_invalid_settings_of_a_source_are_reported(folder):
    path = write(folder / "train.jsonl", [make_llava(QUESTION, GPT)])
    assert_refused("data.sources.mine.path is not set")
    assert_refused("train.json: no such file or folder. Did you mean train.jsonl?", path=str(folder / "train.json"))
    assert_refused("There is no folder", path=str(folder / "x" / "train.json"))
    assert_refused("cannot tell the format; endings are .jsonl", path=str(folder / "flower.png"))
    assert_refused("the folder has no file ending in", path=str(folder / "사진"))
    assert_refused("data.sources.mine.image_root=/no/where: no such", path=str(path), image_root="/no/where")
    assert_refused("is a file; give the folder", path=str(path), image_root=str(folder / "flower.png"))
    assert_refused("data.sources.mine.kind=captoin is unknown", path=str(path), kind="captoin")
    assert_refused("Did you mean caption?", path=str(path), kind="captoin")
    assert_refused("data.sources.mine.num_samples=0: at least 1", path=str(path), num_samples=0)
    write(folder / "other.json", [])
    assert_refused("the folder has files of several endings (.json, .jsonl)", path=str(folder))


def test_the_error_of_an_unknown_format_lists_the_choices(folder):
    path = write(folder / "train.jsonl", ["{bad", {"text": "x", "label": 1}])
    assert_refused("train.jsonl:2: cannot tell the format from the keys 'text', 'label'", path=str(path))
    assert_refused("data.sources.mine.format=<one of auto, llava, sharegpt, messages", path=str(path))
    assert_refused("No record can be read, the first fault: train.jsonl:1", path=str(write(path, ["{bad", "[1]"])))


def test_the_error_of_a_saved_dataset_with_several_splits_lists_them(folder):
    import datasets

    part = datasets.Dataset.from_list([{"messages": make_turns("q", "a")}])
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(folder / "both")
    assert_refused(
        "holds several splits; give data.sources.mine.split=, one of: train, test", path=str(folder / "both")
    )
    assert_refused("and none is called dev; give", path=str(folder / "both"), split="dev")
    assert_refused(
        "split=test has no effect: test is one saved dataset", path=str(folder / "both" / "test"), split="test"
    )
    assert len(open_path(folder / "both" / "test")) == len(open_path(folder / "both", split="test")) == 1
