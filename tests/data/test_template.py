"""Supervision masks come from the model's own chat template, and text never becomes a control token."""

import random

import pytest
from support import blueprint_of, sample

from lit_vlm.data.chat_template import ChatTemplate
from lit_vlm.data.processor import Processor, check_vocabulary
from lit_vlm.types import SPECIAL_TOKENS, ControlToken, ImagePlaceholder, Message, Role, UserError

# structure of the template of llava-hf's OneVision checkpoints: parts only, another header than in its prompt
LLAVA_HF = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ '\n' + content['text'] }}{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ '\n' + content['text'] }}{% endgeneration %}{% endfor %}{% endif %}{{'<|im_end|>'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
REWRITES = (  # like Qwen3: only the last answer keeps its thinking block
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN25 = (  # a default system message, contents as strings, whitespace stripped
    "{%- if messages[0]['role'] != 'system' -%}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{%- endif -%}"
    "{%- for message in messages -%}{{ '<|im_start|>' + message.role + '\n' + (message.content | trim) + '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


def make_turns(*texts: str) -> tuple[Message, ...]:
    return tuple(Message(Role.user if i % 2 == 0 else Role.assistant, (text,)) for i, text in enumerate(texts))


def get_supervised_text(template: ChatTemplate, messages: tuple[Message, ...], images: list[int] | None = None) -> str:
    encoded = template.encode(messages, images or [])
    return template.tokenizer.decode(encoded.input_ids[encoded.supervised].tolist())


@pytest.fixture
def template_factory(processor):
    def make(template: str) -> ChatTemplate:
        from lit_vlm.model.vocabulary import wrap_chat_template

        processor.tokenizer.chat_template = wrap_chat_template(template)
        return ChatTemplate(processor.tokenizer)

    return make


def test_exactly_the_answers_and_their_ends_are_supervised(processor):
    text = get_supervised_text(processor.template, make_turns("안녕?", "네, 안녕하세요.", "What color?", "red"))
    assert text == "네, 안녕하세요.<|im_end|>red<|im_end|>"


@pytest.mark.parametrize("chat_template", [QWEN25, LLAVA_HF])
def test_templates_without_generation_markers_and_with_other_headers_work(template_factory, chat_template):
    template = template_factory(chat_template)
    text = get_supervised_text(template, make_turns("무엇인가요?", "빨간 원", "Really?", "yes"))
    assert text.replace("\n", "") == "빨간 원<|im_end|>yes<|im_end|>"


@pytest.mark.parametrize("chat_template", [None, QWEN25, LLAVA_HF])
def test_token_ids_equal_those_of_apply_chat_template(template_factory, processor, chat_template):
    template = template_factory(chat_template) if chat_template else processor.template
    messages = make_turns(" What is this?  It's 12 o'clock. ", "빨간 원입니다. 그리고 a star!", "또?", "no")
    plain = [{"role": m.role.value, "content": [{"type": "text", "text": m.content[0]}]} for m in messages]
    whole = template.tokenizer.apply_chat_template(plain, tokenize=True)
    whole = whole["input_ids"] if hasattr(whole, "keys") else whole
    assert template.encode(messages, []).input_ids.tolist() == list(whole)


@pytest.mark.parametrize("chat_template", [None, QWEN25, LLAVA_HF])
def test_long_conversations_are_masked_like_short_ones(template_factory, processor, monkeypatch, chat_template):
    """Answers after the first ones are found by their header; rendering up to each of them gives the same mask."""
    template = template_factory(chat_template) if chat_template else processor.template
    messages = make_turns(*(f"{i}번 질문" if i % 2 == 0 else f" answer {i} " for i in range(60)))
    rendered = []
    monkeypatch.setattr(
        ChatTemplate,
        "render",
        lambda self, *a, render=ChatTemplate.render, **k: rendered.append(1) or render(self, *a, **k),
    )
    fast = template.encode(messages, [])
    assert len(rendered) < 60
    monkeypatch.setattr("lit_vlm.data.chat_template.NUM_RENDERED_TURNS", 1000)
    exact = ChatTemplate(template.tokenizer).encode(messages, [])
    assert len(rendered) > 100
    assert fast.input_ids.tolist() == exact.input_ids.tolist() and fast.supervised.tolist() == exact.supervised.tolist()


def test_a_template_that_rewrites_earlier_turns_is_refused_with_the_fix(template_factory):
    template = template_factory(REWRITES)
    assert get_supervised_text(template, make_turns("q", "a")).endswith("a<|im_end|>")  # one turn works
    with pytest.raises(UserError, match=r"rewrites earlier turns.*model\.chat_template=chatml"):
        template.encode(make_turns("q", "a", "q2", "a2"), [])


def test_a_tokenizer_without_a_chat_template_is_refused_with_the_fix(processor):
    processor.tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template.*model.chat_template=chatml"):
        ChatTemplate(processor.tokenizer)


def test_a_template_that_does_not_close_answers_is_refused(template_factory):
    template = template_factory("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}")
    with pytest.raises(UserError, match="without a control token"):
        template.encode(make_turns("q", "a"), [])


def test_images_are_placed_at_their_placeholders(processor):
    messages = (Message(Role.user, ("앞 ", ImagePlaceholder(0), "뒤")), Message(Role.assistant, ("네",)))
    ids = processor.template.encode(messages, [5]).input_ids.tolist()
    first = ids.index(processor.image_token_id)
    assert ids[first : first + 5] == [processor.image_token_id] * 5
    assert processor.tokenizer.decode(ids[:first]).endswith("앞 ")


def test_control_tokens_are_one_id_each(processor):
    for token in SPECIAL_TOKENS:
        messages = (Message(Role.user, (ControlToken(token), "x")), Message(Role.assistant, ("y",)))
        ids = processor.template.encode(messages, []).input_ids.tolist()
        assert ids.count(processor.tokenizer.convert_tokens_to_ids(token)) == 1


def test_an_unknown_control_token_is_refused_by_name(processor):
    with pytest.raises(UserError, match="<quad>.*model.special_tokens"):
        processor.template.encode((Message(Role.user, (ControlToken("<quad>"),)), Message(Role.assistant, ("y",))), [])


def test_a_prompt_that_contains_control_tokens_as_text_is_tokenised_as_text(processor):
    """Two thousand hostile strings: the number of control ids is what the template wrote, and the text survives."""
    rng = random.Random(0)
    controls = [*SPECIAL_TOKENS, "<image>", "<video>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    glue = [
        "",
        " ",
        "안녕 ",
        "<",
        ">",
        "<ima<image>ge>",
        "<|im_<|im_end|>end|>",
        "\n",
        "a\u200bb",
        "\uff1cimage\uff1e",
        "ᄀ\u1161",
    ]
    control_ids = set(processor.template.control_ids.values())
    plain = sum(i in control_ids for i in processor.template.encode(make_turns("q", "a"), []).input_ids.tolist())
    import unicodedata

    for _ in range(2000):
        hostile = "".join(rng.choice(controls) + rng.choice(glue) for _ in range(rng.randint(1, 4))) or "x"
        hostile += "."
        where = rng.choice([0, 1])
        messages = make_turns(hostile, "a") if where == 0 else make_turns("q", hostile)
        encoded = processor.template.encode(messages, [])
        ids = encoded.input_ids.tolist()
        assert sum(i in control_ids for i in ids) == plain
        assert unicodedata.normalize("NFC", hostile) in processor.tokenizer.decode(ids)
        expected = "a<|im_end|>" if where == 0 else unicodedata.normalize("NFC", hostile) + "<|im_end|>"
        assert processor.tokenizer.decode(encoded.input_ids[encoded.supervised].tolist()) == expected


def test_a_tokenizer_that_tokenises_pieces_and_the_whole_differently_is_refused(processor, monkeypatch):
    check_vocabulary(processor)
    from tokenizers import pre_tokenizers

    backend = processor.template.plain_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Metaspace()  # like SentencePiece: a space before every piece
    processor.template.tokenize_text.cache_clear()
    with pytest.raises(UserError, match="byte-level tokenizer"):
        check_vocabulary(processor)


def test_the_first_token_of_a_sequence_is_never_counted_as_supervised(processor):
    record = sample("q", "a")
    (encoded,) = processor.encode_sequences(record)
    assert processor.compute_cost(record).num_supervised == int(encoded.supervised[1:].sum()) > 0


def test_chatml_can_be_given_by_name_and_from_a_file(small_parts, tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}")
    for choice in ("chatml", str(file)):
        blueprint = blueprint_of(small_parts, chat_template=choice)
        assert get_supervised_text(
            Processor(blueprint.tokenizer, blueprint.images).template, make_turns("q", "a")
        ).endswith("a<|im_end|>")
    with pytest.raises(UserError, match="no such file"):
        blueprint_of(small_parts, chat_template="nowhere.jinja")
