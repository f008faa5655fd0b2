"""The dense demo says, word for word, what transformers makes of the same GGUF file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from octavo import LLM, SamplingParams
from octavo.weights.demo import demo_path

QUESTIONS = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain why the sky is blue.",
    "List five fruits.",
    "How do I boil an egg?",
    "Tell me a story about a fox and a crow.",
    "What is 12 times 7?",
    "Who wrote Hamlet?",
    "Translate 'good morning' into Spanish.",
    "Give me three tips for better sleep.",
    "What is photosynthesis?",
    "Describe a rainy day in a city.",
    "Write a Python function that adds two numbers.",
    "Why do we have seasons?",
    "What should I pack for a hiking trip?",
    "Summarise the plot of Cinderella.",
    "What is the difference between a virus and a bacterium?",
    "Name the planets of the solar system.",
    "How does a bicycle stay upright?",
    "Write a polite email that declines an invitation.",
)
NEW_TOKENS = 64


def reference_model(path: Path) -> torch.nn.Module:
    """Dequantised to float32 by transformers itself."""
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    missing, surplus = model.load_state_dict(tensors, strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not surplus
    model.tie_weights()
    return model


def greedy_choices(model: torch.nn.Module, prompt: list[int], tokens: list[int]) -> list[int]:
    """What transformers would say next at each position of `tokens`. If all agree, its own greedy
    text is the same, by induction; one pass is thirty times quicker than generating it."""
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + tokens])).logits[0]
    return logits[len(prompt) - 1 : -1].argmax(dim=-1).tolist()


@pytest.mark.demo
@pytest.mark.slow
def test_twenty_greedy_texts_of_64_tokens_are_those_of_transformers() -> None:
    torch.set_num_threads(2)
    path = demo_path("demo")
    llm = LLM("demo", device="cpu", max_model_len=512, poison_freed_blocks=True)
    tokenizer = llm.tokenizer
    prompts = [tokenizer.encode_chat([{"role": "user", "content": q}]).token_ids for q in QUESTIONS]
    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    llm.close()
    torch.set_num_threads(2)
    model = reference_model(path)
    for question, prompt, output in zip(QUESTIONS, prompts, outputs, strict=True):
        said = output.outputs[0]
        assert said.token_ids == greedy_choices(model, prompt, said.token_ids), question
        ended = said.token_ids[-1] == tokenizer.eos_token_id
        assert (said.finish_reason == "stop") == ended
        assert ended or len(said.token_ids) == NEW_TOKENS
        assert said.text == tokenizer.decode(said.token_ids)


@pytest.mark.demo
def test_activations_in_int8_change_little_of_what_is_said() -> None:
    questions = [QUESTIONS[i] for i in (2, 3, 5, 14)]
    params = SamplingParams(temperature=0.0, max_tokens=8, logprobs=1)
    said: list[list[list[int]]] = []
    first: list[list[float]] = []
    for activation_dtype in ("auto", "int8"):
        llm = LLM("demo", device="cpu", max_model_len=512, activation_dtype=activation_dtype)
        ids = [
            llm.tokenizer.encode_chat([{"role": "user", "content": question}]).token_ids
            for question in questions
        ]
        outputs = [one.outputs[0] for one in llm.generate(ids, params, use_tqdm=False)]
        llm.close()
        said.append([list(one.token_ids) for one in outputs])
        first.append([one.logprobs[0][one.token_ids[0]].logprob for one in outputs if one.logprobs])
    assert said[0] == said[1]
    distances = [abs(exact - rounded) for exact, rounded in zip(*first, strict=True)]
    assert len(distances) == len(questions)
    assert 0 < max(distances) < 0.3
