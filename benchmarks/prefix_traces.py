"""Traces of prompts that have prefixes in common, for simulations of prefix caches.

A prompt is a row of texts, told by length and name: equal names are equal texts. What each trace
stands for is said by its function; all are drawn from the given source alone.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

BLOCK = 16
SYSTEMS, DOCUMENTS, QUESTIONS = 8, 60, 25
SYSTEM_TOKENS, DOCUMENT_TOKENS, QUESTION_TOKENS, OUTPUT_TOKENS = 256, 1024, 56, 16
PROMPT_TOKENS = SYSTEM_TOKENS + DOCUMENT_TOKENS + QUESTION_TOKENS
NUM_REQUESTS = 2000
Question = tuple[int, int, int, int]
"""Era, system prompt, document and question."""


class Text(NamedTuple):
    length: int
    name: object


class Asked(NamedTuple):
    prompt: tuple[Text, ...]
    output: Text

    @property
    def prompt_tokens(self) -> int:
        return sum(text.length for text in self.prompt)


class Chain(NamedTuple):
    """A request in blocks."""

    blocks: tuple[int, ...]
    """One number for each prefix of whole blocks, its output's last."""
    prompt_tokens: int

    @property
    def num_findable(self) -> int:
        """Blocks that may hit: the last token of a prompt is always left to compute."""
        return (self.prompt_tokens - 1) // BLOCK


@lru_cache(maxsize=1 << 16)
def ids_of(text: Text) -> array[int]:
    rng = random.Random(repr(text.name))
    return array("i", [rng.randrange(50_000) for _ in range(text.length)])


def tokens_of(asked: Asked) -> array[int]:
    """Returns ids of prompt and output: equal exactly where both come from the same texts."""
    ids = array("i")
    for text in (*asked.prompt, asked.output):
        ids.extend(ids_of(text))
    return ids


def chains_of(trace: Sequence[Asked]) -> list[Chain]:
    """Numbers the distinct prefixes of all requests, in whole blocks."""
    numbers: dict[tuple[int, bytes], int] = {}
    found = []
    for asked in trace:
        ids, blocks, parent = tokens_of(asked), [], -1
        for start in range(0, len(ids) // BLOCK * BLOCK, BLOCK):
            key = (parent, ids[start : start + BLOCK].tobytes())
            parent = numbers.setdefault(key, len(numbers))
            blocks.append(parent)
        found.append(Chain(tuple(blocks), asked.prompt_tokens))
    return found


@lru_cache
def _zipf_weights(count: int) -> list[float]:
    return list(accumulate(1 / rank for rank in range(1, count + 1)))


def zipf(rng: random.Random, count: int) -> int:
    return rng.choices(range(count), cum_weights=_zipf_weights(count))[0]


def questions(rng: random.Random, count: int, era: int) -> Iterator[Question]:
    for _ in range(count):
        yield era, zipf(rng, SYSTEMS), zipf(rng, DOCUMENTS), zipf(rng, QUESTIONS)


def question(asked: Question, place: int) -> Asked:
    """Returns a question about a document under a system prompt, request `place` of its trace."""
    era, system, document, _ = asked
    prompt = (
        Text(SYSTEM_TOKENS, (era, system)),
        Text(DOCUMENT_TOKENS, (era, system, document)),
        Text(QUESTION_TOKENS, asked),
    )
    return Asked(prompt, Text(OUTPUT_TOKENS, (*asked, place)))


def zipf_questions(rng: random.Random) -> list[Asked]:
    """Questions about documents under system prompts, all by Zipf's law."""
    asked = questions(rng, NUM_REQUESTS, 0)
    return [question(one, place) for place, one in enumerate(asked)]


def reuse_ends(rng: random.Random) -> list[Asked]:
    """As `zipf_questions`; half-way all prompts change, and what was useful until then is dead."""
    half = NUM_REQUESTS // 2
    asked = [*questions(rng, half, 0), *questions(rng, half, 1)]
    return [question(one, place) for place, one in enumerate(asked)]


def shifting(rng: random.Random) -> list[Asked]:
    """Which documents are popular is drawn anew every 250 requests."""
    found, count = [], SYSTEMS * DOCUMENTS
    ranks = list(range(count))
    for place in range(NUM_REQUESTS):
        if place % 250 == 0:
            rng.shuffle(ranks)
        system, document = divmod(ranks[zipf(rng, count)], DOCUMENTS)
        found.append(question((0, system, document, zipf(rng, QUESTIONS)), place))
    return found


def drifting(rng: random.Random) -> list[Asked]:
    """Every other request, one of the popular documents changes places with any."""
    found, count = [], SYSTEMS * DOCUMENTS
    ranks = list(range(count))
    rng.shuffle(ranks)
    for place in range(NUM_REQUESTS):
        if place % 2 == 0:
            one, other = zipf(rng, count), rng.randrange(count)
            ranks[one], ranks[other] = ranks[other], ranks[one]
        system, document = divmod(ranks[zipf(rng, count)], DOCUMENTS)
        found.append(question((0, system, document, zipf(rng, QUESTIONS)), place))
    return found


def scan(rng: random.Random) -> list[Asked]:
    """Every other request is of a hot set, the rest are documents that come once."""
    found = []
    for place in range(NUM_REQUESTS):
        is_hot = rng.random() < 0.5
        asked = (0, 0, zipf(rng, DOCUMENTS), zipf(rng, QUESTIONS)) if is_hot else (1, 0, place, 0)
        found.append(question(asked, place))
    return found


def loop(rng: random.Random) -> list[Asked]:
    """120 documents in turns, a new question to each."""
    return [question((0, 0, place % 120, place), place) for place in range(NUM_REQUESTS)]


def chats(rng: random.Random, talking: int = 60) -> list[Asked]:
    """Conversations under 4 system prompts; the one that spoke last goes on soonest, and every
    eighth turn is the last of its conversation."""
    found: list[Asked] = []
    talks: list[tuple[int, list[Text]]] = []
    count = 0
    while len(found) < NUM_REQUESTS:
        while len(talks) < talking:
            talks.append((count, [Text(SYSTEM_TOKENS, ("system", count % 4))]))
            count += 1
        talk, texts = talks.pop(min(int(rng.expovariate(1 / 12)), talking - 1))
        texts.append(Text(rng.randrange(40, 400), ("turn", talk, len(texts))))
        answer = Text(rng.randrange(50, 400), ("answer", talk, len(texts)))
        found.append(Asked(tuple(texts), answer))
        texts.append(answer)
        if rng.random() < 7 / 8:
            talks.insert(0, (talk, texts))
    return found


def agents(rng: random.Random, working: int = 24) -> list[Asked]:
    """Agents with one system prompt of 2,048 tokens; each makes 4 to 23 steps, whose results its
    context keeps, in no order among each other."""
    found: list[Asked] = []
    active: list[tuple[int, int, list[Text]]] = []
    count = 0
    while len(found) < NUM_REQUESTS:
        while len(active) < working:
            texts = [Text(2048, "system"), Text(200, ("task", count))]
            active.append((count, rng.randrange(4, 24), texts))
            count += 1
        place = rng.randrange(working)
        agent, steps, texts = active.pop(place)
        call = Text(60, ("call", agent, steps))
        found.append(Asked(tuple(texts), call))
        texts += [call, Text(rng.randrange(100, 600), ("result", agent, steps))]
        if steps > 1:
            active.append((agent, steps - 1, texts))
    return found


def bursts(rng: random.Random) -> list[Asked]:
    """Ten documents at a time get 1 to 19 questions each, and then none ever again."""
    found: list[Asked] = []
    live: list[tuple[int, int]] = []
    count = 0
    while len(found) < NUM_REQUESTS:
        while len(live) < 10:
            live.append((count, rng.randrange(1, 20)))
            count += 1
        document, left = live.pop(rng.randrange(10))
        place = len(found)
        found.append(question((0, document % SYSTEMS, document, place), place))
        if left > 1:
            live.append((document, left - 1))
    return found


def tenants(rng: random.Random) -> list[Asked]:
    """Zipf's questions, chats, a scan and agents beside each other."""
    once = [question((9, 0, place, 0), place) for place in range(NUM_REQUESTS)]
    sources = [zipf_questions(rng), chats(rng, 30), once, agents(rng, 8)]
    each = [iter(source) for source in sources]
    shares = (0.4, 0.25, 0.2, 0.15)
    return [next(rng.choices(each, shares)[0]) for _ in range(NUM_REQUESTS)]


TRACES: dict[str, tuple[Callable[[random.Random], list[Asked]], int]] = {
    "zipf": (zipf_questions, 3),
    "reuse_ends": (reuse_ends, 3),
    "shifting": (shifting, 3),
    "drifting": (drifting, 3),
    "scan": (scan, 16),
    "loop": (loop, 3),
    "chats": (chats, 8),
    "agents": (agents, 10),
    "bursts": (bursts, 24),
    "tenants": (tenants, 3),
}
"""And of how many distinct blocks of its prompts the cache keeps one."""
