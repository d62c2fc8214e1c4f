"""Training: transformers' Trainer, to which this module adds the regulariser, its schedule and a progress line."""

import math
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from sparse_backend.errors import UserError
from sparse_backend.prosparse.recipe import TrainingRecipe
from sparse_backend.prosparse.regulariser import ActivationL1
from sparse_backend.prosparse.schedule import L1Schedule
from sparse_backend.prosparse.tokens import Text, TokenWindows, as_model_input

# AdamW's constants, the usual ones for language models.
OPTIMIZER = {"beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "gradient_clip": 1.0}

_EVALUATIONS = 10


@dataclass(frozen=True)
class Runtime:
    """Where a run computes and how it reports; nothing here changes the result beyond rounding."""

    device: torch.device
    compile: bool
    progress_every: int


def train(
    model: PreTrainedModel,
    text: Text,
    recipe: TrainingRecipe,
    runtime: Runtime,
    folder: Path,
    schedule: L1Schedule | None = None,
) -> list[float]:
    """Train ``model`` (float32) in place; with ``schedule``, λ times the L1 norm of act(gate)*up is added to the loss.

    On a GPU products are in bfloat16 (autocast), weights and optimiser state in float32; on the CPU all is float32.

    Args:
        model: the model, whose weights are changed.
        text: training tokens, and the blocks on which the loss is printed ten times during the run.
        recipe: the run's settings.
        runtime: device and printing.
        folder: for the Trainer's own files; created where missing.
        schedule: λ by step; None for plain language modelling.

    Returns:
        Seconds since the start after each step.

    Raises:
        UserError: the loss became NaN or infinite.
    """
    on_gpu = runtime.device.type == "cuda"
    l1 = ActivationL1(model)
    progress = _Progress(recipe, runtime.progress_every, l1 if schedule is not None else None)
    trainer = _RegularisedTrainer(
        l1=l1,
        schedule=schedule,
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=recipe.steps,
            per_device_train_batch_size=recipe.pass_sequences,
            gradient_accumulation_steps=recipe.batch // recipe.pass_sequences,
            per_device_eval_batch_size=recipe.pass_sequences,
            learning_rate=recipe.learning_rate,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": recipe.final_learning_rate},
            warmup_steps=round(recipe.warmup * recipe.steps),
            optim="adamw_torch_fused",
            adam_beta1=OPTIMIZER["beta1"],
            adam_beta2=OPTIMIZER["beta2"],
            adam_epsilon=OPTIMIZER["epsilon"],
            max_grad_norm=OPTIMIZER["gradient_clip"],
            weight_decay=recipe.weight_decay,
            bf16=on_gpu,
            use_cpu=not on_gpu,
            torch_compile=runtime.compile,
            dataloader_pin_memory=on_gpu,
            remove_unused_columns=False,
            logging_strategy="no",
            logging_nan_inf_filter=False,
            prediction_loss_only=True,
            save_strategy="no",
            disable_tqdm=True,
            report_to="none",
            seed=recipe.seed,
        ),
        train_dataset=TokenWindows(text.stream, recipe.context, recipe.steps * recipe.batch, recipe.seed),
        eval_dataset=text.held_out,
        data_collator=as_model_input,
        callbacks=[progress],
    )
    trainer.remove_callback(PrinterCallback)
    try:
        trainer.train()
    finally:
        l1.remove()
    return progress.seconds


class _RegularisedTrainer(Trainer):
    """The Trainer with λ·L1 in its loss; ``loss`` in its log is the language-modelling loss alone."""

    def __init__(self, *, l1: ActivationL1, schedule: L1Schedule | None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._l1 = l1
        self._schedule = schedule
        self._loss = torch.zeros((), device=self.args.device)
        self._forward_passes = 0
        # The Trainer is to average over micro-batches: the regulariser, too, is a mean over one.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Mean next-token cross-entropy, plus λ times the L1 norm while training with λ > 0."""
        if not model.training:
            outputs = model(**inputs, use_cache=False)
            return (outputs.loss, outputs) if return_outputs else outputs.loss
        weight = 0.0 if self._schedule is None else self._schedule.weight(self.state.global_step + 1)
        with self._l1.collecting(penalise=weight > 0):
            outputs = model(**inputs, use_cache=False)
        loss = outputs.loss
        self._loss += loss.detach()
        self._forward_passes += 1
        if weight > 0:
            loss = loss + weight * self._l1.take_norm()
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Replace ``loss``, which holds the penalty, and add λ and the sparsity."""
        if "loss" in logs:
            logs["loss"] = self._loss.item() / self._forward_passes
            self._loss.zero_()
            self._forward_passes = 0
            if self._schedule is not None:
                logs["lambda"] = self._schedule.weight(self.state.global_step)
                logs["sparsity"] = self._l1.take_sparsity()
        super().log(logs, start_time)

    def _get_train_sampler(self, *_args: Any) -> SequentialSampler:
        # TokenWindows has an order of its own.
        return SequentialSampler(self.train_dataset)


class _Progress(TrainerCallback):
    """Decides when the Trainer logs and evaluates, and prints both."""

    def __init__(self, recipe: TrainingRecipe, every: int, l1: ActivationL1 | None) -> None:
        self.seconds: list[float] = []
        self._recipe, self._every, self._l1 = recipe, every, l1
        self._evaluate_every = -(-recipe.steps // _EVALUATIONS)
        self._started = self._window_started = 0.0
        self._window_step = 0

    def _is_evaluated(self, step: int) -> bool:
        return step == self._recipe.steps or step % self._evaluate_every == 0

    def _is_printed(self, step: int) -> bool:
        # The tenth step comes early and, unlike the first, runs at full speed: it tells how long the run will take.
        return step in (1, 10) or step % self._every == 0 or self._is_evaluated(step)

    def on_train_begin(self, *_args: Any, **_kwargs: Any) -> None:
        self._started = self._window_started = time.perf_counter()

    def on_step_begin(self, _args: TrainingArguments, state: TrainerState, *_rest: Any, **_kwargs: Any) -> None:
        if self._l1 is not None:
            self._l1.counting = self._is_printed(state.global_step + 1)

    def on_step_end(
        self, _args: TrainingArguments, state: TrainerState, control: TrainerControl, **_kwargs: Any
    ) -> None:
        control.should_log = self._is_printed(state.global_step)
        control.should_evaluate = self._is_evaluated(state.global_step)
        self.seconds.append(time.perf_counter() - self._started)

    def on_log(
        self,
        _args: TrainingArguments,
        state: TrainerState,
        _control: TrainerControl,
        logs: dict[str, float],
        **_kwargs: Any,
    ) -> None:
        if "loss" not in logs:
            return
        step, steps = state.global_step, self._recipe.steps
        if not math.isfinite(logs["loss"]):
            raise UserError(
                f"The loss became {logs['loss']} by step {step} of {steps}. Lower --learning-rate or --l1, or lengthen"
                " --warmup."
            )
        rate = (step - self._window_step) / (time.perf_counter() - self._window_started)
        parts = [
            f"step {step:>{len(str(steps))}}/{steps}",
            f"loss {logs['loss']:.4f}",
            f"lr {logs['learning_rate']:.2e}",
        ]
        if "lambda" in logs:
            parts += [f"λ {logs['lambda']:.2e}", f"sparsity {logs['sparsity']:6.2%}"]
        parts += [
            f"{rate * self._recipe.step_tokens:,.0f} tokens/s",
            f"left {timedelta(seconds=round((steps - step) / rate))}",
        ]
        print("  ".join(parts), flush=True)
        self._window_step, self._window_started = step, time.perf_counter()

    def on_evaluate(
        self,
        _args: TrainingArguments,
        state: TrainerState,
        _control: TrainerControl,
        metrics: dict[str, float],
        **_kwargs: Any,
    ) -> None:
        print(f"step {state.global_step}: held-out loss {metrics['eval_loss']:.4f}", flush=True)
        # An evaluation directly follows a progress line, so that the next one's rate leaves it out.
        self._window_started = time.perf_counter()
