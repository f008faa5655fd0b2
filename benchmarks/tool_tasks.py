"""Ordinary tool tasks for a real model: is every call that it makes found, and none made up?

    python -m benchmarks.tool_tasks MODEL [--choice auto|required] > tool_tasks.jsonl

Prints a line a task and turn, then a summary; fails if a call was missed or made up, or if held
arguments do not fit. What the model called is found a second time without the parser: every JSON
object in the raw text that names a tool of the task and has arguments.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jsonschema_rs

from octavo import LLM, SamplingParams

TEXT, NUMBER = {"type": "string"}, {"type": "number"}
INTEGER = {"type": "integer"}


def tool(name: str, description: str, **parameters: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": parameters, "required": list(parameters)}
    function = {"name": name, "description": description, "parameters": schema}
    return {"type": "function", "function": function}


TOOLS = {
    one["function"]["name"]: one
    for one in (
        tool("get_weather", "The weather of a city today.", city=TEXT),
        tool("get_time", "The time in a city.", city=TEXT),
        tool("send_email", "Sends a mail.", to=TEXT, subject=TEXT, body=TEXT),
        tool("add_event", "Puts an event in the calendar.", title=TEXT, date=TEXT),
        tool("convert_currency", "Converts money.", amount=NUMBER, source=TEXT, target=TEXT),
        tool("search_files", "Finds files by a pattern.", pattern=TEXT, folder=TEXT),
        tool("set_timer", "Starts a timer.", minutes=INTEGER),
        tool("play_music", "Plays songs of an artist.", artist=TEXT),
    )
}
RESULTS = {
    "get_weather": "21 degrees, sunny",
    "get_time": "14:05",
    "send_email": "sent",
    "add_event": "added",
    "convert_currency": "93.10",
    "search_files": '["notes.txt", "todo.txt"]',
    "set_timer": "started",
    "play_music": "playing",
}
TASKS = [
    "How warm is it in Rome?",
    "Is it raining in Bergen today?",
    "Tell me the weather in Tokyo.",
    "What time is it in Lima?",
    "What time is it in Delhi and in Oslo?",
    "Compare the weather in Paris and in Madrid.",
    "Set a timer for 12 minutes.",
    "Remind me in an hour and a half with a timer.",
    "Put on some Miles Davis.",
    "Play songs by Björk, please.",
    "Convert 100 dollars to euros.",
    "How much is 2500 yen in pounds?",
    "What are 19.99 euros in Swiss francs?",
    "Find all text files in /home/ann.",
    "Are there any *.py files in the folder src?",
    "Write a mail to bob@example.com: the meeting is moved to noon.",
    'Mail "Happy birthday!" to eve@example.org.',
    "Add the dentist on 2027-03-04 to my calendar.",
    "Put 'Team lunch' into the calendar for next Friday, 2027-01-08.",
    "Play Mozart and set a timer for 25 minutes.",
    "What is the weather in 'São Paulo'?",
    "Weather in Zürich?",
    "Time in New York, then weather there.",
    "Find files named report-*.pdf below /srv and mail the list to amy@example.com.",
    "Start a 3 minute timer for my tea.",
    "I need 40 GBP in USD.",
    "Which songs of Nina Simone can you play?",
    "Say hello.",
    "What is two plus two?",
    "Thank you, that is all.",
    "Write a haiku about rain.",
    'Answer with the JSON object {"ok": true}.',
    "Who are you?",
    "Explain in a sentence what a timer is.",
    "Write a Python function that adds two numbers.",
    "Add 'Call mum' on 2027-02-01 and on 2027-02-08.",
    "Send 'On my way' to tom@example.net with the subject Late.",
    "Look for *.log in /var/log.",
    "How hot is it in Cairo and what time is it there?",
    "Convert 1 BTC to USD.",
]


def calls_in(text: str, names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Yields what a text calls, in whatever form around it."""
    decoder, at = json.JSONDecoder(), text.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
        except ValueError:
            end = at + 1
        else:
            if isinstance(value, dict) and value.get("name") in names and "arguments" in value:
                yield value["name"], value["arguments"]
            else:
                end = at + 1
        at = text.find("{", end)


def told_in(message: dict[str, Any]) -> list[tuple[str, Any]]:
    functions = [call["function"] for call in message.get("tool_calls", ())]
    found = []
    for one in functions:
        with contextlib.suppress(ValueError):  # cut off
            found.append((one["name"], json.loads(one["arguments"])))
    return found


@dataclass(slots=True, kw_only=True)
class Summary:
    """Of all answers."""

    answers: int = 0
    answers_with_calls: int = 0
    calls: int = 0
    differing_answers: int = 0
    held_calls: int = 0
    held_calls_that_do_not_fit: int = 0

    @property
    def is_well(self) -> bool:
        return not self.differing_answers and not self.held_calls_that_do_not_fit

    def add(
        self, wanted: list[tuple[str, Any]], found: list[tuple[str, Any]], is_held: bool
    ) -> None:
        self.answers += 1
        self.answers_with_calls += bool(found)
        self.calls += len(found)
        self.differing_answers += wanted != found
        if is_held:
            self.held_calls += len(found)
            self.held_calls_that_do_not_fit += sum(not fits(*call) for call in found)


def fits(name: str, arguments: Any) -> bool:
    return jsonschema_rs.is_valid(TOOLS[name]["function"]["parameters"], arguments)


def turn(
    llm: LLM,
    chats: list[list[dict[str, Any]]],
    tasks: Sequence[int],
    choice: str,
    number: int,
    summary: Summary,
) -> list[int]:
    """Answers one turn of the given tasks; prints a line each. Returns those that called."""
    outputs = llm.chat(
        [chats[task] for task in tasks],
        SamplingParams(temperature=0, max_tokens=80),
        use_tqdm=False,
        tools=list(TOOLS.values()),
        tool_choice=choice,
    )
    called = []
    for task, output in zip(tasks, outputs, strict=True):
        sequence = output.outputs[0]
        message = sequence.message
        assert message is not None
        wanted, found = list(calls_in(sequence.text, [*TOOLS])), told_in(message)
        summary.add(wanted, found, choice == "required")
        line = {
            "turn": number,
            "task": TASKS[task],
            "text": sequence.text,
            "calls_in_text": wanted,
            "calls_found": found,
            "is_equal": wanted == found,
        }
        print(json.dumps(line, ensure_ascii=False), flush=True)
        if found and output.outputs[0].finish_reason == "stop":
            called.append(task)
            chats[task].append(message)
            for call in message["tool_calls"]:
                content = RESULTS[call["function"]["name"]]
                chats[task].append({"role": "tool", "tool_call_id": call["id"], "content": content})
    return called


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--choice", default="auto")
    parser.add_argument("--tasks", type=int, default=len(TASKS))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    llm = LLM(given.model, max_model_len=2048, max_num_seqs=40, num_threads=given.threads)
    chats: list[list[dict[str, Any]]] = [[{"role": "user", "content": text}] for text in TASKS]
    tasks: Sequence[int] = range(given.tasks)
    summary = Summary()
    for number in range(given.turns):
        tasks = turn(llm, chats, tasks, given.choice if number == 0 else "auto", number, summary)
        if not tasks:
            break
    llm.close()
    print(json.dumps({"choice": given.choice, **asdict(summary)}))
    sys.exit(not summary.is_well)


if __name__ == "__main__":
    main()
