"""What vLLM's users type: accepted where it is so anyway, else refused by name and reason."""

from __future__ import annotations

import logging
from dataclasses import fields as fields_of
from typing import Any

import pytest

from octavo import LLM
from octavo.cli import main
from octavo.cli.commands import build_parser
from octavo.config import EngineConfig, ServerConfig
from octavo.errors import ConfigError
from octavo.vllm_options import SYNONYMS, log_verdicts, nearest, read_options

SO_ANYWAY = """
--trust-remote-code | --no-trust-remote-code | --enable-chunked-prefill | --disable-log-requests
--swap-space 0 | --swap-space 0.0 | --cpu-offload-gb 0 | --no-enable-lora
--no-enable-eplb
--async-scheduling | --scheduling-policy fcfs | -pp 1 | --pipeline-parallel-size 1 | -dpl 1
--task generate | --convert none | --tokenizer-mode auto | --model-impl auto
--disable-custom-all-reduce | --enable-prompt-tokens-details | --enable-request-id-headers
--prefix-caching-hash-algo sha256 | --response-role assistant | --guided-decoding-backend auto
--allowed-methods ["*"] | --hf-overrides {} | --max-logprobs 100 | --config-format hf
--num-scheduler-steps 1 | --enable-auto-tool-choice | --no-enable-auto-tool-choice
--api-server-count 1
--kv-transfer-config {"kv_connector":"OffloadingConnector","kv_role":"kv_both"}
"""

REFUSED = """
--tool-parser-plugin x.py | --tool-server demo | --reasoning-parser-plugin x.py | --enable-lora
--lora-modules a=b c=d | -pp 2 | --data-parallel-rank 1 | --enable-eplb | --headless
--speculative-config {"model":"x"} | --swap-space 4 | --cpu-offload-gb 8
--collect-detailed-traces x
--no-enable-chunked-prefill | --enable-log-requests | --disable-uvicorn-access-log
--hf-overrides {"a":1} | --override-generation-config {"top_p":0.5} | --num-gpu-blocks-override 9
--max-logprobs 5 | --config c.yaml | --task embed | --convert embed
--structured-outputs-config {"backend":"xgrammar"} | --compilation-config {"level":3} | -O3
--no-async-scheduling | --limit-mm-per-prompt {"image":2} | --calculate-kv-scales
--enable-force-include-usage | --middleware m.M | --uvicorn-log-level info | --ssl-cert-reqs 2
--kv-transfer-config {"kv_connector":"NixlConnector"} | --kv-transfer-config {} | --uds /s
"""


def lines_of(text: str) -> list[list[str]]:
    lines = text.replace("|", "\n").splitlines()
    return [line.split() for line in lines if line.strip()]


def refusal(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("given", lines_of(SO_ANYWAY), ids=" ".join)
def test_what_is_so_anyway_is_taken(given: list[str]):
    args = build_parser().parse_checked(["serve", "m", *given])
    assert len(args.verdicts) <= 1
    for verdict in args.verdicts:
        assert verdict.text.startswith(given[0])


@pytest.mark.parametrize("given", lines_of(REFUSED), ids=" ".join)
def test_what_is_not_supported_is_refused_by_name_and_reason(
    given: list[str], capsys: pytest.CaptureFixture[str]
):
    error = refusal(["serve", "m", *given], capsys)
    assert given[0][:2] in error
    assert "is not supported: " in error
    assert "unknown" not in error
    assert error.count("\n") == 1


def test_the_line_says_what_is_so(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "/no/model", "--swap-space", "0", "--enable-chunked-prefill"]) == 2
    shown = capsys.readouterr().err.splitlines()
    assert shown[0] == "note: --swap-space 0: nothing is swapped to the host's memory"
    assert shown[1] == "note: --enable-chunked-prefill: prompts are always computed in chunks"


def test_an_offloading_connector_is_a_warning(caplog: pytest.LogCaptureFixture):
    given = ["--kv-transfer-config", '{"kv_connector":"OffloadingConnector"}']
    args = build_parser().parse_checked(["serve", "m", *given])
    with caplog.at_level(logging.INFO):
        log_verdicts(args.verdicts)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "KV is not offloaded, it stays on the device" in record.message


def test_the_arguments_of_kserves_stock_command_are_taken():
    args = build_parser().parse_checked(
        [
            *("serve", "/mnt/models", "--served-model-name", "NAME", "publishers/ns/models/NAME"),
            *("--port", "8000", "--disable-access-log-for-endpoints", "/health,/metrics,/ping"),
            *("--shutdown-timeout", "30", "--tensor-parallel-size", "2", "--enable-ssl-refresh"),
            *("--kv-transfer-config", '{"kv_connector":"OffloadingConnector"}'),
            *("--ssl-certfile", "/var/run/kserve/tls/tls.crt"),
            *("--ssl-keyfile", "/var/run/kserve/tls/tls.key"),
        ]
    )
    assert args.model == "/mnt/models"
    assert args.served_model_name == ["NAME", "publishers/ns/models/NAME"]


@pytest.mark.parametrize("value", ["false", "False"])
def test_flags_take_the_words_true_and_false(value: str):
    given = ["--enable-ssl-refresh=true", f"--trust-remote-code={value}", "--public-metrics", value]
    args = build_parser().parse_checked(["serve", *given, "m", "--enforce-eager", "true"])
    assert (args.model, args.enable_ssl_refresh, args.public_metrics) == ("m", True, False)
    assert args.enforce_eager is True
    with pytest.raises(SystemExit):
        build_parser().parse_checked(["serve", "m", f"--enable-chunked-prefill={value}"])


def test_a_reason_names_the_field_that_clients_have(capsys: pytest.CaptureFixture[str]):
    error = refusal(["serve", "m", "--return-tokens-as-token-ids"], capsys)
    assert "clients ask for it: return_tokens_as_token_ids" in error


def test_all_that_cannot_be_used_is_named_at_once(capsys: pytest.CaptureFixture[str]):
    given = ["--foo", "1", "--enable-lora", "--max-modl-len", "5", "--port", "0", "stray"]
    error = refusal(["serve", "m", *given], capsys)
    assert "4 arguments cannot be used:" in error
    assert "  unknown argument '--foo'\n" in error
    assert "  unknown argument '--max-modl-len'; did you mean --max-model-len?\n" in error
    assert "  --enable-lora is not supported: LoRA adapters are not built yet\n" in error
    assert "stray" in refusal(["serve", "m", "stray"], capsys)


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("--tp", "--tensor-parallel-size"),
        ("--max_model_len", "--max-model-len"),
        ("--context-length", "--max-model-len"),
        ("--cors-origins", "--allowed-origins"),
        ("--allowed-origin", "--allowed-origins"),
        ("--enable-prefix-cachin", "--enable-prefix-caching"),
        ("--num-shard", "--tensor-parallel-size"),
        ("--max-total-tokens", "--max-model-len"),
        ("--max-input-tokens", "--max-prompt-tokens"),
        ("--prometheus-port", "--metrics-port"),
        ("--generation", None),
        ("--loras", None),
        ("--quantize", None),
        ("--trust", None),
        ("--max-tokens", None),
    ],
)
def test_a_hint_is_right_or_there_is_none(
    given: str, hint: str | None, capsys: pytest.CaptureFixture[str]
):
    error = refusal(["serve", "m", given, "2"], capsys)
    assert given in error
    assert ("did you mean" in error) == (hint is not None)
    assert f"did you mean {hint}?" in error or hint is None


def test_every_hint_is_an_option_of_the_server():
    fields = {field.name for config in (EngineConfig, ServerConfig) for field in fields_of(config)}
    assert set(SYNONYMS.values()) <= fields
    assert not SYNONYMS.keys() & fields


@pytest.mark.parametrize("flag", ["--model", "--model-id"])
def test_a_model_with_a_flag_is_told_how_it_is_given(flag: str, capsys: pytest.CaptureFixture[str]):
    error = refusal(["serve", flag, "demo"], capsys)
    assert f"MODEL is given without {flag}," in error


def test_no_hint_leads_to_another_option_of_vllms():
    assert nearest("--enable-lora", ["--enable-prefix-caching"]) is None


# -- Python --------------------------------------------------------------------------------------


def test_python_takes_and_refuses_the_same():
    options: dict[str, Any] = {
        **{"enable_prefix_caching": True, "trust_remote_code": False, "swap_space": 0},
        **{"enable_lora": False, "enable_chunked_prefill": True, "hf_overrides": None},
        **{"kv_cache_memory": "1GiB", "max_model_len": "4k", "dtype": "half"},
        "kv_transfer_config": {"kv_connector": "OffloadingConnector"},
    }
    config, said = read_options("m", options)
    assert (config.prefix_caching, config.kv_cache_memory_bytes) == ("on", 2**30)
    assert (config.max_model_len, config.dtype) == (4000, "float16")
    assert [verdict.is_warning for verdict in said] == [False, False, False, True]
    assert said[1].text == "swap_space=0: nothing is swapped to the host's memory"


@pytest.mark.parametrize(("value", "meaning"), [(True, "on"), (False, "off"), (None, "auto")])
def test_prefix_caching_has_vllms_word_in_python_too(value: bool | None, meaning: str):
    assert read_options("m", {"enable_prefix_caching": value})[0].prefix_caching == meaning


def test_an_engine_of_its_own_writes_no_lines_on_throughput():
    _, (verdict,) = read_options("m", {"disable_log_stats": True})
    assert verdict.text.endswith("only octavo serve writes lines on throughput")


def test_python_names_all_that_cannot_be_used():
    options = {"enable_lora": True, "max_modl_len": 5, "port": 1, "swap_space": 4}
    with pytest.raises(ConfigError) as refused:
        LLM("m", **options)
    text = str(refused.value)
    assert "enable_lora=True is not supported: LoRA adapters are not built yet" in text
    assert "there is no option 'max_modl_len'; did you mean max_model_len?" in text
    assert "port is an option of octavo serve" in text
    assert "swap_space=4 is not supported" in text
    assert refused.value.field == "enable_lora"
