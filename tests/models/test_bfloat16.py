"""On a GPU, in bfloat16: greedy texts are those of transformers but where two tokens are even."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from octavo import LLM, SamplingParams

NUM_TOKENS = 64
SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
MOE = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "norm_topk_prob": True,
}

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="it is about a GPU's products"
)


def save(model_type: str, std: float, folder: Path) -> None:
    """Writes random bfloat16 weights: rounding moves logits less than most gaps between them."""
    torch.manual_seed(0)
    sizes = SIZES | (MOE if model_type.endswith("moe") else {})
    config = AutoConfig.for_model(model_type, **sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    for name, parameter in model.named_parameters():
        is_norm, is_embedding = name.endswith("norm.weight"), "embed" in name
        torch.nn.init.normal_(parameter, std=0.1 if is_norm else 1.0 if is_embedding else std)
        if is_norm:
            parameter.data += 1.0
    model.save_pretrained(folder)


def forced_logits(folder: Path, dtype: torch.dtype, texts: list[list[int]], count: int) -> Tensor:
    """Returns transformers' float32 [texts, count, V], each text's last `count` tokens given."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    torch.nn.Module.cuda(model.eval())
    with torch.inference_mode():
        rows = [model(torch.tensor([text]).cuda()).logits[0, -count - 1 : -1] for text in texts]
    return torch.stack(rows).float().cpu()


@pytest.mark.parametrize(("model_type", "std"), [("qwen3", 0.03), ("qwen3_moe", 0.015)])
def test_greedy_texts_differ_from_transformers_only_where_two_tokens_are_even(
    model_type: str, std: float, tmp_path: Path
) -> None:
    save(model_type, std, tmp_path)
    draw = random.Random(0)
    lens = (5, 17, 40, 64, 9, 23, 31, 50)
    prompts = [[draw.randrange(SIZES["vocab_size"]) for _ in range(n)] for n in lens]
    llm = LLM(
        str(tmp_path),
        device="cuda",
        dtype="bfloat16",
        skip_tokenizer_init=True,
        max_num_seqs=8,
        kv_cache_memory_bytes=2**26,
    )
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    outputs = [o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False)]
    llm.close()
    ours = torch.tensor(outputs)
    texts = [prompt + output for prompt, output in zip(prompts, outputs, strict=True)]
    theirs = forced_logits(tmp_path, torch.bfloat16, texts, NUM_TOKENS).argmax(-1)
    exact = forced_logits(tmp_path, torch.float32, texts, NUM_TOKENS)
    # What a wrong answer would also pass: texts of one word, or logits that are all alike.
    assert ours.shape == (len(prompts), NUM_TOKENS)
    assert ours.unique().numel() >= 64
    noise = 0.1 * exact.std()
    best = exact.topk(2).values
    assert ((best[..., 0] - best[..., 1]) > noise).float().mean() > 0.5
    assert (theirs == ours.roll(1, dims=1)).float().mean() < 0.5
    for choices in (theirs, exact.argmax(-1)):
        assert (ours == choices).float().mean() >= 0.95
    lost = best[..., 0] - exact.gather(-1, ours[..., None])[..., 0]
    assert lost.max() < noise
