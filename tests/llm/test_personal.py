"""Personal data in text: what is found, and what only looks like it."""

import pytest

from springhead.llm import personal

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("text", "kind", "piece"),
    [
        ("Write to jane.doe+work@mail.some-firm.co.uk, please.", "email", "jane.doe+work@mail.some-firm.co.uk"),
        ("Pay with 4111 1111 1111 1111 today", "card", "4111 1111 1111 1111"),
        ("Pay with 5500-0000-0000-0004.", "card", "5500-0000-0000-0004"),
        ("The account is DE89 3704 0044 0532 0130 00.", "iban", "DE89 3704 0044 0532 0130 00"),
        ("GB29NWBK60161331926819 is mine", "iban", "GB29NWBK60161331926819"),
        ("Call +49 30 1234567 now", "phone", "+49 30 1234567"),
        ("Call (030) 123 4567 now", "phone", "(030) 123 4567"),
        ("Call 030 1234567 now", "phone", "030 1234567"),
        ("Call 212-867-5309 now", "phone", "212-867-5309"),
    ],
)
def test_what_is_found(text: str, kind: str, piece: str) -> None:
    assert personal.found(text) == [(kind, piece)]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "It happened in 1984, on page 1234 of 5678, at 10:30.",
        "Order 4111 1111 1111 1112 has arrived.",  # a digit off: Luhn's sum is wrong
        "0000 0000 0000 0000",
        "DE89370400440532013002 is no account",
        "Write to me@example.com or you@mail.example.org or it@host.test.",
        "Call 212-555-0123, as they do in films.",
        "Version 1.2.3-4567 of 192.168.0.1 costs 1,234,567.89.",
        "at@ sign and @handle",
    ],
)
def test_what_only_looks_like_it(text: str) -> None:
    assert personal.found(text) == []


def test_several_pieces_are_all_found_and_a_card_is_no_telephone() -> None:
    text = "a@b.io, 4111-1111-1111-1111, +44 20 7946 0018 and c@d.io"
    assert [kind for kind, _ in personal.found(text)] == ["email", "email", "card", "phone"]
