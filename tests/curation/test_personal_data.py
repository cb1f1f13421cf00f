"""Personal data in texts. The numbers here belong to nobody: births in the 19th century and after 2090, and test cards."""

import phonenumbers
import pytest

from lit_vlm.curation.personal_data import PersonalKind, find_personal_data, mask_personal_data

MOBILE = phonenumbers.example_number_for_type("KR", phonenumbers.PhoneNumberType.MOBILE)
NATIONAL, INTERNATIONAL = (
    phonenumbers.format_number(MOBILE, form)
    for form in (phonenumbers.PhoneNumberFormat.NATIONAL, phonenumbers.PhoneNumberFormat.INTERNATIONAL)
)
REGISTRATION, PHONE, CARD = PersonalKind.registration_number, PersonalKind.phone_number, PersonalKind.card_number


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        (f"전화는 {NATIONAL}입니다.", [PHONE]),
        (f"전화 {NATIONAL.replace('-', '')} 로", [PHONE]),
        (f"Call {INTERNATIONAL}, or +1 202-555-0123.", [PHONE, PHONE]),
        ("주민등록번호 971013-9019902 입니다", [REGISTRATION]),
        ("9710139019902", [REGISTRATION]),
        ("991231-3123456은 검증 숫자가 없는 번호입니다", [REGISTRATION]),  # born in 2099
        ("카드 4242 4242 4242 4242, 378282246310005", [CARD, CARD]),
        (f"971013-9019902, {NATIONAL}, 4111-1111-1111-1111", [REGISTRATION, PHONE, CARD]),
        ("971013-9019903", []),  # wrong check digit
        ("990231-3123456", []),  # 31 February
        ("4242 4242 4242 4241", []),  # wrong check digit
        ("0.431, 0.382, 0.597, 0.607", []),  # corners of a box
        ("2019 2020 2021 2022, 1,234,567,890원", []),
        ("ISBN 978-89-954321-4-2, 계좌 110-123-456789", []),
        ("4242424242424242424242", []),  # a longer number
        ("https://example.com/20240115/0431038205970607", []),
        ("", []),
    ],
)
def test_numbers_are_found_by_their_form_and_check_digits(text, kinds):
    assert [one.kind for one in find_personal_data(text)] == kinds


def test_found_numbers_are_masked_and_the_rest_of_the_text_stays():
    text = f"전화 {NATIONAL}, 971013-9019902 그리고 상자 0.431, 0.382"
    masked = mask_personal_data(text)
    assert masked.endswith("••••••-••••••• 그리고 상자 0.431, 0.382") and masked.startswith("전화 •••-")
    assert len(masked) == len(text) and find_personal_data(masked) == []
