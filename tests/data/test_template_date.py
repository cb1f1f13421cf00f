"""Chat templates that write the day, draw by chance, or have a slip."""

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
LLAMA = (  # as Llama 3.1's begins
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}{%- set date_string = strftime_now('%d %b %Y') %}"
    "{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}{%- endif %}{{- 'Today Date: ' + date_string + '\\n' }}"
)
SPRING, AUTUMN = date(2026, 5, 1), date(2026, 9, 23)


@pytest.fixture
def make(processor):
    """A processor of a template, on a day."""

    def made(template: str, day: date | None = SPRING, **options) -> Processor:
        tokenizer = copy.deepcopy(processor.tokenizer)
        tokenizer.chat_template = wrap_chat_template(template)
        return Processor(tokenizer, processor.images, day=day, **options)

    return made


def text(processor: Processor) -> str:
    ids = processor.encode_sequences(sample("question", "answer", (56, 56)))[0].input_ids
    return processor.tokenizer.decode(ids)


@pytest.mark.parametrize("head", [DAY, LLAMA])
def test_the_day_stands_still_whatever_the_clock_says(make, monkeypatch, head):
    import transformers.utils.chat_template_utils as utils

    class Later(utils.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 12, 31)

    fixed = make(head + CHATML)
    before = text(fixed)
    monkeypatch.setattr(utils, "datetime", Later)
    assert text(make(head + CHATML)) == before == text(pickle.loads(pickle.dumps(fixed)))
    assert "2026" in before and "2031" not in before
    assert text(make(head + CHATML, AUTUMN)) != before


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
def test_every_form_of_a_day_is_what_the_clock_of_that_day_would_write(form):
    import datetime

    from transformers.utils.chat_template_utils import render_jinja_template

    midnight = datetime.datetime(2026, 5, 1)
    head = "\n  {% if true %}\n a{% endif %}"  # white space at the beginning stays as it is
    (expected,), _ = render_jinja_template([[]], chat_template=head + midnight.strftime(form.replace("{", "")))
    (found,), _ = render_jinja_template(
        [[]], chat_template=freeze_date(head + "{{ strftime_now('" + form + "') }}", SPRING)
    )
    assert found == expected


def test_an_index_of_one_day_is_no_index_of_another_and_without_a_day_it_is_the_same(make):
    assert make(DAY + CHATML).digest != make(DAY + CHATML, AUTUMN).digest
    assert make(CHATML).digest == make(CHATML, AUTUMN).digest


def test_a_processor_keeps_the_day_on_which_it_was_made(make):
    assert make(DAY + CHATML, None).template.day == date.today()


@pytest.mark.parametrize("words", ["'strftime_now'", "message.strftime_now", "{# strftime_now #}''"])
def test_a_day_that_is_only_spoken_of_is_none(words):
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
def test_what_is_drawn_by_chance_is_refused(make, words):
    with pytest.raises(UserError, match="draws by chance"):
        make("{{ " + words + " }}" + CHATML)


def test_chance_in_a_block_of_a_filter_is_refused(make):
    with pytest.raises(UserError, match="draws by chance"):
        make("{% filter random %}abc{% endfilter %}" + CHATML)


def test_seconds_of_a_fixed_day_are_those_of_no_machines_time_zone(monkeypatch):
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
def test_a_word_for_chance_is_no_chance(make, words):
    assert "answer" in text(make("{{ " + words + " }}" + CHATML))


SLIPS = {
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


@pytest.mark.parametrize("name", SLIPS)
def test_a_slip_in_a_template_is_told_in_a_sentence(make, name):
    template, said = SLIPS[name]
    with pytest.raises(UserError) as caught:
        made = make(template)
        made.encode_sequences(sample("question", "answer", (56, 56)))
    assert (
        said in str(caught.value)
        and "chat template" in str(caught.value)
        and "model.chat_template" in str(caught.value)
    )


def test_a_system_message_that_a_template_drops_is_told(make):
    quiet = CHATML.replace(
        "{%- for message in messages -%}", "{%- for message in messages if message['role'] != 'system' -%}"
    )
    made = make(quiet)
    said = (Message(Role.system, ("Be brief.",)), Message(Role.user, ("q",)), Message(Role.assistant, ("a",)))
    with pytest.raises(UserError, match="leaves out what the system says in a conversation of roles"):
        made.template.encode(said, [])
    assert made.template.encode(
        (Message(Role.user, (ImagePlaceholder(0), "q")), Message(Role.assistant, ("a",))), [4]
    ).num_tokens
