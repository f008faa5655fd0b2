"""The formats in which models reason: one row each.

Names and aliases are those of vLLM's `--reasoning-parser`. A new format is a row here; rows that
come first are found first in a chat template.
"""

from __future__ import annotations

from octavo.tools.shapes import ReasoningFormat

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
