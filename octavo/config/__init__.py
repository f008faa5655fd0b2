"""Every option of the engine and of the server, and where Octavo keeps files."""

from octavo.config.engine import AttentionConfig, EngineConfig
from octavo.config.environment import bench_dir, cache_dir, store_dir, tuned_dir
from octavo.config.server import ServerConfig

__all__ = [
    "AttentionConfig",
    "EngineConfig",
    "ServerConfig",
    "bench_dir",
    "cache_dir",
    "store_dir",
    "tuned_dir",
]
