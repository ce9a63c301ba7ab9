"""Range checks of hyper-parameters, for the ``__post_init__`` of frozen settings."""

from __future__ import annotations

import math

from springhead.errors import BadInput


class OutOfRange(BadInput, ValueError):
    """A hyper-parameter out of range. A ValueError, so that ``springhead.params.load`` adds file and key before it."""


def at_least(low: float, settings: object, *names: str) -> None:
    """Makes sure that fields of settings are ``low`` or more, and finite.

    Raises:
        OutOfRange: Naming the first that is not.
    """
    for name in names:
        if not low <= getattr(settings, name) < math.inf:
            raise OutOfRange(f"{name} is {getattr(settings, name)}; use at least {low:g}, and finite")


def above_zero(settings: object, *names: str) -> None:
    """Makes sure that fields of settings are more than 0, and finite.

    Raises:
        OutOfRange: Naming the first that is not.
    """
    for name in names:
        if not 0 < getattr(settings, name) < math.inf:
            raise OutOfRange(f"{name} is {getattr(settings, name)}; use more than 0, and finite")


def finite(settings: object, *names: str) -> None:
    """Makes sure that fields of settings are finite numbers, or None where that is allowed.

    Raises:
        OutOfRange: Naming the first that is not.
    """
    for name in names:
        value = getattr(settings, name)
        if value is not None and not math.isfinite(value):
            raise OutOfRange(f"{name} is {value}; use a finite number")


def below_one(settings: object, *names: str) -> None:
    """Makes sure that fields of settings lie in [0, 1).

    Raises:
        OutOfRange: Naming the first that does not.
    """
    for name in names:
        if not 0 <= getattr(settings, name) < 1:
            raise OutOfRange(f"{name} is {getattr(settings, name)}; use a number of 0 or more and below 1")


def fraction(settings: object, *names: str) -> None:
    """Makes sure that fields of settings lie in [0, 1].

    Raises:
        OutOfRange: Naming the first that does not.
    """
    for name in names:
        if not 0 <= getattr(settings, name) <= 1:
            raise OutOfRange(f"{name} is {getattr(settings, name)}; use a number between 0 and 1")
