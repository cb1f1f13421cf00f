"""Personal data in texts: phone numbers, resident registration numbers of Korea, and payment cards. Pictures are not looked at.

Phone numbers are those of Google's libphonenumber. Registration and card numbers have check digits, which python-stdnum
checks. Registration numbers given since October 2020 have no check digit any more, so for births from then on the date decides.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from lit_vlm.config.curation import CurateConfig
from lit_vlm.curation.features import OnProgress
from lit_vlm.curation.mixture import CuratedMixture, CurationResult, Example, choose_examples, map_records
from lit_vlm.curation.text_hashes import list_messages
from lit_vlm.formatting import format_count
from lit_vlm.types import Record, Source, UserError

try:
    import phonenumbers
    from stdnum import luhn
    from stdnum.exceptions import ValidationError
    from stdnum.kr import rrn
except ImportError:  # packages of the extra `curate`
    phonenumbers = None  # type: ignore[assignment]

COUNTRY = "KR"  # of phone numbers without a country code
FIRST_DAY_WITHOUT_CHECK_DIGIT = datetime.date(2020, 10, 5)
# Not within a longer number, nor a decimal: no digit, and no separator with a digit, on either side
_START, _END = r"(?<![\d])(?<!\d[-.,/])", r"(?![\d])(?![-.,/]\d)"
_REGISTRATION = re.compile(rf"{_START}\d{{6}}[- ]?[0-9]\d{{6}}{_END}")
_CARD = re.compile(rf"{_START}(?:\d{{4}}([ -]?)\d{{4}}\1\d{{4}}\1\d{{4}}|3[47]\d{{2}}([ -]?)\d{{6}}\2\d{{5}}){_END}")
# Visa; Mastercard; American Express; JCB; Discover and UnionPay; domestic cards of Korea
_ISSUERS = re.compile(r"4|5[1-5]|2(?:22[1-9]|2[3-9]|[3-6]|7[01]|720)|3[47]|35(?:2[89]|[3-8])|6(?:011|2|4[4-9]|5)|9")
_MANY_DIGITS = re.compile(r"(?:\d[\s().-]{0,2}){7}")


class PersonalKind(StrEnum):
    """Kind of personal data."""

    registration_number = "registration_number"
    card_number = "card_number"
    phone_number = "phone_number"


@dataclass(frozen=True, slots=True)
class PersonalData:
    """Personal data at characters `start` to `end` of a text."""

    kind: PersonalKind
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class PersonalRecord:
    """Record with personal data: the number of the record among all, and how many of each kind it has."""

    record: int
    counts: dict[PersonalKind, int]


def require_packages() -> None:
    """Raise UserError if the packages of this search are missing."""
    if phonenumbers is None:
        raise UserError(
            "curate.method=personal needs phonenumbers and python-stdnum: pip install -e '.[curate]' -c constraints.txt"
        )


def find_personal_data(text: str) -> list[PersonalData]:
    """Find the personal data in a text, in its order; none overlaps another."""
    if _MANY_DIGITS.search(text) is None:  # most texts have no long number, and the search for phones is slow
        return []
    found = [
        PersonalData(PersonalKind.registration_number, *match.span())
        for match in _REGISTRATION.finditer(text)
        if is_registration_number(match[0])
    ]
    found += [
        PersonalData(PersonalKind.card_number, *match.span())
        for match in _CARD.finditer(text)
        if is_card_number(match[0])
    ]
    taken = [(one.start, one.end) for one in found]
    for match in phonenumbers.PhoneNumberMatcher(text, COUNTRY):
        if all(match.end <= start or match.start >= end for start, end in taken):
            found.append(PersonalData(PersonalKind.phone_number, match.start, match.end))
    return sorted(found, key=lambda one: one.start)


def is_registration_number(text: str) -> bool:
    """Return True if 13 digits are a resident or alien registration number: a date that exists, and the check digit."""
    digits = re.sub(r"\D", "", text)
    try:
        born = rrn.get_birth_date(digits)
    except ValidationError:
        return False
    return born >= FIRST_DAY_WITHOUT_CHECK_DIGIT or rrn.calc_check_digit(digits[:-1]) == digits[-1]


def is_card_number(text: str) -> bool:
    """Return True if 15 or 16 digits begin as the numbers of an issuer do, and have Luhn's check digit."""
    digits = re.sub(r"\D", "", text)
    return _ISSUERS.match(digits) is not None and bool(luhn.is_valid(digits))


def mask_personal_data(text: str) -> str:
    """Replace the digits of personal data in a text, so that a list or a page can show it."""
    parts, end = [], 0
    for one in find_personal_data(text):
        parts += [text[end : one.start], re.sub(r"\d", "•", text[one.start : one.end])]
        end = one.end
    return "".join([*parts, text[end:]])


@dataclass(slots=True)
class PersonalSearch:
    """Result of the search: the records with personal data, and the messages of those that cannot be read, by number."""

    found: list[PersonalRecord]
    errors: dict[int, str]


def search_sources(sources: Sequence[Source], *, workers: int, on_progress: OnProgress | None = None) -> PersonalSearch:
    """Search the texts of all records; no picture is read. Arguments as of `map_records`."""
    found, errors = map_records(sources, count_personal_data, workers=workers, on_progress=on_progress)
    return PersonalSearch([PersonalRecord(record, counts) for record, counts in enumerate(found) if counts], errors)


def count_personal_data(record: Record) -> dict[PersonalKind, int]:
    """Count the personal data in a record by kind, without kinds that it does not have."""
    kinds = [one.kind for message in list_messages(record) for one in find_personal_data(message.text)]
    return {kind: kinds.count(kind) for kind in PersonalKind if kind in kinds}


def collect_personal_data(mixture: CuratedMixture, personal: PersonalSearch, settings: CurateConfig) -> CurationResult:
    """Collect the records with personal data. Lists and page have none of it: its digits are masked."""
    found = [one for one in personal.found if not mixture.is_out[one.record]]
    counts = [
        (f"records with a {kind.value.replace('_', ' ')}", sum(kind in one.counts for one in found))
        for kind in PersonalKind
    ]
    lines = [mixture.describe(one.record) | {kind.value: count for kind, count in one.counts.items()} for one in found]
    examples = []
    for one in choose_examples(found, [min(one.counts) for one in found], settings.num_shown):
        shown = mixture.show("left out", one.record, mask=mask_personal_data)
        reason = ", ".join(format_count(count, kind.value.replace("_", " ")) for kind, count in one.counts.items())
        examples.append(Example(reason, (shown,)))
    notes = ["Only texts were looked at. Names, addresses, faces and text in pictures are not found."]
    return CurationResult([one.record for one in found], lines, counts, examples, notes=notes)
