"""Lines to the end of a file: rotation, several writers, disks that are full, readers that are not
there."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from octavo.observe import file_writer
from octavo.observe.file_writer import FileWriter

MIB = 2**20


def lost(count: int) -> str:
    return json.dumps({"dropped_lines": count}) + "\n"


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[FileWriter]:
    found = FileWriter(str(tmp_path / "log"), lost, MIB)
    yield found
    found.close(5)


def put(writer: FileWriter, text: str) -> None:
    writer.put_later(lambda: text + "\n", len(text))


def test_a_file_that_was_moved_is_left_and_one_is_made_in_its_place(
    writer: FileWriter, tmp_path: Path
) -> None:
    put(writer, "one")
    writer.flush(5)
    (tmp_path / "log").rename(tmp_path / "log.1")
    put(writer, "two")
    writer.flush(5)
    assert (tmp_path / "log.1").read_text() == "one\n"
    assert (tmp_path / "log").read_text() == "two\n"
    (tmp_path / "log").unlink()
    put(writer, "three")
    writer.flush(5)
    assert (tmp_path / "log").read_text() == "three\n"
    assert (tmp_path / "log").stat().st_mode & 0o077 == 0


def test_a_pipe_in_place_of_the_file_holds_no_lines(writer: FileWriter, tmp_path: Path) -> None:
    (tmp_path / "log").unlink()
    os.mkfifo(tmp_path / "log")
    put(writer, "one")
    writer.flush(5)
    assert writer.num_dropped == 1
    (tmp_path / "log").unlink()
    put(writer, "two")
    writer.flush(5)
    assert (tmp_path / "log").read_text() == 'two\n{"dropped_lines": 1}\n'


def test_a_file_that_was_emptied_goes_on_at_its_beginning(
    writer: FileWriter, tmp_path: Path
) -> None:
    put(writer, "one")
    writer.flush(5)
    os.truncate(tmp_path / "log", 0)
    put(writer, "two")
    writer.flush(5)
    assert (tmp_path / "log").read_text() == "two\n"


def test_writers_of_one_file_do_not_mix_within_lines(tmp_path: Path) -> None:
    writers = [FileWriter(str(tmp_path / "log"), lost, 64 * MIB) for _ in range(4)]

    def write(number: int) -> None:
        for count in range(100):
            put(writers[number], json.dumps({"n": number, "c": count, "text": "x" * 20_000}))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in writers:
        one.close(10)
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    for number in range(4):
        assert [one["c"] for one in lines if one["n"] == number] == list(range(100))


def test_lines_that_cannot_be_written_are_counted_and_told_of_once_one_can(
    writer: FileWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, broken = os.write, threading.Event()
    broken.set()

    def full(descriptor: int, data: bytes) -> int:
        if not broken.is_set():
            return real(descriptor, data)
        if len(data) > 3 and data[:1] != b"\n":
            return real(descriptor, data[:3])  # as a disk with three bytes left
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(file_writer.os, "write", full)
    put(writer, "first line")
    writer.flush(5)
    put(writer, "second line")
    writer.flush(5)
    assert writer.num_dropped == 2
    broken.clear()
    put(writer, "third line")
    writer.flush(5)
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines == ["first lin", "third line", '{"dropped_lines": 2}']


def test_a_line_that_cannot_be_made_costs_no_other(writer: FileWriter, tmp_path: Path) -> None:
    put(writer, "one")
    writer.put_later(lambda: [][0], 1)
    put(writer, "two")
    writer.flush(5)
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines == ["one", "two", '{"dropped_lines": 1}']


def test_what_waits_is_bounded_and_nobody_waits_for_it(tmp_path: Path) -> None:
    found = FileWriter(str(tmp_path / "log"), lost, 1000)
    held = threading.Event()
    found.put_later(lambda: "slow\n" if held.wait(10) else "", 1)
    for _ in range(30):
        put(found, "x" * 100)
    num_dropped = found.num_dropped
    assert 20 <= num_dropped <= 21
    held.set()
    found.close(5)
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == 1 + 30 - num_dropped + 1
    assert json.loads(lines[-1]) == {"dropped_lines": num_dropped}
