"""Recent prompts: few are kept, and the nearest is what comparing all would find."""

from __future__ import annotations

from array import array

from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.kv_cache.prefix_index import Digester
from octavo.kv_cache.recent_prompts import RecentPrompt, RecentPrompts

SIZE = 4
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=40)


def digests_of(root: bytes, ids: array[int]) -> list[bytes]:
    digests: list[bytes] = []
    Digester().extend(digests, root, ids, SIZE)
    return digests


def prompt(tokens: list[int], root: bytes = b"root", tenant: str = "a") -> RecentPrompt:
    ids = array("i", tokens)
    digests = digests_of(root, ids)
    return RecentPrompt(tenant, root, ids, digests, len(digests))


def shared(first: list[int], second: list[int]) -> int:
    count = min(len(first), len(second))
    return next((n for n in range(count) if first[n] != second[n]), count)


@settings(max_examples=60, deadline=None)
@given(st.lists(TOKENS, max_size=12), TOKENS)
def test_the_nearest_of_all_is_found_though_few_are_kept(
    given_prompts: list[list[int]], asked: list[int]
) -> None:
    recent = RecentPrompts()
    for tokens in given_prompts:
        recent.remember(prompt(tokens))
    kept = recent.of_root(b"root")
    assert len(kept) == len(recent)
    assert recent.num_tokens == sum(len(one.token_ids) for one in kept)
    for one in kept:  # what another continues is not kept twice
        assert not any(other.continues(one) for other in kept if other is not one)
    ids = array("i", asked)
    digests = digests_of(b"root", ids)
    found = max((one.num_shared(ids, digests, SIZE) for one in kept), default=0)
    whole = [tokens for tokens in given_prompts if len(tokens) >= SIZE]
    best = max((shared(tokens, asked) for tokens in whole), default=0)
    # All full blocks are found; of a tail that nobody kept, fewer than a block is lost.
    assert best - SIZE < found <= best or found == best


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(TOKENS, st.integers(0, 2)), max_size=30))
def test_what_is_remembered_is_bounded(given_prompts: list[tuple[list[int], int]]) -> None:
    recent = RecentPrompts(max_tokens=100, max_prompts=3)
    for tokens, root in given_prompts:
        recent.remember(prompt(tokens, bytes([root]), "ab"[root % 2]))
        assert recent.num_tokens <= 100
        assert all(len(recent.of_root(bytes([one]))) <= 3 for one in range(3))
    for one in recent.of_other_roots("a", bytes([0])):
        assert (one.tenant, one.root) == ("a", bytes([2]))
    recent.clear()
    assert len(recent) == recent.num_tokens == 0
    assert recent.of_root(bytes([0])) == []
