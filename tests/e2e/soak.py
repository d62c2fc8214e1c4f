"""Mixed load for a long time, and what becomes of the server's memory: python -m tests.e2e.soak [--minutes 30]

Prints resident memory by process as JSON lines; the status is 0 if nothing grew by 2 % after the first five minutes, no
request failed and the engine lived on. One that was replaced began anew: nothing can be said of its growth then.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import fmean

from tests.e2e.conftest import DEMO
from tests.e2e.servers import Server
from tests.e2e.streams import Request

CLIENTS = 8
SCHEMA = {"type": "object", "properties": {"kind": {"type": "boolean"}}, "required": ["kind"]}


def request(server: Server, dice: random.Random) -> Request:
    """One of the kinds of requests that a server sees, with a prompt of its own."""
    completion = {"model": "demo", "prompt": f"def f{dice.random()}(", "max_tokens": dice.randint(1, 64)}
    chat = {"model": "demo", "messages": [{"role": "user", "content": f"class C{dice.random()}:"}], "max_tokens": 24}
    form = {"type": "json_schema", "json_schema": {"name": f"s{dice.randint(0, 9)}", "schema": SCHEMA}}
    completions, chats = "/v1/completions", "/v1/chat/completions"
    body, path = dice.choice(
        [
            (completion | {"stream": True}, completions),
            (completion | {"n": 2, "logprobs": 3}, completions),
            (completion | {"prompt": "import " * dice.randint(1, 100), "stream": True}, completions),
            (chat, chats),
            (chat | {"stream": True, "stop": ["\n"]}, chats),
            (chat | {"response_format": form, "temperature": 0}, chats),
            (completion | {"n": 100}, completions),
        ]
    )
    return Request(server.port, body, server.headers, path)


async def client(server: Server, end: float, dice: random.Random, counts: Counter[int | None]) -> None:
    """Ask until the end; one time in ten leave before the answer is complete."""
    while time.monotonic() < end:
        asked = request(server, dice)
        running = asyncio.create_task(asked.run())
        if dice.random() < 0.1:
            await asyncio.wait({running}, timeout=0.02)
            if not running.done() and asked.connected:
                asked.leave()
        outcome = await running
        counts[outcome.status] += 1


async def soak(server: Server, seconds: float, interval: float) -> tuple[list[dict[str, int]], Counter[int | None]]:
    """Load the server; returns its memory at each interval and how often each status came (None: the client left)."""
    counts: Counter[int | None] = Counter()
    engine = {server.engine_process(role) for role in ("EngineCore", "Worker")}
    end = time.monotonic() + seconds
    clients = [asyncio.create_task(client(server, end, random.Random(seed), counts)) for seed in range(CLIENTS)]
    samples = []
    while time.monotonic() < end:
        await asyncio.sleep(interval)
        samples.append(server.memory())
        if not engine <= set(server.processes()):
            lines = "\n".join(server.log.read_text().splitlines()[-20:])
            sys.exit(f"the engine ended after {interval * len(samples):.0f} s. The last lines of the log:\n{lines}")
        await asyncio.to_thread(server.get, "/metrics")
    await asyncio.gather(*clients)
    return samples, counts


def growth(samples: list[dict[str, int]], skipped: int) -> dict[str, float]:
    """Share by which each process grew, from the mean of three samples after the skipped ones to that of the last three."""
    first, last = samples[skipped : skipped + 3], samples[-3:]
    return {name: fmean(s[name] for s in last) / fmean(s[name] for s in first) - 1 for name in samples[-1]}


def main() -> int:
    """Start a server, load it, print, and judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    minutes = parser.parse_args().minutes
    interval = 10.0
    with tempfile.TemporaryDirectory() as folder:
        server = Server(DEMO, Path(folder) / "log")
        try:
            server.wait_ready()
            samples, counts = asyncio.run(soak(server, 60 * minutes, interval))
        finally:
            server.close()
    for sample in samples:
        print(json.dumps({name: round(size / 2**20, 1) for name, size in sample.items()}))
    grown = growth(samples, int(min(300, 30 * minutes) / interval))
    print(json.dumps({"minutes": minutes, "statuses": {str(key): n for key, n in counts.items()}, "growth": grown}))
    return 0 if max(grown.values()) < 0.02 and not any((status or 0) >= 500 for status in counts) else 1


if __name__ == "__main__":
    sys.exit(main())
