"""How each format writes calls, as models do: what the parser has to read back."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from octavo.tools.answer_parser import AnswerParser
from octavo.tools.calls import Piece, TextPiece
from octavo.tools.detect import answer_format

Call = tuple[str, dict[str, Any]]
BAR = "\uff5c"


def dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def raw(value: Any) -> str:
    """A value as formats of tags have it: texts as they are, all else as JSON."""
    return value if isinstance(value, str) else dumped(value)


def named(call: Call, key: str = "arguments") -> str:
    return dumped({"name": call[0], key: call[1]})


def each(one: Callable[[Call], str], between: str = "") -> Callable[[Sequence[Call]], str]:
    return lambda calls: between.join(map(one, calls))


def around(before: str, inner: Callable[[Sequence[Call]], str], after: str = "") -> Any:
    return lambda calls: before + inner(calls) + after


def listed(calls: Sequence[Call]) -> str:
    return "[" + ", ".join(map(named, calls)) + "]"


def tags(
    head: str, parameter: str, tail: str, before: str = "", after: str = ""
) -> Callable[[Call], str]:
    def one(call: Call) -> str:
        text = head.replace("NAME", call[0])
        for key, value in call[1].items():
            attribute = "true" if isinstance(value, str) else "false"
            filled = parameter.replace("KEY", key).replace("ATTRIBUTE", attribute)
            text += filled.replace("VALUE", before + raw(value) + after)
        return text + tail

    return one


def kimi(calls: Sequence[Call]) -> str:
    text = "<|tool_calls_section_begin|>"
    for place, (name, arguments) in enumerate(calls):
        text += f"<|tool_call_begin|>functions.{name}:{place}<|tool_call_argument_begin|>"
        text += dumped(arguments) + "<|tool_call_end|>"
    return text + "<|tool_calls_section_end|>"


def kimi_k3(calls: Sequence[Call]) -> str:
    text = "<|open|>tools<|sep|>"
    for place, (name, arguments) in enumerate(calls):
        text += f'<|open|>call tool="{name}" index="{place}"<|sep|>'
        for key, value in arguments.items():
            kind = "string" if isinstance(value, str) else "object"
            text += f'<|open|>argument key="{key}" type="{kind}"<|sep|>{raw(value)}'
            text += "<|close|>argument<|sep|>"
        text += "<|close|>call<|sep|>"
    return text + "<|close|>tools<|sep|>"


def deepseek(one: Callable[[Call], str]) -> Callable[[Sequence[Call]], str]:
    begin, end = f"<{BAR}tool\u2581calls\u2581begin{BAR}>", f"<{BAR}tool\u2581calls\u2581end{BAR}>"
    opens, closes = f"<{BAR}tool\u2581call\u2581begin{BAR}>", f"<{BAR}tool\u2581call\u2581end{BAR}>"
    return around(begin, each(lambda call: opens + one(call) + closes), end)


SEPARATOR = f"<{BAR}tool\u2581sep{BAR}>"


def dsml(outer: str, inner: str, parameter: str) -> Callable[[Sequence[Call]], str]:
    bar = f"{BAR}DSML{BAR}"
    one = tags(
        f'<{bar}{inner} name="NAME">\n',
        f'<{bar}{parameter} name="KEY" string="ATTRIBUTE">VALUE</{bar}{parameter}>\n',
        f"</{bar}{inner}>\n",
    )
    return around(f"<{bar}{outer}>\n", each(one), f"</{bar}{outer}>")


def python(call: Call) -> str:
    return call[0] + "(" + ", ".join(f"{key}={value!r}" for key, value in call[1].items()) + ")"


def harmony(calls: Sequence[Call]) -> str:
    return "<|start|>assistant".join(
        f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>"
        f"{dumped(arguments)}<|call|>"
        for name, arguments in calls
    )


def braces(value: Any) -> str:
    if isinstance(value, str):
        return f'<|"|>{value}<|"|>'
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{braces(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(braces, value)) + "]"
    return dumped(value)


def elements(value: Any) -> str:
    mark = "]<]minimax[>["
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = [("item", one) for one in value]
    else:
        return raw(value)
    return "".join(f"{mark}<{key}>{elements(one)}{mark}</{key}>" for key, one in items)


def minimax_m3(calls: Sequence[Call]) -> str:
    mark = "]<]minimax[>["
    inner = "".join(
        f'{mark}<invoke name="{name}">{elements(arguments)}{mark}</invoke>'
        for name, arguments in calls
    )
    return f"{mark}<tool_call>{inner}{mark}</tool_call>"


QWEN = tags("<function=NAME>\n", "<parameter=KEY>\nVALUE\n</parameter>\n", "</function>\n")
INVOKE = tags('<invoke name="NAME">\n', '<parameter name="KEY">VALUE</parameter>\n', "</invoke>\n")
ARGUMENT = "<arg_key>KEY</arg_key>\n<arg_value>VALUE</arg_value>\n"
HERMES = each(lambda call: f"<tool_call>\n{named(call)}\n</tool_call>", "\n")


@dataclass(frozen=True)
class Rendering:
    parser: str
    write: Callable[[Sequence[Call]], str]
    is_typed: bool = False
    """Whether the schema tells texts from other values."""
    nests: bool = True
    """Whether any JSON can be written: texts with markers, and all kinds of values and names."""


RENDERINGS: dict[str, Rendering] = {
    "hermes": Rendering("hermes", HERMES),
    "qwen3_xml": Rendering(
        "qwen3_coder",
        each(lambda call: f"<tool_call>\n{QWEN(call)}</tool_call>", "\n"),
        is_typed=True,
    ),
    "seed_oss": Rendering(
        "seed_oss",
        each(lambda call: f"<seed:tool_call>\n{QWEN(call)}</seed:tool_call>", "\n"),
        is_typed=True,
    ),
    "mistral old": Rendering("mistral", around("[TOOL_CALLS] ", listed)),
    "mistral new": Rendering(
        "mistral", each(lambda call: f"[TOOL_CALLS]{call[0]}[ARGS]{dumped(call[1])}")
    ),
    "llama3_json": Rendering(
        "llama3_json",
        around("<|python_tag|>", each(lambda call: named(call, "parameters"), "; ")),
    ),
    "llama3_json bare": Rendering("llama3_json", each(lambda call: named(call, "parameters"), ";")),
    "pythonic": Rendering("pythonic", around("[", each(python, ", "), "]"), nests=False),
    "llama4_pythonic": Rendering(
        "llama4_pythonic",
        around("<|python_start|>[", each(python, ", "), "]<|python_end|>"),
        nests=False,
    ),
    "olmo3": Rendering(
        "olmo3",
        around("<function_calls>", each(python, "\n"), "</function_calls>"),
        nests=False,
    ),
    "lfm2": Rendering(
        "lfm2",
        around("<|tool_call_start|>[", each(python, ", "), "]<|tool_call_end|>"),
        nests=False,
    ),
    "deepseek_v3": Rendering(
        "deepseek_v3",
        deepseek(lambda call: f"function{SEPARATOR}{call[0]}\n```json\n{dumped(call[1])}\n```"),
    ),
    "deepseek_v31": Rendering(
        "deepseek_v31", deepseek(lambda call: f"{call[0]}{SEPARATOR}{dumped(call[1])}")
    ),
    "deepseek_v32": Rendering("deepseek_v32", dsml("function_calls", "invoke", "parameter")),
    "deepseek_v4": Rendering("deepseek_v4", dsml("tool_calls", "invoke", "parameter")),
    "deepseek_v41": Rendering("deepseek_v41", dsml(" calls", " invoke", " parameter")),
    "kimi_k2": Rendering("kimi_k2", kimi),
    "kimi_k3": Rendering("kimi_k3", kimi_k3),
    "glm45": Rendering(
        "glm45",
        each(tags("<tool_call>NAME\n", ARGUMENT, "</tool_call>"), "\n"),
        is_typed=True,
    ),
    "glm47": Rendering(
        "glm47",
        each(tags("<tool_call>NAME", ARGUMENT.replace("\n", ""), "</tool_call>")),
        is_typed=True,
    ),
    "hy_v3": Rendering(
        "hy_v3",
        around(
            "<tool_calls>",
            each(tags("<tool_call>NAME<tool_sep>", ARGUMENT.replace("\n", ""), "</tool_call>")),
            "</tool_calls>",
        ),
        is_typed=True,
    ),
    "harmony": Rendering("openai", harmony),
    "granite": Rendering("granite", around("<|tool_call|>", listed)),
    "granite 3.1": Rendering("granite", around("<tool_call>", listed)),
    "granite-20b-fc": Rendering(
        "granite-20b-fc", each(lambda call: f"<function_call> {named(call)}", "\n")
    ),
    "minimax_m2": Rendering(
        "minimax_m2",
        around("<minimax:tool_call>\n", each(INVOKE), "</minimax:tool_call>"),
        is_typed=True,
    ),
    "minimax_m3": Rendering("minimax_m3", minimax_m3, is_typed=True, nests=False),
    "hunyuan_a13b": Rendering("hunyuan_a13b", around("<tool_calls>", listed, "</tool_calls>")),
    "ernie45": Rendering("ernie45", HERMES),
    "gemma4": Rendering(
        "gemma4",
        each(lambda call: f"<|tool_call>call:{call[0]}{braces(call[1])}<tool_call|>"),
        nests=False,
    ),
    "phi4_mini": Rendering("phi4_mini_json", around("functools", listed)),
    "internlm": Rendering(
        "internlm",
        each(lambda call: f"<|action_start|><|plugin|>{named(call, 'parameters')}<|action_end|>"),
    ),
    "longcat": Rendering(
        "longcat",
        each(lambda call: f"<longcat_tool_call>{named(call)}</longcat_tool_call>", "\n"),
    ),
}


@dataclass
class Answer:
    """The pieces of one answer, put together as a client does."""

    content: str = ""
    reasoning: str = ""
    names: list[str] | None = None
    ids: list[str] | None = None
    arguments: list[str] | None = None

    @staticmethod
    def of(pieces: Sequence[Piece]) -> Answer:
        answer = Answer(names=[], ids=[], arguments=[])
        assert answer.names is not None
        assert answer.ids is not None
        assert answer.arguments is not None
        for piece in pieces:
            if isinstance(piece, TextPiece):
                assert piece.text
                setattr(answer, piece.kind, getattr(answer, piece.kind) + piece.text)
                continue
            assert bool(piece.name) == bool(piece.id) == (piece.number == len(answer.names))
            if piece.name:
                answer.names.append(piece.name)
                answer.ids.append(piece.id)
                answer.arguments.append("")
            assert piece.number == len(answer.names) - 1
            answer.arguments[-1] += piece.arguments
        return answer

    @property
    def calls(self) -> list[Call]:
        assert self.names is not None
        assert self.arguments is not None
        pairs = zip(self.names, self.arguments, strict=True)
        return [(name, json.loads(arguments)) for name, arguments in pairs]

    @property
    def said(self) -> tuple[Any, ...]:
        """All but the ids, which are drawn anew."""
        return self.content, self.reasoning, self.names, self.arguments


def read(
    parser: str,
    pieces: Sequence[str],
    *,
    schemas: dict[str, Any] | None = None,
    reasoning: str = "none",
    starts_inside: bool = False,
    is_cut: bool = False,
) -> Answer:
    """Returns what a parser makes of an answer that comes in pieces."""
    found = answer_format("", {}, tool_parser=parser, reasoning_parser=reasoning)
    one = AnswerParser(found, schemas=schemas, starts_inside=starts_inside)
    told = [piece for text in pieces for piece in one.push(text)]
    return Answer.of([*told, *one.finish(is_cut=is_cut)])
