"""Supervision masks come from the model's own chat template, and text never becomes a control token."""

import random
from dataclasses import replace

import pytest
from support import blueprint_of, sample
from transformers import AddedToken

from lit_vlm.data.chat_template import ChatTemplate
from lit_vlm.data.processor import Processor, check_vocabulary
from lit_vlm.data.word_tokens import WordTokenizer
from lit_vlm.model.vocabulary import wrap_chat_template
from lit_vlm.reports.preflight.samples import prepare_sample
from lit_vlm.types import SPECIAL_TOKENS, ControlToken, ImagePlaceholder, Message, RecordError, Role, UserError

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


THOUGHTS = "<think>\n\n</think>\n\n"
QWEN3 = (  # thoughts in the turn behind the last question only, none in the generation prompt
    "{%- set last = namespace(question=0) -%}{%- for m in messages -%}{%- if m.role == 'user' -%}"
    "{%- set last.question = loop.index0 -%}{%- endif -%}{%- endfor -%}{%- for m in messages -%}"
    "{%- set words = m.content.split('</think>')[-1].lstrip('\n') -%}{{ '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' and loop.index0 > last.question -%}{{ '<think>\n\n</think>\n\n' }}{%- endif -%}"
    "{{ words + '<|im_end|>\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking -%}{{ '<think>\n\n</think>\n\n' }}{%- endif -%}{%- endif -%}"
)
EXAONE4 = (  # thoughts in every turn, and in the generation prompt
    "{%- for m in messages -%}{{ '[|' + m.role + '|]\n' }}{%- if m.role == 'assistant' -%}{{ '<think>\n\n</think>\n\n' }}{%- endif -%}"
    "{{ m.content.split('</think>')[-1] + '[|endofturn|]\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '[|assistant|]\n<think>\n\n</think>\n\n' }}{%- endif -%}"
)
LLAMA3 = (
    "{{ '<|begin_of_text|>' }}{%- for m in messages -%}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim"
    " + '<|eot_id|>' }}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif -%}"
)
MISTRAL = (  # a space before an answer, which the generation prompt does not have
    "{{ '<s>' }}{%- for m in messages -%}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('user and assistant must alternate') }}{%- endif -%}"
    "{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else ' ' + m.content + '</s>' }}{%- endfor -%}"
)
GEMMA = (
    "{{ '<bos>' }}{%- for m in messages -%}{%- if m.role == 'system' -%}{{ raise_exception('System role not supported') }}{%- endif -%}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<end_of_turn>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)
PHI3 = (
    "{%- for m in messages -%}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>\n' }}{%- endif -%}"
)
GRANITE = (
    "{%- for m in messages -%}{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + '<|end_of_text|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif -%}"
)
# Templates in the manner of the families' own, their control tokens, and what closes an answer
FAMILY_TEMPLATES = {
    "qwen3": (QWEN3, "<think> </think>", "<|im_end|>"),
    "exaone4": (EXAONE4, "[|user|] [|assistant|] [|endofturn|] <think> </think>", "[|endofturn|]"),
    "llama3": (LLAMA3, "<|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>", "<|eot_id|>"),
    "mistral": (MISTRAL, "<s> </s> [INST] [/INST]", "</s>"),
    "gemma": (GEMMA, "<bos> <start_of_turn> <end_of_turn>", "<end_of_turn>"),
    "phi3": (PHI3, "<|user|> <|assistant|> <|end|>", "<|end|>"),
    "granite": (GRANITE, "<|start_of_role|> <|end_of_role|> <|end_of_text|>", "<|end_of_text|>"),
}


def make_turns(*texts: str) -> tuple[Message, ...]:
    return tuple(Message(Role.user if i % 2 == 0 else Role.assistant, (text,)) for i, text in enumerate(texts))


def get_supervised_text(template: ChatTemplate, messages: tuple[Message, ...], images: list[int] | None = None) -> str:
    encoded = template.encode(messages, images or [])
    return template.tokenizer.decode(encoded.input_ids[encoded.supervised].tolist())


@pytest.fixture
def template_factory(processor):
    def make(template: str) -> ChatTemplate:
        processor.tokenizer.chat_template = wrap_chat_template(template)
        return ChatTemplate(processor.tokenizer)

    return make


@pytest.fixture
def make_family_template(processor):
    def make(family: str) -> ChatTemplate:
        text, tokens, _ = FAMILY_TEMPLATES[family]
        # as in Qwen3: no special token, so that a decoder keeps it
        processor.tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in tokens.split()])
        processor.tokenizer.chat_template = wrap_chat_template(text)
        processor.template = ChatTemplate(processor.tokenizer)
        return processor.template

    return make


@pytest.mark.parametrize("family", FAMILY_TEMPLATES)
def test_the_templates_of_families_supervise_what_an_answer_adds_to_its_generation_prompt(family, make_family_template):
    template, end = make_family_template(family), FAMILY_TEMPLATES[family][2]
    turns = make_turns("무엇인가요?", "빨간 원", "Really?", "yes")[: 2 if family == "qwen3" else 4]
    encoded = template.encode(turns, [])
    plain = [{"role": m.role.value, "content": m.content[0]} for m in turns]
    whole = template.tokenizer.apply_chat_template(plain, tokenize=True)
    assert encoded.input_ids.tolist() == list(whole["input_ids"] if hasattr(whole, "keys") else whole)
    expected = {"qwen3": f"빨간 원{end}", "mistral": f" 빨간 원{end} yes{end}"}.get(family, f"빨간 원{end}yes{end}")
    assert get_supervised_text(template, turns) == expected
    for number in range(1, len(turns), 2):
        prompt = template.encode(turns[:number], [], prompt=True).input_ids.tolist()
        assert encoded.input_ids.tolist()[: len(prompt)] == prompt


@pytest.mark.parametrize("family", ["qwen3", "exaone4"])
def test_a_generation_prompt_ends_with_the_empty_thoughts_unless_thoughts_are_asked_for(family, make_family_template):
    """Here, and in the template that is exported, so that the model answers as it was trained."""
    template = make_family_template(family)
    plain = [{"role": "user", "content": "q"}]
    prompts = [
        template.tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True, **options)
        for options in ({}, {"enable_thinking": False}, {"enable_thinking": True})
    ]
    assert prompts[0] == prompts[1] and prompts[0].endswith(THOUGHTS)
    assert family == "exaone4" or prompts[2] == prompts[0].removesuffix(THOUGHTS)
    encoded = template.encode(make_turns("q"), [], prompt=True)
    assert template.tokenizer.decode(encoded.input_ids.tolist()) == prompts[0]


def test_the_page_of_preflight_shows_the_empty_thoughts_and_that_they_are_not_supervised(
    processor, make_family_template
):
    make_family_template("qwen3")
    ((_, pieces),) = prepare_sample(sample("무엇?", "원"), processor).segments
    assert "".join(piece.text for piece in pieces if piece.supervised) == "원<|im_end|>"
    shown = "".join(piece.text for piece in pieces if not piece.supervised)
    assert shown == f"<|im_start|>user\n무엇?<|im_end|>\n<|im_start|>assistant\n{THOUGHTS}\n"


def test_thoughts_in_several_turns_of_qwen3_are_refused_with_the_fix(make_family_template):
    with pytest.raises(UserError, match=r"rewrites earlier turns.*model\.chat_template=chatml"):
        make_family_template("qwen3").encode(make_turns("q", "a", "q2", "a2"), [])


def test_earlier_answers_of_qwen3_that_are_not_supervised_are_the_history_of_the_last_one(make_family_template):
    """So a model is served in several turns, and a pair or a record whose last answer alone counts is trained."""
    template, turns = make_family_template("qwen3"), make_turns("q", "a", "q2", "a2")
    turns = tuple(replace(turn, supervised=number == 3) for number, turn in enumerate(turns))
    plain = [{"role": m.role.value, "content": m.content[0]} for m in turns]
    encoded = template.encode(turns, [])
    assert template.tokenizer.decode(encoded.input_ids) == template.tokenizer.apply_chat_template(plain, tokenize=False)
    assert get_supervised_text(template, turns) == "a2<|im_end|>"
    prompt = template.encode(turns[:3], [], prompt=True).input_ids.tolist()
    assert encoded.input_ids.tolist()[: len(prompt)] == prompt


def test_an_answer_with_thoughts_as_text_is_a_bad_record_where_thoughts_are_tokens(processor, make_family_template):
    thoughts = sample("q", "\n<think>because</think>yes")
    assert processor.encode_sequences(thoughts)  # without such tokens it is a text like any other
    make_family_template("qwen3")
    with pytest.raises(RecordError, match=r"test:0: an answer begins with <think>.*Take the thoughts out"):
        processor.encode_sequences(thoughts)
    assert processor.encode_sequences(sample("<think>?", "<b> and </think>"))


def test_a_role_that_a_template_does_not_know_is_refused_with_the_fix(make_family_template):
    messages = (Message(Role.system, ("Be short.",)), *make_turns("q", "a"))
    refusal = r"refuses a conversation of roles \[system, user, assistant\]: .*model\.chat_template=chatml"
    for family, reason in (("gemma", "System role not supported"), ("mistral", "must alternate")):
        with pytest.raises(UserError, match=refusal) as error:
            make_family_template(family).encode(messages, [])
        assert reason in str(error.value)


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
    monkeypatch.setattr(processor.template, "tokenize_text", WordTokenizer(backend).encode)
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
