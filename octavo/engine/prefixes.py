"""Whose prefix a request's is, as the engine core and the routers of a fleet both need it.

Pure: a front that knows the plan of its engines finds the digests that they will look up.
"""

from __future__ import annotations

from array import array

from octavo.config import EngineConfig
from octavo.kv_cache.hash_memory import hash_of
from octavo.kv_cache.planner import MemoryPlan
from octavo.kv_cache.prefix_index import Digester, prefix_root
from octavo.request import Request
from octavo.weights.hub import ModelFiles


def model_identity(config: EngineConfig, files: ModelFiles) -> str:
    """Returns what names the weights and their version."""
    return f"{files.identity}|{config.dtype}|{config.seed}|{config.quantization}"


def request_root(identity: str, plan: MemoryPlan, salt: str) -> bytes:
    """Returns the parent digest of a request's first block."""
    return prefix_root(
        model=identity,
        kv="; ".join(dict.fromkeys(group.spec.identity for group in plan.groups)),
        block=str(plan.block_size),
        salt=salt,
    )


def is_caching(config: EngineConfig, request: Request) -> bool:
    """Returns whether a request uses the prefix cache."""
    wanted = request.params.prefix_caching
    return wanted == "on" or (wanted != "off" and config.prefix_caching != "off")


class RequestHasher:
    """The hashes of requests' blocks, as engines of one model tell of theirs."""

    def __init__(self, config: EngineConfig, files: ModelFiles, plan: MemoryPlan) -> None:
        self.block_size = plan.block_size
        self.is_off = config.prefix_caching == "off"
        """Whether requests have hashes only where they ask for that themselves."""
        self._config = config
        self._plan = plan
        self._identity = model_identity(config, files)
        self._digester = Digester()

    def hashes(self, request: Request) -> list[int]:
        """Returns one hash for each full block of the prompt; none if it shares none."""
        if not is_caching(self._config, request) or request.needs_all_states:
            return []
        digests: list[bytes] = []
        ids = array("i", request.packed_prompt)
        root = request_root(self._identity, self._plan, request.cache_salt)
        self._digester.extend(digests, root, ids, self.block_size)
        return list(map(hash_of, digests))
