"""Command-line options made from the config dataclasses, which are their one source.

Called by every command; `docs/cli.md` and the pinned list of the tests come from the same fields.
Never holds a default of its own: an option that was not given is left to the dataclass.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn, Protocol

from octavo.config import EngineConfig, ServerConfig
from octavo.errors import ConfigError
from octavo.option_values import kind_of, read_count, read_size, read_value
from octavo.vllm_options import Verdict, judge, nearest
from octavo.vllm_table import VLLM_OPTIONS, Face

ConfigClass = type[EngineConfig] | type[ServerConfig]


class Subparsers(Protocol):
    """What `add_subparsers` returns, which argparse keeps private."""

    def add_parser(self, name: str, *, help: str, description: str, epilog: str) -> Parser: ...


class Parser(argparse.ArgumentParser):
    """Refuses abbreviations, and says of all arguments that cannot be used why, at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)
        # Also `-10..10` is a value and not an option.
        self._negative_number_matcher = re.compile(r"-\d+(\.\d+|\.\.-?\d+)?$")

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """Takes `--flag=false` and `--flag false` for `--no-flag`, as charts and scripts write it,
        and so with true."""
        return super().parse_known_args(
            None if args is None else self._plain_flags(args), namespace
        )

    def _plain_flags(self, args: Sequence[str]) -> list[str]:
        known = self._option_string_actions
        plain: list[str] = []
        for given in args:
            flag, is_joined, value = given.partition("=")
            if not is_joined and plain:
                flag, value = plain[-1], given
            negative = f"--no-{flag[2:]}"
            if value.lower() in ("true", "false") and {flag, negative} <= known.keys():
                if not is_joined:
                    plain.pop()
                plain.append(flag if value.lower() == "true" else negative)
            else:
                plain.append(given)
        return plain

    def parse_checked(self, argv: Sequence[str]) -> argparse.Namespace:
        """Returns the parsed options, with what is to be said of them as `verdicts`.

        Exits with code 2 if some are unknown or not supported, naming all of them.
        """
        args, unknown = self.parse_known_args(argv)
        # The chosen command's parser knows its own options; the top one knows only --help.
        parser = typing.cast("Parser", vars(args).get("parser", self))
        problems = list(parser.explain_unknown(unknown))
        args.verdicts = []
        for option in vars(args).pop("vllm_options", ()):
            verdict = judge(*option)
            assert verdict is not None
            if verdict.is_refused:
                problems.append(verdict.text)
            elif verdict.text:
                args.verdicts.append(verdict)
        if problems:
            parser.error(_list(problems))
        return args

    def error(self, message: str) -> NoReturn:
        """Says what is wrong without the usage of all options, which would hide it."""
        if "required: MODEL" in message:
            message = (
                "MODEL is missing: a Hugging Face id, a folder, a .gguf file, demo or demo-moe; "
                "give it first, since --api-key and the like take all that follows"
            )
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    def explain_unknown(self, unknown: Sequence[str]) -> Iterator[str]:
        """Yields a message for each argument that nothing takes, with a hint if one is sure."""
        known = [
            text
            for text, action in self._option_string_actions.items()
            if text.startswith("--") and action.help != argparse.SUPPRESS
        ]
        follows = False
        for given in unknown:
            is_option = given.startswith("-")
            if (flag := given.split("=")[0]) in ("--model", "--model-id"):
                yield f"MODEL is given without {flag}, as the first argument"
            elif is_option or not follows:  # else the value of the one before
                near = nearest(flag, known) if is_option else None
                yield f"unknown argument {given!r}" + (f"; did you mean {near}?" if near else "")
            follows = is_option and "=" not in given


def _list(problems: Sequence[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    lines = [f"{len(problems)} arguments cannot be used:", *(f"  {text}" for text in problems)]
    return "\n".join([*lines, ""])


class _VllmAction(argparse.Action):
    """Notes an option of vLLM that has no field here, for `parse_checked` to judge."""

    def __init__(self, *args: Any, name: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._name = name

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        flag = option_string or ""
        shown = flag
        if self.nargs == 0:
            values = not flag.startswith("--no-")
        else:
            shown += " " + (values if isinstance(values, str) else " ".join(values))
        vars(namespace).setdefault("vllm_options", []).append((self._name, values, shown))


def _add_vllm_options(parser: Parser, face: Face) -> None:
    """Lets the parser take vLLM's options that have no field, without showing them."""
    for option in VLLM_OPTIONS.values():
        if option.face != face:
            continue
        flags = [option.flag, *option.short]
        if option.is_flag:
            flags.append("--no-" + option.flag[2:])
        nargs = 0 if option.is_flag else "+" if option.is_list else None
        parser.add_argument(
            *flags,
            action=_VllmAction,
            name=option.name,
            nargs=nargs,
            dest="vllm_options",
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One field of a config as the command line shows it."""

    field: str
    flag: str
    kind: str
    """str, int, float, bool, size, count or list."""
    default: Any
    choices: tuple[str, ...] | None
    help: str
    metadata: Mapping[str, Any]

    @property
    def flags(self) -> tuple[str, ...]:
        """All spellings of the flag."""
        return (self.flag, *self.metadata.get("also", ()))

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
        shown = {"bool": "", "list": "TEXT", "str": "TEXT", "count": "INT"}
        return shown.get(self.kind, self.kind.upper())


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
            kind=kind_of(field.name, hints[field.name], field.metadata),
            default=field.default,
            choices=None if choices is None else tuple(str(c) for c in choices),
            help=field.metadata["help"],
            metadata=field.metadata,
        )


def add_options(parser: Parser, config: ConfigClass, only: tuple[str, ...] = ()) -> None:
    """Adds a flag for each field of `config` (or for those in `only`)."""
    title: Face = "engine" if config is EngineConfig else "server"
    group = parser.add_argument_group(f"{title} options")
    for option in options_of(config):
        if only and option.field not in only:
            continue
        default = option.shown_default
        help = option.help + (f" (default: {default})" if default else "")
        if option.metadata.get("is_hidden"):
            help = argparse.SUPPRESS
        common: dict[str, Any] = {
            "help": help,
            "dest": option.field,
            "default": argparse.SUPPRESS,
        }
        if option.kind == "bool":
            group.add_argument(option.flag, action=argparse.BooleanOptionalAction, **common)
            continue
        if option.field == "allow_priority":
            common |= {"nargs": "?", "const": "all"}
        if option.kind == "list":
            common |= {"action": "extend", "nargs": "+"}
        else:
            common["type"] = _PARSERS[option.kind]
        group.add_argument(*option.flags, metavar=option.shown_value, **common)
        if option.field == "prefix_caching":
            _add_prefix_caching_alias(group)
    if not only:
        _add_vllm_options(parser, title)


def config_values(args: argparse.Namespace, config: ConfigClass) -> dict[str, Any]:
    """Returns the fields of `config` that were given on the command line, checked for choice."""
    given = vars(args)
    values: dict[str, Any] = {}
    for option in options_of(config):
        if option.field not in given:
            continue
        try:
            value = read_value(option.flag, option.kind, option.metadata, given[option.field])
        except ConfigError as error:
            raise ConfigError(str(error), field=option.field) from error
        values[option.field] = value
    return values


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """Returns the checked engine options of a command line whose model is `args.model`."""
    return EngineConfig(model=args.model, **config_values(args, EngineConfig)).resolve()


def server_config(args: argparse.Namespace) -> ServerConfig:
    """Returns the checked server options of a command line."""
    return ServerConfig(**config_values(args, ServerConfig)).resolve()


def parse_size(text: str) -> int:
    """Returns bytes from text like 4096, 512MiB, 80GiB or 1.5G (all units are powers of 1024)."""
    try:
        return read_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not {error}") from error


def _parse_count(text: str) -> int | None:
    try:
        return read_count(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not {error}") from error


def say(text: str) -> None:
    """Prints a line for the person at the terminal, at once even into a pipe."""
    print(text, file=sys.stderr, flush=True)


def say_verdicts(verdicts: Sequence[Verdict]) -> None:
    """Says of each option what is so anyway, or that it has no effect."""
    for verdict in verdicts:
        say(f"{'warning' if verdict.is_warning else 'note'}: {verdict.text}")


_PARSERS = {"str": str, "int": int, "float": float, "size": parse_size, "count": _parse_count}


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
