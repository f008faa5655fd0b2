"""Command-line options made from the config dataclasses, which are their one source.

Called by every command; `docs/cli.md` and the pinned list of the tests come from the same fields.
Never holds a default of its own: an option that was not given is left to the dataclass.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import sys
import typing
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, Protocol

from octavo.config import AttentionConfig, EngineConfig, ServerConfig
from octavo.errors import ConfigError

ConfigClass = type[EngineConfig] | type[ServerConfig]
SIZE_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Subparsers(Protocol):
    """What `add_subparsers` returns, which argparse keeps private."""

    def add_parser(self, name: str, *, help: str, description: str) -> Parser: ...


class Parser(argparse.ArgumentParser):
    """Refuses abbreviations, and answers a misspelt option with the nearest known one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)
        # Also `-10..10` is a value and not an option.
        self._negative_number_matcher = re.compile(r"-\d+(\.\d+|\.\.-?\d+)?$")

    def parse_checked(self, argv: Sequence[str]) -> argparse.Namespace:
        """Returns the parsed options; exits with code 2 and a suggestion if one is unknown."""
        args, unknown = self.parse_known_args(argv)
        if unknown:
            # The chosen command's parser knows its own options; the top one knows only --help.
            parser = typing.cast("Parser", vars(args).get("parser", self))
            parser.error(parser.explain_unknown(unknown[0]))
        return args

    def error(self, message: str) -> NoReturn:
        """Says what is wrong in one line: the usage of all options would hide it."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    def explain_unknown(self, given: str) -> str:
        """Returns the message for an argument that nothing takes."""
        name = given.split("=")[0].replace("_", "-")
        known = [text for text in self._option_string_actions if text.startswith("--")]
        near = difflib.get_close_matches(name, known, n=1)
        return f"unknown argument {given!r}" + (f"; did you mean {near[0]}?" if near else "")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One field of a config as the command line shows it."""

    field: str
    flag: str
    kind: str
    """str, int, float, bool, size or list."""
    default: Any
    choices: tuple[str, ...] | None
    help: str

    @property
    def shown_default(self) -> str:
        """The default as help and docs print it."""
        if isinstance(self.default, bool):
            return "on" if self.default else "off"
        return "" if self.default in (None, (), "") else str(self.default)

    @property
    def shown_value(self) -> str:
        """What may stand after the flag."""
        if self.choices:
            return "{" + ",".join(self.choices) + "}"
        return {"bool": "", "list": "TEXT", "str": "TEXT"}.get(self.kind, self.kind.upper())


def options_of(config: ConfigClass) -> Iterator[Option]:
    """Yields the options of a config class, in its order; `model` is positional and left out."""
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        if field.name == "model":
            continue
        choices = field.metadata.get("choices")
        yield Option(
            field=field.name,
            flag="--" + field.name.replace("_", "-"),
            kind=_kind(field.name, hints[field.name]),
            default=field.default,
            choices=None if choices is None else tuple(str(c) for c in choices),
            help=field.metadata["help"],
        )


def add_options(parser: Parser, config: ConfigClass, only: tuple[str, ...] = ()) -> None:
    """Adds a flag for each field of `config` (or for those in `only`)."""
    title = "engine" if config is EngineConfig else "server"
    group = parser.add_argument_group(f"{title} options")
    for option in options_of(config):
        if only and option.field not in only:
            continue
        default = option.shown_default
        shown = {"help": option.help + (f" (default: {default})" if default else "")}
        common: dict[str, Any] = {**shown, "dest": option.field, "default": argparse.SUPPRESS}
        if option.kind == "bool":
            group.add_argument(option.flag, action=argparse.BooleanOptionalAction, **common)
            continue
        flags = [option.flag]
        if option.field == "kv_cache_memory_bytes":
            flags.append("--kv-cache-memory")
        if option.field == "allow_priority":
            common |= {"nargs": "?", "const": "all"}
        if option.kind == "list":
            common["action"] = "append"
            common["help"] += " (repeat for several)"
        else:
            common["type"] = _PARSERS[option.kind]
        group.add_argument(*flags, metavar=option.shown_value, **common)
        if option.field == "prefix_caching":
            _add_prefix_caching_alias(group)


def config_values(args: argparse.Namespace, config: ConfigClass) -> dict[str, Any]:
    """Returns the fields of `config` that were given on the command line, checked for choice."""
    given = vars(args)
    values: dict[str, Any] = {}
    for option in options_of(config):
        if option.field not in given:
            continue
        value = given[option.field]
        if option.choices is not None and str(value) not in option.choices:
            known = ", ".join(option.choices)
            raise ConfigError(
                f"{option.flag} {value!r} is unknown; use {known}", field=option.field
            )
        values[option.field] = tuple(value) if option.kind == "list" else value
    return values


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """Returns the checked engine options of a command line whose model is `args.model`."""
    return EngineConfig(model=args.model, **config_values(args, EngineConfig)).resolve()


def server_config(args: argparse.Namespace) -> ServerConfig:
    """Returns the checked server options of a command line."""
    return ServerConfig(**config_values(args, ServerConfig)).resolve()


def parse_size(text: str) -> int:
    """Returns bytes from text like 4096, 512MiB, 80GiB or 1.5G (all units are powers of 1024)."""
    plain = text.strip().upper().removesuffix("B").removesuffix("I")
    number, unit = (plain[:-1], plain[-1]) if plain and plain[-1].isalpha() else (plain, "")
    try:
        size = int(float(number) * SIZE_UNITS[unit])
    except (KeyError, ValueError, OverflowError):
        size = -1
    if size < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write it like 4096, 512MiB or 4GiB")
    return size


def say(text: str) -> None:
    """Prints a line for the person at the terminal, at once even into a pipe."""
    print(text, file=sys.stderr, flush=True)


_PARSERS = {"str": str, "int": int, "float": float, "size": parse_size}


def _kind(name: str, hint: Any) -> str:
    """Returns the kind of a field from its annotation, or fails: no field is guessed."""
    if name.endswith("_bytes"):
        return "size"
    members = set(typing.get_args(hint)) - {type(None), AttentionConfig}
    if typing.get_origin(hint) is tuple:
        return "list"
    if typing.get_origin(hint) is typing.Literal:
        return "str"
    (plain,) = members or {hint}
    return {str: "str", int: "int", float: "float", bool: "bool"}[plain]


def _add_prefix_caching_alias(group: argparse._ArgumentGroup) -> None:
    """vLLM's spelling of the same option."""
    for flag, value in (("--enable-prefix-caching", "on"), ("--no-enable-prefix-caching", "off")):
        group.add_argument(
            flag,
            action="store_const",
            const=value,
            dest="prefix_caching",
            default=argparse.SUPPRESS,
            help=f"the same as --prefix-caching {value}",
        )
