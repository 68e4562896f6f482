"""What the settings of a run must satisfy, so that a bad option is one line and not a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from var_fast.errors import UserError


def check_values(settings: Any, expected: dict[str, tuple[Any, str]], choices: dict[str, tuple[str, ...]]) -> None:
    """Raises UserError for the first setting that is not what it should be.

    expected: {words: (predicate, names of settings with spaces between them)}. choices: {name: values}.
    """
    for words, (holds, names) in expected.items():
        for name in names.split():
            if not holds(getattr(settings, name)):  # so that NaN, which no comparison holds for, is refused
                raise UserError(f"{name}: got {getattr(settings, name)!r}, expected {words}")
    for name, values in choices.items():
        if getattr(settings, name) not in values:
            raise UserError(f"{name}: got {getattr(settings, name)!r}, expected one of {', '.join(values)}")


@contextmanager
def user_errors(what: str) -> Iterator[None]:
    """Around the constructor of `what`: the ValueErrors it raises about its arguments become UserErrors."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"cannot build {what}: {error}") from None
