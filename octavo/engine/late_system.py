"""Owns what becomes of a system's words within a conversation, where a template takes none there.

Called by `chat_template`. They stay where they stand: moved to the top they would change the prompt
from its beginning on, and nothing of it would be found in the prefix cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from octavo.errors import ChatTemplateError

Message = Mapping[str, Any]
_TEXTS = ("octavo-first", "octavo-asks", "octavo-says", "octavo-late", "octavo-next")
_ROLES = ("system", "user", "assistant", "system", "user")


def has_late_system(messages: Sequence[Message]) -> bool:
    """Whether a system speaks within the conversation."""
    return any(message.get("role") == "system" for message in messages[1:])


def keeps_late_system(render: Callable[[Sequence[Message]], str]) -> bool:
    """Whether a template writes a system's words where they stand, told by a conversation.

    Also as the last ones: else the same words would be the user's first, and the system's later."""
    messages = [{"role": r, "content": t} for r, t in zip(_ROLES, _TEXTS, strict=True)]
    try:
        render(messages[:-1])
        text = render(messages)
    except ChatTemplateError:
        return False
    places = [text.find(one) for one in _TEXTS]
    return places[0] >= 0 and places == sorted(places)


def as_users_words(messages: Sequence[Message]) -> list[Message]:
    """Returns the messages with a late system's words as the user's; messages of the user that so
    stand beside each other are one, since templates want turns."""
    found: list[Message] = []
    was_system = False
    for place, message in enumerate(messages):
        is_system = place > 0 and message.get("role") == "system"
        if is_system:
            text = f"<system>\n{message.get('content') or ''}\n</system>"
            message = {"role": "user", "content": text}
        joins = (is_system or was_system) and message.get("role") == "user"
        if joins and found and found[-1].get("role") == "user":
            before = found.pop()
            content = f"{before.get('content') or ''}\n{message.get('content') or ''}"
            message = {**before, "content": content}
        found.append(message)
        was_system = is_system
    return found
