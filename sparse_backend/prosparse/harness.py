"""``prosparse eval``: lm-evaluation-harness against a running server, on held-out text or on tasks of the harness.

Held-out text becomes one task of the harness for each domain, of its type ``loglikelihood_rolling``: every token of every
document is predicted once, documents longer than the server's context in disjoint windows. The harness asks the server's
/v1/completions for the log-probabilities of the prompt (``echo`` with ``logprobs``), so what is measured is what is served.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import transformers
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from sparse_backend.checkpoint import Checkpoint
from sparse_backend.errors import UserError
from sparse_backend.prosparse import modeling
from sparse_backend.prosparse.checkpoints import load_tokenizer
from sparse_backend.prosparse.corpus import read_documents
from sparse_backend.prosparse.verify import held_out_texts

# That of OpenAI's clients, and of the harness.
KEY_VARIABLE = "OPENAI_API_KEY"

# Prompts in one HTTP request; the server batches them with whatever else it serves.
_PROMPTS_PER_REQUEST = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "folder", metavar="FOLDER", help="the checkpoint that is served: its tokenizer and its held-out text are used"
    )
    parser.add_argument(
        "--url",
        default="http://127.0.0.1:8000",
        help=f"the running server (default: %(default)s); its API key, if it has one, is taken from {KEY_VARIABLE}",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--corpus",
        metavar="SOURCE",
        help="the corpus the checkpoint was made with, where its folder does not hold the held-out text (default: stdlib)",
    )
    what.add_argument(
        "--text",
        metavar="SOURCE",
        nargs="+",
        help="measure on all of this text instead, one domain each: a folder, a .jsonl or .parquet file or a text file",
    )
    what.add_argument(
        "--tasks", metavar="TASK", nargs="+", help="run tasks of the harness instead; most download their data"
    )
    parser.add_argument(
        "--include-path",
        metavar="FOLDER",
        help="with --tasks, a folder of task files (YAML), in place of the harness' own",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N documents of each domain or task")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the result to this file, as JSON")


def run(args: argparse.Namespace) -> int:
    """Evaluate, print a table, and write the JSON file.

    Raises:
        UserError: the harness is not installed, the server cannot be used, or there is no text to measure on.
    """
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit is {args.limit}: it must be at least 1.")
    if args.include_path is not None and args.tasks is None:
        raise UserError("--include-path says where tasks are found: name them with --tasks.")
    if args.out is not None and (args.out.exists() or not args.out.parent.is_dir()):
        fault = "exists already" if args.out.exists() else "is in a folder that does not exist"
        raise UserError(f"--out {str(args.out)!r} {fault}. Name another file.")
    require_harness()
    checkpoint = Checkpoint.open(args.folder)
    modeling.register()
    tokenizer = load_tokenizer(checkpoint.folder, checkpoint.config.get("vocab_size"))
    if args.tasks is None:
        texts = (
            held_out_texts(checkpoint, args.corpus)
            if args.text is None
            else {source: read_documents(source) for source in args.text}
        )
        tasks: list[Any] = held_out_tasks(texts, tokenizer)
    else:
        tasks = args.tasks
    server = find_server(args.url)
    found = evaluate(server, checkpoint.folder, tasks, args.limit, args.include_path)
    result = {
        "checkpoint": str(checkpoint.folder),
        "served_model": server.model,
        "context": server.context,
        "limit": args.limit,
        "versions": {"lm_eval": version("lm_eval"), "transformers": transformers.__version__},
        "results": found,
    }
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    _print(found)
    return 0


@dataclass(frozen=True)
class RunningServer:
    """What is asked, and what it serves."""

    url: str
    model: str
    context: int
    """Tokens of prompt and answer together."""


def require_harness() -> None:
    """Check that lm-evaluation-harness can be imported.

    Raises:
        UserError: it cannot.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"prosparse eval takes lm-evaluation-harness, which is not installed ({error}): pip install 'prosparse-serve[eval]'."
        ) from None


def find_server(url: str) -> RunningServer:
    """Ask a server which model it serves.

    Args:
        url: without ``/v1``.

    Raises:
        UserError: it does not answer, wants another key, or does not serve a model yet.
    """
    models = url.rstrip("/") + "/v1/models"
    try:
        response = httpx.get(models, headers=_headers(), timeout=30)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise UserError(
            f"--url {url!r}: no server answers there ({error}). Start one: prosparse serve FOLDER."
        ) from None
    if response.status_code in (401, 403):
        raise UserError(f"The server at {url} wants an API key that it knows: set {KEY_VARIABLE}.")
    try:
        response.raise_for_status()
        served = response.json()["data"][0]
        return RunningServer(url.rstrip("/"), served["id"], int(served["max_model_len"]))
    except (httpx.HTTPError, ValueError, LookupError, TypeError):
        raise UserError(
            f"{models} answers with status {response.status_code} and no served model: {response.text[:200]!r}. Wait until"
            " the server is ready, or correct --url."
        ) from None


def _headers() -> dict[str, str]:
    # A server without keys looks at none; an empty one is no valid header.
    return {"Authorization": f"Bearer {os.environ.get(KEY_VARIABLE) or 'none'}"}


def held_out_tasks(texts: Mapping[str, Sequence[str]], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """One task of the harness for each domain.

    Its metrics are ``perplexity`` per token of this tokenizer, and ``byte_perplexity`` and ``bits_per_byte``, which compare
    models of different tokenizers. All weigh every token alike, whatever document it is in.
    """
    return [_held_out_task(number, name, texts[name], tokenizer) for number, name in enumerate(texts)]


def _held_out_task(
    number: int, name: str, documents: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    from datasets import Dataset

    tokens = tokenizer(list(documents), add_special_tokens=False, verbose=False)["input_ids"]
    rows = [
        {"text": text, "tokens": len(ids), "bytes": len(text.encode())}
        for text, ids in zip(documents, tokens, strict=True)
    ]
    aggregations = {
        "perplexity": "weighted_perplexity",
        "byte_perplexity": "weighted_perplexity",
        "bits_per_byte": "bits_per_byte",
    }
    return {
        "task": f"held_out_{number}",
        "task_alias": name,
        "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": lambda document: document["text"],
        "process_results": _weigh,
        "metric_list": [
            {"metric": metric, "aggregation": aggregation, "higher_is_better": False}
            for metric, aggregation in aggregations.items()
        ],
    }


def _weigh(document: Mapping[str, Any], results: Sequence[float]) -> dict[str, tuple[float, int]]:
    """A document's log-likelihood with the weight it has in each metric's mean."""
    (log_likelihood,) = results
    return {
        "perplexity": (log_likelihood, document["tokens"]),
        "byte_perplexity": (log_likelihood, document["bytes"]),
        "bits_per_byte": (log_likelihood, document["bytes"]),
    }


def evaluate(
    server: RunningServer, tokenizer: Path, tasks: Sequence[Any], limit: int | None = None, include: str | None = None
) -> dict[str, dict[str, Any]]:
    """Run the harness' ``local-completions`` model on tasks.

    Args:
        server: where requests go.
        tokenizer: folder of the served model's tokenizer; requests carry token ids.
        tasks: names, or tasks as dicts.
        limit: documents of each task, from the first.
        include: folder of the task files that names refer to; None for the harness' own.

    Returns:
        For each task its number of ``samples`` and its metrics; ``METRIC_stderr`` where the harness gives one.

    Raises:
        UserError: a task is unknown, or the server refuses a request.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    # Its warnings speak of its own command line.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    names = [task for task in tasks if isinstance(task, str)]
    # Its own tasks are thousands of files, which take half a minute to index.
    manager = TaskManager(include_path=include, include_defaults=bool(names) and include is None)
    if unknown := [name for name in names if not manager.match_tasks([name])]:
        raise UserError(
            f"--tasks: the harness knows no {', '.join(unknown)}. For tasks of your own, give their folder: --include-path."
        )
    try:
        found = lm_eval.simple_evaluate(
            model="local-completions",
            model_args={
                "model": server.model,
                "base_url": f"{server.url}/v1/completions",
                "tokenizer": str(tokenizer),
                "tokenizer_backend": "huggingface",
                "max_length": server.context,
                "header": _headers(),
            },
            tasks=list(tasks),
            batch_size=_PROMPTS_PER_REQUEST,
            limit=limit,
            task_manager=manager,
            log_samples=False,
            # Errors of perplexities would be bootstrapped over documents, which differ more than models do.
            bootstrap_iters=100_000 if names else 0,
        )
    # What requests raises, which the harness sends with, are OSErrors too.
    except OSError as error:
        answer = getattr(getattr(error, "response", None), "text", "")
        raise UserError(f"The server at {server.url} failed a request: {error} {answer[:300]}".rstrip()) from None
    return {
        measured.get("alias", name).strip(" -"): {"samples": found["n-samples"].get(name, {}).get("effective")}
        | _metrics(measured)
        for name, measured in found["results"].items()
    }


def _metrics(measured: Mapping[str, Any]) -> dict[str, float]:
    """The harness names them ``METRIC,FILTER``; a filter of the name 'none' says nothing."""
    return {
        name.removesuffix(",none").replace("_stderr,none", "_stderr"): value
        for name, value in measured.items()
        if isinstance(value, int | float) and "," in name
    }


def _print(found: Mapping[str, Mapping[str, Any]]) -> None:
    table = Table("task", "samples", "metric", "value", "±")
    for column in table.columns[1:2] + table.columns[3:]:
        column.justify = "right"
    for name, measured in found.items():
        for metric, value in measured.items():
            if metric != "samples" and "_stderr" not in metric:
                error = measured.get(f"{metric}_stderr")
                table.add_row(
                    name, str(measured["samples"]), metric, f"{value:.4f}", "" if error is None else f"{error:.4f}"
                )
    width = None if sys.stdout.isatty() else 100
    Console(highlight=False, markup=False, emoji=False, width=width).print(table)
