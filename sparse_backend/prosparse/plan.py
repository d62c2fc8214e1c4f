"""``prosparse sparsify --dry-run``: what a recipe will do and need, reckoned from its numbers; no tensor is made."""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

from pydantic import ValidationError

from sparse_backend.checkpoint import read_json
from sparse_backend.errors import UserError
from sparse_backend.prosparse.checkpoints import check_base
from sparse_backend.prosparse.recipe import STANDARD_LIBRARY, Data, Recipe, Shape, TrainingRecipe

_GIB = 2**30
_REDUCTIONS = {
    "mean_tokens_sum_dff": "mean over tokens of the sum over d_ff",
    "sum": "sum over the tokens of a forward pass and d_ff",
    "mean": "mean over tokens and d_ff",
}


def plan(recipe: Recipe, base: Path | None) -> str:
    """The plan as text: model, data, stages, training, memory per device, time.

    Args:
        recipe: what to plan for.
        base: the model to start from; None for the one that the recipe describes.

    Raises:
        UserError: the model cannot be made sparse or has not the recipe's context, or there is none.
    """
    shape, origin = _shape(recipe, base)
    return "\n".join(
        [
            *([recipe.description.strip(), ""] if recipe.description else []),
            f"model      {_count(shape.parameters)} parameters: {shape.num_hidden_layers} layers, d_model"
            f" {shape.hidden_size}, d_ff {shape.intermediate_size} ({origin})",
            *_data_lines("data", recipe.data),
            *([] if recipe.sft is None else _data_lines("SFT data", recipe.sft.data)),
            "",
            *_stage_table(recipe),
            "",
            *_training_lines(recipe),
            "",
            *_device_lines(recipe, shape),
        ]
    )


def _shape(recipe: Recipe, base: Path | None) -> tuple[Shape, str]:
    if base is None:
        if recipe.model is None:
            raise UserError(
                "--dry-run is given no BASE, and the recipe has no 'model' to plan for. Give one of the two."
            )
        return recipe.model, "as the recipe says"
    check_base(base)
    config = read_json(base, "config.json")
    try:
        shape = Shape.from_config(config)
    except ValidationError as error:
        fault = error.errors()[0]
        name = fault["loc"][0]
        raise UserError(
            f"BASE {str(base)!r}: {name} in its config.json is {config.get(str(name))!r}: {fault['msg']}. Copy the model"
            " again."
        ) from None
    longest = config.get("max_position_embeddings")
    if isinstance(longest, int) and recipe.training.context > longest:
        raise UserError(
            f"--context is {recipe.training.context}, BASE was made for {longest} tokens at most"
            " (max_position_embeddings). Take a shorter context."
        )
    return shape, f"BASE {base}"


def _data_lines(label: str, data: Data | None) -> Iterator[str]:
    if data is None:
        yield f"{label:<10} none: name sources in the recipe or give --corpus"
        return
    total = sum(source.weight or 0 for source in data.sources)
    for source in data.sources:
        share = f"{source.weight / total:.1%} of the tokens" if source.weight else "its own share of the tokens"
        found = source.path == STANDARD_LIBRARY or Path(source.path).exists()
        yield f"{label:<10} {source.name or source.path}: {share}{'' if found else ' (NOT FOUND on this machine)'}"
        label = ""
    yield f"{'':<10} {data.held_out:.1%} of the documents held out"


def _stage_table(recipe: Recipe) -> Iterator[str]:
    """The paper's tables 6 and 7: λ_i, T_i, tokens up to T_i."""
    yield f"{'stage':<7}{'':<14}{'λ':>10}{'until step':>12}{'tokens (B)':>14}"
    step_tokens = recipe.training.step_tokens
    rows = [
        (str(index), stage.name, stage.peak, end, end * step_tokens)
        for index, (stage, end) in enumerate(zip(recipe.stages, recipe.stage_ends, strict=True))
    ]
    if recipe.sft is not None and (run := recipe.sft_run) is not None:
        steps, tokens = recipe.steps + run.steps, recipe.steps * step_tokens + run.steps * run.step_tokens
        rows.append(("SFT", "", recipe.sft.peak, steps, tokens))
    for index, name, peak, end, tokens in rows:
        yield f"{index:<7}{name:<14}{peak:>10.4g}{end:>12,}{_billions(tokens):>14}"


def _training_lines(recipe: Recipe) -> Iterator[str]:
    training = recipe.training
    yield (
        f"batch      {training.batch} sequences of {training.context} tokens: {training.step_tokens:,} tokens a step,"
        f" {recipe.steps:,} steps"
    )
    course: str = training.learning_rate_schedule
    if course != "constant":
        course += f", down to {training.final_learning_rate:g} of it"
    yield (
        f"AdamW      learning rate {training.learning_rate:g} ({course}; rises for {round(training.warmup * recipe.steps):,}"
        f" steps), weight decay {training.weight_decay:g}, seed {training.seed}"
    )
    target = "" if recipe.target_sparsity is None else f"; λ is steered towards {recipe.target_sparsity:.1%} sparsity"
    yield f"L1         λ * {recipe.l1.scale:g} * {_REDUCTIONS[recipe.l1.reduction]}, summed over layers{target}"
    sweep = ", ".join(f"{threshold:g}" for threshold in recipe.threshold.sweep)
    unit = " times the gate's root mean square" if recipe.threshold.unit == "gate_rms" else ""
    yield f"threshold  the sparsest of {sweep}{unit} that costs at most {recipe.threshold.budget:g} nats"


def _device_lines(recipe: Recipe, shape: Shape) -> Iterator[str]:
    hardware, training = recipe.hardware, recipe.training
    sequences = training.micro_batch or -(-training.batch // hardware.devices)
    memory = memory_per_device(shape, recipe.run, hardware.devices)
    yield (
        f"memory     about {memory / _GIB:.1f} GiB of {hardware.memory_gib:.0f} on each device ({hardware.devices}),"
        f" {sequences} sequences in a forward pass"
    )
    if memory > hardware.memory_gib * _GIB:
        yield "           DOES NOT FIT: lower --micro-batch, turn --gradient-checkpointing on, or take more devices"
    runs = [recipe.run] if recipe.sft_run is None else [recipe.run, recipe.sft_run]
    operations = sum(run.tokens * operations_per_token(shape, run.context) for run in runs)
    seconds = operations / (hardware.devices * hardware.tflops * 1e12 * hardware.utilisation)
    yield (
        f"time       about {_duration(seconds)} at {hardware.utilisation:.0%} of {hardware.tflops:g} TFLOP/s a device"
        " (hardware in the recipe); threshold sweep and evaluations not counted"
    )


def operations_per_token(shape: Shape, context: int) -> float:
    """Floating-point operations to train on one token: 6 per weight, and 6 * context * d_model per layer for attention."""
    looked_up = 0 if shape.tie_word_embeddings else shape.vocab_size * shape.hidden_size
    return 6 * (shape.parameters - looked_up) + 6 * shape.num_hidden_layers * context * shape.hidden_size


def memory_per_device(shape: Shape, run: TrainingRecipe, devices: int) -> float:
    """Bytes on one device, states sharded over all of them (FSDP2); an estimate to a quarter or so.

    States are float32 weights, gradients and AdamW's two moments; activations are those that a LLaMA layer keeps for the
    backward pass under bfloat16 autocast, with its residual stream and norms in float32.
    """
    d_model, d_ff = shape.hidden_size, shape.intermediate_size
    states = 16 * shape.parameters / devices
    embeddings = shape.vocab_size * d_model
    layer_weights = (shape.parameters - embeddings) / shape.num_hidden_layers
    # bfloat16 copies: of the whole model, or of the layers at work and the embeddings.
    copies = 2 * (shape.parameters if devices == 1 else 2 * layer_weights + embeddings)

    tokens = run.context * (run.micro_batch or -(-run.batch // devices))
    grouped = shape.num_key_value_heads / shape.num_attention_heads
    layer = tokens * (d_model * (24 + 4 * (1 + 2 * grouped)) + 8 * d_ff)
    entry = tokens * 4 * d_model
    layers = shape.num_hidden_layers * entry + layer if run.gradient_checkpointing else shape.num_hidden_layers * layer
    # Logits in bfloat16, and in float32 with what cross-entropy adds.
    logits = tokens * shape.vocab_size * 14
    return states + copies + layers + logits


def _count(number: float) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"


def _billions(tokens: int) -> str:
    return f"{tokens / 1e9:.2f}" if tokens >= 1e9 else f"{tokens / 1e9:.4f}"


def _duration(seconds: float) -> str:
    return f"{seconds / 86_400:.1f} days" if seconds > 2 * 86_400 else str(timedelta(seconds=max(1, round(seconds))))
