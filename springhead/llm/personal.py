"""Patterns of personal data in text: e-mail addresses, telephone, card and bank account numbers.

Numbers are checked, so that a year or an order number is no finding: cards by Luhn's sum (ISO/IEC 7812), account
numbers by the remainder of 97 (ISO 13616). The telephone pattern asks for an international or trunk prefix, or for
the separators that people write. Addresses and numbers reserved for examples are not counted.
"""

from __future__ import annotations

import re

_EMAIL = re.compile(r"\b[\w.+-]+@[\w-]+(?:\.[\w-]+)*\.[A-Za-z]{2,}\b")
_EXAMPLE_DOMAIN = re.compile(r"@(?:[\w-]+\.)*(?:example\.(?:com|org|net)|example|invalid|test)$", re.IGNORECASE)
_CARD = re.compile(r"(?<![\w.-])\d(?:[ -]?\d){12,18}(?![\w-])")
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,30}\b")
_PHONE = re.compile(
    r"(?<![\w.])(?:\+\d{1,3}[ .-]?(?:\(?\d{1,4}\)?[ .-]?){2,4}\d{2,4}"  # +49 30 1234567
    r"|\(\d{2,5}\)[ .-]?\d{3,4}[ .-]?\d{3,5}"  # (030) 123 4567
    r"|0\d{1,4}[ /-]\d{3,4}[ -]?\d{3,5}"  # 030 1234567
    r"|\d{3}[.-]\d{3}[.-]\d{4})(?![\w-])"  # 212-555-0199
)
_FICTION = re.compile(r"555\D?01\d\d$")  # numbers kept for fiction in North America


def found(text: str) -> list[tuple[str, str]]:
    """What in a text looks like personal data: kind (email, card, iban, phone) and the piece of text."""
    hits = [("email", hit) for hit in _EMAIL.findall(text) if not _EXAMPLE_DOMAIN.search(hit)]
    hits += [("iban", hit) for hit in _IBAN.findall(text) if _is_iban(hit)]
    hits += [("card", hit) for hit in _CARD.findall(text) if _is_card(hit)]
    taken = [hit for _, hit in hits]
    for hit in _PHONE.findall(text):
        digits = [c for c in hit if c.isdigit()]
        real = 8 <= len(digits) <= 15 and len(set(digits)) > 1 and not _FICTION.search(hit)
        if real and not any(hit in other for other in taken):
            hits.append(("phone", hit))
    return hits


def _is_card(text: str) -> bool:
    digits = [int(c) for c in text if c.isdigit()]
    if len(set(digits)) == 1:
        return False
    doubled = [d if i % 2 == 0 else (d * 2 - 9 if d > 4 else d * 2) for i, d in enumerate(reversed(digits))]
    return sum(doubled) % 10 == 0


def _is_iban(text: str) -> bool:
    """A piece of text may go on after the number, so its beginnings are tried, the longest first."""
    compact = text.replace(" ", "")
    for end in range(len(compact), 14, -1):
        moved = compact[4:end] + compact[:4]
        if int("".join(str(int(c, 36)) for c in moved)) % 97 == 1:
            return True
    return False
