"""Chat templates that write the date, use randomness, or have an error."""

import copy
import pickle
from datetime import date

import pytest
from support import sample

from lit_vlm.data.processor import Processor
from lit_vlm.data.template_date import freeze_date, is_date_dependent
from lit_vlm.model.vocabulary import CHATML, wrap_chat_template
from lit_vlm.types import ImagePlaceholder, Message, Role, UserError

DAY = "{{ 'Today: ' + strftime_now('%d %B %Y') + '\\n' }}"
LLAMA = (  # like the beginning of that of Llama 3.1
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}{%- set date_string = strftime_now('%d %b %Y') %}"
    "{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}{%- endif %}{{- 'Today Date: ' + date_string + '\\n' }}"
)
SPRING, AUTUMN = date(2026, 5, 1), date(2026, 9, 23)


@pytest.fixture
def make_processor(processor):
    """Factory of a processor of a template, with a fixed day."""

    def build_processor(template: str, day: date | None = SPRING, **options) -> Processor:
        tokenizer = copy.deepcopy(processor.tokenizer)
        tokenizer.chat_template = wrap_chat_template(template)
        return Processor(tokenizer, processor.images, day=day, **options)

    return build_processor


def decode_text(processor: Processor) -> str:
    ids = processor.encode_sequences(sample("question", "answer", (56, 56)))[0].input_ids
    return processor.tokenizer.decode(ids)


@pytest.mark.parametrize("head", [DAY, LLAMA])
def test_the_date_is_fixed_whatever_the_clock_says(make_processor, monkeypatch, head):
    import transformers.utils.chat_template_utils as utils

    class LaterDatetime(utils.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 12, 31)

    fixed = make_processor(head + CHATML)
    before = decode_text(fixed)
    monkeypatch.setattr(utils, "datetime", LaterDatetime)
    assert decode_text(make_processor(head + CHATML)) == before == decode_text(pickle.loads(pickle.dumps(fixed)))
    assert "2026" in before and "2031" not in before
    assert decode_text(make_processor(head + CHATML, AUTUMN)) != before


@pytest.mark.parametrize(
    "form",
    [
        "%d %B %Y",
        "%A",
        "%-d.%m.%y",
        "%H:%M:%S",
        "%Y-%m-%d",
        "%d%%d %j",
        "%F %b %%",
        "%P %C %f",
        "%^a %#b",
        "%0d %Ey %Od",
        "no day",
    ],
)
def test_every_format_of_a_date_is_rendered_as_the_clock_of_that_day_would(form):
    import datetime

    from transformers.utils.chat_template_utils import render_jinja_template

    midnight = datetime.datetime(2026, 5, 1)
    head = "\n  {% if true %}\n a{% endif %}"  # white space at the beginning is unchanged
    (expected,), _ = render_jinja_template([[]], chat_template=head + midnight.strftime(form.replace("{", "")))
    (found,), _ = render_jinja_template(
        [[]], chat_template=freeze_date(head + "{{ strftime_now('" + form + "') }}", SPRING)
    )
    assert found == expected


def test_the_digest_depends_on_the_day_only_if_the_template_writes_it(make_processor):
    assert make_processor(DAY + CHATML).digest != make_processor(DAY + CHATML, AUTUMN).digest
    assert make_processor(CHATML).digest == make_processor(CHATML, AUTUMN).digest


def test_a_processor_keeps_the_day_on_which_it_was_created(make_processor):
    assert make_processor(DAY + CHATML, None).template.day == date.today()


@pytest.mark.parametrize("words", ["'strftime_now'", "message.strftime_now", "{# strftime_now #}''"])
def test_a_template_that_only_mentions_the_date_function_does_not_depend_on_the_date(words):
    assert not is_date_dependent("{{ " + words + " }} strftime_now") and is_date_dependent("{{ strftime_now('%d') }}")


@pytest.mark.parametrize(
    "words",
    [
        "['a', 'b']|random",
        "['a', 'b'] | random",
        "lipsum(1)",
        "[['a', 'b']]|map('random')|join",
        "[['a', 'b']]|map(f)|join if 'random' else ''",
    ],
)
def test_templates_that_use_randomness_are_refused(make_processor, words):
    with pytest.raises(UserError, match="draws by chance"):
        make_processor("{{ " + words + " }}" + CHATML)


def test_randomness_in_a_filter_block_is_refused(make_processor):
    with pytest.raises(UserError, match="draws by chance"):
        make_processor("{% filter random %}abc{% endfilter %}" + CHATML)


def test_seconds_of_a_fixed_day_do_not_depend_on_the_time_zone_of_the_machine(monkeypatch):
    import time

    for zone in ("Asia/Seoul", "UTC"):
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        assert "1777593600" in freeze_date("{{ strftime_now('%s') }}", SPRING)
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize(
    "words",
    [
        "'random' ~ (['a']|map('upper')|join)",
        "'a random word, lipsum'",
        "{'random': 'a'}.random",
        "{'lipsum': 'a'}['lipsum']",
    ],
)
def test_templates_that_only_mention_randomness_are_accepted(make_processor, words):
    assert "answer" in decode_text(make_processor("{{ " + words + " }}" + CHATML))


TEMPLATE_ERRORS = {
    "no end": ("{% for message in messages %}{{ message.content }}", "is not well-formed, line 1"),
    "a wrong tag": ("{% frob %}" + CHATML, "is not well-formed"),
    "a name that is called": ("{{ today() }}" + CHATML, "'today' is undefined"),
    "a name of a name": ("{{ date.year }}" + CHATML, "'date' is undefined"),
    "a misspelt list": (CHATML.replace("in messages", "in mesages"), "leaves out what the user says"),
    "another error": ("{{ 1 // 0 }}" + CHATML, "refuses a conversation"),
    "its own refusal": ("{{ raise_exception('not today') }}" + CHATML, "not today"),
    "no answer": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] }}{% if message['role'] == 'user' %}"
        "{{ message['content'] }}{% endif %}{{ '<|im_end|>' }}{% endfor %}",
        "leaves out what the assistant says",
    ),
    "no question": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] }}{% if message['role'] != 'user' %}"
        "{{ message['content'] }}{% endif %}{{ '<|im_end|>' }}{% endfor %}",
        "leaves out what the user says",
    ),
    "the answer twice": (
        CHATML.replace("message['content']", "message['content'] + message['content']"),
        "writes the words of a assistant 2 times",
    ),
    "a picture too many": (wrap_chat_template(CHATML) + "{{ '<image>' }}", "writes <image> 2 times for 1 picture"),
    "no picture": (
        "{# <image> #}" + wrap_chat_template(CHATML).replace("+ '<image>\\n'", "+ ''"),
        "writes <image> 0 times for 1 picture",
    ),
}


@pytest.mark.parametrize("name", TEMPLATE_ERRORS)
def test_an_error_in_a_template_is_reported_in_a_sentence(make_processor, name):
    template, message = TEMPLATE_ERRORS[name]
    with pytest.raises(UserError) as caught:
        build_processor = make_processor(template)
        build_processor.encode_sequences(sample("question", "answer", (56, 56)))
    assert (
        message in str(caught.value)
        and "chat template" in str(caught.value)
        and "model.chat_template" in str(caught.value)
    )


def test_a_system_message_that_a_template_drops_is_reported(make_processor):
    quiet = CHATML.replace(
        "{%- for message in messages -%}", "{%- for message in messages if message['role'] != 'system' -%}"
    )
    build_processor = make_processor(quiet)
    conversation = (Message(Role.system, ("Be brief.",)), Message(Role.user, ("q",)), Message(Role.assistant, ("a",)))
    with pytest.raises(UserError, match="leaves out what the system says in a conversation of roles"):
        build_processor.template.encode(conversation, [])
    assert build_processor.template.encode(
        (Message(Role.user, (ImagePlaceholder(0), "q")), Message(Role.assistant, ("a",))), [4]
    ).num_tokens
