"""What every command has in common: `--debug`, errors as one message, exit codes, quiet libraries."""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import functools
import inspect
import io
import os
import sys
import typing
import warnings
from collections.abc import Callable
from typing import Annotated, Any, TextIO

import typer

from mixq_compile.errors import MixqError, OptionError

FAILURE, USAGE = 1, 2

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def command(function: Callable[..., None]) -> Callable[..., None]:
    """The function as a command: takes `--debug` too, and shows a MixqError as its message.

    A parameter whose type is a dataclass stands for its fields, an option each: several commands share
    them so. Exit codes: 2 where the user's input is wrong (OptionError), 1 for any other failure.
    """
    hints = typing.get_type_hints(function, include_extras=True)
    groups: dict[str, type[Any]] = {
        name: kind
        for name, kind in hints.items()
        if isinstance(kind, type) and dataclasses.is_dataclass(kind)
    }

    @functools.wraps(function)
    def run(*args: Any, debug: bool = False, **kwargs: Any) -> None:
        _quiet_libraries()
        write_in_any_encoding(sys.stdout, sys.stderr)
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                for name, kind in groups.items():
                    given = {field.name: kwargs.pop(field.name) for field in dataclasses.fields(kind)}
                    kwargs[name] = kind(**given)
                function(*args, **kwargs)
                sys.stdout.flush()
        except Exception as error:
            found = cause_of(error) or _file_problem(error)
            if found is None or debug:
                raise
            _give_up_stdout()
            typer.echo(f"error: {found}", err=True)
            raise typer.Exit(USAGE if isinstance(found, OptionError) else FAILURE) from error

    # typer reads the options from the signature and from the annotations.
    signature = inspect.signature(function)
    parameters: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        parameters += _options_of(groups[name]) if name in groups else [
            parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
        ]  # fmt: skip
    parameters.append(_option("debug", Debug, default=False))
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _option(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _options_of(group: type) -> list[inspect.Parameter]:
    """The parameters that the fields of a dataclass stand for."""
    hints = typing.get_type_hints(group, include_extras=True)
    return [
        _option(
            field.name,
            hints[field.name],
            inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default,
        )
        for field in dataclasses.fields(group)
    ]


def cause_of(error: BaseException) -> MixqError | None:
    """The MixqError behind an error; torch.compile wraps what a backend raises in one of its own."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        if isinstance(current, MixqError):
            return current
        seen.add(id(current))
        inner: BaseException | None = getattr(current, "inner_exception", None)
        current = inner or current.__cause__ or current.__context__
    return None


def _file_problem(error: BaseException) -> MixqError | None:
    """What a file that cannot be read or written says; None for any other error."""
    if not isinstance(error, OSError) or isinstance(error, BrokenPipeError) or error.strerror is None:
        return None
    where = error.filename if error.filename is not None else "the output"
    return MixqError(f"{where}: {error.strerror}. Give a path that can be read and written, with room left.")


def _give_up_stdout() -> None:
    """Lets what cannot be written go: Python would try again when it ends, and fail with a traceback."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def write_in_any_encoding(*streams: TextIO) -> None:
    """Lets streams whose encoding lacks a character write a similar one: `x` for the times sign."""
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper) and stream.encoding.lower().replace("-", "") != "utf8":
            stream.reconfigure(errors=SIMILAR)


def _similar(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return "".join(_PLAIN.get(sign, "?") for sign in error.object[error.start : error.end]), error.end


SIMILAR = "mixq-similar"
_PLAIN = {
    "×": "x", "…": "...", "–": "-", "—": "-", "−": "-", "→": "->", "≤": "<=", "≥": ">=", "≈": "~", "·": "*",
    "±": "+/-", "²": "^2", "½": "1/2", "“": '"', "”": '"', "’": "'", "✓": "yes", "✗": "no", "°": " deg",
    "µ": "u", "σ": "sigma", "Σ": "sum", "│": "|", "─": "-", "┼": "+", "├": "+", "└": "+", "█": "#",
}  # fmt: skip
codecs.register_error(SIMILAR, _similar)


def _quiet_libraries() -> None:
    """No progress bars or chatter of others; what the user has set himself stays."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Our own warnings are for the user; those of libraries are for their callers."""
    if "mixq" in str(message) or "mixq_compile" in filename:
        print(f"warning: {message}", file=sys.stderr)
