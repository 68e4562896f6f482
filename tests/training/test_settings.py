from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer
from typer.testing import CliRunner

from var_fast.errors import UserError
from var_fast.training.settings import differences, setting, takes_settings


@dataclass(frozen=True)
class Example:
    rate: float = setting(0.5, "How fast.", panel="Rates")
    sides: tuple[int, ...] = setting((1, 2), "How large.")
    flip: bool = setting(True, "Whether.")
    place: str | None = setting(None, "Where.", compare=False)
    hidden: int = 3


def ask(*words):
    app, seen = typer.Typer(), {}

    @app.command()
    @takes_settings(settings=Example)
    def command(
        data: Annotated[str, typer.Option(help="Data.")], settings: dict, count: Annotated[int, typer.Option()] = 2
    ) -> None:
        """Words of the command."""
        seen.update(data=data, settings=settings, count=count)

    return CliRunner().invoke(app, list(words)), seen


def test_options_of_settings():
    result, seen = ask("--data", "d", "--rate", "2", "--sides", "3,4", "--no-flip", "--place", "x", "--count", "5")
    assert result.exit_code == 0
    assert seen == {
        "data": "d",
        "count": 5,
        "settings": {"rate": 2.0, "sides": (3, 4), "flip": False, "place": "x"},
    }
    assert ask("--data", "d")[1]["settings"] == {}


def test_help_tells_what_they_are():
    text = ask("--help")[0].output
    for words in ("Words of the command.", "How fast. Default: 0.5.", "Default: 1,2.", "Where.", "--no-flip"):
        assert words in text
    assert "hidden" not in text and "None" not in text


def test_numbers_that_are_none_are_named():
    result, _ = ask("--data", "d", "--sides", "3,x")
    assert isinstance(result.exception, UserError) and "sides: got '3,x'" in str(result.exception)


def test_differences_from_what_json_kept_are_found():
    ours = Example(sides=(1, 3), place="here")
    theirs = {"rate": 0.5, "sides": [1, 2], "flip": True, "place": "there", "hidden": 3}
    assert differences(ours, theirs) == [("sides", (1, 3), [1, 2])]
