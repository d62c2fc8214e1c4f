"""What sparsity does and what it gains: density by layer, path taken, bytes not read, the scheduler's part in it."""

from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.grafana.board import Row, board
from deploy.grafana.panels import (
    BAD,
    GOOD,
    NEUTRAL,
    PATH_COLOURS,
    WARN,
    Query,
    Steps,
    Tile,
    bars,
    heat,
    label,
    lines,
    number,
    scatter,
)
from deploy.grafana.promql import gauge, or_zero, rate, select, total

NEURONS = select("sparse_ffn_neurons")
NEURON_BYTES = select("sparse_ffn_neuron_bytes")


def over_paths(metric: str, **labels: str) -> str:
    """Per second and layer, both paths together unless ``labels`` choose one."""
    return f"sum without (path) ({rate(metric, **labels)})"


def density(by: str = "") -> str:
    """Share of neurons active per token row, from counters: exact over any range."""
    aggregate = f"sum by ({by})" if by else "sum"
    return (
        f"{aggregate} ({rate('sparse_ffn_active_neurons_total')})"
        f" / {aggregate} ({over_paths('sparse_ffn_rows_total')} * {NEURONS})"
    )


def union_density(by: str = "") -> str:
    """Share of neurons active for at least one row of a step, likewise."""
    aggregate = f"sum by ({by})" if by else "sum"
    return (
        f"{aggregate} ({rate('sparse_ffn_union_neurons_total')})"
        f" / {aggregate} ({over_paths('sparse_ffn_steps_total')} * {NEURONS})"
    )


def sparse_share(by: str = "") -> str:
    """Share of steps that took the sparse path."""
    return f"{total('sparse_ffn_steps_total', by=by, path='sparse')} / {total('sparse_ffn_steps_total', by=by)}"


def bytes_saved(by: str = "") -> str:
    """Weight bytes per second that the sparse path did not read: rows of up and down outside each step's union."""
    aggregate = f"sum by ({by})" if by else "sum"
    steps = over_paths("sparse_ffn_steps_total", path="sparse")
    union = over_paths("sparse_ffn_union_neurons_total", path="sparse")
    return f"{aggregate} (2 * {NEURON_BYTES} * ({NEURONS} * {steps} - {union}))"


def bytes_dense() -> str:
    """Weight bytes per second that all steps would read on the dense path: gate, up and down, whole."""
    return f"sum (3 * {NEURON_BYTES} * {NEURONS} * {over_paths('sparse_ffn_steps_total')})"


def two_digits(expression: str) -> str:
    """The label ``layer`` with a leading zero: a heat map sorts its rows as text."""
    return f'label_replace({expression}, "layer", "0$1", "layer", "([0-9])")'


def sparsity() -> Dashboard:
    """The board."""
    return board(
        "prosparse-sparsity",
        "ProSparse / Sparsity",
        "How sparse the feed-forward layers run, which path they take, and what that saves.",
        [
            Row("Now", _now()),
            Row("Density by layer", _layers()),
            Row("Batches and paths", _paths()),
            Row("What it gains", _gain()),
            Row("Scheduler", _scheduler()),
        ],
    )


def _now() -> list[Tile]:
    return [
        number(
            "Density",
            "Share of neurons active per token, mean over layers. Lower is sparser.",
            Query(gauge("avg", "sparse_ffn_density")),
            unit="percentunit",
            no_value="at rest",
        ),
        number(
            "Union density",
            "Share of neurons active for at least one token of a step, mean over layers: what the sparse path has to read.",
            Query(gauge("avg", "sparse_ffn_union_density")),
            unit="percentunit",
            no_value="at rest",
        ),
        number(
            "Sparse path",
            "Share of steps computed on the sparse path. Near zero under decode load: runbook, ProSparseSparsePathIdle.",
            Query(sparse_share()),
            unit="percentunit",
            no_value="at rest",
        ),
        number(
            "Weight reads saved",
            "Share of the feed-forward weights' bytes that were not read. At most two thirds: gate is always read.",
            Query(f"{bytes_saved()} / {bytes_dense()}"),
            unit="percentunit",
            steps=Steps(NEUTRAL, [(0.1, GOOD)]),
            no_value="at rest",
        ),
        number(
            "Saved", "Weight bytes not read per second; with dReLU an upper bound.", Query(bytes_saved()), unit="Bps"
        ),
        number(
            "Layers without",
            "Layers that have no sparse path, as they may have a LoRA adapter or their weights are quantised.",
            Query(or_zero(gauge("sum", "sparse_ffn_dense_fallback"))),
            unit="none",
            steps=Steps(GOOD, [(1, WARN)]),
        ),
        label(
            "Kernel",
            "Implementation and instruction set of the feed-forward layers; reference: runbook, ProSparseKernelIsReference.",
            Query(f"count by (name, isa) ({select('sparse_kernel_info')})", "{{name}} {{isa}}"),
        ),
        label(
            "Batching",
            "Policy of the scheduler.",
            Query(f"count by (policy) ({select('sparse_batching_info')})", "{{policy}}"),
        ),
    ]


def _layers() -> list[Tile]:
    against = f"{density('layer')} / {gauge('avg', 'sparse_ffn_expected_density', by='layer')}"
    return [
        heat(
            "Density by layer over time",
            "Share of neurons active per token. A row that changes colour while the traffic does not is worth a look;"
            " all rows bright: the wrong checkpoint, or text unlike its training's.",
            Query(two_digits(density("layer")), "{{layer}}"),
            unit="percentunit",
            axis="layer",
        ),
        bars(
            "Density against the checkpoint's",
            "100 %: as dense as on held-out text when the checkpoint was made. Empty for a checkpoint without a manifest. Red is"
            " where ProSparseDensityDrift fires if it lasts.",
            Query(two_digits(against), "layer {{layer}}"),
            unit="percentunit",
            steps=Steps(BAD, [(0.5, WARN), (0.75, GOOD), (1.25, WARN), (1.5, BAD)]),
            highest=2,
            height=10,
        ),
    ]


def _paths() -> list[Tile]:
    rows_per_step = f"{total('sparse_ffn_rows_total')} / {total('sparse_ffn_steps_total')}"
    per_path = "{path} / {steps}".format(
        path=total("sparse_ffn_rows_total", by="path"), steps=total("sparse_ffn_steps_total", by="path")
    )
    return [
        scatter(
            "Union density against batch size",
            "A point for each moment: the more tokens share a step, the more neurons it needs. Where the cloud nears 100 %, the"
            " sparse path has nothing left to skip.",
            Query(rows_per_step, "Rows per step"),
            Query(union_density(), "Union density"),
            x_unit="none",
            y_unit="percentunit",
            y_highest=1,
        ),
        lines(
            "Rows per step",
            "Token rows that share a step, mean by path. Dashed: up to this many take the sparse path; 512 stands for more.",
            [
                Query(per_path, "{{path}}"),
                Query(f"clamp_max({gauge('avg', 'sparse_ffn_max_sparse_rows')}, 512)", "limit of the sparse path"),
            ],
            unit="none",
            colours=PATH_COLOURS,
            dashed="limit of the sparse path",
        ),
        bars(
            "Sparse path by layer",
            "Share of each layer's steps that took the sparse path. Layers differ where their density does.",
            Query(two_digits(sparse_share("layer")), "layer {{layer}}"),
            unit="percentunit",
            steps=Steps(WARN, [(0.01, NEUTRAL), (0.5, GOOD)]),
            highest=1,
        ),
        lines(
            "Steps by path",
            "Engine steps per second on each path, mean over layers.",
            [Query(f"avg by (path) ({rate('sparse_ffn_steps_total')})", "{{path}}")],
            unit="suffix: steps/s",
            colours=PATH_COLOURS,
            stacked=True,
        ),
        lines(
            "Token rows by path",
            "Token rows per second on each path, mean over layers: prompts go dense, generated tokens sparse.",
            [Query(f"avg by (path) ({rate('sparse_ffn_rows_total')})", "{{path}}")],
            unit="suffix: rows/s",
            colours=PATH_COLOURS,
            stacked=True,
        ),
        lines(
            "Active neurons per token",
            "Of one layer, mean over layers, and of the layers with fewest and most.",
            [
                Query(_active("avg"), "mean"),
                Query(_active("min"), "fewest"),
                Query(_active("max"), "most"),
            ],
            unit="short",
        ),
    ]


def _active(operator: str) -> str:
    return f"{operator} ({total('sparse_ffn_active_neurons_total', by='layer')} / {total('sparse_ffn_rows_total', by='layer')})"


def _gain() -> list[Tile]:
    return [
        lines(
            "Speed beside density",
            "Tokens generated per second (left) and density (right): at equal load, speed rises as density falls.",
            [Query(total("vllm:generation_tokens_total"), "tokens/s"), Query(density(), "density")],
            unit="suffix: tok/s",
            right=("density", "percentunit"),
            colours={"tokens/s": NEUTRAL, "density": WARN},
        ),
        lines(
            "Weight bytes",
            "What the steps would read densely, and what they did not read.",
            [Query(bytes_dense(), "all dense"), Query(bytes_saved(), "not read")],
            unit="Bps",
            colours={"not read": GOOD},
            dashed="all dense",
        ),
        lines(
            "Bytes not read per token",
            "Weight bytes that a token row did not cost.",
            [Query(f"{bytes_saved()} / avg({over_paths('sparse_ffn_rows_total')})", "per token row")],
            unit="bytes",
            colours={"per token row": GOOD},
        ),
    ]


def _scheduler() -> list[Tile]:
    return [
        lines(
            "Decisions",
            "What the scheduler decided, per second.",
            [Query(total("sparse_scheduler_decisions_total", by="decision"), "{{decision}}")],
            unit="suffix: /s",
            stacked=True,
            width=6,
        ),
        lines(
            "Fallbacks to first come, first served",
            "Per minute, by reason. Lasting: runbook, ProSparseSchedulerFallback.",
            [Query(f"60 * {total('sparse_scheduler_fallbacks_total', by='reason')}", "{{reason}}")],
            unit="suffix: /min",
            stacked=True,
            width=6,
        ),
        lines(
            "Error of the predicted step time",
            "Running median of the relative error by path, on the worst server. What the scheduler decides is worth as much as"
            " this is small.",
            [Query(gauge("max", "sparse_cost_error_ratio", by="path"), "{{path}}")],
            unit="percentunit",
            colours=PATH_COLOURS,
            width=6,
        ),
        heat(
            "Density of finished requests",
            "Finished requests per second by their density: two bands are two kinds of text.",
            Query(total("sparse_request_density_bucket", by="le"), "{{le}}"),
            unit="reqps",
            axis="density",
            axis_unit="percentunit",
            buckets=True,
            width=6,
            height=8,
        ),
    ]
