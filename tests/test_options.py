"""The list of options is pinned: a new one is a decision, not an accident."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from octavo.cli.options import options_of
from octavo.config import EngineConfig, ServerConfig
from octavo.vllm_table import _TABLE, VLLM_OPTIONS

CONFIGS = (EngineConfig, ServerConfig)
ROOT = Path(__file__).resolve().parents[1]

ENGINE_OPTIONS = """
--tokenizer --revision --download-dir --dtype --activation-dtype --load-format --quantization
--max-model-len --allow-longer-than-trained --max-num-seqs --max-num-batched-tokens --step-stretch
--max-num-queued-requests --block-size --gpu-memory-utilization --kv-cache-memory-bytes
--kv-cache-dtype --prefix-caching --kv-events-config
--tensor-parallel-size --data-parallel-size --enable-expert-parallel --rank-address
--attention-backend
--enforce-eager --deterministic
--device --num-threads
--watchdog-timeout --seed --chat-template --tool-call-parser --reasoning-parser --generation-config
--runner --label-tokens --skip-tokenizer-init
--poison-freed-blocks
""".split()

SERVER_OPTIONS = """
--host --port --api-key --api-key-file --operator-key --operator-key-file --keys --public-metrics
--metrics-port --expert-metrics --otlp-traces-endpoint --otlp-traces-protocol
--otlp-traces-sampling --allow-priority --served-model-name --api-processes
--max-body-bytes --max-prompt-tokens --max-messages
--store-dir --max-store-bytes --allowed-origins
--ssl-certfile --ssl-keyfile --enable-ssl-refresh
--root-path --forwarded-allow-ips
--audit-log --audit-log-text
--guard --guard-url --guard-stages --guard-timeout --guard-fail-open --guard-max-concurrent
--guard-max-waiting --guard-window
--disable-access-log-for-endpoints --log-format
--log-level --disable-log-stats --shutdown-timeout --preemption-notice --debug-loop-holds
""".split()


def test_the_engine_has_these_options_and_no_others():
    assert [option.flag for option in options_of(EngineConfig)] == ENGINE_OPTIONS


def test_the_server_has_these_options_and_no_others():
    assert [option.flag for option in options_of(ServerConfig)] == SERVER_OPTIONS


def test_every_option_says_what_it_does():
    for config in (EngineConfig, ServerConfig):
        for option in options_of(config):
            assert len(option.help) > 8, option.flag


def test_options_of_vllm_are_fields_or_in_the_table_and_never_both():
    flags = {flag for config in CONFIGS for option in options_of(config) for flag in option.flags}
    spellings = [flag for option in VLLM_OPTIONS.values() for flag in (option.flag, *option.short)]
    assert len(spellings) == len(set(spellings))
    assert not flags & set(spellings)
    assert len(VLLM_OPTIONS) == len(_TABLE)


def test_options_of_vllm_give_a_reason_and_say_what_is_so():
    for option in VLLM_OPTIONS.values():
        assert len(option.reason) > 10, option.name
        if option.is_flag and True in option.neutral:
            assert option.note, option.name


def test_the_docs_show_the_options_as_they_are():
    made = subprocess.run(
        [sys.executable, "-m", "docs.make_cli", "--stdout"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    shown = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert shown == made.stdout, "docs/cli.md is out of date: run make docs"
