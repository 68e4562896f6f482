"""Settings of a run: a dataclass whose fields say what they are, and the command-line options made of it."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any

import typer

from var_fast.errors import UserError


def setting(default: Any, help: str, *, compare: bool = True, panel: str | None = None) -> Any:
    """A field of settings. compare False: a resumed run may have another value of it. panel: its group in --help."""
    return dataclasses.field(default=default, compare=compare, metadata={"help": help, "panel": panel})


def takes_settings(**classes: type) -> Callable[[Callable], Callable]:
    """For a typer command with parameters of these names: it gets an option for each field of their classes instead.

    Each parameter is then a dict of the fields that the user gave. Tuples are given as numbers with commas between
    them. No two classes may have a field of one name.
    """

    def decorate(command: Callable) -> Callable:
        hints = {name: typing.get_type_hints(of) for name, of in classes.items()}
        fields = {
            name: {field.name: field for field in dataclasses.fields(of) if field.metadata}
            for name, of in classes.items()
        }

        def with_options(**given: Any) -> Any:
            for name in classes:
                chosen = {field: given.pop(field) for field in fields[name]}
                given[name] = {
                    field: _numbers(field, value) if typing.get_origin(hints[name][field]) is tuple else value
                    for field, value in chosen.items()
                    if value is not None
                }
            return command(**given)

        signature = inspect.signature(command, eval_str=True)
        own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in signature.parameters.values()]
        made = [_option(field, hints[name][field.name]) for name in classes for field in fields[name].values()]
        parameters = [p for p in own if p.name not in classes] + made
        with_options.__signature__ = signature.replace(parameters=parameters)
        # typer asks for the hints apart from the signature
        with_options.__annotations__ = {p.name: p.annotation for p in parameters}
        with_options.__name__, with_options.__doc__ = command.__name__, command.__doc__
        return with_options

    return decorate


def _option(field: dataclasses.Field, hint: Any) -> inspect.Parameter:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(arm for arm in typing.get_args(hint) if arm is not type(None))
    is_tuple = typing.get_origin(hint) is tuple
    default = field.default
    if isinstance(default, tuple):
        shown = ",".join(map(str, default))
    else:
        shown = f"{default:g}" if isinstance(default, float) else default if default != "" else "none"
    help = field.metadata["help"] if default is None else f"{field.metadata['help']} Default: {shown}."
    option = typer.Option(help=help, rich_help_panel=field.metadata["panel"])
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[(str if is_tuple else hint) | None, option],
    )


def _numbers(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{name}: got {text!r}, expected numbers with commas between them, like 1,2,4") from None


def differences(ours: Any, theirs: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(name, our value, theirs) of every field that a resumed run must not change and that `theirs`, read from JSON,
    has another value of."""
    return [
        (field.name, getattr(ours, field.name), theirs.get(field.name))
        for field in dataclasses.fields(ours)
        if field.compare and _plain(getattr(ours, field.name)) != _plain(theirs.get(field.name))
    ]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
