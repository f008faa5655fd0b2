"""A guard that asks a classifier which Octavo serves, too.

    octavo serve CLASSIFIER --port 8001
    CLASSIFIER_URL=http://127.0.0.1:8001 octavo serve MODEL --guard classifier:guard

Started in this file's folder. CLASSIFIER is a checkpoint that is a `...ForSequenceClassification`
of several labels; CLASSIFIER_LABEL is the one that is refused (its place in `id2label`), from a
probability of CLASSIFIER_THRESHOLD (0.5) on; CLASSIFIER_KEY is a key of that server.
"""

from __future__ import annotations

import os

import httpx

from octavo.guard import GuardCheck, Refuse, Verdict

MAX_TEXTS = 2048
"""In one request to the classifier."""


class Classifier:
    """Refuses what the classifier gives a label."""

    def __init__(self, url: str, label: int, threshold: float, key: str) -> None:
        self._url = f"{url}/pooling"
        self._label = label
        self._threshold = threshold
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client: httpx.AsyncClient | None = None

    async def __call__(self, check: GuardCheck) -> Verdict:
        texts = [one.text for one in check.texts if not one.is_fixed]
        if check.stage == "output":
            texts = [check.before + texts[0]]  # a piece says little without what stands before it
        for start in range(0, len(texts), MAX_TEXTS):
            for share in await self._shares(texts[start : start + MAX_TEXTS]):
                if share >= self._threshold:
                    return Refuse(f"label {self._label} has a probability of {share:.2f}")
        return None

    async def _shares(self, texts: list[str]) -> list[float]:
        """Returns the probability of the label for each text; long ones are cut at their end."""
        if self._client is None:
            self._client = httpx.AsyncClient(headers=self._headers, timeout=None)
        body = {"input": texts, "task": "classify", "truncate_prompt_tokens": -1}
        answer = await self._client.post(self._url, json=body)
        answer.raise_for_status()
        return [one["data"][self._label] for one in answer.json()["data"]]

    async def close(self) -> None:
        """Called when the server ends."""
        if self._client is not None:
            await self._client.aclose()


guard = Classifier(
    os.environ.get("CLASSIFIER_URL", "http://127.0.0.1:8001"),
    int(os.environ.get("CLASSIFIER_LABEL", "1")),
    float(os.environ.get("CLASSIFIER_THRESHOLD", "0.5")),
    os.environ.get("CLASSIFIER_KEY", ""),
)
