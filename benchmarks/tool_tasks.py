"""Ordinary tool tasks for a real model: is every call that it makes found, and none made up?

    python -m benchmarks.tool_tasks MODEL [--choice auto|required] > tool_tasks.jsonl

Prints a line a task and a summary. What the model called is found a second time without the parser:
every JSON object in the raw text that names a tool of the task and has arguments.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from typing import Any

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
TASKS: list[tuple[str, tuple[str, ...]]] = [
    ("How warm is it in Rome?", ("get_weather",)),
    ("Is it raining in Bergen today?", ("get_weather", "get_time")),
    ("Tell me the weather in Tokyo.", ("get_time", "get_weather", "set_timer")),
    ("What time is it in Lima?", ("get_time",)),
    ("What time is it in Delhi and in Oslo?", ("get_time", "get_weather")),
    ("Compare the weather in Paris and in Madrid.", ("get_weather",)),
    ("Set a timer for 12 minutes.", ("set_timer", "add_event")),
    ("Remind me in an hour and a half with a timer.", ("set_timer",)),
    ("Put on some Miles Davis.", ("play_music", "search_files")),
    ("Play songs by Björk, please.", ("play_music",)),
    ("Convert 100 dollars to euros.", ("convert_currency",)),
    ("How much is 2500 yen in pounds?", ("convert_currency", "get_time")),
    ("What are 19.99 euros in Swiss francs?", ("convert_currency",)),
    ("Find all text files in /home/ann.", ("search_files", "send_email")),
    ("Are there any *.py files in the folder src?", ("search_files",)),
    ("Write a mail to bob@example.com: the meeting is moved to noon.", ("send_email",)),
    ('Mail "Happy birthday!" to eve@example.org.', ("send_email", "add_event")),
    ("Add the dentist on 2027-03-04 to my calendar.", ("add_event", "set_timer")),
    ("Put 'Team lunch' into the calendar for next Friday, 2027-01-08.", ("add_event",)),
    ("Play Mozart and set a timer for 25 minutes.", ("play_music", "set_timer")),
    ("What is the weather in 'São Paulo'?", ("get_weather",)),
    ("Weather in Zürich?", ("get_weather", "convert_currency")),
    ("Time in New York, then weather there.", ("get_time", "get_weather")),
    (
        "Find files named report-*.pdf below /srv and mail the list to amy@example.com.",
        ("search_files", "send_email"),
    ),
    ("Start a 3 minute timer for my tea.", ("set_timer", "play_music")),
    ("I need 40 GBP in USD.", ("convert_currency", "send_email")),
    ("Which songs of Nina Simone can you play?", ("play_music",)),
    ("Say hello.", ("get_weather", "set_timer")),
    ("What is two plus two?", ("get_weather",)),
    ("Thank you, that is all.", ("send_email", "add_event")),
    ("Write a haiku about rain.", ("get_weather",)),
    ('Answer with the JSON object {"ok": true}.', ("set_timer",)),
    ("Who are you?", ("play_music", "get_time")),
    ("Explain in a sentence what a timer is.", ("set_timer",)),
    ("Write a Python function that adds two numbers.", ("search_files",)),
    ("Add 'Call mum' on 2027-02-01 and on 2027-02-08.", ("add_event",)),
    ("Send 'On my way' to tom@example.net with the subject Late.", ("send_email",)),
    ("Look for *.log in /var/log.", ("search_files", "get_time")),
    ("How hot is it in Cairo and what time is it there?", ("get_weather", "get_time")),
    ("Convert 1 BTC to USD.", ("convert_currency",)),
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
    return [(one["name"], json.loads(one["arguments"])) for one in functions]


def turn(
    llm: LLM, chats: list[list[dict[str, Any]]], tasks: Sequence[int], choice: str, number: int
) -> list[int]:
    """Answers one turn of the given tasks; prints a line each. Returns those that called."""
    params = SamplingParams(temperature=0, max_tokens=96)
    called = []
    # One request a set of tools, since a call of `chat` has one.
    for task in tasks:
        names = TASKS[task][1]
        (output,) = llm.chat(
            chats[task],
            params,
            use_tqdm=False,
            tools=[TOOLS[name] for name in names],
            tool_choice=choice,
        )
        sequence = output.outputs[0]
        assert sequence.message is not None
        wanted = list(calls_in(sequence.text, names))
        found = told_in(sequence.message)
        line = {
            "turn": number,
            "task": task,
            "text": sequence.text,
            "calls_in_text": wanted,
            "calls_found": found,
            "is_equal": wanted == found,
        }
        print(json.dumps(line, ensure_ascii=False), flush=True)
        if found:
            called.append(task)
            chats[task].append(sequence.message)
            for call in sequence.message["tool_calls"]:
                content = RESULTS[call["function"]["name"]]
                chats[task].append({"role": "tool", "tool_call_id": call["id"], "content": content})
    return called


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--choice", default="auto")
    parser.add_argument("--tasks", type=int, default=len(TASKS))
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    llm = LLM(given.model, max_model_len=2048, max_num_seqs=4, num_threads=given.threads)
    chats: list[list[dict[str, Any]]] = [[{"role": "user", "content": text}] for text, _ in TASKS]
    tasks: Sequence[int] = range(given.tasks)
    for number in range(given.turns):
        tasks = turn(llm, chats, tasks, given.choice if number == 0 else "auto", number)
    llm.close()


if __name__ == "__main__":
    main()
