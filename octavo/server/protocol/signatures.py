"""Owns the signatures of thinking blocks: by them a block that comes back is known as ours.

Made by `message_answers`, read by `protocol.message_blocks`. They hold no secret, since any client
of the chat route may send a reasoning: they tell a text that was changed on its way, and the words
of other models. So they outlive restarts and are the same in all front processes and replicas.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import zlib

_OURS = "octavo1."
_PERSON = b"octavo-thinking1"
MAX_THINKING_BYTES = 8 * 2**20
"""Of a text that a signature carries."""


class BrokenSignatureError(ValueError):
    """The signature is ours, but not that of this text."""


def signature_of(thinking: str, *, carries_text: bool = False) -> str:
    """Returns the signature of a block's whole text; with the text in it, for a client that is not
    shown it."""
    data = thinking.encode()
    signature = _OURS + _spelled(_digest(data))
    return f"{signature}.{_spelled(zlib.compress(data))}" if carries_text else signature


def signed_text(thinking: str, signature: str) -> str | None:
    """Returns the text that a block stands for; None if its signature is not one of ours.

    Raises BrokenSignatureError.
    """
    if not signature.startswith(_OURS):
        return None
    digest, _, packed = signature.removeprefix(_OURS).partition(".")
    data = _unpacked(packed) if packed and not thinking else thinking.encode()
    if not hmac.compare_digest(_spelled(_digest(data)).encode(), digest.encode()):
        raise BrokenSignatureError("the signature is not that of the thinking beside it")
    return data.decode()


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16, person=_PERSON).digest()


def _spelled(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _unpacked(packed: str) -> bytes:
    try:
        data = base64.b64decode(packed + "=" * (-len(packed) % 4), altchars=b"-_", validate=True)
        unpacking = zlib.decompressobj()
        text = unpacking.decompress(data, MAX_THINKING_BYTES)
    except (ValueError, zlib.error) as error:
        raise BrokenSignatureError("the signature is damaged") from error
    if unpacking.unconsumed_tail:
        raise BrokenSignatureError(f"the signature holds more than {MAX_THINKING_BYTES} bytes")
    return text
