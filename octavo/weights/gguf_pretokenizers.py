"""How text is cut before the merges apply, by `tokenizer.ggml.pre` of GGUF files. No torch.

Asked by `gguf_tokenizer`. The expressions are those of the models' own tokenizer.json, or of what
they have in its place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LINES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_LLAMA3_SPLIT = rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_MARKS}|{_LINES}"
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPERS, _LOWERS = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"


def _cased(without: str = "") -> tuple[str, str]:
    """Returns what cuts words between a small and a capital letter: those that end with small
    letters, and others, of letters that are not in `without`, too."""
    before, uppers, lowers = r"[^\r\n\p{L}\p{N}]?", f"[{_UPPERS}{without}]", f"[{_LOWERS}{without}]"
    return f"{before}{uppers}*{lowers}+", f"{before}{uppers}+{lowers}*"


_REST = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_LINES}"
_TEKKEN_SPLIT = "|".join((*_cased(), r"\p{N}", _REST))
_GPT_4O_SPLIT = "|".join((*(f"{one}{_SHORT}?" for one in _cased()), r"\p{N}{1,3}", _REST))
_KIMI_WORDS = (f"{one}{_SHORT}?" for one in _cased(r"&&[^\p{Han}]"))
_KIMI_SPLIT = "|".join((r"\p{Han}+", *_KIMI_WORDS, r"\p{N}{1,3}", _MARKS, _LINES))
_CASED_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1"
    "\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd"
    "\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d"
    "\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec"
    "\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b"
    "\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787"
    "\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2"
    "\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
"""Letters that are small or capital, as the tokenizer of DeepSeek-LLM lists them."""
_IDEOGRAPHS = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK_MARKS = r"\s?[!-/:-~" + "\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
_DEEPSEEK_LLM_SPLITS = (
    *(r"[\r\n]", rf"\s?[{_CASED_LETTERS}]+", _DEEPSEEK_MARKS),
    *(r"\s+$", _IDEOGRAPHS, r"\p{N}"),
)
_DEEPSEEK_CODER_SPLITS = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _IDEOGRAPHS, r"\p{N}")
_DEEPSEEK_V3_SPLITS = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
    + _LINES,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreTokenizer:
    """How text is cut before the merges apply."""

    splits: tuple[str, ...] = ()
    """Each cuts the pieces of those before it. None: GPT-2's expression, which the ByteLevel
    pre-tokenizer brings along."""
    digits: bool = False
    """Every digit is a piece of its own, before anything else."""
    nfc: bool = False
    ignore_merges: bool = False
    """A piece that is a token is taken whole, whatever the merges say."""
    add_bos: bool = False
    """Where the file does not say."""

    def steps(self) -> list[dict[str, Any]]:
        """Returns the steps before ByteLevel as tokenizer.json has them."""
        digits = [{"type": "Digits", "individual_digits": True}] if self.digits else []
        how = {"behavior": "Isolated", "invert": False}
        splits = ({"type": "Split", "pattern": {"Regex": one}, **how} for one in self.splits)
        return [*digits, *splits]


_LLAMA3 = PreTokenizer(splits=(_LLAMA3_SPLIT,), ignore_merges=True, add_bos=True)
_UNMERGED = PreTokenizer(splits=(_LLAMA3_SPLIT,))
_QWEN2 = PreTokenizer(splits=(_QWEN2_SPLIT,), nfc=True)
PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "default": PreTokenizer(),
    "gpt-2": PreTokenizer(),
    "olmo": PreTokenizer(nfc=True),
    "smollm": PreTokenizer(digits=True),
    "starcoder": PreTokenizer(digits=True),
    "refact": PreTokenizer(digits=True),
    "command-r": PreTokenizer(digits=True, nfc=True),
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "dbrx": _UNMERGED,
    "smaug-bpe": _UNMERGED,
    "glm4": _UNMERGED,
    "chatglm-bpe": _UNMERGED,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "deepseek-llm": PreTokenizer(splits=_DEEPSEEK_LLM_SPLITS),
    "deepseek-coder": PreTokenizer(splits=_DEEPSEEK_CODER_SPLITS),
    "deepseek-v3": PreTokenizer(splits=_DEEPSEEK_V3_SPLITS),
    "kimi-k2": PreTokenizer(splits=(_KIMI_SPLIT,)),
    "gpt-4o": PreTokenizer(splits=(_GPT_4O_SPLIT,)),
    "tekken": PreTokenizer(splits=(_TEKKEN_SPLIT,), ignore_merges=True, add_bos=True),
}
