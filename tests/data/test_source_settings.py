"""Effects of the settings of a source, and formats other than LLaVA's and Hugging Face's own."""

import base64
import json
import pickle
import unicodedata

import numpy as np
import pytest
from source_cases import ANSWER, GPT, HUMAN, encode_png, get_contents, make_llava, open_path, read_record, write

from lit_vlm.config.choices import Format
from lit_vlm.config.schema import SourceConfig
from lit_vlm.data.sources import open_source
from lit_vlm.data.subsets import SourceSubset, choose_positions
from lit_vlm.types import Fault, ImagePlaceholder, RecordError, Role, SampleKind, UserError

QUESTION = {"from": "human", "value": "q"}


def assert_refused(words, **options):
    with pytest.raises(UserError) as caught:
        open_source("mine", SourceConfig(**options), max_image_pixels=10**6)
    assert not isinstance(caught.value, RecordError) and words in str(caught.value), caught.value


# ShareGPT


@pytest.mark.parametrize("format", [Format.auto, Format.sharegpt])
def test_sharegpt_has_a_system_column_and_a_column_of_images(folder, format):
    turns = [{"from": "user", "value": "<image>무엇?"}, {"from": "assistant", "value": "꽃"}, QUESTION, GPT]
    record = {"conversations": turns, "system": "짧게 답하라.", "tools": "", "images": ["flower.png"]}
    sample = read_record(folder, record, format=format)
    assert get_contents(sample) == [
        ("짧게 답하라.",),
        (ImagePlaceholder(0), "무엇?"),
        ("꽃",),
        ("q",),
        ("꽃이 보입니다.",),
    ]
    assert sample.messages[0].role is Role.system


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (
            make_llava(QUESTION, {"from": "function_call", "value": "{}"}),
            "'function_call': calls of tools are not read",
        ),
        (
            make_llava(QUESTION, GPT, {"from": "observation", "value": "x"}, GPT),
            "'observation': calls of tools are not read",
        ),
        (make_llava(QUESTION, GPT, tools='[{"name": "f"}]'), "it has 'tools': calls of tools are not read"),
        (make_llava(QUESTION, GPT, videos=["a.mp4"]), "it has 'videos': video is not read"),
        (make_llava(QUESTION, GPT, audios=["a.wav"]), "it has 'audios': sound is not read"),
        (
            make_llava({"from": "system", "value": "s"}, QUESTION, GPT, system="t"),
            "both a 'system' column and a system turn",
        ),
        (make_llava(QUESTION, GPT, system=3), "system is a number; it must be text"),
    ],
)
def test_unsupported_content_of_sharegpt_is_refused_by_name(folder, record, words):
    with pytest.raises(RecordError) as caught:
        read_record(folder, record, format=Format.sharegpt)
    assert words in str(caught.value) and caught.value.fault is Fault.malformed


# OpenAI


def test_openai_content_lists_are_read_in_both_spellings(folder, photos):
    url = f"data:image/png;base64,{base64.b64encode(encode_png(photos[1])).decode()}"
    parts = [
        {"type": "text", "text": "a"},
        {"type": "image_url", "image_url": {"url": url, "detail": "high"}},
        {"type": "image_url", "image_url": {"url": "flower.png"}},
        {"type": "input_text", "text": "b"},
        {"type": "input_image", "image_url": url, "detail": "auto"},
    ]
    answer = {"role": "assistant", "content": [{"type": "output_text", "text": "c"}]}
    sample = read_record(folder, {"messages": [{"role": "user", "content": parts}, answer]})
    assert get_contents(sample) == [("a", ImagePlaceholder(0), ImagePlaceholder(1), "b", ImagePlaceholder(2)), ("c",)]
    assert [image.size for image in sample.images] == [(40, 60)] * 3
    assert np.array_equal(np.asarray(sample.images[2].load()), np.asarray(photos[1]))


@pytest.mark.parametrize("kind", ["image_url", "input_image"])
def test_openai_images_are_not_fetched(folder, kind):
    value = {"url": "https://x/a.png"} if kind == "image_url" else "https://x/a.png"
    turn = {"role": "user", "content": [{"type": kind, "image_url": value}]}
    with pytest.raises(RecordError, match="URLs are never fetched") as caught:
        read_record(folder, {"messages": [turn, ANSWER]})
    assert caught.value.fault is Fault.url


# Captions and prompts


@pytest.mark.parametrize("key", ["caption", "text"])
def test_a_caption_column_makes_the_image_the_question(folder, key):
    sample = read_record(folder, {"image": "flower.png", key: "붉은 꽃"})
    assert get_contents(sample) == [(ImagePlaceholder(0),), ("붉은 꽃",)] and sample.kind is SampleKind.image_only


def test_prompts_are_added_to_each_record_with_an_image_and_no_question(folder):
    silent = {"from": "human", "value": "<image>\n"}
    parts = {"role": "user", "content": [{"type": "image"}]}
    records = {
        "llava": make_llava(silent, GPT, image="flower.png"),
        "messages": {"messages": [parts, ANSWER], "images": ["flower.png"]},
        "caption": {"image": "flower.png", "caption": "꽃"},
        "preference": {"prompt": "<image>", "chosen": "꽃", "rejected": "개", "image": "flower.png"},
    }
    for record in records.values():
        sample = read_record(folder, record, prompts=["설명해줘"])
        messages = sample.prompt if hasattr(sample, "prompt") else sample.messages
        assert messages[0].content == (ImagePlaceholder(0), "설명해줘")
        assert sample.kind in (SampleKind.caption, SampleKind.preference)
        assert read_record(folder, record, prompts=["설명해줘"], kind="document").kind is SampleKind.document
    asked = read_record(folder, make_llava(HUMAN, GPT, image="flower.png"), prompts=["설명해줘"])
    assert (
        asked.messages[0].content == (ImagePlaceholder(0), "무엇이 보이나요?") and asked.kind is SampleKind.instruction
    )
    assert read_record(folder, make_llava(QUESTION, GPT), prompts=["설명해줘"]).messages[0].content == ("q",)


def test_a_record_keeps_its_prompt_when_the_rest_of_the_file_changes(folder):
    prompts = [f"질문 {number}" for number in range(5)]
    rows = [{"image": "flower.png", "caption": f"꽃 {number}"} for number in range(50)]
    before = {sample.messages[1].text: sample.messages[0].text for sample in read_all(folder, rows, prompts)}
    after = {sample.messages[1].text: sample.messages[0].text for sample in read_all(folder, rows[20:], prompts)}
    assert len(set(before.values())) == 5
    assert all(before[answer] == question for answer, question in after.items())
    named = read_all(folder, [{**row, "id": number} for number, row in enumerate(rows)], prompts)
    assert len({sample.messages[0].text for sample in named}) == 5


def read_all(folder, rows, prompts):
    source = open_path(write(folder / "train.jsonl", rows), prompts=prompts)
    return [source[index] for index in range(len(source))]


def test_invalid_prompts_are_refused(folder):
    path = str(write(folder / "train.jsonl", [make_llava(QUESTION, GPT)]))
    assert_refused("data.sources.mine.prompts: '<image> What?' holds '<image>'", path=path, prompts=["<image> What?"])
    assert_refused("data.sources.mine.prompts: ' ' is empty", path=path, prompts=[" "])
    assert_refused("prompts: not for format=digits", format=Format.digits, prompts=["q"])


# Selection of records, and number of tiles


def test_a_fraction_is_uniform_stable_and_counted(folder):
    path = write(folder / "train.jsonl", [make_llava(QUESTION, GPT, id=f"r{i}") for i in range(2000)])
    source = open_path(path, fraction=0.25)
    ids = [source[index].id for index in range(len(source))]
    assert 430 < len(source) < 570 and ids == sorted(ids, key=lambda name: int(name[1:]))
    assert [open_path(path, fraction=0.25, num_samples=10)[index].id for index in range(10)] == ids[:10]
    assert len(open_path(path, fraction=0.25, num_samples=10)) == 10 and len(open_path(path, fraction=1.0)) == 2000
    assert source.origin(7) == source[7].origin
    again = pickle.loads(pickle.dumps(source))
    assert [again[index].id for index in range(len(again))] == ids and len(pickle.dumps(source)) < 70_000
    with path.open("a") as stream:
        stream.write(json.dumps(make_llava(QUESTION, GPT, id="new")) + "\n")
    grown = open_path(path, fraction=0.25)
    assert [grown[index].id for index in range(len(ids))] == ids
    assert grown.digest_of(0, 100) == source.digest_of(0, 100) != source.digest_of(1, 101)
    with pytest.raises(IndexError):
        source[len(source)]


def test_sources_of_different_names_select_different_records():
    ours, theirs = choose_positions("a", 10_000, 0.5), choose_positions("b", 10_000, 0.5)
    assert 2300 < len(np.intersect1d(ours, theirs)) < 2700
    assert set(choose_positions("a", 10_000, 0.1)) <= set(ours) and len(
        choose_positions("a", 3_000_000, 0.5)
    ) == pytest.approx(1.5e6, rel=0.01)


def test_an_invalid_fraction_is_refused(folder):
    path = str(write(folder / "train.jsonl", [make_llava(QUESTION, GPT)]))
    assert_refused("data.sources.mine.fraction=1.5: above 0 and at most 1", path=path, fraction=1.5)
    assert_refused("fraction=1e-09 chooses none of its 1 record. Raise it.", path=path, fraction=1e-9)


def test_max_tiles_of_a_source_is_set_on_its_records(folder):
    row, pair = make_llava(HUMAN, GPT, image="flower.png"), {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert read_record(folder, row).max_tiles is None and read_record(folder, row, max_tiles=4).max_tiles == 4
    assert read_record(folder, pair, max_tiles=0).max_tiles == 0
    made = SourceConfig(path="caption", format=Format.builtin, num_samples=40, max_tiles=1, fraction=0.5)
    source = open_source("mine", made, max_image_pixels=10**6)
    assert isinstance(source, SourceSubset) and 8 < len(source) < 32 and source[3].max_tiles == 1
    assert source.digest_of(0, 2) != source.digest_of(0, 3) and source.origin(0).startswith("mine[")


def test_the_error_of_a_missing_named_set_says_how_to_obtain_it(folder):
    missing = dict(path=str(folder / "x.json"), obtain="hf download a/b, then unpack", homepage="https://x.org/b")
    assert_refused(
        "x.json: no such file or folder. How to get it: hf download a/b, then unpack, https://x.org/b.", **missing
    )
    path = str(write(folder / "train.jsonl", [make_llava(QUESTION, GPT)]))
    assert_refused("images: no such", path=path, image_root=str(folder / "images"), obtain="unpack images.zip")
    assert_refused(
        "How to get it: unpack images.zip.", path=path, image_root=str(folder / "images"), obtain="unpack images.zip"
    )


# The hub


def test_a_local_folder_of_the_hubs_layout_is_read_like_the_hub(folder, photos):
    import datasets

    (folder / "set" / "data").mkdir(parents=True)
    turns = [{"role": "user", "content": "무엇?"}, ANSWER]
    rows = [{"messages": turns, "images": [{"bytes": encode_png(photos[1]), "path": None}]}] * 3
    table = datasets.Dataset.from_list(rows)
    table = table.cast(datasets.Features({**table.features, "images": datasets.List(datasets.Image())}))
    table.to_parquet(folder / "set" / "data" / "train-00000-of-00001.parquet")
    table.select(range(2)).to_parquet(folder / "set" / "data" / "test-00000-of-00001.parquet")
    source = open_source("mine", SourceConfig(hub=str(folder / "set")), max_image_pixels=10**6)
    test = open_source("mine", SourceConfig(hub=str(folder / "set"), split="test"), max_image_pixels=10**6)
    assert (len(source), len(test)) == (3, 2) and source[2].origin == "set:train[2]"
    assert get_contents(source[0]) == [(ImagePlaceholder(0), "무엇?"), ("A flower.",)] and source[0].images[0].size == (
        40,
        60,
    )
    assert source.digest_of(0, 2) != source.digest_of(1, 3) and source.digest != test.digest
    assert_refused("cannot be loaded", hub=str(folder / "set"), split="dev")


def test_the_error_of_an_unreachable_hub_dataset_names_the_remedy(folder, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    assert_refused("data.sources.mine.hub=nobody/nothing: cannot be loaded: ", hub="nobody/nothing")
    assert_refused("`hf download nobody/nothing --repo-type dataset --local-dir <folder>`", hub="nobody/nothing")
    assert_refused("both path and hub are given", hub="nobody/nothing", path=str(folder))


# Properties of records


def test_records_that_nfc_changes_are_marked(folder):
    nfd = unicodedata.normalize("NFD", "한국어")
    turn = {"from": "gpt", "value": nfd}
    assert (
        read_record(folder, make_llava(QUESTION, turn)).nfc_changed
        and not read_record(folder, make_llava(QUESTION, GPT)).nfc_changed
    )
    assert read_record(folder, {"prompt": "q", "chosen": nfd, "rejected": "b"}).nfc_changed
    assert not read_record(folder, {"prompt": "q", "chosen": "한국어", "rejected": "b"}).nfc_changed
    asked = read_record(folder, {"image": "flower.png", "caption": "x"}, prompts=[nfd])
    assert not asked.nfc_changed and asked.messages[0].content[1] == "한국어"


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        ("{bad", Fault.malformed),
        (make_llava(QUESTION, {"from": "gpt", "value": " "}), Fault.no_answer),
        (make_llava(QUESTION, GPT, QUESTION), Fault.no_answer),
        (make_llava(HUMAN, GPT), Fault.placeholders),
        (make_llava(HUMAN, GPT, image="http://x/a.png"), Fault.url),
        ({"messages": []}, Fault.malformed),
        ({"caption": "x", "images": []}, Fault.placeholders),
    ],
)
def test_each_fault_has_its_class(folder, record, fault):
    write(folder / "train.jsonl", [record, make_llava(QUESTION, GPT)])
    with pytest.raises(RecordError) as caught:
        open_path(folder / "train.jsonl")[0]
    assert caught.value.fault is fault


def test_enlarge_to_px_enlarges_small_images_and_changes_the_digest_but_not_the_content(folder):
    row = make_llava(HUMAN, GPT, image="flower.png")
    path = write(folder / "train.jsonl", [row])
    plain, large, none = (
        open_source("mine", SourceConfig(path=str(path), enlarge_to_px=side), max_image_pixels=10**9)
        for side in (None, 1000, 1)
    )
    before, after, same = (source[0].images[0] for source in (plain, large, none))
    (height, width), scale = before.size, 1000 / max(before.size)
    assert after.size == (int(height * scale), int(width * scale)) and max(after.size) == 1000
    assert after.load().size == after.size[::-1] and same.load().tobytes() == before.load().tobytes()
    assert after.content() == before.content() and not hasattr(after, "load_at_least")
    assert len({plain.digest, large.digest, none.digest}) == 3
    assert pickle.loads(pickle.dumps(large))[0].images[0].size == after.size
