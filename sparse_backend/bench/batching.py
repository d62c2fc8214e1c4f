"""`prosparse bench batching`: replays traffic against real servers, one for each policy, and counts what came in time.

    prosparse bench batching --model deploy/demo --trace mix --load 0.8 --itl-slo-ms 60
    prosparse bench batching --synthetic 7b --trace mix,chat --load 0.6,0.9,1.2 --itl-slo-ms 50 --ttft-slo-ms 2000

Every policy is given the same requests at the same moments. Loads are in units of the capacity of the first policy given: the
requests per second that it finishes when there are always enough of them. With --clients requests have no times of their own:
so many clients ask anew whenever they have their answers. On a machine with several GPUs each policy has one, and they are
replayed at the same time; otherwise they go one after another.
"""

import argparse
import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sparse_backend.bench.arguments import positive_int, positive_ints
from sparse_backend.bench.batching_replays import (
    PLACEMENTS,
    POLICIES,
    BatchingReport,
    Plan,
    Prompts,
    densities,
    load_of,
    measure,
)
from sparse_backend.bench.goodput import Objectives
from sparse_backend.bench.synthetic_checkpoint import write_checkpoint
from sparse_backend.bench.synthetic_model import SHAPES, SyntheticModel
from sparse_backend.bench.trace import Trace
from sparse_backend.checkpoint import Checkpoint
from sparse_backend.errors import UserError

_TABLE_WIDTH = 180


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", type=Path, metavar="FOLDER", help="checkpoint folder")
    model.add_argument(
        "--synthetic",
        choices=SHAPES,
        help="a made-up checkpoint of this shape, in which each class of the traces has its density; written to --folder",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="with --synthetic: where to write it, or to find it written (default: a temporary folder)",
    )
    parser.add_argument("--trace", default="mix", metavar="T,T", help="traces, by name or as .yaml files (default mix)")
    parser.add_argument(
        "--policy", default="fcfs,sparse", metavar="P,P", help=f"of {', '.join(POLICIES)} (default fcfs,sparse)"
    )
    parser.add_argument(
        "--placement",
        metavar="P,P",
        help=f"replay over --replicas servers of the first policy, placing requests by: {', '.join(PLACEMENTS)}",
    )
    parser.add_argument("--replicas", type=positive_int, default=2, help="with --placement (default 2)")
    parser.add_argument("--load", default="0.6,0.9,1.2", metavar="L,L", help="shares of capacity (default 0.6,0.9,1.2)")
    parser.add_argument(
        "--clients",
        type=positive_ints,
        default=[],
        metavar="N,N",
        help="in place of --load: so many, each with one request at a time",
    )
    parser.add_argument(
        "--rate", type=float, metavar="R", help="requests per second at load 1, in place of measuring it"
    )
    parser.add_argument("--seconds", type=positive_int, default=60, help="length of each replay (default 60)")
    parser.add_argument("--saturate", type=positive_int, default=30, help="seconds for measuring capacity (default 30)")
    parser.add_argument(
        "--at-once", type=positive_int, default=256, help="requests at once while doing so (default 256)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of arrivals and lengths (default 0)")
    parser.add_argument("--itl-slo-ms", type=float, help="objective for 99 of 100 times between a request's tokens")
    parser.add_argument("--ttft-slo-ms", type=float, help="objective for the time to its first token")
    parser.add_argument(
        "--max-unfairness-ms", type=float, help="how much earlier a longer prompt must have come to be read first"
    )
    parser.add_argument(
        "--corpus", default="stdlib", help="where the prompts of a checkpoint come from (default: stdlib)"
    )
    parser.add_argument(
        "--logs", type=Path, help="folder for the servers' output and step logs (default: a temporary one)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures to a file")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; returns the exit status."""
    plan = _plan(arguments)
    with _checkpoint(arguments, plan) as (checkpoint, synthetic), contextlib.ExitStack() as stack:
        logs = arguments.logs or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="prosparse-")))
        logs.mkdir(parents=True, exist_ok=True)
        prompts = Prompts(checkpoint, synthetic, plan, arguments.corpus)
        for report in measure(checkpoint, plan, prompts, logs):
            # Anew after each replay: a run that is cut off leaves what it has.
            if arguments.json is not None:
                arguments.json.write_text(json.dumps(report, indent=1))
    _print(report)
    return 0


def _plan(arguments: argparse.Namespace) -> Plan:
    policies = arguments.policy.split(",")
    for policy in policies:
        if policy not in POLICIES:
            raise UserError(f"--policy {policy!r} is no policy. Known are {', '.join(POLICIES)}.")
    placements = arguments.placement.split(",") if arguments.placement else []
    for placement in placements:
        if placement not in PLACEMENTS:
            raise UserError(f"--placement {placement!r} is none. Known are {', '.join(PLACEMENTS)}.")
    try:
        loads = [float(load) for load in arguments.load.split(",")]
    except ValueError:
        raise UserError(f"--load {arguments.load!r} is not a comma-separated list of numbers.") from None
    if arguments.clients and arguments.rate is not None:
        raise UserError("--rate is for --load, and with --clients there is none. Leave one of them out.")
    settings = []
    for name in ("itl_slo_ms", "ttft_slo_ms", "max_unfairness_ms"):
        if (value := getattr(arguments, name)) is not None:
            settings += [f"--{name.replace('_', '-')}", str(value)]
    return Plan(
        policies=policies,
        placements=placements,
        replicas=arguments.replicas,
        traces={name: Trace.load(name) for name in arguments.trace.split(",")},
        loads=loads,
        clients=arguments.clients,
        log_steps=arguments.logs is not None,
        rate=arguments.rate,
        seconds=arguments.seconds,
        saturate_s=arguments.saturate,
        at_once=arguments.at_once,
        seed=arguments.seed,
        objectives=Objectives(_seconds(arguments.ttft_slo_ms), _seconds(arguments.itl_slo_ms)),
        settings=settings,
        vllm_flags=arguments.vllm_flags,
    )


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds * 1e-3


@contextlib.contextmanager
def _checkpoint(arguments: argparse.Namespace, plan: Plan) -> Iterator[tuple[Checkpoint, SyntheticModel | None]]:
    if arguments.model is not None:
        if arguments.folder is not None:
            raise UserError("--folder is for --synthetic. Leave it out.")
        yield Checkpoint.open(arguments.model), None
        return
    model = SyntheticModel(SHAPES[arguments.synthetic], 0.0, classes=tuple(densities(plan).values()))
    with contextlib.ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="prosparse-")))
        yield write_checkpoint(folder, model), model


def _print(report: BatchingReport) -> None:
    # Where the output is no terminal, as wide as the table.
    console = Console() if Console().is_terminal else Console(width=_TABLE_WIDTH)
    objectives = f"ITL {report['itl_slo_ms']} ms, TTFT {report['ttft_slo_ms']} ms"
    console.print(f"{report['model']}, {report['machine']['name']}, objectives: {objectives}")
    for name, capacity in report["capacity"].items():
        console.print(f"{name}: capacity {capacity:.2f} requests/s")
    table = Table(title="replays")
    quantiles = ("TTFT p50", "p99", "ITL p50", "p99")
    columns = (
        "trace",
        "load",
        "policy",
        "class",
        "requests",
        "goodput/s",
        "good",
        "tokens/s",
        "merged",
        *quantiles,
        "rejected",
        "fairness",
    )
    for column in (*columns, "cost error"):
        table.add_column(column, justify="left" if column in ("trace", "policy", "class") else "right")
    for result in report["replays"]:
        summary = result["summary"]
        for name, times in {"all": summary["all"], **summary["classes"]}.items():
            whole = name == "all"
            table.add_row(
                result["trace"] if whole else "",
                load_of(result) if whole else "",
                result["policy"] if whole else "",
                name,
                f"{times['requests']}",
                f"{summary['goodput']:.3f}" if whole else "",
                f"{times['good']:.1%}",
                f"{summary['tokens_s']:.0f}" if whole else "",
                f"{summary['merged']:.0%}" if whole else "",
                *(f"{times[key]:.1f}" for key in ("ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms")),
                f"{summary['rejected'] + summary['failed']}" if whole else "",
                f"{summary['fairness']:.2f}" if whole else "",
                ", ".join(f"{path} {error:.1%}" for path, error in result["cost_error"].items()) if whole else "",
            )
    console.print(table)
