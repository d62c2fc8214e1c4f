"""The same across replicas: which one stands out."""

from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.grafana.board import Row, board
from deploy.grafana.panels import BAD, GOOD, WARN, Column, Query, Steps, Tile, grid, lines, number
from deploy.grafana.promql import gauge, in_range, or_zero, quantile, select, total
from deploy.grafana.service import API, ITL, ITL_OBJECTIVE, TTFT, TTFT_OBJECTIVE, error_ratio
from deploy.grafana.sparsity import bytes_saved, density, sparse_share, union_density

EACH = "{{instance}}"


def fleet() -> Dashboard:
    """The board."""
    return board(
        "prosparse-fleet",
        "ProSparse / Fleet",
        "The chosen servers side by side: which replica stands out, and in what.",
        [
            Row("Together", _together()),
            Row("Replicas", [_replicas()]),
            Row("Traffic and latency", _traffic()),
            Row("Load", _load()),
            Row("Sparsity", _sparsity()),
        ],
    )


def _together() -> list[Tile]:
    return [
        number(
            "Replicas ready",
            "Servers that take requests.",
            Query(gauge("sum", "sparse_ready")),
            unit="none",
            steps=Steps(BAD, [(1, GOOD)]),
            width=4,
        ),
        number(
            "Replicas scraped",
            "Servers that Prometheus reaches, of those chosen.",
            Query(gauge("sum", "up")),
            unit="none",
            width=4,
        ),
        number(
            "Output",
            "Tokens generated per second, all replicas.",
            Query(total("vllm:generation_tokens_total")),
            unit="suffix: tok/s",
            width=4,
        ),
        number(
            "Worst error share",
            "Share of 5xx on the replica with most.",
            Query(f"max({error_ratio('instance')})"),
            unit="percentunit",
            steps=Steps(GOOD, [(0.001, WARN), (0.01, BAD)]),
            width=4,
        ),
        number(
            "Worst TTFT p95",
            "Time to first token, on the slowest replica.",
            Query(f"max({quantile(0.95, TTFT, by='instance')})"),
            unit="s",
            steps=Steps(GOOD, [(TTFT_OBJECTIVE, BAD)]),
            width=4,
        ),
        number(
            "Alerts firing",
            "Of ours, for the chosen jobs.",
            Query(or_zero('count(ALERTS{alertname=~"ProSparse.*", alertstate="firing", job=~"$job"})')),
            unit="none",
            steps=Steps(GOOD, [(1, BAD)]),
            width=4,
        ),
    ]


def _replicas() -> Tile:
    return grid(
        "Replicas",
        "One line each, newest values. Restarts: over the time range of the board.",
        "instance",
        [
            Column(
                "Ready",
                f"sum by (instance, model, version) ({select('sparse_server_info')})"
                f" * on (instance) group_left () {gauge('max', 'sparse_ready', by='instance')}",
                words={"0": "no", "1": "yes"},
                steps=Steps(BAD, [(1, GOOD)]),
            ),
            Column("Output", total("vllm:generation_tokens_total", by="instance"), "suffix: tok/s"),
            Column("TTFT p95", quantile(0.95, TTFT, by="instance"), "s", Steps(GOOD, [(TTFT_OBJECTIVE, BAD)])),
            Column("ITL p95", quantile(0.95, ITL, by="instance"), "s", Steps(GOOD, [(ITL_OBJECTIVE, BAD)])),
            Column("Queued", gauge("sum", "sparse_requests_queued", by="instance")),
            Column("KV cache", gauge("max", "vllm:kv_cache_usage_perc", by="instance"), "percentunit"),
            Column("Density", gauge("avg", "sparse_ffn_density", by="instance"), "percentunit"),
            Column("Sparse path", sparse_share("instance"), "percentunit"),
            Column(
                "Restarts", in_range("sparse_engine_restarts_total", by="instance"), "none", Steps(GOOD, [(1, BAD)])
            ),
        ],
        labels={"model": "Model", "version": "Version"},
    )


def _traffic() -> list[Tile]:
    return [
        lines(
            "Output by replica",
            "Tokens generated per second. One line below the others: its router weight, or a slower machine.",
            [Query(total("vllm:generation_tokens_total", by="instance"), EACH)],
            unit="suffix: tok/s",
            stacked=True,
        ),
        lines(
            "Requests by replica",
            "API requests answered per second.",
            [Query(total("sparse_http_requests_total", by="instance", path=API), EACH)],
            unit="reqps",
            stacked=True,
        ),
        lines(
            "Errors by replica",
            "Share of API requests answered with a 5xx.",
            [Query(error_ratio("instance"), EACH)],
            unit="percentunit",
        ),
        lines(
            "TTFT p95 by replica",
            "Time to first token. Dashed: the objective.",
            [Query(quantile(0.95, TTFT, by="instance"), EACH)],
            unit="s",
            limit=TTFT_OBJECTIVE,
            width=12,
        ),
        lines(
            "ITL p95 by replica",
            "Inter-token latency. Dashed: the objective.",
            [Query(quantile(0.95, ITL, by="instance"), EACH)],
            unit="s",
            limit=ITL_OBJECTIVE,
            width=12,
        ),
    ]


def _load() -> list[Tile]:
    return [
        lines(
            "Running by replica",
            "Requests in the engine's batch.",
            [Query(gauge("sum", "vllm:num_requests_running", by="instance"), EACH)],
            unit="short",
        ),
        lines(
            "Queued by replica",
            "Requests that wait for admission or for a place in the batch.",
            [
                Query(
                    f"{gauge('sum', 'sparse_requests_queued', by='instance')}"
                    f" + {gauge('sum', 'vllm:num_requests_waiting', by='instance')}",
                    EACH,
                )
            ],
            unit="short",
        ),
        lines(
            "KV cache by replica",
            "Share of the key-value cache in use.",
            [Query(gauge("max", "vllm:kv_cache_usage_perc", by="instance"), EACH)],
            unit="percentunit",
            highest=1,
        ),
    ]


def _sparsity() -> list[Tile]:
    return [
        lines(
            "Density by replica",
            "Share of neurons active per token. One line apart: other traffic, or another checkpoint.",
            [Query(density("instance"), EACH)],
            unit="percentunit",
            width=6,
        ),
        lines(
            "Union density by replica",
            "Share of neurons active for at least one token of a step.",
            [Query(union_density("instance"), EACH)],
            unit="percentunit",
            width=6,
        ),
        lines(
            "Sparse path by replica",
            "Share of steps on the sparse path.",
            [Query(sparse_share("instance"), EACH)],
            unit="percentunit",
            highest=1,
            width=6,
        ),
        lines(
            "Weight bytes not read by replica",
            "Per second.",
            [Query(bytes_saved("instance"), EACH)],
            unit="Bps",
            stacked=True,
            width=6,
        ),
    ]
