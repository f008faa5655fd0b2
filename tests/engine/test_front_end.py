"""What an operator or a model's files say wrongly is refused at start, not at every request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from octavo.config import EngineConfig
from octavo.engine.front_end import FrontEnd
from octavo.errors import ConfigError, ModelError
from tests.engine.conftest import write_byte_level_folder

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
}
CHAT = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_byte_level_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def start(folder: Path, **options: Any) -> FrontEnd:
    return FrontEnd(EngineConfig(model=str(folder), load_format="dummy", **options))


def refusal(folder: Path, template: str) -> str:
    with pytest.raises(ConfigError) as caught:
        start(folder, chat_template=template)
    assert caught.value.field == "chat_template"
    return str(caught.value)


def test_a_chat_template_is_a_file_or_text(folder: Path):
    source = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    (folder / "mine.jinja").write_text(source)
    for given in (source, str(folder / "mine.jinja")):
        assert start(folder, chat_template=given).tokenizer.encode_chat(CHAT).text == "<Hi>"


def test_a_chat_template_whose_file_has_a_brace_in_its_name_is_read(folder: Path):
    (folder / "{a}.jinja").write_text("[{{ messages[0].content }}]")
    found = start(folder, chat_template=str(folder / "{a}.jinja"))
    assert found.tokenizer.encode_chat(CHAT).text == "[Hi]"


def test_a_chat_template_that_is_no_file_is_refused_by_its_name(folder: Path):
    assert "'/no/such.jinja' cannot be read: there is no such file" in refusal(
        folder, "/no/such.jinja"
    )
    assert "cannot be read" in refusal(folder, str(folder))
    assert "there is no such file" in refusal(folder, "chatml")
    assert "cannot be read" in refusal(folder, "a\0b")
    assert "cannot be read" in refusal(folder, "x" * 5000)


def test_a_chat_template_file_that_cannot_be_one_is_refused_by_its_name(folder: Path):
    path = folder / "mine.jinja"
    path.write_text("Hello")
    assert "mine.jinja' has no {{ ... }}" in refusal(folder, str(path))
    path.write_text("")
    assert "mine.jinja' has no {{ ... }}" in refusal(folder, str(path))
    path.write_bytes(b"{{ '\xff\xfe' }}")
    assert "mine.jinja' cannot be read" in refusal(folder, str(path))
    path.write_text("{{ x }}\n{% if %}")
    assert "mine.jinja': the chat template is malformed at line 2" in refusal(folder, str(path))


def test_a_chat_template_text_that_is_malformed_is_refused(folder: Path):
    assert "malformed at line 1" in refusal(folder, "{% for %}")
    assert "malformed" in refusal(folder, "{{ messages | nosuchfilter }}")
    assert "too deep" in refusal(folder, "{{" + "(" * 5000 + "1" + ")" * 5000 + "}}")


def test_a_models_own_template_that_is_not_utf_8_is_a_clear_error(folder: Path):
    (folder / "chat_template.jinja").write_bytes(b"{{ '\xff' }}")
    with pytest.raises(ModelError, match=r"chat_template\.jinja cannot be read as UTF-8"):
        start(folder)


def test_a_tokenizer_whose_ends_the_model_does_not_have_is_refused(folder: Path):
    (folder / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": 2}))
    with pytest.raises(ModelError, match=r"eos_token '<\|im_end\|>' has the id 2.*2 tokens"):
        start(folder)
    assert start(folder, skip_tokenizer_init=True).spec.vocab_size == 2


def test_a_context_longer_than_the_model_was_trained_for_is_refused(folder: Path):
    with pytest.raises(ConfigError, match=r"129 is more than the 128 tokens.*allow_l") as error:
        start(folder, max_model_len=129)
    assert error.value.field == "max_model_len"
    start(folder, max_model_len=128)
    start(folder, max_model_len=129, allow_longer_than_trained=True)


@pytest.mark.parametrize(
    ("rope", "longest"),
    [
        ({"rope_type": "linear", "factor": 2.0}, 256),
        ({"rope_type": "dynamic", "factor": 2.5}, 320),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}, 128),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
            128,
        ),
    ],
)
def test_what_rope_scaling_stretches_counts_as_trained(
    folder: Path, rope: dict[str, Any], longest: int
):
    (folder / "config.json").write_text(json.dumps(CONFIG | {"rope_scaling": rope}))
    start(folder, max_model_len=longest)
    with pytest.raises(ConfigError, match=f"more than the {longest} tokens"):
        start(folder, max_model_len=longest + 1)
