"""The formats in which models call tools: one row each.

Names and aliases are those of vLLM's `--tool-call-parser`. A new format is a row here; rows that
come first are found first in a chat template.
"""

from __future__ import annotations

from octavo.tools import harmony
from octavo.tools.json_calls import JsonCalls, NamedJson
from octavo.tools.nested_calls import BraceCall, ElementCall
from octavo.tools.python_calls import PythonCalls
from octavo.tools.shapes import Layout, ToolFormat
from octavo.tools.tagged_calls import TaggedCall

_JSON = JsonCalls()
_QWEN_TAGS = TaggedCall(
    name_end=">",
    parameter="<parameter=",
    key_end=">",
    value_end="</parameter>",
    has_lines=True,
    written="NAME>\n",
    written_parameter="<parameter=KEY>\nVALUE\n</parameter>\n",
)
_INVOKE_TAGS = TaggedCall(
    name_end=">",
    parameter="<parameter name=",
    key_end=">",
    value_end="</parameter>",
    written='"NAME">\n',
    written_parameter='<parameter name="KEY">VALUE</parameter>\n',
)
_IN_TAGS = Layout(open="<tool_call>\n", close="\n</tool_call>", joint="\n")


def _dsml(name: str, outer: str, inner: str, parameter: str) -> ToolFormat:
    """DeepSeek's markup; its versions differ in the words of the tags."""
    bar = "\uff5cDSML\uff5c"
    return ToolFormat(
        name=name,
        begins=(f"<{bar}{outer}>",),
        opens=(f"<{bar}{inner} name=",),
        closes=(f"</{bar}{inner}>",),
        ends=(f"</{bar}{outer}>",),
        shape=TaggedCall(
            name_end=">",
            parameter=f"<{bar}{parameter} name=",
            key_end=">",
            value_end=f"</{bar}{parameter}>",
            takes_json=True,
            written='"NAME">\n',
            written_parameter=(
                f'<{bar}{parameter} name="KEY" string="TEXT">VALUE</{bar}{parameter}>\n'
            ),
        ),
        layout=Layout(
            begin=f"<{bar}{outer}>\n",
            open=f"<{bar}{inner} name=",
            close=f"</{bar}{inner}>\n",
            end=f"</{bar}{outer}>",
        ),
        signs=((f"{bar}{outer}",),),
    )


def _deepseek(name: str, shape: NamedJson, *signs: str) -> ToolFormat:
    """DeepSeek's special tokens; its versions differ in what stands between them."""
    return ToolFormat(
        name=name,
        begins=("<\uff5ctool\u2581calls\u2581begin\uff5c>",),
        opens=("<\uff5ctool\u2581call\u2581begin\uff5c>",),
        closes=("<\uff5ctool\u2581call\u2581end\uff5c>",),
        ends=("<\uff5ctool\u2581calls\u2581end\uff5c>",),
        shape=shape,
        layout=Layout(
            begin="<\uff5ctool\u2581calls\u2581begin\uff5c>",
            open="<\uff5ctool\u2581call\u2581begin\uff5c>",
            close="<\uff5ctool\u2581call\u2581end\uff5c>",
            end="<\uff5ctool\u2581calls\u2581end\uff5c>",
        ),
        signs=((_DEEPSEEK_SEPARATOR, *signs),),
    )


_DEEPSEEK_SEPARATOR = "<\uff5ctool\u2581sep\uff5c>"

TOOL_FORMATS: tuple[ToolFormat, ...] = (
    ToolFormat(
        name="openai",
        shape=None,
        begins=harmony.TEXTS,
        signs=(("<|channel|>", "<|message|>", "functions."),),
        aliases=("harmony", "gpt_oss"),
        layout=Layout(
            open="<|channel|>commentary to=functions.",
            close="<|call|>",
            is_single=True,
            behind_thought="<|start|>assistant",
        ),
        written_shape=NamedJson(
            separators=("<|message|>",), written="NAME <|constrain|>json<|message|>"
        ),
    ),
    _dsml("deepseek_v32", "function_calls", "invoke", "parameter"),
    _dsml("deepseek_v4", "tool_calls", "invoke", "parameter"),
    _dsml("deepseek_v41", " calls", " invoke", " parameter"),
    _deepseek(
        "deepseek_v3",
        NamedJson(
            separators=("```json", "{"),
            header=rf"(?:function\s*{_DEEPSEEK_SEPARATOR})?\s*(?P<name>[^\s`]+)",
            fence="```",
            written=f"function{_DEEPSEEK_SEPARATOR}NAME\n```json\n",
            written_end="\n```",
        ),
        "```json",
    ),
    _deepseek(
        "deepseek_v31",
        NamedJson(separators=(_DEEPSEEK_SEPARATOR,), written=f"NAME{_DEEPSEEK_SEPARATOR}"),
    ),
    ToolFormat(
        name="kimi_k2",
        begins=("<|tool_calls_section_begin|>",),
        opens=("<|tool_call_begin|>",),
        closes=("<|tool_call_end|>",),
        ends=("<|tool_calls_section_end|>",),
        shape=NamedJson(
            separators=("<|tool_call_argument_begin|>",),
            header=r"(?P<id>(?:functions\.)?(?P<name>[A-Za-z_][^\s:]*)(?::\d+)?)",
            written="NAME:NUMBER<|tool_call_argument_begin|>",
        ),
        ids="kimi",
        signs=(("<|tool_calls_section_begin|>",),),
        layout=Layout(
            begin="<|tool_calls_section_begin|>",
            open="<|tool_call_begin|>functions.",
            close="<|tool_call_end|>",
            end="<|tool_calls_section_end|>",
        ),
    ),
    ToolFormat(
        name="kimi_k3",
        begins=("<|open|>tools<|sep|>",),
        opens=("<|open|>call tool=",),
        closes=("<|close|>call<|sep|>",),
        ends=("<|close|>tools<|sep|>",),
        drops=("<|open|>response<|sep|>", "<|close|>response<|sep|>"),
        shape=TaggedCall(
            name_end="<|sep|>",
            parameter="<|open|>argument key=",
            key_end="<|sep|>",
            value_end="<|close|>argument<|sep|>",
            written='"NAME" index="NUMBER"<|sep|>',
            written_parameter=(
                '<|open|>argument key="KEY" type="TYPE"<|sep|>VALUE<|close|>argument<|sep|>'
            ),
        ),
        signs=(("<|open|>", "<|sep|>"),),
        layout=Layout(
            begin="<|open|>tools<|sep|>",
            open="<|open|>call tool=",
            close="<|close|>call<|sep|>",
            end="<|close|>tools<|sep|>",
        ),
    ),
    ToolFormat(
        name="minimax_m3",
        begins=("]<]minimax[>[<minimax:tool_call>", "]<]minimax[>[<tool_call>"),
        opens=("]<]minimax[>[<invoke name=",),
        closes=("]<]minimax[>[</invoke>",),
        ends=("]<]minimax[>[</minimax:tool_call>", "]<]minimax[>[</tool_call>"),
        shape=ElementCall(prefix="]<]minimax[>["),
        signs=(("]<]minimax[>[",),),
        layout=Layout(
            begin="]<]minimax[>[<tool_call>",
            open="]<]minimax[>[<invoke name=",
            close="]<]minimax[>[</invoke>",
            end="]<]minimax[>[</tool_call>",
        ),
    ),
    ToolFormat(
        name="minimax_m2",
        begins=("<minimax:tool_call>",),
        opens=("<invoke name=",),
        closes=("</invoke>",),
        ends=("</minimax:tool_call>",),
        shape=_INVOKE_TAGS,
        signs=(("<minimax:tool_call>",),),
        aliases=("minimax",),
        layout=Layout(
            begin="<minimax:tool_call>\n",
            open="<invoke name=",
            close="</invoke>\n",
            end="</minimax:tool_call>",
        ),
    ),
    ToolFormat(
        name="seed_oss",
        begins=("<seed:tool_call>",),
        opens=("<function=",),
        closes=("</function>",),
        ends=("</seed:tool_call>",),
        shape=_QWEN_TAGS,
        signs=(("<seed:tool_call>",),),
        layout=Layout(
            open="<seed:tool_call>\n<function=",
            close="</function>\n</seed:tool_call>",
            joint="\n",
        ),
    ),
    ToolFormat(
        name="hy_v3",
        begins=("<tool_calls>",),
        opens=("<tool_call>",),
        closes=("</tool_call>",),
        ends=("</tool_calls>",),
        shape=TaggedCall(
            name_end="<tool_sep>",
            parameter="<arg_key>",
            key_end="</arg_key>",
            value_begin="<arg_value>",
            value_end="</arg_value>",
            written="NAME<tool_sep>",
            written_parameter="<arg_key>KEY</arg_key><arg_value>VALUE</arg_value>",
        ),
        signs=(("<tool_sep>", "<arg_key>"),),
        aliases=("hunyuan_v3",),
        layout=Layout(
            begin="<tool_calls>", open="<tool_call>", close="</tool_call>", end="</tool_calls>"
        ),
    ),
    ToolFormat(
        name="glm45",
        opens=("<tool_call>",),
        closes=("</tool_call>",),
        shape=TaggedCall(
            name_end="\n",
            parameter="<arg_key>",
            key_end="</arg_key>",
            value_begin="<arg_value>",
            value_end="</arg_value>",
            written="NAME\n",
            written_parameter="<arg_key>KEY</arg_key>\n<arg_value>VALUE</arg_value>\n",
        ),
        signs=(("<arg_key>", "<tool_call>"),),
        aliases=("glm47", "glm4_moe", "ling3"),
        layout=Layout(open="<tool_call>", close="</tool_call>", joint="\n"),
    ),
    ToolFormat(
        name="qwen3_xml",
        begins=("<tool_call>",),
        opens=("<function=",),
        closes=("</function>",),
        ends=("</tool_call>",),
        shape=_QWEN_TAGS,
        signs=(("<function=", "<parameter="),),
        aliases=("qwen3_coder", "step3p5", "mimo", "nemotron_v3"),
        layout=Layout(
            open="<tool_call>\n<function=", close="</function>\n</tool_call>", joint="\n"
        ),
    ),
    ToolFormat(
        name="mistral",
        opens=("[TOOL_CALLS]",),
        shape=NamedJson(
            separators=("[ARGS]", "{"),
            header=r"(?P<name>[^\s{}\[\]]+)",
            id_marker="[CALL_ID]",
            is_object_taken=True,
            written="NAME[ARGS]",
        ),
        ids="alphanumeric",
        signs=(("[TOOL_CALLS]",),),
        layout=Layout(open="[TOOL_CALLS]"),
    ),
    ToolFormat(
        name="gemma4",
        opens=("<|tool_call>",),
        closes=("<tool_call|>",),
        shape=BraceCall(quote='<|"|>'),
        signs=(("<|tool_call>",),),
        layout=Layout(open="<|tool_call>", close="<tool_call|>"),
    ),
    ToolFormat(
        name="granite",
        opens=("<|tool_call|>", "<tool_call>"),
        closes=("</tool_call>",),
        shape=_JSON,
        signs=(("<|tool_call|>",), ("<|start_of_role|>", "<tool_call>[")),
        layout=Layout(begin="<|tool_call|>[", end="]", joint=", "),
    ),
    ToolFormat(
        name="granite-20b-fc",
        opens=("<function_call>",),
        shape=_JSON,
        signs=(("<function_call>",),),
        layout=Layout(open="<function_call> ", joint="\n"),
    ),
    ToolFormat(
        name="hunyuan_a13b",
        opens=("<tool_calls>",),
        closes=("</tool_calls>",),
        shape=_JSON,
        signs=(("<tool_calls>",),),
        layout=Layout(begin="<tool_calls>[", end="]</tool_calls>", joint=", "),
    ),
    ToolFormat(
        name="longcat",
        opens=("<longcat_tool_call>",),
        closes=("</longcat_tool_call>",),
        shape=_JSON,
        signs=(("<longcat_tool_call>",),),
        layout=Layout(open="<longcat_tool_call>\n", close="\n</longcat_tool_call>", joint="\n"),
    ),
    ToolFormat(
        name="internlm",
        opens=("<|action_start|><|plugin|>",),
        closes=("<|action_end|>",),
        shape=JsonCalls(key="parameters"),
        signs=(("<|action_start|>",),),
        aliases=("internlm2",),
        layout=Layout(open="<|action_start|><|plugin|>", close="<|action_end|>"),
    ),
    ToolFormat(
        name="phi4_mini_json",
        opens=("functools",),
        shape=_JSON,
        signs=(("functools",),),
        aliases=("phi4_mini",),
        layout=Layout(begin="functools[", end="]", joint=", "),
    ),
    ToolFormat(
        name="lfm2",
        opens=("<|tool_call_start|>",),
        closes=("<|tool_call_end|>",),
        shape=PythonCalls(),
        signs=(("<|tool_call_start|>",),),
        layout=Layout(begin="<|tool_call_start|>[", end="]<|tool_call_end|>", joint=", "),
    ),
    ToolFormat(
        name="olmo3",
        opens=("<function_calls>",),
        closes=("</function_calls>",),
        shape=PythonCalls(),
        signs=(("<function_calls>",),),
        layout=Layout(begin="<function_calls>", end="</function_calls>", joint="\n"),
    ),
    ToolFormat(
        name="llama4_pythonic",
        begins=("<|python_start|>",),
        ends=("<|python_end|>",),
        shape=PythonCalls(),
        bare=("[",),
        signs=(("<|python_start|>",), ("<|header_start|>", "<|python_end|>")),
        layout=Layout(begin="<|python_start|>[", end="]<|python_end|>", joint=", "),
    ),
    ToolFormat(
        name="llama3_json",
        begins=("<|python_tag|>",),
        shape=JsonCalls(joined_by=";", key="parameters"),
        bare=("{",),
        signs=(("<|python_tag|>",), ("<|start_header_id|>", '"parameters"')),
        aliases=("llama4_json",),
        layout=Layout(joint="; "),
    ),
    ToolFormat(
        name="pythonic",
        shape=PythonCalls(),
        bare=("[",),
        layout=Layout(begin="[", end="]", joint=", "),
    ),
    ToolFormat(
        name="ernie45",
        opens=("<tool_call>",),
        closes=("</tool_call>",),
        drops=("<response>", "</response>"),
        shape=_JSON,
        signs=(("<tool_call>", "<response>"),),
        layout=_IN_TAGS,
    ),
    ToolFormat(
        name="hermes",
        opens=("<tool_call>",),
        closes=("</tool_call>",),
        shape=_JSON,
        # Small models forget the tags that their templates ask for.
        bare=("{", "```json", "```", "<tools>"),
        signs=(("<tool_call>",),),
        aliases=("qwen3_json", "qwen2_5", "qwen25", "qwen", "granite4"),
        layout=_IN_TAGS,
    ),
)
