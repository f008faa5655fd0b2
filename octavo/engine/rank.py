"""A tensor parallel rank in a process of its own: `main` is run by `engine.parent`.

Started through `engine.rank_transport`; repeats the calls of `engine.executor`: it launches the
plans that it is sent and collects them when told to. Ends when told to or with a RankFailure;
`engine.parent` ends it when its parent is gone.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import socket
import sys
import traceback
from collections import deque
from dataclasses import replace
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Thread
from typing import NoReturn

import torch

from octavo.config import EngineConfig
from octavo.device import select_device
from octavo.engine.executor import ARRIVED, COLLECT, END, RankFailure
from octavo.engine.load import load_runner
from octavo.errors import ModelError, OctavoError
from octavo.parallel import Meeting, TorchCollectives
from octavo.step import StepPlan
from octavo.weights.fingerprint import with_fingerprint
from octavo.weights.hub import ModelFiles, resolve_model


def run(connection: Connection) -> None:
    """Loads this rank's part and repeats the parent's calls until the end."""
    config, files, rank, address, device_index, fingerprint = connection.recv()
    if fingerprint:
        files = _files_here(config, files, fingerprint)
    device = torch.device(select_device(config.device, device_index).torch_name)
    if device.type != "cpu":
        torch.accelerator.set_device_index(device_index)
    connection.send(ARRIVED)
    meeting = Meeting.at(address, config.tensor_parallel_size)
    collectives = TorchCollectives(meeting, rank, device)
    runner, _ = load_runner(config, files, collectives, device_index=device_index)
    gc.collect()
    gc.freeze()
    inbox: SimpleQueue[bytes] = SimpleQueue()
    Thread(target=_read, args=(connection, inbox), daemon=True).start()
    connection.send(ARRIVED)
    tickets: deque[object] = deque()
    while (data := inbox.get()) != END:
        if data == COLLECT:
            runner.collect(tickets.popleft())
            continue
        given = pickle.loads(data)
        if isinstance(given, StepPlan):
            tickets.append(runner.launch(given))
        else:
            runner.sample(tickets[-1], given)
    runner.close()


def _files_here(config: EngineConfig, files: ModelFiles, fingerprint: str) -> ModelFiles:
    """Returns rank 0's files as this host has them. Raises ModelError if it has others."""
    here = resolve_model(
        config.model,
        revision=config.revision,
        download_dir=config.download_dir,
        load_format=config.load_format,
        seed=config.seed,
    )
    files = replace(files, path=here.path)
    if with_fingerprint(files).identity != fingerprint:
        raise ModelError(
            f"{config.model} at {here.path} on {socket.gethostname()} has other weights than rank "
            "0's; give all hosts the same files"
        )
    return files


def _read(connection: Connection, inbox: SimpleQueue[bytes]) -> None:
    """Reads at once, so that the parent never waits."""
    while True:
        try:
            inbox.put(connection.recv_bytes())
        except (EOFError, OSError):
            return inbox.put(END)


def repeat(connection: Connection) -> bool:
    """Runs a rank to its end; returns False, having told why, if it failed."""
    try:
        run(connection)
    except Exception as error:  # the edge of the process
        kind = type(error).__name__ if isinstance(error, OctavoError) else ""
        with contextlib.suppress(OSError):  # rank 0 is gone, which is why it failed
            connection.send(RankFailure(kind, str(error) if kind else traceback.format_exc()))
        return False
    return True


def main(number: str) -> NoReturn:
    """Leaves at once at the end: what is left are destructors that wait for other ranks."""
    is_well = repeat(Connection(int(number)))
    sys.stderr.flush()
    os._exit(0 if is_well else 1)
