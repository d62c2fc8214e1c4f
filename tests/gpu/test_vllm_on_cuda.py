"""The demo in vLLM on a GPU: the same text and exact counters, whatever vLLM does around the op.

Text is compared with a dense, eager engine. Where two configurations part, the two best tokens must have been within rounding of
each other. Engines run in float16, whose rounding leaves fewer near-ties than bfloat16's, unless said otherwise.

Only the engines that the selected tests need are started: `-m smoke` takes four of them; `-m "not smoke"` and `-k two_ranks`
(two GPUs) are the rest. With `-s` one sees what they are at.
"""

import importlib.util

import pytest
import torch

from sparse_backend.vllm_plugin.batching import SETTINGS_VARIABLE
from tests.gpu.device import NEEDS_GPU
from tests.gpu.engines import LOAD_TOKENS, Answer, EngineConfig, EngineError, Engines, Round, text_tokens
from tests.vllm_plugin import holding

pytestmark = [
    *NEEDS_GPU,
    pytest.mark.engine,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM"),
]

D_FF, LAYERS = 768, 8

# None of these batches has the size of a captured graph, but for one row.
BATCHES = (1, 3, 5, 11)
DECODED = 24
CACHE_BLOCK = 16  # vLLM's default, in tokens
GRAPH_SIZES = [1, 2, 4, 8, 16, 32, 64]

NEAR_TIE = {"float16": 0.08, "bfloat16": 0.35}
"""Nats between the two best tokens, and between two configurations' log-probabilities of the best, that rounding explains. In
float16 five steps of a logit between 16 and 32: a compiled and an eager dense engine were 0.041 apart on an H200."""

IDENTICAL = {"float16": 0.8, "bfloat16": 0.4}
"""Share of the texts that must be the same to the last token."""


def engine(ffn_path="sparse", dtype="float16", graphs=None, environment=None, ours=None, **options):
    compilation = {"cudagraph_capture_sizes": GRAPH_SIZES, **({"cudagraph_mode": graphs} if graphs else {})}
    if not options.get("enforce_eager"):
        options.setdefault("compilation_config", compilation)
    stock = ffn_path == "stock"
    return EngineConfig(ffn_path, stock, {"dtype": dtype, **options}, environment or {}, ours or {})


V1 = {"VLLM_USE_V2_MODEL_RUNNER": "0"}

# By name; what is asserted of each beyond the text is in the tests below.
ENGINES = {
    "reference": engine("dense", enforce_eager=True),
    "stock": engine("stock"),
    "eager": engine(enforce_eager=True),
    "piecewise": engine(graphs="PIECEWISE"),
    "full decode": engine(graphs="FULL_AND_PIECEWISE"),
    # Not FULL, whose graphs hold prefill too: with FlashAttention 3 vLLM's own classes give wrong text then (docs/results).
    "full decode only": engine(graphs="FULL_DECODE_ONLY"),
    # As the server asks for: whole prompts, and prompts beside decodes, are replayed too.
    "prompts in graphs": engine(
        compilation_config={"cudagraph_capture_sizes": [*GRAPH_SIZES, 128, 256, 320, 512, 1024, 2048]}
    ),
    "auto": engine("auto"),
    "dense": engine("dense"),
    "chunked": engine(
        max_num_batched_tokens=48,
        compilation_config={"cudagraph_capture_sizes": [size for size in GRAPH_SIZES if size <= 48]},
    ),
    "held back": engine(
        max_num_batched_tokens=48,
        compilation_config={"cudagraph_capture_sizes": [size for size in GRAPH_SIZES if size <= 48]},
        scheduler_cls=holding.NAME,
        ours={"count_rows": True},
        environment={SETTINGS_VARIABLE: holding.SETTINGS},
    ),
    "cached": engine(enable_prefix_caching=True),
    "synchronous": engine(async_scheduling=False),
    "v1": engine(environment=V1, graphs="FULL_AND_PIECEWISE"),
    "v1 piecewise": engine(environment=V1, graphs="PIECEWISE", async_scheduling=False),
    "v1 eager": engine(environment=V1, enforce_eager=True),
    "unmarked": engine(environment={"VLLM_MOE_SKIP_PADDING": "0"}),
    "bfloat16": engine(dtype="bfloat16"),
    "bfloat16 eager": engine(dtype="bfloat16", enforce_eager=True),
    "bfloat16 stock": engine("stock", dtype="bfloat16", enforce_eager=True),
    "float32": engine(dtype="float32"),
}
SMOKE = ("reference", "full decode", "bfloat16 eager", "bfloat16 stock")
OURS = [name for name, config in ENGINES.items() if not config.stock]


def rounds() -> list[Round]:
    """Batches of short prompts of different lengths, two longer prompts, and one batch with a common beginning twice."""
    ids = text_tokens()
    short = [Round([ids[97 * row : 105 + 104 * row] for row in range(batch)], DECODED) for batch in BATCHES]
    long = Round([ids[2000:2200], ids[2500:2590]], 8)
    common = Round([ids[3000:3070] + ids[4000 + 50 * row : 4010 + 50 * row] for row in range(3)], 8)
    return [*short, long, common, common]


def dtype_of(name: str) -> str:
    """The dtype whose rounding an engine's text is held to; that of float32 is within float16's."""
    return "bfloat16" if "bfloat16" in name else "float16"


def reference_of(name: str) -> str:
    """The engine whose text and counts another one's are compared with."""
    return "bfloat16 stock" if dtype_of(name) == "bfloat16" else "reference"


@pytest.fixture(scope="module")
def engines(request, tmp_path_factory):
    calls = [
        item.callspec.params
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec")
    ]
    asked = [call["answer"] for call in calls if "answer" in call]
    needed = {*asked, *map(reference_of, asked)}
    configs = {name: config for name, config in ENGINES.items() if name in needed}
    with Engines(tmp_path_factory.mktemp("engines"), configs, rounds()) as engines:
        yield engines


@pytest.fixture
def answer(engines, request) -> Answer:
    return answered(engines, request.param)


def answered(engines, name) -> Answer:
    try:
        return engines.answer(name)
    except EngineError as error:
        reason = str(error)
    pytest.fail(reason, pytrace=False)


def each(names):
    marked = [pytest.param(name, marks=pytest.mark.smoke if name in SMOKE else ()) for name in names]
    return pytest.mark.parametrize("answer", marked, indirect=True)


def real_rows(round_: Round, generated) -> int:
    """Rows that must be computed: the prompts, less what the cache had, and each token but the last, fed back."""
    prompts = sum(len(prompt) - one.cached for prompt, one in zip(round_.prompts, generated, strict=True))
    return prompts + len(round_.prompts) * (round_.max_tokens - 1)


def compare_texts(expected: Answer, found: Answer, near_tie: float, identical: float) -> None:
    partings, far, texts = [], [], 0
    for batch, (expected_round, found_round) in enumerate(zip(expected.rounds, found.rounds, strict=True)):
        for row, (one, other) in enumerate(zip(expected_round, found_round, strict=True)):
            texts += 1
            for position, tokens in enumerate(zip(one.tokens, other.tokens, strict=True)):
                # Not `>`: a NaN is far from everything.
                if not abs(one.top[position][0] - other.top[position][0]) <= near_tie:
                    far.append(
                        f"round {batch}, text {row}, token {position}: {one.top[position]}, {other.top[position]}"
                    )
                    break
                if tokens[0] != tokens[1]:
                    partings.append(one.top[position][0] - one.top[position][1])
                    break
    print(f"{texts - len(partings)} of {texts} texts the same; gaps where they part: {partings}; too far: {far}")
    assert not far, far
    assert all(gap <= near_tie for gap in partings), partings
    assert texts - len(partings) >= identical * texts, partings


def check_rows(answer: Answer) -> None:
    for round_, generated, counted in zip(rounds(), answer.rounds, answer.counted, strict=True):
        rows = [sparse + dense for sparse, dense in zip(counted.sparse_rows, counted.dense_rows, strict=True)]
        assert rows == [real_rows(round_, generated)] * LAYERS


@each([name for name in ENGINES if name != reference_of(name)])
def test_text_is_that_of_the_dense_eager_engine(answer, engines, request):
    name = request.node.callspec.params["answer"]
    dtype = dtype_of(name)
    compare_texts(answered(engines, reference_of(name)), answer, NEAR_TIE[dtype], IDENTICAL[dtype])


@each([name for name in OURS if name != "unmarked"])
def test_every_token_row_is_counted_and_no_padding(answer):
    check_rows(answer)


@each(["unmarked"])
def test_padding_that_vllm_does_not_mark_is_counted_but_nothing_is_skipped(answer):
    for round_, generated, counted in zip(rounds(), answer.rounds, answer.counted, strict=True):
        rows = counted.sparse_rows[0] + counted.dense_rows[0]
        assert rows >= real_rows(round_, generated)
    assert rows > real_rows(round_, generated), "this engine pads nothing, so the others' counts prove nothing"


@each(
    [
        "eager",
        "piecewise",
        "full decode",
        "full decode only",
        "prompts in graphs",
        "chunked",
        "synchronous",
        "v1",
        "v1 piecewise",
        "v1 eager",
    ]
)
def test_active_neurons_are_those_of_the_reference(answer, engines):
    """Up to those within rounding of the threshold, and to texts that part."""
    for expected, counted in zip(answered(engines, "reference").counted, answer.counted, strict=True):
        for layer, (one, other) in enumerate(zip(expected.active, counted.active, strict=True)):
            assert abs(one - other) <= 0.05 * one, layer
        assert sum(counted.active) == pytest.approx(sum(expected.active), rel=0.02)


@each([name for name in OURS if ENGINES[name].ffn_path == "sparse" and name != "float32"])
def test_decode_steps_take_the_sparse_path(answer, request):
    chunked = request.node.callspec.params["answer"] == "chunked"
    for round_, counted in zip(rounds(), answer.counted, strict=True):
        if chunked and len(round_.prompts) > 1:
            continue  # most of the steps have a piece of another prompt in them
        # But for those beside the prefill of a prompt that came a step later.
        assert min(counted.sparse_rows) >= 0.85 * len(round_.prompts) * (round_.max_tokens - 1)
    assert answer.snapshot["kernel"]["name"] == "cuda"
    assert answer.snapshot["kernel"]["reason"] == ""


@each(["reference", "dense", "float32"])
def test_these_take_the_dense_path_only(answer, request):
    assert all(rows == 0 for counted in answer.counted for rows in counted.sparse_rows)
    kernel, dtype = answer.snapshot["kernel"], "float32" if "float32" in request.node.name else ""
    assert dtype in kernel["reason"]
    assert bool(kernel["reason"]) == bool(dtype)


def check_snapshots_under_load(answer: Answer, cached: int = 0) -> None:
    """Each is of one step, in every layer and worker, and they follow the request, of whose prompt some may be in the cache."""
    assert all(len(set(rows)) == 1 for rows in answer.under_load)
    counts = [rows[0] for rows in answer.under_load]
    assert counts == sorted(counts)
    assert len(set(counts)) > 10
    at_rest = sum(counts["rows"] for counts in answer.snapshot["layers"][0]["paths"].values())
    before = sum(rows for counted in answer.counted for rows in (counted.sparse_rows[0], counted.dense_rows[0]))
    assert at_rest == before + len(rounds()[0].prompts[0]) - cached + LOAD_TOKENS - 1


@each([name for name in OURS if name != "unmarked"])
def test_snapshots_under_load_are_each_of_one_step(answer, request):
    whole_blocks = (len(rounds()[0].prompts[0]) - 1) // CACHE_BLOCK * CACHE_BLOCK
    check_snapshots_under_load(answer, whole_blocks if request.node.callspec.params["answer"] == "cached" else 0)


@each(OURS)
def test_the_snapshot_taken_without_waiting_is_the_exact_one_at_rest(answer):
    assert answer.live_snapshot == answer.snapshot
    assert [(layer["layer"], layer["d_ff"]) for layer in answer.snapshot["layers"]] == [
        (str(index), D_FF) for index in range(LAYERS)
    ]


@each(ENGINES)
def test_the_engine_ran_as_asked(answer, request):
    """vLLM falls back silently: to another runner, to fewer graphs."""
    name = request.node.callspec.params["answer"]
    config, facts = ENGINES[name], answer.facts
    print(f"{name}: {facts}, ready after {answer.ready_s:.0f} s, {answer.total_s:.0f} s in all")
    assert facts["runner"] == (
        "vllm.v1.worker.gpu_model_runner" if name[:2] == "v1" else "vllm.v1.worker.gpu.model_runner"
    )
    assert facts["async_scheduling"] == config.options.get("async_scheduling", True)
    expected = "NONE"
    if not config.options.get("enforce_eager"):
        expected = config.options["compilation_config"].get("cudagraph_mode", "FULL_AND_PIECEWISE")
    assert facts["graphs"] == expected


@each(["cached"])
def test_a_common_beginning_is_found_in_the_cache(answer):
    assert sum(one.cached for one in answer.rounds[-1]) >= 3 * 64


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_ranks_give_the_text_and_the_counters_of_one(tmp_path):
    # What the ranks exchange sums with is vLLM's business: NCCL is what works on every machine.
    shared = {"tensor_parallel_size": 2, "disable_custom_all_reduce": True}
    no_symmetric_memory = {"VLLM_ALLREDUCE_USE_SYMM_MEM": "0"}
    configs = {
        "one": engine(),
        "two": engine(environment=no_symmetric_memory, **shared),
        "two, v1": engine(environment={**no_symmetric_memory, **V1}, **shared),
    }
    with Engines(tmp_path, configs, rounds()) as engines:
        one, *others = [answered(engines, name) for name in configs]
    for two in others:
        compare_texts(one, two, NEAR_TIE["float16"], IDENTICAL["float16"])
        check_rows(two)
        check_snapshots_under_load(two)
        assert two.live_snapshot == two.snapshot
        assert [layer["d_ff"] for layer in two.snapshot["layers"]] == [D_FF] * LAYERS
        for expected, counted in zip(one.counted, two.counted, strict=True):
            # Which prompts share a step is a matter of time, and with it which steps are too large for the sparse path.
            assert sum(counted.active) == pytest.approx(sum(expected.active), rel=0.02)
            assert min(counted.sparse_rows) >= 0.9 * min(expected.sparse_rows) > 0
