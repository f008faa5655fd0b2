"""The formats in which models call tools and reason: one row each.

Names and aliases are those of vLLM's `--tool-call-parser` and `--reasoning-parser`. A new format is
a row here; rows that come first are found first in a chat template.
"""

from __future__ import annotations

from octavo.tools import harmony
from octavo.tools.json_calls import JsonCalls, NamedJson
from octavo.tools.nested_calls import BraceCall, ElementCall
from octavo.tools.python_calls import PythonCalls
from octavo.tools.shapes import ReasoningFormat, ToolFormat
from octavo.tools.tagged_calls import TaggedCall

_JSON = JsonCalls()
_QWEN_TAGS = TaggedCall(
    name_end=">",
    parameter="<parameter=",
    key_end=">",
    value_end="</parameter>",
    has_lines=True,
)
_INVOKE_TAGS = TaggedCall(
    name_end=">", parameter="<parameter name=", key_end=">", value_end="</parameter>"
)


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
        ),
        "```json",
    ),
    _deepseek("deepseek_v31", NamedJson(separators=(_DEEPSEEK_SEPARATOR,))),
    ToolFormat(
        name="kimi_k2",
        begins=("<|tool_calls_section_begin|>",),
        opens=("<|tool_call_begin|>",),
        closes=("<|tool_call_end|>",),
        ends=("<|tool_calls_section_end|>",),
        shape=NamedJson(
            separators=("<|tool_call_argument_begin|>",),
            header=r"(?P<id>(?:functions\.)?(?P<name>[A-Za-z_][^\s:]*)(?::\d+)?)",
        ),
        ids="kimi",
        signs=(("<|tool_calls_section_begin|>",),),
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
        ),
        signs=(("<|open|>", "<|sep|>"),),
    ),
    ToolFormat(
        name="minimax_m3",
        begins=("]<]minimax[>[<minimax:tool_call>", "]<]minimax[>[<tool_call>"),
        opens=("]<]minimax[>[<invoke name=",),
        closes=("]<]minimax[>[</invoke>",),
        ends=("]<]minimax[>[</minimax:tool_call>", "]<]minimax[>[</tool_call>"),
        shape=ElementCall(prefix="]<]minimax[>["),
        signs=(("]<]minimax[>[",),),
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
    ),
    ToolFormat(
        name="seed_oss",
        begins=("<seed:tool_call>",),
        opens=("<function=",),
        closes=("</function>",),
        ends=("</seed:tool_call>",),
        shape=_QWEN_TAGS,
        signs=(("<seed:tool_call>",),),
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
        ),
        signs=(("<tool_sep>", "<arg_key>"),),
        aliases=("hunyuan_v3",),
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
        ),
        signs=(("<arg_key>", "<tool_call>"),),
        aliases=("glm47", "glm4_moe", "ling3"),
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
    ),
    ToolFormat(
        name="mistral",
        opens=("[TOOL_CALLS]",),
        shape=NamedJson(
            separators=("[ARGS]", "{"),
            header=r"(?P<name>[^\s{}\[\]]+)",
            id_marker="[CALL_ID]",
            is_object_taken=True,
        ),
        ids="alphanumeric",
        signs=(("[TOOL_CALLS]",),),
    ),
    ToolFormat(
        name="gemma4",
        opens=("<|tool_call>",),
        closes=("<tool_call|>",),
        shape=BraceCall(quote='<|"|>'),
        signs=(("<|tool_call>",),),
    ),
    ToolFormat(
        name="granite",
        opens=("<|tool_call|>", "<tool_call>"),
        closes=("</tool_call>",),
        shape=_JSON,
        signs=(("<|tool_call|>",), ("<|start_of_role|>", "<tool_call>[")),
    ),
    ToolFormat(
        name="granite-20b-fc",
        opens=("<function_call>",),
        shape=_JSON,
        signs=(("<function_call>",),),
    ),
    ToolFormat(
        name="hunyuan_a13b",
        opens=("<tool_calls>",),
        closes=("</tool_calls>",),
        shape=_JSON,
        signs=(("<tool_calls>",),),
    ),
    ToolFormat(
        name="longcat",
        opens=("<longcat_tool_call>",),
        closes=("</longcat_tool_call>",),
        shape=_JSON,
        signs=(("<longcat_tool_call>",),),
    ),
    ToolFormat(
        name="internlm",
        opens=("<|action_start|><|plugin|>",),
        closes=("<|action_end|>",),
        shape=_JSON,
        signs=(("<|action_start|>",),),
        aliases=("internlm2",),
    ),
    ToolFormat(
        name="phi4_mini_json",
        opens=("functools",),
        shape=_JSON,
        signs=(("functools",),),
        aliases=("phi4_mini",),
    ),
    ToolFormat(
        name="lfm2",
        opens=("<|tool_call_start|>",),
        closes=("<|tool_call_end|>",),
        shape=PythonCalls(),
        signs=(("<|tool_call_start|>",),),
    ),
    ToolFormat(
        name="olmo3",
        opens=("<function_calls>",),
        closes=("</function_calls>",),
        shape=PythonCalls(),
        signs=(("<function_calls>",),),
    ),
    ToolFormat(
        name="llama4_pythonic",
        begins=("<|python_start|>",),
        ends=("<|python_end|>",),
        shape=PythonCalls(),
        bare=("[",),
        signs=(("<|python_start|>",), ("<|header_start|>", "<|python_end|>")),
    ),
    ToolFormat(
        name="llama3_json",
        begins=("<|python_tag|>",),
        shape=JsonCalls(joined_by=";"),
        bare=("{",),
        signs=(("<|python_tag|>",), ("<|start_header_id|>", '"parameters"')),
        aliases=("llama4_json",),
    ),
    ToolFormat(name="pythonic", shape=PythonCalls(), bare=("[",)),
    ToolFormat(
        name="ernie45",
        opens=("<tool_call>",),
        closes=("</tool_call>",),
        drops=("<response>", "</response>"),
        shape=_JSON,
        signs=(("<tool_call>", "<response>"),),
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
    ),
)

REASONING_FORMATS: tuple[ReasoningFormat, ...] = (
    ReasoningFormat(
        name="openai_gptoss",
        begins=(),
        ends=(),
        tokens=(("<|channel|>", "analysis"), ("<|end|>", "<|call|>", "<|return|>")),
        signs=(("<|channel|>", "<|message|>", "analysis"),),
        aliases=("openai", "gpt_oss", "harmony"),
    ),
    ReasoningFormat(
        name="kimi_k3",
        begins=("<|open|>think<|sep|>",),
        ends=("<|close|>think<|sep|>",),
        drops=("<|open|>response<|sep|>", "<|close|>response<|sep|>"),
        signs=(("<|open|>think",),),
    ),
    ReasoningFormat(
        name="minimax_m3",
        begins=("<mm:think>",),
        ends=("</mm:think>",),
        signs=(("<mm:think>",),),
    ),
    ReasoningFormat(
        name="seed_oss",
        begins=("<seed:think>",),
        ends=("</seed:think>",),
        signs=(("<seed:think>",),),
    ),
    ReasoningFormat(name="mistral", begins=("[THINK]",), ends=("[/THINK]",), signs=(("[THINK]",),)),
    ReasoningFormat(
        name="gemma4",
        begins=("<|channel>thought",),
        ends=("<channel|>",),
        signs=(("<|channel>thought",),),
    ),
    ReasoningFormat(
        name="cohere",
        begins=("<|START_THINKING|>",),
        ends=("<|END_THINKING|>",),
        drops=("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
        signs=(("<|START_THINKING|>",),),
    ),
    ReasoningFormat(
        name="apertus",
        begins=("<|inner_prefix|>",),
        ends=("<|inner_suffix|>",),
        signs=(("<|inner_prefix|>",),),
    ),
    ReasoningFormat(
        name="kimi_vl",
        begins=("\u25c1think\u25b7",),
        ends=("\u25c1/think\u25b7",),
        signs=(("\u25c1think\u25b7",),),
    ),
    ReasoningFormat(
        name="ernie45",
        drops=("<response>", "</response>"),
        signs=(("<think>", "<response>"),),
    ),
    ReasoningFormat(
        name="hunyuan_a13b",
        begins=("<think>",),
        ends=("</think>",),
        drops=("<answer>", "</answer>"),
        signs=(("<think>", "<answer>"),),
    ),
    ReasoningFormat(name="deepseek_r1", starts_inside=True, aliases=("minimax_m2",)),
    ReasoningFormat(
        name="qwen3",
        signs=(("</think>",),),
        aliases=(
            *("glm45", "glm47", "deepseek_v3", "deepseek_v31", "deepseek_v32", "deepseek_v4"),
            *("kimi_k2", "hy_v3", "nemotron_v3", "step3", "step3p5", "mimo", "olmo3", "granite"),
            *("holo2", "ling3", "longcat", "think"),
        ),
    ),
)
