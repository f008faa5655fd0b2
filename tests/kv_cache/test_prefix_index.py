"""Keys of the prefix cache: nothing but equal prefixes of one tenant can meet."""

from __future__ import annotations

from array import array

from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.kv_cache.block_pool import NULL_BLOCK, BlockKey
from octavo.kv_cache.prefix_index import Digester, PrefixIndex, prefix_root

TOKENS = st.lists(st.integers(0, 3), max_size=40)


def digests(token_ids: list[int], root: bytes = b"root") -> list[bytes]:
    found: list[bytes] = []
    Digester().extend(found, root, array("i", token_ids), 4)
    return found


@given(TOKENS, TOKENS)
def test_two_digests_are_equal_exactly_when_all_tokens_up_to_there_are(
    one: list[int], other: list[int]
) -> None:
    for i, (a, b) in enumerate(zip(digests(one), digests(other), strict=False)):
        assert (a == b) == (one[: 4 * i + 4] == other[: 4 * i + 4])


@given(TOKENS, st.integers(0, 40))
def test_digests_do_not_depend_on_how_the_tokens_arrived(token_ids: list[int], cut: int) -> None:
    found: list[bytes] = []
    Digester().extend(found, b"root", array("i", token_ids[:cut]), 4)
    Digester().extend(found, b"root", array("i", token_ids), 4)
    assert found == digests(token_ids)


@given(st.lists(st.integers(1, 9), max_size=60), st.dictionaries(st.integers(0, 60), st.binary()))
def test_a_sequence_that_grows_gets_the_digests_of_its_whole(
    steps: list[int], extras: dict[int, bytes]
) -> None:
    token_ids = array("i", (i * i % 97 for i in range(sum(steps) * 4)))
    grown: list[bytes] = []
    whole: list[bytes] = []
    length = 0
    for step in steps:
        length += 4 * step
        Digester().extend(grown, b"root", token_ids[:length], 4, extras)
    Digester().extend(whole, b"root", token_ids, 4, extras)
    assert grown == whole
    assert len(set(whole)) == len(token_ids) // 4


@given(st.integers(0, 79), st.integers(1, 80))
def test_an_extra_changes_the_digests_from_its_block_on(block: int, count: int) -> None:
    token_ids = array("i", range(4 * count))
    plain: list[bytes] = []
    other: list[bytes] = []
    Digester().extend(plain, b"root", token_ids, 4)
    Digester().extend(other, b"root", token_ids, 4, {block: b"an image"})
    changed = [a != b for a, b in zip(plain, other, strict=True)]
    assert changed == [index >= block for index in range(count)]


@given(st.text(), st.text(), st.text(), st.text())
def test_roots_differ_unless_every_tagged_field_is_equal(a: str, b: str, c: str, d: str) -> None:
    equal = prefix_root(model=a, salt=b) == prefix_root(model=c, salt=d)
    assert equal == ((a, b) == (c, d))


def test_a_digest_moved_to_another_field_is_another_root() -> None:
    assert prefix_root(salt="x") != prefix_root(adapter="x")


def test_each_miss_has_its_reason() -> None:
    index = PrefixIndex(1)
    key = BlockKey(0, b"digest")
    assert index.miss_reason(b"digest", 7, b"root", was_evicted=False) == "never_seen"
    assert index.insert(key, 3, 7, b"root")
    assert not index.insert(key, 4, 7, b"root"), "the first holder of a key keeps it"
    assert index.miss_reason(b"other", 7, b"another root", was_evicted=False) == "other_tenant"
    index.remove(key)
    assert index.find_all(0, [b"digest"], 1).tolist() == [NULL_BLOCK]
    assert index.miss_reason(b"digest", 7, b"root", was_evicted=True) == "evicted"
    assert index.miss_reason(b"digest", 7, b"root", was_evicted=False) == "never_seen"
    assert index.insert(key, 3, 7, b"root")
    index.clear()
    assert index.miss_reason(b"digest", 7, b"root", was_evicted=False) == "evicted"


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 700)), min_size=1, max_size=8))
def test_remembered_pieces_give_the_digests_of_new_ones(turns: list[tuple[int, int]]) -> None:
    digester = Digester()
    for root, length in turns:
        token_ids = array("i", (i * i % 97 for i in range(length)))
        found: list[bytes] = []
        expected: list[bytes] = []
        digester.extend(found, bytes([root]), token_ids, 4)
        Digester().extend(expected, bytes([root]), token_ids, 4)
        assert found == expected
        assert len(set(found)) == length // 4


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 1), st.integers(0, 900), st.integers(0, 900), st.integers(0, 64)),
        min_size=1,
        max_size=6,
    )
)
def test_a_long_prompt_is_compared_with_the_one_before_it_and_gets_its_own_digests(
    turns: list[tuple[int, int, int, int]],
) -> None:
    digester = Digester()
    for root, length, changed, first in turns:
        token_ids = array("i", (i * i % 97 for i in range(length)))
        if changed < length:
            token_ids[changed] = 100
        found: list[bytes] = []
        digester.extend(found, bytes([root]), token_ids, 4, most=first)
        assert len(found) == min(first, length // 4)
        digester.extend(found, bytes([root]), token_ids, 4)
        expected: list[bytes] = []
        Digester().extend(expected, bytes([root]), token_ids, 4)
        assert found == expected


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), TOKENS), max_size=12))
def test_chains_asked_for_one_after_the_other_are_found_as_alone(
    turns: list[tuple[int, int, list[int]]],
) -> None:
    index, held = PrefixIndex(2), dict[BlockKey, int]()
    for turn, (what, place, token_ids) in enumerate(turns, start=1):
        chain = digests(token_ids)
        key = BlockKey(turn % 2, chain[place]) if place < len(chain) else None
        if what == 1 and key is not None and index.insert(key, turn, 0, b"root"):
            held[key] = turn
        elif what == 2 and key is not None and key in held:
            index.remove(key)
            del held[key]
        elif what == 3:
            index.clear()
            held.clear()
        for group in range(2):
            found = index.find_all(group, chain, len(chain)).tolist()
            assert found == [held.get(BlockKey(group, one), NULL_BLOCK) for one in chain]


EXTRAS = st.dictionaries(st.integers(0, 9), st.binary(min_size=1, max_size=3), max_size=3)


@given(TOKENS, EXTRAS, EXTRAS, st.integers(0, 40))
def test_equal_placeholders_with_other_images_behind_them_never_meet(
    token_ids: list[int], one: dict[int, bytes], other: dict[int, bytes], cut: int
) -> None:
    found: list[list[bytes]] = []
    for extras in (one, other):
        digests, digester = list[bytes](), Digester()
        for ids in (token_ids[:cut], token_ids):
            digester.extend(digests, b"root", array("i", ids), 4, extras)
        found.append(digests)
    for i, (a, b) in enumerate(zip(*found, strict=True)):
        seen = [{k: v for k, v in extras.items() if k <= i} for extras in (one, other)]
        assert (a == b) == (seen[0] == seen[1])


def test_a_prompt_with_an_image_is_not_found_by_its_ids_alone() -> None:
    digester, plain, with_image = Digester(), list[bytes](), list[bytes]()
    token_ids = array("i", [7] * 4 * 64)
    digester.extend(plain, b"root", token_ids, 4)
    digester.extend(with_image, b"root", token_ids, 4, {3: b"image"})
    assert with_image[:3] == plain[:3]
    assert not set(with_image[3:]) & set(plain)
