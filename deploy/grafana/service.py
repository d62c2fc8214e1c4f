"""Is the service well: readiness, traffic, latency, load, objectives."""

from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.grafana.board import Row, board
from deploy.grafana.panels import (
    BAD,
    GOOD,
    QUANTILE_COLOURS,
    STATUS_COLOURS,
    WARN,
    Query,
    Steps,
    Tile,
    lines,
    number,
)
from deploy.grafana.promql import gauge, mean, or_zero, quantile, select, total

# Requests that ask for text; probes and scrapes are none.
API = "~/v1/.*"

TTFT = "vllm:time_to_first_token_seconds"
ITL = "vllm:inter_token_latency_seconds"
TPOT = "vllm:request_time_per_output_token_seconds"
E2E = "vllm:e2e_request_latency_seconds"

# As in deploy/prometheus/rules/objectives.yml.
TTFT_OBJECTIVE = 2.5
ITL_OBJECTIVE = 0.1


def error_ratio(by: str = "") -> str:
    """Share of API requests answered with a 5xx."""
    requests = total("sparse_http_requests_total", by=by, path=API)
    errors = total("sparse_http_requests_total", by=by, path=API, status="~5..")
    # Zero rather than nothing while there was no error, for each ``by``.
    return f"({errors} or 0 * {requests}) / {requests}"


def service() -> Dashboard:
    """The board."""
    return board(
        "prosparse-service",
        "ProSparse / Service",
        "Is the service well: readiness, traffic, latency, load and objectives of the chosen servers together.",
        [
            Row("Now", _now()),
            Row("Traffic", _traffic()),
            Row("Latency", _latency()),
            Row("Load", _load()),
            Row("Engine and objectives", _engine()),
        ],
    )


def _now() -> list[Tile]:
    return [
        number(
            "Ready",
            "Share of the servers that take requests. Below 100 %: runbook, ProSparseNotReady.",
            Query(gauge("avg", "sparse_ready")),
            unit="percentunit",
            steps=Steps(BAD, [(0.5, WARN), (1, GOOD)]),
        ),
        number(
            "Requests",
            "API requests answered per second, whatever their status.",
            Query(total("sparse_http_requests_total", path=API)),
            unit="reqps",
        ),
        number(
            "Errors",
            "Share of API requests answered with a 5xx. 429s are not in it: see Rejections.",
            Query(error_ratio()),
            unit="percentunit",
            steps=Steps(GOOD, [(0.001, WARN), (0.01, BAD)]),
        ),
        number(
            "Output",
            "Tokens generated per second.",
            Query(total("vllm:generation_tokens_total")),
            unit="suffix: tok/s",
        ),
        number(
            "TTFT p95",
            "Time to first token that 95 % of the requests stay under, queueing included.",
            Query(quantile(0.95, TTFT)),
            unit="s",
            steps=Steps(GOOD, [(TTFT_OBJECTIVE, BAD)]),
        ),
        number(
            "ITL p95",
            "Inter-token latency that 95 % of the tokens stay under.",
            Query(quantile(0.95, ITL)),
            unit="s",
            steps=Steps(GOOD, [(ITL_OBJECTIVE, BAD)]),
        ),
        number(
            "Queue",
            "Fullness of the admission queue; at 100 % requests are answered 429.",
            Query(f"max({select('sparse_requests_queued')} / {select('sparse_queue_limit_requests')})"),
            unit="percentunit",
            steps=Steps(GOOD, [(0.5, WARN), (0.9, BAD)]),
        ),
        number(
            "KV cache",
            "Share of the key-value cache in use, on the fullest server.",
            Query(gauge("max", "vllm:kv_cache_usage_perc")),
            unit="percentunit",
            steps=Steps(GOOD, [(0.8, WARN), (0.95, BAD)]),
        ),
    ]


def _traffic() -> list[Tile]:
    return [
        lines(
            "Requests by status",
            "API requests answered per second. 429: a limit was reached; 503: not ready, or the engine died.",
            [Query(total("sparse_http_requests_total", by="status", path=API), "{{status}}")],
            unit="reqps",
            colours=STATUS_COLOURS,
            stacked=True,
        ),
        lines(
            "Rejections by reason",
            "Requests per second that were refused, by reason: a limit of the queue, a key's rate, what they ask for, their size"
            " or time, a server that is not ready.",
            [Query(total("sparse_requests_rejected_total", by="reason"), "{{reason}}")],
            unit="reqps",
            stacked=True,
        ),
        lines(
            "Tokens",
            "Prompt tokens taken in and tokens generated, per second.",
            [
                Query(total("vllm:prompt_tokens_total"), "prompt"),
                Query(total("vllm:generation_tokens_total"), "generated"),
            ],
            unit="suffix: tok/s",
        ),
    ]


def _latency() -> list[Tile]:
    return [
        _quantiles("Time to first token", "From arrival to the first token, queueing included.", TTFT, TTFT_OBJECTIVE),
        _quantiles("Inter-token latency", "Between one token and the next.", ITL, ITL_OBJECTIVE),
        _quantiles("Time per output token", "A request's decode time over its tokens, the first left out.", TPOT),
        _quantiles("End to end", "From arrival to the last token.", E2E),
        lines(
            "Where the time goes",
            "Mean time of a finished request in each phase: waiting to be scheduled, reading the prompt, generating.",
            [Query(mean(f"vllm:request_{phase}_time_seconds"), phase) for phase in ("queue", "prefill", "decode")],
            unit="s",
            stacked=True,
            width=12,
        ),
        lines(
            "Finished requests by reason",
            "Per second; `length`: the limit of tokens was reached, `abort`: the client went away, `error`: the engine failed.",
            [Query(total("vllm:request_success_total", by="finished_reason"), "{{finished_reason}}")],
            unit="reqps",
            stacked=True,
            width=12,
        ),
    ]


def _quantiles(title: str, description: str, histogram: str, objective: float | None = None) -> Tile:
    drawn = "" if objective is None else f" Dashed: the objective, {objective:g} s."
    return lines(
        title,
        f"{description}{drawn}",
        [Query(quantile(q, histogram), f"p{100 * q:.0f}") for q in (0.5, 0.95, 0.99)],
        unit="s",
        colours=QUANTILE_COLOURS,
        limit=objective,
        width=6,
    )


def _load() -> list[Tile]:
    return [
        lines(
            "Requests inside",
            "Waiting for admission; admitted and being answered; of these, in the engine's batch and waiting for a place in it.",
            [
                Query(gauge("sum", "sparse_requests_queued"), "queued"),
                Query(gauge("sum", "sparse_requests_admitted"), "admitted"),
                Query(gauge("sum", "vllm:num_requests_running"), "engine: running"),
                Query(gauge("sum", "vllm:num_requests_waiting"), "engine: waiting"),
                Query(gauge("sum", "sparse_queue_limit_requests"), "queue limit"),
            ],
            unit="short",
            dashed="queue limit",
        ),
        lines(
            "Tokens queued",
            "Tokens that the waiting requests may take, prompts and answers together.",
            [
                Query(gauge("sum", "sparse_queued_tokens"), "queued"),
                Query(gauge("sum", "sparse_queue_limit_tokens"), "limit"),
            ],
            unit="short",
            dashed="limit",
        ),
        lines(
            "KV cache and prefix hits",
            "Share of the key-value cache in use (mean and fullest server), and of prompt tokens that the prefix cache had.",
            [
                Query(gauge("avg", "vllm:kv_cache_usage_perc"), "used, mean"),
                Query(gauge("max", "vllm:kv_cache_usage_perc"), "used, fullest"),
                Query(
                    f"{total('vllm:prefix_cache_hits_total')} / {total('vllm:prefix_cache_queries_total')}",
                    "prefix hits",
                ),
            ],
            unit="percentunit",
            highest=1,
        ),
    ]


def _engine() -> list[Tile]:
    burn = f"job:slo_errors:ratio_rate1h{{{_JOB}}} / on (slo) group_left () (1 - slo:objective:ratio)"
    return [
        lines(
            "Error budget burn, last hour",
            "How many times faster than the objective allows the budget is used up; 1 uses up a month's in a month."
            " ProSparseObjectiveBurnsFast fires at 14.4.",
            [Query(burn, "{{job}} {{slo}}")],
            unit="none",
            limit=14.4,
        ),
        lines(
            "Trouble",
            "Engine restarts, preempted requests and scrapes without counters, per minute. Each should be zero.",
            [
                Query(f"60 * {or_zero(total('sparse_engine_restarts_total'))}", "engine restarts"),
                Query(f"60 * {total('vllm:num_preemptions_total')}", "preemptions"),
                Query(f"60 * {total('sparse_snapshot_failures_total')}", "scrapes without counters"),
            ],
            unit="none",
        ),
        lines(
            "Engine's answers",
            "Seconds that the engine has had work and made no progress, on the worst server; mean time it takes to answer"
            " with its counters.",
            [
                Query(gauge("max", "sparse_engine_seconds_without_progress"), "without progress"),
                Query(mean("sparse_snapshot_seconds"), "counters read in"),
            ],
            unit="s",
        ),
    ]


_JOB = 'job=~"$job"'
