"""task=generate: turns that a model wrote, as a source with the pictures of the records; replies that are not used; resumption."""

import json
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "evaluation"))

from chat_server import ChatServer, complete

from lit_vlm.config.overrides import ConfigError
from lit_vlm.config.parse import parse
from lit_vlm.config.schema import SourceConfig
from lit_vlm.curation.generation_prompts import PROMPTS
from lit_vlm.data.sources import open_source
from lit_vlm.evaluation import endpoint as endpoint_module
from lit_vlm.tasks.generate import generate
from lit_vlm.types import ControlToken, Language, UserError

PIXELS = 10**8
# A prompt whose text changes needs a higher version here and in the code.
HASHES = {
    "conversation 1 ko": "d8a37de4f9407f9d",
    "conversation 1 en": "3db8db38bdf2a537",
    "description 1 ko": "9e898cd07d174fd3",
    "description 1 en": "0dc416f7b291ad66",
    "reasoning 1 ko": "6031fa40c91deea4",
    "reasoning 1 en": "2be8ac7b887dd754",
    "sentence 1 ko": "69ea2ba5f19fcf19",
    "sentence 1 en": "b7c2189c120a2cfb",
    "caption 1 ko": "cca96986f164d18c",
    "caption 1 en": "33fc461a94f20af0",
    "translation 1 ko": "1f2bab4b24aa0a70",
    "translation 1 en": "58676c439bac51a6",
}


@pytest.fixture(autouse=True)
def short_waits(monkeypatch, tmp_path):
    monkeypatch.setattr(endpoint_module, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.chdir(tmp_path)


def get_prompt(body):
    content = body["messages"][0]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def read_material(prompt, title):
    match = re.search(rf"\[{title}\]\n<<<(\w+)\n(.*)\n\1>>>", prompt, re.DOTALL)
    return match[2] if match else None


def answer_like_a_model(number, body):
    """Write what the prompt asks for from its material, as a model that follows the instructions."""
    prompt = get_prompt(body)
    conversation = read_material(prompt, "conversation")
    if conversation is not None:
        texts = [
            turn["text"] for turn in json.loads(conversation) if '"all texts' in prompt or turn["role"] == "assistant"
        ]
        is_translation = '"all texts' in prompt or "모든 글" in prompt
        done = [
            f"This says: {re.sub('[가-힣]+', 'word', text)}" if is_translation else f"답은 {text} 입니다."
            for text in texts
        ]
        return complete(json.dumps({"texts": done}, ensure_ascii=False))
    objects = [line.rpartition(": ")[::2] for line in (read_material(prompt, "objects and boxes") or "").splitlines()]
    mention = "".join(f"<obj>{phrase.partition(':')[0]}</obj><bbox>{box}</bbox>" for phrase, box in objects[:1])
    if '"turns"' in prompt:
        turns = [
            {"question": "무엇이 있나요?", "answer": f"사진에 {mention} 있습니다."},
            {"question": "배경은요?", "answer": "단색입니다."},
        ]
        return complete("```json\n" + json.dumps({"turns": turns}, ensure_ascii=False) + "\n```")
    return complete(json.dumps({"question": "왜 그럴까요?", "answer": f"{mention} 때문입니다."}, ensure_ascii=False))


def run_generate(server, *overrides, path="grounding", num_samples=3, language="ko"):
    url = server if isinstance(server, str) else server.url
    settings = {"format": "builtin", "path": path, "num_samples": num_samples, "language": language}
    source = [f"data.sources.mine.{name}={value}" for name, value in settings.items()]
    arguments = ["task=generate", "data=auto", *source, f"generate.endpoint={url}"]
    run = parse([*arguments, "generate.model=m", *overrides])
    generate(run)
    return run.dir


def open_generated(folder, path="grounding", num_samples=3, language="ko", **settings):
    config = SourceConfig(format="builtin", path=path, language=Language(language), num_samples=num_samples)
    config.generated = str(folder / "mine.generated.jsonl")
    return open_source("mine", config, max_image_pixels=PIXELS, **settings)


def read_summary(folder):
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def read_rejected(folder):
    return [json.loads(line) for line in (folder / "rejected.jsonl").read_text(encoding="utf-8").splitlines()]


def test_conversations_descriptions_and_reasoning_become_an_ordinary_source_with_the_records_own_pictures():
    with ChatServer(answer_like_a_model) as server:
        folder = run_generate(server)
    source = open_generated(folder)
    original = open_source(
        "mine",
        SourceConfig(format="builtin", path="grounding", language=Language.ko, num_samples=3),
        max_image_pixels=PIXELS,
    )
    assert len(source) == 9 and len({source[n].id for n in range(9)}) == 9
    for number in range(9):
        sample, record = source[number], original[number // 3]
        assert sample.images[0].load().tobytes() == record.images[0].load().tobytes()
        boxes = re.findall("<bbox>(.*?)</bbox>", "".join(message.text for message in record.messages))
        found = re.findall("<bbox>(.*?)</bbox>", "".join(message.text for message in sample.messages))
        assert found == boxes[:1]
        assert (
            ControlToken("<gro>") in sample.messages[0].content and ControlToken("<bbox>") in sample.messages[1].content
        )
    conversation = source[0]
    assert [message.text for message in conversation.messages[2:]] == ["배경은요?", "단색입니다."]
    counts = read_summary(folder)["counts"]
    assert {kind: row["accepted"] for kind, row in counts.items()} == {
        "conversation": 3,
        "description": 3,
        "reasoning": 3,
    }
    page = (folder / "page.html").read_text(encoding="utf-8")
    assert "data:image/" in page and "무엇이 있나요?" in page


def test_boxes_and_control_tokens_survive_a_translation_and_text_in_the_picture_is_not_translated():
    for path in ("grounding", "ocr", "referring"):
        with ChatServer(answer_like_a_model) as server:
            folder = run_generate(server, "generate.kinds=[translation]", "overwrite=true", path=path)
            sent = get_prompt(server.bodies[0])
        source = open_generated(folder, path)
        original = open_source(
            "mine",
            SourceConfig(format="builtin", path=path, language=Language.ko, num_samples=3),
            max_image_pixels=PIXELS,
        )
        for number in range(3):
            old, new = original[number], source[number]
            assert (new.language, new.kind) == ("en", old.kind)
            for before, after in zip(old.messages, new.messages, strict=True):
                assert [p for p in before.content if not isinstance(p, str)] == [
                    p for p in after.content if not isinstance(p, str)
                ]
                assert re.findall("<bbox>.*?</bbox>|<char>.*?</char>", before.text) == re.findall(
                    "<bbox>.*?</bbox>|<char>.*?</char>", after.text
                )
        assert "<bbox>" not in sent and "<char>" not in sent


def test_short_answers_become_sentences_and_a_lost_number_is_not_used():
    def lose_a_number(number, body):
        reply = answer_like_a_model(number, body)
        message = reply["choices"][0]["message"]
        if number == 0:
            message["content"] = re.sub(r"\d", "", message["content"])
        return reply

    with ChatServer(lose_a_number) as server:
        folder = run_generate(server, "generate.kinds=[sentence]", "generate.concurrency=1", path="number")
    source = open_generated(folder, "number")
    assert len(source) == 2 and all(re.search(r"^답은 \d+ 입니다.$", source[n].messages[-1].text) for n in range(2))
    assert source[0].kind == "instruction"
    assert [row["status"] for row in read_rejected(folder)] == ["numbers"]


@pytest.mark.parametrize(
    ("reply", "status"),
    [
        (complete("I'm sorry, I can't help with that."), "refused"),
        (complete("", refusal="no"), "refused"),
        (complete("Here you are: three nice questions."), "unreadable"),
        (complete('{"turns": []}'), "unreadable"),
        (complete('{"turns": [{"question": "뭐죠?"}]}'), "unreadable"),
        (complete('{"turns": [{"question": "무엇', finish_reason="length"), "cut"),
        (complete('{"turns": [{"question": "What is it?", "answer": "A circle."}]}'), "language"),
        (complete('{"turns": [{"question": "这是什么?", "answer": "这是一个圆。"}]}'), "language"),
        (
            complete(
                '{"turns": [{"question": "뭐죠?", "answer": "<obj>원</obj><bbox>0.01, 0.02, 0.03, 0.04</bbox>"}]}'
            ),
            "boxes",
        ),
        (complete('{"turns": [{"question": "뭐죠?", "answer": "<bbox>원입니다."}]}'), "boxes"),
        (complete('{"turns": [{"question": "<gro>뭐죠?", "answer": "원입니다."}]}'), "boxes"),
    ],
)
def test_a_reply_that_cannot_be_used_is_named_counted_and_never_trained_on(reply, status, tmp_path):
    with ChatServer(lambda number, body: reply if number == 0 else answer_like_a_model(number, body)) as server:
        folder = run_generate(server, "generate.kinds=[conversation]", "generate.concurrency=1")
        assert len(open_generated(folder)) == 2
        assert [(row["position"], row["status"]) for row in read_rejected(folder)] == [(0, status)]
        assert read_summary(folder)["counts"]["conversation"][status] == 1
    with (
        ChatServer(lambda number, body: reply) as server,
        pytest.raises(UserError, match=f"no text was accepted.*{status}"),
    ):
        run_generate(server, "generate.kinds=[conversation]", f"generate.output={tmp_path / 'none'}")
    assert not list((tmp_path / "none").glob("*.generated.jsonl"))


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        (["[[0]]a[[0]]b[[1]]"], "a mark twice"),
        (["a circle"], "no mark"),
        (["[[1]]a circle[[0]]"], "closed before it is opened"),
        (["[[0]]a[[1]]", "one more"], "another number of texts"),
    ],
)
def test_a_translation_that_loses_or_moves_a_mark_is_not_used(texts, reason):
    def translate(number, body):
        turns = json.loads(read_material(get_prompt(body), "conversation"))
        return complete(json.dumps({"texts": ["Where is it?"] * (len(turns) - 1) + texts}))

    with ChatServer(translate) as server, pytest.raises(UserError, match="no text was accepted"):
        run_generate(server, "generate.kinds=[translation]", num_samples=1)


def test_replies_that_are_there_are_not_asked_for_again_and_failed_requests_are():
    with ChatServer(
        lambda number, body: (500, {"error": "busy"}, {}) if number == 0 else answer_like_a_model(number, body)
    ) as server:
        words = ("generate.kinds=[conversation]", "generate.concurrency=1", "generate.max_retries=0")
        with pytest.raises(UserError, match="1 request failed"):
            run_generate(server, *words)
        assert len(server.bodies) == 3
        folder = run_generate(server, *words)
        assert len(server.bodies) == 4  # only the one that failed
        assert len(open_generated(folder)) == 3
        first = (folder / "mine.generated.jsonl").read_bytes()
        run_generate(server, *words)
        assert len(server.bodies) == 4 and (folder / "mine.generated.jsonl").read_bytes() == first
        with pytest.raises(UserError, match="another request: it differs in kinds"):
            run_generate(server, "generate.kinds=[description]")


def test_a_dry_run_sends_and_writes_nothing_and_says_what_it_would_cost(capsys):
    with ChatServer(answer_like_a_model) as server:
        prices = ("generate.price_input=2", "generate.price_output=8", "generate.max_new_tokens=100")
        folder = run_generate(server, "generate.dry_run=true", *prices)
        assert not server.bodies
    printed = capsys.readouterr().out
    assert not (folder / "summary.json").exists()
    assert re.search(r"requests to send\s*\W\s*9 ", printed) and re.search(r"at most\s*\W\s*900 ", printed)


def test_turns_of_other_records_are_refused_with_the_reason():
    with ChatServer(answer_like_a_model) as server:
        folder = run_generate(server)
    with pytest.raises(UserError, match="made of 3 records, and the source has 4"):
        open_generated(folder, num_samples=4)
    with pytest.raises(UserError, match="have changed"):
        open_generated(folder, seed=1)
    text = (folder / "mine.generated.jsonl").read_text(encoding="utf-8")
    (folder / "mine.generated.jsonl").write_text(text[:-5], encoding="utf-8")
    with pytest.raises(UserError, match="cut off"):
        open_generated(folder)
    (folder / "mine.generated.jsonl").write_text("[]\n", encoding="utf-8")
    with pytest.raises(UserError, match="no file of task=generate"):
        open_generated(folder)


def test_a_new_caption_is_written_from_the_picture_itself():
    def describe(number, body):
        (image, text) = body["messages"][0]["content"]
        assert image["image_url"]["url"].startswith("data:image/")
        return complete('{"answer": "빨간 원이 하나 있습니다."}')

    with ChatServer(describe) as server:
        folder = run_generate(server, "generate.kinds=[caption]", path="caption")
    sample = open_generated(folder, "caption")[0]
    assert sample.kind == "caption" and sample.messages[-1].text == "빨간 원이 하나 있습니다."


def test_a_record_that_a_kind_cannot_use_is_listed_and_costs_no_request():
    with ChatServer(answer_like_a_model) as server:
        with pytest.raises(UserError, match="no text was accepted: 3 unsuitable"):
            run_generate(server, "generate.kinds=[conversation]", path="multi_image")
        assert not server.bodies


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["generate.kinds=[]"], "generate.kinds: is empty"),
        (["generate.kinds=[caption,caption]"], "names a kind twice"),
        (["generate.max_cost=1"], "generate.max_cost: needs the prices"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_read(overrides, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        run_generate("http://127.0.0.1:9/v1", *overrides)


def test_a_prompt_whose_text_changes_has_another_version():
    found = {
        f"{kind.value} {one.version} {language.value}": one.sha256[:16] for (kind, language), one in PROMPTS.items()
    }
    assert found == HASHES
