"""Five times as many requests as the server can answer: python -m tests.e2e.overload [--seconds 60]

First as many clients as have a turn at once, which is capacity; then requests at five times its rate; then capacity again.
Prints what was measured as JSON; the status is 0 if every bar held.
"""

import argparse
import asyncio
import json
import sys
import tempfile
from pathlib import Path

from tests.e2e.conftest import DEMO, QUEUE, RUNNING
from tests.e2e.load import Load, Result
from tests.e2e.servers import Server

BODY = {"model": "demo", "prompt": "import ", "max_tokens": 48, "ignore_eos": True, "temperature": 0.8}


def measure(server: Server, seconds: float, calm: float) -> dict[str, object]:
    """Run the three phases.

    Args:
        server: was started with ``QUEUE``.
        seconds: of overload.
        calm: of each measurement of capacity.
    """
    load = Load(server.port, BODY, server.headers)
    warm_up = asyncio.run(load.clients(RUNNING, calm))
    capacity = asyncio.run(load.clients(RUNNING, calm))
    memory = server.memory()
    # What else the machine did can only have made these smaller.
    over = asyncio.run(load.rate(5 * max(warm_up.rate, capacity.rate), seconds))
    grown = {name: after / memory[name] - 1 for name, after in server.memory().items()}
    later = asyncio.run(load.clients(RUNNING, calm))
    return {
        "capacity": _shown(capacity),
        "overload": {
            **_shown(over),
            "offered_per_s": len(over.outcomes) / seconds,
            "refused": len(over.refused),
            "refused_without_retry_after": sum(outcome.retry_after is None for outcome in over.refused),
            "neither": len(over.outcomes) - len(over.answered) - len(over.refused),
        },
        "afterwards": _shown(later),
        "itl_p99_ratio": over.itl(99) / capacity.itl(99),
        "memory_growth": grown,
    }


def _shown(result: Result) -> dict[str, object]:
    return {
        "answers_per_s": result.rate,
        "itl_p50_ms": 1000 * result.itl(50),
        "itl_p99_ms": 1000 * result.itl(99),
        "answered": len(result.answered),
    }


def main() -> int:
    """Start a server, measure it, print, and judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    seconds = parser.parse_args().seconds
    with tempfile.TemporaryDirectory() as folder:
        server = Server(DEMO, Path(folder) / "log", *QUEUE)
        try:
            server.wait_ready()
            found = measure(server, seconds, calm=20)
        finally:
            server.close()
    print(json.dumps(found, indent=1))
    over, later = found["overload"], found["afterwards"]
    held = {
        "every request answered or told when to come back": over["neither"] == over["refused_without_retry_after"] == 0,
        "admitted p99 ITL at most 1.5 of its value at capacity": found["itl_p99_ratio"] <= 1.5,
        "memory flat": all(growth < 0.02 for growth in found["memory_growth"].values()),
        "serves as before": later["answers_per_s"] > 0.8 * found["capacity"]["answers_per_s"],
    }
    for bar, holds in held.items():
        print(f"{'held ' if holds else 'MISSED'} {bar}")
    return 0 if all(held.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
