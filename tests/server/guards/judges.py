"""Guards as operators write them, for the tests; each test's server imports one by its name."""

from __future__ import annotations

import asyncio
import threading
import time

from octavo.guard import GuardCheck, Refuse, Rewrite, Verdict

SEEN: list[GuardCheck] = []
RELEASE = threading.Event()


def watcher(check: GuardCheck) -> None:
    """Allows everything, and remembers it."""
    SEEN.append(check)


async def strict(check: GuardCheck) -> Verdict:
    """Refuses what has the word bad, and writes XX for secret."""
    SEEN.append(check)
    texts = [one.text for one in check.texts]
    if any("bad" in check.before[-2:] + text for text in texts):
        return Refuse("a bad word")
    if check.stage == "input" and all("secret" not in text for text in texts):
        return None
    return Rewrite([text.replace("secret", "XX") for text in texts])


def strict_in_a_thread(check: GuardCheck) -> Verdict:
    return asyncio.run(strict(check))


def hanging(check: GuardCheck) -> None:
    """Blocks its thread until it is released."""
    SEEN.append(check)
    RELEASE.wait(30)


async def hanging_async(check: GuardCheck) -> None:
    SEEN.append(check)
    await asyncio.sleep(30)


async def slow(check: GuardCheck) -> None:
    SEEN.append(check)
    await asyncio.sleep(0.01)


def broken(check: GuardCheck) -> Verdict:
    raise ValueError("no judgement")


def quoting(check: GuardCheck) -> Verdict:
    raise ValueError(f"cannot judge {check.texts[0].text}")


async def quoting_async(check: GuardCheck) -> Verdict:
    return quoting(check)


def silent(check: GuardCheck) -> Verdict:
    """Refuses without a reason."""
    return Refuse("")


def senseless(check: GuardCheck) -> object:
    return "yes"


async def cancelled(check: GuardCheck) -> Verdict:
    raise asyncio.CancelledError


def too_many(check: GuardCheck) -> Verdict:
    return Rewrite([*(one.text for one in check.texts), "and more"])


NOT_A_FUNCTION = time.time()
