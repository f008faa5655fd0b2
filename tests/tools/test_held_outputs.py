"""A model with random weights that is held to a format's calls makes calls, and right ones."""

from __future__ import annotations

from typing import Any

import pytest

from octavo.constraint import StructuredOutputsParams
from octavo.tools.constrained import structural_tag
from octavo.tools.definitions import read_tools, with_choice
from tests.grammar.bytes_model import draw, guide_of, make_guides
from tests.tools.held_tools import HELD, TOOLS, check
from tests.tools.rendering import read


@pytest.mark.parametrize("row", HELD, ids=lambda row: row.name)
def test_whatever_is_drawn_is_a_call(row: Any) -> None:
    guides = make_guides()
    tools = with_choice(read_tools(TOOLS), "required")
    tag = structural_tag(row, tools, has_thought=False)
    wanted, ended = StructuredOutputsParams(structural_tag=tag), 0
    for seed in range(4):
        output = draw(guides, guide_of(guides, wanted), seed, 800)
        assert output.end in ("eos", "over", "cut")
        if output.end == "cut" or "E" in output.text:  # numbers beyond all bounds
            continue
        ended += 1
        answer = read(row.name, [output.text], schemas=dict(tools.schemas or {}))
        assert answer.content == "", output.text
        assert answer.calls
        for name, arguments in answer.calls:
            check(name, arguments)
    assert ended
