"""What runs beside an app while it serves, whoever serves it: batches, fresh keys; its stores, its
guard, its audit log.

Entered by `serve.Server`, and by the deployments that hand the app to a server of others. Without
it an app answers, but batches do not run and files of keys are read once.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from octavo.server.batches.runner import BatchRunner
from octavo.server.state import ServerState


@contextlib.asynccontextmanager
async def beside(state: ServerState) -> AsyncIterator[None]:
    """While inside, the app whose state it is has all that it needs; then what it opened is
    closed."""
    keys = asyncio.create_task(state.keyring.keep_fresh())
    batches = BatchRunner(state)
    try:
        await state.store.check()
        batches.start()
        yield
    finally:
        await batches.close()
        await state.parser.close()
        await state.responses.close()
        await state.store.close()
        if state.guard is not None:
            await state.guard.close()
        if state.audit is not None:
            await asyncio.to_thread(state.audit.close)
        keys.cancel()
        state.budgets.end()
