"""`octavo top`: how a running server does, in the terminal, kept up by itself.

Called by the command line. Asks GET /live as the page at `/` does; draws with rich. Never imports
torch.
"""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

from octavo.cli.options import Parser, Subparsers
from octavo.config.environment import environment_keys
from octavo.errors import ConfigError, RequestError

if TYPE_CHECKING:
    import httpx
    from rich.console import RenderableType
    from rich.table import Table

HELP = "watch a running server in the terminal"
EXAMPLES = """examples:
  octavo top                                   the server on this machine
  octavo top --url http://host:8000 --api-key OPERATOR_KEY
  octavo top --once                            print it once"""
DEFAULT_URL = "http://127.0.0.1:8000"
KEY_HINT = "give an operator's key as --api-key, or in OCTAVO_OPERATOR_KEY"
MIN_PERIOD_SECONDS = 0.2
TIMEOUT_SECONDS = 5.0
_BAR = 24
_SHADES = " .:-=+*#%@"
_MAX_ROWS, _MAX_COLUMNS = 24, 64
_HOT = 4.0
"""Times the mean that get the darkest shade."""


def add_parser(subparsers: Subparsers) -> None:
    """Adds `top`."""
    parser: Parser = subparsers.add_parser("top", help=HELP, description=HELP, epilog=EXAMPLES)
    add = parser.add_argument
    add("--url", metavar="URL", default=DEFAULT_URL, help=f"server (default: {DEFAULT_URL})")
    add(
        "--api-key",
        metavar="TEXT",
        help="operator's key, where the server has keys (also OCTAVO_OPERATOR_KEY, OCTAVO_API_KEY)",
    )
    add("--period", type=float, metavar="SECONDS", default=1.0, help="between two looks")
    add("--once", action="store_true", help="look twice, print once")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    """Watches until Ctrl-C; returns 0."""
    import httpx
    from rich.console import Console
    from rich.live import Live

    if not MIN_PERIOD_SECONDS <= args.period <= 3600:
        message = f"--period must be in {MIN_PERIOD_SECONDS}..3600 seconds, got {args.period:g}"
        raise ConfigError(message, field="period")
    key = args.api_key
    if key is None:
        key = environment_keys("operator_key") or environment_keys("api_key")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        client = httpx.Client(base_url=args.url, headers=headers, timeout=TIMEOUT_SECONDS)
    except (httpx.InvalidURL, ValueError) as error:
        raise ConfigError(f"--url {args.url!r} cannot be used: {error}", field="url") from error
    console = Console()
    with client:
        before = ask(client)
        if args.once:
            time.sleep(args.period)
            console.print(screen(before, ask(client)))
            return 0
        with Live(screen(before, before), console=console, screen=console.is_terminal) as shown:
            try:
                while True:
                    time.sleep(args.period)
                    now = ask(client)
                    shown.update(screen(before, now), refresh=True)
                    before = now
            except KeyboardInterrupt:
                return 0


def ask(client: httpx.Client) -> dict[str, Any]:
    """Returns what GET /live tells. Raises RequestError with what to do instead."""
    import httpx

    try:
        answer = client.get("/live", params={"experts": "true"})
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        message = f"{client.base_url} does not answer ({error}); give another --url"
        raise RequestError(message) from error
    if answer.status_code == 200:
        return answer.json()
    try:
        said = answer.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        said = "is that an Octavo server?"
    hint = f"; {KEY_HINT}" if answer.status_code in (401, 403) else ""
    raise RequestError(
        f"{answer.url.copy_with(query=None)} answers {answer.status_code}: {said}{hint}"
    )


def screen(before: dict[str, Any], now: dict[str, Any]) -> RenderableType:
    """Returns what to show of a server that told `before` and now."""
    from rich.console import Group
    from rich.text import Text

    head = Text(f"Octavo {now['version']}  {now['model']}  up {now['uptime_seconds'] // 60} min")
    parts: list[RenderableType] = [head, _figures(before, now), _memory(now), _tenants(now)]
    parts.append(_requests(now["engine"]["sequences"]))
    heat = heat_map(before["engine"]["expert_counts"], now["engine"]["expert_counts"])
    if heat:
        parts += [Text("experts' load, layers down, experts across"), Text(heat)]
    return Group(*parts)


def _table(*heads: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    for place, head in enumerate(heads):
        table.add_column(head, justify="left" if place == 0 else "right", no_wrap=True)
    return table


def _figures(before: dict[str, Any], now: dict[str, Any]) -> Table:
    stats, was = now["engine"], before["engine"]
    seconds = max(now["time"] - before["time"], 1e-3)

    def gained(name: str) -> float:
        return max(0, stats[name] - was[name])

    steps, asked = gained("num_steps"), gained("prefix_query_tokens")
    each = f"{1000 * gained('step_seconds') / steps:.1f} ms" if steps else "-"
    hits = f"{gained('prefix_hit_tokens') / asked:.0%}" if asked else "-"
    table = _table("tokens/s", "prompt tokens/s", "running", "waiting", "step", "cached", "waste")
    table.add_row(
        f"{gained('num_generation_tokens') / seconds:,.0f}",
        f"{gained('num_prompt_tokens') / seconds:,.0f}",
        f"{stats['num_running']:,}",
        f"{stats['num_waiting']:,}",
        each,
        hits,
        f"{stats['waste_share']:.1%}",
    )
    return table


def _memory(now: dict[str, Any]) -> Table:
    stats, plan = now["engine"], now["plan"]
    table = _table("memory", "", "")
    blocks = stats["num_blocks"] or 1
    shares = [
        ("KV in use", stats["num_used_blocks"] / blocks),
        ("KV cached", stats["num_cached_blocks"] / blocks),
    ]
    kv_bytes = plan["kv_bytes"] if plan else 0
    for name, share in shares:
        table.add_row(name, bar(share), f"{share:.0%} {size(kv_bytes * share)}")
    if plan:
        weights = plan["weights_bytes"]
        table.add_row("weights", bar(weights / max(plan["usable_bytes"], 1)), size(weights))
    return table


def _tenants(now: dict[str, Any]) -> Table:
    table = _table("tenant", "running", "waiting", "KV")
    for one in now["engine"]["tenants"][:8]:
        name = one["tenant"] or "all"
        counts = (f"{one['num_running']:,}", f"{one['num_waiting']:,}")
        table.add_row(name, *counts, size(one["kv_bytes"]))
    return table


def _requests(sequences: list[dict[str, Any]]) -> Table:
    table = _table("request", "state", "progress", "prompt", "cached", "answer", "age")
    for one in sequences[:16]:
        done = min(one["num_computed"], one["prompt_len"]) + one["num_outputs"]
        working = "decodes" if one["num_outputs"] else "prefills"
        table.add_row(
            one["request_id"] + (f"/{one['index']}" if one["index"] else ""),
            working if one["is_running"] else "waits",
            bar(done / (one["prompt_len"] + max(one["max_outputs"], 1))),
            f"{one['prompt_len']:,}",
            f"{one['num_cached_tokens']:,}",
            f"{one['num_outputs']:,}/{one['max_outputs']:,}",
            f"{one['age_seconds']:.1f} s",
        )
    return table


def bar(share: float) -> str:
    """Returns a bar of fixed width for a share of 0 to 1."""
    full = round(_BAR * min(max(share, 0.0), 1.0))
    return "#" * full + "." * (_BAR - full)


def size(num_bytes: float) -> str:
    """Returns bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def heat_map(before: list[list[int]], now: list[list[int]]) -> str:
    """Returns a line a layer with a character an expert, darker for more tokens since `before`, or
    since the start where nothing was routed; neighbours are put together where there are more than
    fit."""
    if not now or not now[0]:
        return ""
    is_new = before != now and len(before) == len(now)
    rows = [
        [count - (before[layer][expert] if is_new else 0) for expert, count in enumerate(row)]
        for layer, row in enumerate(now)
    ]
    tall = -(-len(rows) // _MAX_ROWS)
    wide = -(-len(rows[0]) // _MAX_COLUMNS)
    lines = []
    for top in range(0, len(rows), tall):
        merged = [sum(column) for column in zip(*rows[top : top + tall], strict=True)]
        cells = [sum(merged[left : left + wide]) for left in range(0, len(merged), wide)]
        mean = sum(cells) / len(cells) or 1
        last = len(_SHADES) - 1
        lines.append("".join(_SHADES[min(last, int(last * c / mean / _HOT))] for c in cells))
    return "\n".join(lines)
