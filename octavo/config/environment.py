"""The only environment variables that Octavo reads, and the folders that follow from them.

Called by whoever keeps files. Never makes a folder.
"""

from __future__ import annotations

import os

from octavo.errors import ConfigError

MIN_KEY_LENGTH = 16


def environment_keys(name: str) -> str | None:
    """Returns what OCTAVO_API_KEY or OCTAVO_OPERATOR_KEY says; `name` is the option's."""
    return os.environ.get(f"OCTAVO_{name.upper()}")


def rank_key() -> bytes:
    """Returns what lets ranks of `octavo rank` in: OCTAVO_RANK_KEY. Raises ConfigError."""
    key = os.environ.get("OCTAVO_RANK_KEY", "")
    if len(key) < MIN_KEY_LENGTH:
        raise ConfigError(
            f"OCTAVO_RANK_KEY must have {MIN_KEY_LENGTH} characters or more, the same for octavo "
            "serve and octavo rank: whoever knows it can run code in the ranks. `openssl rand -hex "
            "32` makes one",
            field="rank_address",
        )
    return key.encode()


def cache_dir() -> str:
    """Where Octavo keeps what it makes: OCTAVO_CACHE, else XDG_CACHE_HOME/octavo, else ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.environ.get("OCTAVO_CACHE") or os.path.join(base, "octavo")


def tuned_dir() -> str:
    """Where `octavo tune` leaves launch shapes and the engine looks for them."""
    return os.path.join(cache_dir(), "tuned")


def bench_dir() -> str:
    """Where `octavo bench --keep` leaves its lines and `octavo plan --price` looks for them."""
    return os.path.join(cache_dir(), "bench")


def store_dir() -> str:
    """Where a server keeps what clients leave with it: XDG_DATA_HOME/octavo/store, else
    ~/.local/share. No cache: it cannot be made again."""
    home = os.path.expanduser("~")
    base = os.environ.get("XDG_DATA_HOME") or os.path.join(home, ".local", "share")
    return os.path.join(base, "octavo", "store")


def forbid_multicast() -> None:
    """Keeps torch from asking GPUs for memory that one write reaches on all of them."""
    os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
