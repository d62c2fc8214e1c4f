import random

import pytest

from sparse_backend.vllm_plugin.batching import BatchingSettings
from sparse_backend.vllm_plugin.cost import LayerTable, StepCost, StepShape, layer_scale, union_of
from sparse_backend.vllm_plugin.plan import Decode, Planner, Prefill, step_shape
from sparse_backend.vllm_plugin.snapshot import PATHS

# Microseconds of a layer: rows, union, sparse; rows, dense.
TABLE = LayerTable(
    [(rows, 1 - 0.9**rows, 24 + 50 * (1 - 0.9**rows) + rows / 2) for rows in (1, 2, 4, 8, 16)],
    [(rows, 77 + 0.4 * max(0, rows - 64)) for rows in (1, 8, 16, 32, 64, 128, 256)],
)


def model() -> StepCost:
    return StepCost(TABLE, scale=layer_scale(32, 4096, 11008, 32000), max_sparse_rows=16)


def truth(step: StepShape) -> float:
    """Another machine than the table's, with attention and a host."""
    host = 8e-4 if step.after_prefill else 0
    if step.rows <= 16:
        return host + 2.5e-3 + 2.2e-3 * step.union + 3e-5 * step.rows + 1.3e-7 * step.context
    return host + 4e-3 + 2.2e-5 * max(0, step.rows - 90) + 1.3e-7 * step.context + (1e-3 if step.prefill_tokens else 0)


def most_seconds(cost: StepCost, step: StepShape) -> float:
    """What the step seldom takes longer than."""
    return cost.times(step)[1]


def traffic(generator: random.Random, count: int) -> list[StepShape]:
    steps: list[StepShape] = []
    for _ in range(count):
        after_prefill = bool(steps) and steps[-1].prefill_tokens > 0
        rows = generator.choice([1, 3, 8, 14, 30, 60])
        context = rows * generator.randint(50, 1500)
        if generator.random() < 0.2:
            tokens = generator.randint(30, 3000)
            steps.append(StepShape(rows + tokens, tokens, context, tokens**2 // 2, after_prefill=after_prefill))
        else:
            densities = [generator.choice([0.02, 0.06, 0.16]) for _ in range(rows)]
            union = union_of(densities)
            steps.append(StepShape(rows, context=context, union=union, after_prefill=after_prefill))
    return steps


def test_it_starts_from_the_table() -> None:
    # 32 layers, whose feed-forward part is two thirds of the weights; the head is one more.
    assert 1e3 * model().seconds(StepShape(8)) == pytest.approx(32 * 1.55 * 0.078, rel=0.1)
    alone = StepShape(1, union=0.1)
    assert 1e3 * model().seconds(alone) == pytest.approx(32 * 1.55 * 0.0295, rel=0.1)
    assert model().seconds(StepShape(512, 512)) > 2 * model().seconds(StepShape(64))
    assert model().path(alone) == "sparse"
    assert model().path(StepShape(17)) == "dense"


@pytest.mark.parametrize("prefill", [False, True])
def test_beyond_the_table_it_goes_on_as_the_table_ends(prefill: bool) -> None:
    times = [model().seconds(StepShape(rows, rows if prefill else 0)) for rows in (200, 250, 256, 257, 264, 300, 600)]
    per_row = (times[1] - times[0]) / 50
    assert per_row > 0
    assert times[-1] - times[2] == pytest.approx(344 * per_row, rel=0.01)
    assert times == sorted(times)


@pytest.mark.parametrize("prefill", [False, True])
def test_beyond_the_steps_seen_it_goes_on_as_they_did(prefill: bool) -> None:
    generator = random.Random(0)
    for seen in range(32, 300, 32):
        cost = model()
        for _ in range(seen):
            rows, context = generator.randint(17, 250), generator.randint(10000, 200000)
            tokens = rows - 4 if prefill else 0
            cost.observe(StepShape(rows, tokens, context), 4e-3 + 2e-5 * rows + 1.2e-7 * context)
        for rows in (251, 256, 257, 261, 280):
            assert cost.seconds(StepShape(rows, rows - 4 if prefill else 0, 180000)) == pytest.approx(
                4e-3 + 2e-5 * rows + 1.2e-7 * 180000, rel=0.15
            )


def test_without_a_table_it_starts_all_the_same() -> None:
    assert StepCost(LayerTable([], []), scale=1, max_sparse_rows=0).seconds(StepShape(1)) > 0


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_it_learns_the_machine_within_a_minute_of_steps(noise: float) -> None:
    generator = random.Random(0)
    cost = model()
    for step in traffic(generator, 1500):
        hiccup = 10 if generator.random() < 0.02 else 1
        cost.observe(step, truth(step) * hiccup * (1 + noise * generator.gauss(0, 1)))
    for path in PATHS:
        error = cost.error(path)
        assert error is not None
        assert error < 0.02 + noise
    for step in traffic(generator, 200):
        assert cost.seconds(step) == pytest.approx(truth(step), rel=0.1 + 2 * noise)
        assert most_seconds(cost, step) >= cost.seconds(step)


def test_small_steps_that_wait_for_the_host_do_not_make_large_ones_look_longer() -> None:
    generator = random.Random(0)
    cost = model()

    def prompt(tokens: int) -> StepShape:
        return StepShape(30 + tokens, tokens, 10000, tokens**2 // 2)

    for _ in range(1000):
        tokens = generator.choice([50, 60, 80, 180, 1500, 2500])
        waits = tokens < 200 and generator.random() < 0.3
        cost.observe(prompt(tokens), truth(prompt(tokens)) * (3 if waits else 1))
    assert most_seconds(cost, prompt(70)) > 2 * truth(prompt(70))
    assert most_seconds(cost, prompt(2000)) == pytest.approx(truth(prompt(2000)), rel=0.1)
    assert most_seconds(cost, prompt(8000)) == pytest.approx(cost.seconds(prompt(8000)), rel=0.1)


def test_a_size_that_was_slow_for_a_while_is_tried_again() -> None:
    generator = random.Random(0)
    cost = model()
    large = StepShape(2060, 2000, 30000, 2000**2 // 2)
    for _ in range(40):
        cost.observe(large, truth(large) * generator.choice([1, 1, 3]))
        for step in traffic(generator, 5):
            cost.observe(step, truth(step))
    assert most_seconds(cost, large) > 2 * truth(large)
    # The planner does not choose it any more.
    for _ in range(6000):
        small = StepShape(130, 100, 5000, 5000)
        cost.observe(small, truth(small))
    assert most_seconds(cost, large) < 1.3 * truth(large)


def test_what_the_host_hides_behind_long_contexts_is_not_held_against_them() -> None:
    generator = random.Random(0)
    cost = model()

    def prompt(context: int) -> StepShape:
        return StepShape(700, 600, context, 600**2 // 2)

    # Launching either keeps the host for 25 to 35 ms.
    for _ in range(1000):
        step = prompt(generator.choice([10_000, 400_000]))
        cost.observe(step, max(truth(step), generator.uniform(25e-3, 35e-3)))
    assert most_seconds(cost, prompt(10_000)) > 33e-3
    assert most_seconds(cost, prompt(400_000)) == pytest.approx(truth(prompt(400_000)), rel=0.05)


def test_a_kind_that_was_slow_is_tried_again_though_none_of_it_is_run() -> None:
    generator = random.Random(0)
    cost = model()
    decoding = StepShape(180, context=130_000)
    for _ in range(200):
        cost.observe(decoding, truth(decoding) * generator.choice([1, 1, 1, 1.6]))
    for _ in range(9):
        cost.observe(decoding, truth(decoding) * 1.6)
    assert cost.seconds(decoding) > 1.5 * truth(decoding)
    for _ in range(1500):
        mixed = StepShape(500, 320, 130_000, 320**2 // 2)
        cost.observe(mixed, truth(mixed))
    assert most_seconds(cost, decoding) == pytest.approx(truth(decoding), rel=0.1)


def test_lateness_of_what_is_seldom_run_is_forgotten() -> None:
    generator = random.Random(0)
    cost = model()
    short, long = StepShape(700, 600, 10_000, 600**2 // 2), StepShape(700, 600, 400_000, 600**2 // 2)
    for _ in range(1000):
        step = generator.choice([short, long])
        cost.observe(step, truth(step) * (3 if step is short and generator.random() < 0.2 else 1))
    assert most_seconds(cost, short) > 2 * truth(short)
    # From now on in time, and as seldom as what a planner avoids.
    for _ in range(2000):
        step = short if generator.random() < 1 / 8 else long
        cost.observe(step, truth(step))
    assert most_seconds(cost, short) < 1.2 * truth(short)


def test_a_machine_that_slows_down_is_not_counted_twice() -> None:
    generator = random.Random(0)
    cost = model()

    def observe(count: int, factor: float) -> None:
        for step in traffic(generator, count):
            cost.observe(step, truth(step) * factor * (1 + 0.03 * generator.gauss(0, 1)))

    observe(1500, 1.0)
    observe(400, 1.5)
    over = [most_seconds(cost, step) / (1.5 * truth(step)) for step in traffic(generator, 200)]
    assert sorted(over)[len(over) // 2] < 1.15


def test_a_time_that_cannot_be_is_not_learned() -> None:
    generator = random.Random(0)
    cost = model()
    for step in traffic(generator, 1000):
        cost.observe(step, truth(step))
    prompt = StepShape(1030, 1000, 10_000, 1000**2 // 2)
    cost.observe(prompt, truth(prompt) / 1000)
    for step in traffic(generator, 300):
        cost.observe(step, truth(step))
        assert cost.seconds(step) == pytest.approx(truth(step), rel=0.35)


def test_prompts_by_themselves_do_not_change_what_those_beside_decodes_take() -> None:
    generator = random.Random(0)
    cost = model()

    def observe(decodes: int, factor: float) -> StepShape:
        tokens = generator.randint(600, 1200)
        step = StepShape(decodes + tokens, tokens, 800 * decodes, tokens**2 // 2)
        cost.observe(step, factor * truth(step))
        return step

    for _ in range(300):
        observe(generator.choice([0, 150, 250]), 1.0)
    for _ in range(30):
        alone = observe(0, 0.75)
    assert cost.seconds(alone) == pytest.approx(0.75 * truth(alone), rel=0.05)
    beside = StepShape(1200, 1000, 160_000, 1000**2 // 2)
    assert cost.seconds(beside) == pytest.approx(truth(beside), rel=0.05)


def test_one_of_two_steps_is_allowed_to_be_late() -> None:
    generator = random.Random(0)
    planner = Planner(BatchingSettings(policy="sparse", itl_slo_ms=75), model())
    decodes, prefills = [Decode(1000, 0.1)] * 180, [Prefill(0, 500)] * 10

    def takes(step: StepShape) -> float:
        # Beside prompts contexts cost twice; one in six is 12 ms late.
        beside = step.prefill_tokens and step.rows > step.prefill_tokens
        return truth(step) * (2 if beside else 1) + generator.choice([0, 0, 0, 0, 0, 12e-3])

    for _ in range(800):
        tokens = generator.randint(100, 1500)
        for step in (
            step_shape(decodes, prefills, tokens),
            step_shape([], prefills, tokens),
            step_shape(decodes, [], 0, after_prefill=True),
        ):
            planner.cost.observe(step, takes(step))
    plan = planner.plan(decodes, prefills, 5000)
    assert not plan.decodes
    own, after = step_shape([], prefills, plan.prompt_tokens), step_shape(decodes, [], 0, after_prefill=True)
    expected = planner.cost.seconds(own) + planner.cost.seconds(after)
    late = max(most_seconds(planner.cost, step) - planner.cost.seconds(step) for step in (own, after))
    assert expected + late == pytest.approx(0.95 * 75e-3 - 60e-6 * 180, abs=1.5e-3)


def test_pieces_of_prompts_are_not_cut_to_those_whose_times_vary_most() -> None:
    generator = random.Random(0)
    planner = Planner(BatchingSettings(policy="sparse", itl_slo_ms=25), model())
    decodes, prefills = [Decode(300, 0.1)] * 30, [Prefill(0, 4000)]
    for _ in range(1000):
        tokens = generator.choice([64, 128, 600, 800])
        step = step_shape(decodes, prefills, tokens)
        # Every other small one takes four times as long.
        planner.cost.observe(step, truth(step) * (4 if tokens < 200 and generator.random() < 0.5 else 1))
    assert most_seconds(planner.cost, step_shape(decodes, prefills, 64)) > 25e-3
    assert 600 <= planner.plan(decodes, prefills, 4000).prompt_tokens <= 1100


def test_the_more_decodes_the_more_time_is_left_for_their_way_to_the_clients() -> None:
    generator = random.Random(0)
    planner = Planner(BatchingSettings(policy="sparse", itl_slo_ms=60), model())
    for step in traffic(generator, 1500):
        planner.cost.observe(step, truth(step))
    prefills = [Prefill(0, 8000)]
    for rows in (20, 100, 300):
        decodes = [Decode(300, 0.1)] * rows
        plan = planner.plan(decodes, prefills, 8000, may_hold_back=False)
        left = 60e-3 - most_seconds(planner.cost, step_shape(decodes, prefills, plan.prompt_tokens))
        assert left == pytest.approx(3e-3 + 60e-6 * rows, abs=1.5e-3)


def test_what_changes_for_all_steps_is_followed_at_once() -> None:
    generator = random.Random(0)
    cost = model()
    for step in traffic(generator, 600):
        cost.observe(step, truth(step))
    for step in traffic(generator, 60):
        cost.observe(step, 1.5 * truth(step))
    for step in traffic(generator, 50):
        assert cost.seconds(step) == pytest.approx(1.5 * truth(step), rel=0.15)


def test_a_step_never_gets_shorter_by_carrying_more() -> None:
    generator = random.Random(0)
    cost = model()
    for step in traffic(generator, 300):
        # Larger steps are measured shorter: nothing that such a machine does may be believed.
        cost.observe(step, 1 / (1 + step.rows))
    times = [cost.seconds(StepShape(20 + tokens, tokens, 5000, tokens**2 // 2)) for tokens in range(20, 4000, 50)]
    assert times == sorted(times)


def test_an_error_is_of_predictions_made_before() -> None:
    cost = model()
    assert cost.error("dense") is None
    predicted = cost.seconds(StepShape(64))
    cost.observe(StepShape(64), 2 * predicted)
    assert cost.error("dense") == pytest.approx(0.5)
    assert cost.error("sparse") is None


def test_union_of_independent_rows() -> None:
    assert union_of([]) == 0
    assert union_of([0.5, 0.5, 0.2]) == pytest.approx(0.8)
