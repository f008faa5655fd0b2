"""Writes a model as a GGUF file in one number format, for llama.cpp to run what Octavo runs.

    python -m benchmarks.gguf_twin DENSE.gguf OUT.gguf --format bf16|f16|q4_1|q8_0
    python -m benchmarks.gguf_twin DENSE.gguf OUT.gguf --format ... --mixtral FOLDER

DENSE is what `octavo demo --dense --path-only` prints, or another GGUF file; FOLDER what `octavo
demo --moe [--experts 8] --path-only` prints, which was made of it: then only the tokenizer is
DENSE's. Matrices get the format, what is small stays float32, as llama.cpp's converter has it. Read
by cpu_decode.py --peer.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from octavo.weights.gguf_file import TENSOR_TYPES, GGUFFile, read_gguf
from tests.weights.tiny_gguf import add_value, finish, interleave

FORMATS = ("bf16", "f16", "q4_1", "q8_0")
_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "block_sparse_moe.gate": "ffn_gate_inp",
}
_PARTS = {"w1": "ffn_gate_exps", "w3": "ffn_up_exps", "w2": "ffn_down_exps"}


class Mixtral:
    """The tensors of a folder, with the names and shapes of the GGUF's."""

    def __init__(self, folder: Path) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self._file = safe_open(folder / "model.safetensors", "pt")

    def write(self, writer: gguf.GGUFWriter, number_format: str) -> None:
        self._add(writer, "token_embd", self._tensor("model.embed_tokens"), number_format)
        self._add(writer, "output_norm", self._tensor("model.norm"), "f32")
        if not self.config["tie_word_embeddings"]:
            self._add(writer, "output", self._tensor("lm_head"), number_format)
        for layer in range(self.config["num_hidden_layers"]):
            self._write_layer(writer, layer, number_format)

    def _write_layer(self, writer: gguf.GGUFWriter, layer: int, number_format: str) -> None:
        for theirs, name in _NAMES.items():
            tensor = self._tensor(f"model.layers.{layer}.{theirs}")
            if name in ("attn_q", "attn_k"):
                heads = "num_attention_heads" if name == "attn_q" else "num_key_value_heads"
                tensor = interleave(tensor, self.config[heads])
            is_small = tensor.ndim == 1 or name == "ffn_gate_inp"
            self._add(writer, f"blk.{layer}.{name}", tensor, "f32" if is_small else number_format)
        for part, name in _PARTS.items():
            experts = [
                self._tensor(f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{part}")
                for expert in range(self.config["num_local_experts"])
            ]
            self._add(writer, f"blk.{layer}.{name}", np.stack(experts), number_format)

    def _tensor(self, name: str) -> NDArray[np.float32]:
        return self._file.get_tensor(f"{name}.weight").float().numpy()

    def _add(
        self, writer: gguf.GGUFWriter, name: str, tensor: NDArray[np.float32], number_format: str
    ) -> None:
        _add_tensor(writer, f"{name}.weight", np.ascontiguousarray(tensor), number_format)


def _add_tensor(
    writer: gguf.GGUFWriter, name: str, values: NDArray[np.float32], number_format: str
) -> None:
    kind = gguf.GGMLQuantizationType[number_format.upper()]
    writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)


def _add_shapes(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_expert_count(config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])


def _copy_metadata(writer: gguf.GGUFWriter, file: GGUFFile, prefix: str) -> None:
    for key, value in file.metadata.items():
        if not key.startswith(prefix) or key.startswith("general."):
            continue
        add_value(writer, key, value)


def _copy_tensors(writer: gguf.GGUFWriter, file: GGUFFile, number_format: str) -> None:
    for name, tensor in file.tensors.items():
        kind = gguf.GGMLQuantizationType(TENSOR_TYPES[tensor.format.name])
        row_bytes = tensor.format.row_bytes(tensor.shape[-1])
        rows = math.prod(tensor.shape[:-1])
        data = np.memmap(tensor.path, np.uint8, "r", tensor.start, (rows, row_bytes))
        if len(tensor.shape) == 1:
            _add_tensor(writer, name, data[0].view(np.float32), "f32")
        else:
            _add_tensor(writer, name, gguf.dequantize(data, kind), number_format)


def write(dense: Path, target: Path, number_format: str, folder: Path | None = None) -> None:
    """Writes `target`; `number_format` is one of FORMATS, `folder` that of a Mixtral."""
    file = read_gguf(dense)
    writer = gguf.GGUFWriter(target, file.metadata["general.architecture"])
    if folder is None:
        _copy_metadata(writer, file, "")
        _copy_tensors(writer, file, number_format)
    else:
        checkpoint = Mixtral(folder)
        _add_shapes(writer, checkpoint.config)
        _copy_metadata(writer, file, "tokenizer.")
        checkpoint.write(writer, number_format)
    finish(writer)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dense", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--mixtral", type=Path, metavar="FOLDER")
    parser.add_argument("--format", choices=FORMATS, default="bf16")
    args = parser.parse_args()
    write(args.dense, args.target, args.format, args.mixtral)


if __name__ == "__main__":
    main()
