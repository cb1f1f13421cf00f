"""Tests of task=chat with a finished model."""

import io
from pathlib import Path

import pytest
from PIL import Image
from support import builtin

from lit_vlm.config.schema import ModelConfig, RunConfig
from lit_vlm.data.processor import Processor
from lit_vlm.model.build import build_model
from lit_vlm.model.export import export_model
from lit_vlm.tasks import chat
from lit_vlm.tasks.chat import Conversation, remove_control_characters, run_chat
from lit_vlm.types import ControlToken, UserError

POINTS = "<obj>별</obj><bbox>0.1, 0.1, 0.6, 0.7</bbox>"


class ChatRun:
    """Run with the attributes that task=chat reads."""

    def __init__(self, init_from, **settings):
        self.init_from = init_from
        self.config = RunConfig(model=ModelConfig(), max_new_tokens=8, **settings)
        self.config.trainer.accelerator = "cpu"


@pytest.fixture
def folder(blueprint, tmp_path):
    export_model(build_model(blueprint), blueprint.tokenizer, blueprint.images, tmp_path / "hf")
    return str(tmp_path / "hf")


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "pictures" / "그림.png"
    path.parent.mkdir()
    builtin("grounding", n=1)[0][0].images[0].load().save(path)
    return str(path)


@pytest.fixture
def conversation(blueprint):
    return Conversation(build_model(blueprint).eval(), Processor(blueprint.tokenizer, blueprint.images), 4, 10**7)


@pytest.fixture
def scripted_answers(monkeypatch):
    """Return a function that makes the model answer with given texts and returns the list of its prompts."""

    def set_answers(*texts):
        prompts, texts = [], list(texts)

        def ask(model, processor, samples, most):
            prompts.append(samples[0])
            return [texts.pop(0)]

        monkeypatch.setattr(chat, "generate_answers", ask)
        return prompts

    return set_answers


def set_stdin(monkeypatch, tmp_path, *lines):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_piped_questions_are_answered_one_by_one(folder, picture, monkeypatch, tmp_path, capsys):
    set_stdin(monkeypatch, tmp_path, "무엇이 보이나요?", "", "And now?")
    run_chat(ChatRun(folder, image=[picture]))
    assert "> " not in capsys.readouterr().out


def test_a_prompt_prints_one_answer_to_stdout_and_writes_its_boxes_to_a_file(
    folder, picture, scripted_answers, monkeypatch, tmp_path, capsys
):
    monkeypatch.chdir(tmp_path)
    prompts = scripted_answers(POINTS)
    run_chat(ChatRun(folder, image=[picture], prompt="<gro> 무엇이 어디에 있나요?"))
    output = capsys.readouterr()
    assert output.out == POINTS + "\n"
    assert "chat_1.png" in output.err
    annotated, plain = Image.open("chat_1.png"), Image.open(picture)
    assert min(annotated.size) >= 224 > max(plain.size)
    assert (229, 72, 77) in [colour for _, colour in annotated.convert("RGB").getcolors(100_000)]
    question = prompts[0].messages[0].content
    assert question[1] == ControlToken("<gro>") and question[2] == "\n무엇이 어디에 있나요?"


def test_the_conversation_keeps_answers_and_images_until_reset(conversation, picture, scripted_answers):
    prompts = scripted_answers("하나", POINTS, "셋")
    conversation.add_image(picture)
    conversation.generate_answer("첫째")
    conversation.add_image(picture)
    conversation.generate_answer("둘째")
    assert [message.role.value for message in prompts[1].messages] == ["user", "assistant", "user", "assistant"]
    assert len(prompts[1].images) == 2
    assert ControlToken("<bbox>") in conversation.messages[-1].content
    conversation.reset()
    conversation.generate_answer("셋째")
    assert len(prompts[2].messages) == 2 and not prompts[2].images


def test_several_turns_with_several_images_reach_the_model(conversation, picture):
    conversation.add_image(picture)
    for question in ("무엇이 보이나요?", "<ocr>", "정말?"):
        assert isinstance(conversation.generate_answer(question), str)
    conversation.add_image(picture)
    conversation.generate_answer("그리고?")
    assert len(conversation.messages) == 8


def test_commands_work_and_errors_do_not_end_the_conversation(
    folder, picture, scripted_answers, monkeypatch, tmp_path, capsys
):
    prompts = scripted_answers("first", POINTS)
    set_stdin(
        monkeypatch,
        tmp_path,
        "/help",
        "/image nowhere.png",
        "hello",
        f"/image {picture}",
        "where?",
        "/nonsense",
        "/quit",
        "never",
    )
    run_chat(ChatRun(folder))
    output = capsys.readouterr().out
    assert output.count("/reset") == 2  # /help and the unknown command
    assert "nowhere.png" in output and "not found" in output
    assert [len(sample.images) for sample in prompts] == [0, 1]
    assert "boxes: chat_1.png" in output and Path("chat_1.png").is_file()


def test_a_model_without_the_control_tokens_gets_them_as_text(conversation, scripted_answers):
    prompts = scripted_answers("x")
    conversation.processor.template.control_ids = {}
    conversation.generate_answer("<gro> where?")
    assert prompts[0].messages[0].content == ("<gro>\nwhere?",)


def test_chat_without_a_model_or_with_a_missing_image_is_refused_with_a_remedy(folder, tmp_path):
    with pytest.raises(UserError, match="task=chat needs a model: init_from="):
        run_chat(ChatRun(None))
    with pytest.raises(UserError, match="no such folder"):
        run_chat(ChatRun(str(tmp_path / "none")))
    with pytest.raises(UserError, match=r"image=.*nope\.png: .*not found.*Give the path"):
        run_chat(ChatRun(folder, image=[str(tmp_path / "nope.png")], prompt="hi"))


def test_terminal_control_characters_are_removed():
    assert remove_control_characters("red\x1b[31m 빨강\n\tend\x07") == "red[31m 빨강\n\tend"
