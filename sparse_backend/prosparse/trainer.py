"""Training: transformers' Trainer, to which this module adds the regulariser, λ, progress lines and resuming."""

import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from shutil import rmtree
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor, distributed, nn
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
from sparse_backend.prosparse import workspace
from sparse_backend.prosparse.recipe import L1Recipe, TrainingRecipe
from sparse_backend.prosparse.regulariser import ActivationL1
from sparse_backend.prosparse.target import SparsityTarget
from sparse_backend.prosparse.tokens import Text, as_model_input

_EVALUATIONS = 10
_SAVE_SECONDS = 600
_DEFAULT_L1 = L1Recipe()


class L1Weight(Protocol):
    """λ by optimiser step."""

    @property
    def relu_steps(self) -> int:
        """T_0, the end of stage 0 (λ = 0)."""

    def weight(self, step: int) -> float:
        """λ of optimiser step ``step``, counted from 1."""


@dataclass(frozen=True)
class Runtime:
    """Where a run computes and how it reports; nothing here changes the result beyond rounding."""

    device: torch.device
    compile: bool = False
    progress_every: int = 50
    save_every: int = 0
    """Steps between checkpoints to resume from; 0 is about every ten minutes."""

    @property
    def processes(self) -> int:
        """Processes that compute together, as torchrun starts them."""
        return int(os.environ.get("WORLD_SIZE", "1"))

    @property
    def is_first(self) -> bool:
        """True in the process that prints and writes."""
        return int(os.environ.get("RANK", "0")) == 0


@dataclass(frozen=True)
class TrainingRun:
    """A training run up to its end, or to where it was to stop."""

    folder: Path
    """The Trainer's last checkpoint: a model folder with float32 weights."""
    history: list[dict[str, float]]
    """In the order of the steps: progress (``step``, ``loss``, ``learning_rate``, ``lambda``, ``sparsity``, ``seconds``, …) and
    evaluations (``step``, ``eval_loss``)."""

    def seconds_at(self, step: int) -> float:
        """Seconds of training up to ``step``, one of the steps that were logged; 0 for 0."""
        return next((entry["seconds"] for entry in self.history if entry["step"] == step and "seconds" in entry), 0.0)


def train(
    model: PreTrainedModel,
    text: Text,
    recipe: TrainingRecipe,
    runtime: Runtime,
    folder: Path,
    *,
    schedule: L1Weight | None = None,
    l1: L1Recipe = _DEFAULT_L1,
    decay_steps: int = 0,
    logs: Path | None = None,
    stop_after: int | None = None,
) -> TrainingRun:
    """Train ``model`` (float32) in place; with ``schedule``, λ times the L1 norm of act(gate)*up is added to the loss.

    On a GPU products are in bfloat16 (autocast), weights and optimiser state in float32; on the CPU all is float32. Under
    torchrun the batch is split over the processes: FSDP2 on GPUs, replicas on CPUs. Where ``folder`` holds a checkpoint of an
    earlier process, training goes on from it and takes the course it would have taken.

    Args:
        model: the model, whose weights are changed.
        text: training tokens, and the blocks on which the loss is printed ten times during the run.
        recipe: the run's settings.
        runtime: device, printing and saving.
        folder: for the Trainer's checkpoints, of which the last two are kept; created where missing.
        schedule: λ by step; None for plain language modelling.
        l1: what λ weighs.
        decay_steps: length of the learning rate's fall under its schedule "wsd".
        logs: folder for TensorBoard's files; None for none.
        stop_after: step to stop after, for a later call to go on from; None for the end.

    Raises:
        UserError: the loss became NaN or infinite, a checkpoint cannot be written or read, or torch.compile fails.
    """
    on_gpu = runtime.device.type == "cuda"
    micro_batch = recipe.micro_batch or recipe.batch // runtime.processes
    if not micro_batch or recipe.batch % (micro_batch * runtime.processes):
        raise UserError(
            f"--batch {recipe.batch} cannot be split over {runtime.processes} processes in micro-batches of"
            f" {micro_batch or 1} sequences. Take a batch that is a multiple of {(micro_batch or 1) * runtime.processes}."
        )
    if runtime.is_first:
        workspace.discard_incomplete(folder)
    end = recipe.steps if stop_after is None else stop_after
    resumed = workspace.last_complete(folder)
    if resumed is not None and workspace.step_of(resumed[0]) >= end:
        return _finished(resumed[0])
    if runtime.compile:
        torch.compiler.reset()  # runs of one process count together towards the limit of recompilations
    norm = ActivationL1(model, l1.reduction, l1.scale)
    progress = _Progress(recipe, runtime, norm, schedule, folder, end)
    trainer = _RegularisedTrainer(
        l1=norm,
        schedule=schedule,
        progress=progress,
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=recipe.steps,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=recipe.batch // (micro_batch * runtime.processes),
            per_device_eval_batch_size=micro_batch,
            learning_rate=recipe.learning_rate,
            **_learning_rate_schedule(recipe, decay_steps),
            warmup_steps=round(recipe.warmup * recipe.steps),
            optim="adamw_torch_fused",
            adam_beta1=recipe.beta1,
            adam_beta2=recipe.beta2,
            adam_epsilon=recipe.epsilon,
            max_grad_norm=recipe.gradient_clip,
            weight_decay=recipe.weight_decay,
            bf16=on_gpu,
            use_cpu=not on_gpu,
            fsdp=on_gpu and runtime.processes > 1,
            ddp_find_unused_parameters=False,
            gradient_checkpointing=recipe.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            torch_compile=runtime.compile,
            dataloader_pin_memory=on_gpu,
            remove_unused_columns=False,
            logging_strategy="no",
            logging_nan_inf_filter=False,
            prediction_loss_only=True,
            save_strategy="no",
            save_total_limit=2,
            disable_tqdm=True,
            report_to="none",
            seed=recipe.seed,
        ),
        train_dataset=text.windows(recipe.context, recipe.steps * recipe.batch, recipe.seed),
        eval_dataset=text.held_out,
        data_collator=as_model_input,
        callbacks=[progress],
    )
    trainer.remove_callback(PrinterCallback)
    if logs is not None and runtime.is_first:
        _add_tensorboard(trainer, logs, None if resumed is None else workspace.step_of(resumed[0]))
    try:
        if resumed is None:
            trainer.train()
        else:
            _resume(trainer, progress, *resumed)
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo.", "torch._inductor.")):
            raise
        raise UserError(
            f"torch.compile cannot compile the model here: {str(error).strip().splitlines()[0]} Give --no-compile, or see that"
            " a C compiler and Python's headers are installed."
        ) from error
    finally:
        norm.remove()
    return _finished(workspace.checkpoint_folder(folder, end))


def _finished(checkpoint: Path) -> TrainingRun:
    return TrainingRun(checkpoint, json.loads((checkpoint / "trainer_state.json").read_text())["log_history"])


def _learning_rate_schedule(recipe: TrainingRecipe, decay_steps: int) -> dict[str, Any]:
    if recipe.learning_rate_schedule == "constant":
        return {"lr_scheduler_type": "constant_with_warmup"}
    if recipe.learning_rate_schedule == "wsd":
        kwargs = {"num_decay_steps": decay_steps, "decay_type": "linear", "min_lr_ratio": recipe.final_learning_rate}
        return {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": kwargs}
    return {
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": recipe.final_learning_rate},
    }


def _resume(trainer: Trainer, progress: "_Progress", checkpoint: Path, state: Mapping[str, Any]) -> None:
    progress.restore(state)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    except (SafetensorError, OSError, EOFError) as error:
        raise UserError(
            f"The checkpoint {str(checkpoint)!r} cannot be read: {error}. Delete this folder; the same command then goes on"
            " from the one before it."
        ) from None


def _add_tensorboard(trainer: Trainer, folder: Path, resumed_step: int | None) -> None:
    if find_spec("tensorboard") is None:
        print("TensorBoard is not installed (pip install tensorboard): its files are left out", flush=True)
        return
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    # What a killed process logged beyond its last checkpoint is about to be logged again.
    purge = None if resumed_step is None else resumed_step + 1
    trainer.add_callback(TensorBoardCallback(SummaryWriter(log_dir=str(folder), purge_step=purge)))


class _RegularisedTrainer(Trainer):
    """The Trainer with λ·L1 in its loss; ``loss`` in its log is the language-modelling loss alone."""

    def __init__(self, *, l1: ActivationL1, schedule: L1Weight | None, progress: "_Progress", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._l1, self._schedule, self._progress = l1, schedule, progress
        # Compiled, the first λ above 0 would compile the model again: the norm is there from the start, and weighs nothing.
        self._always_penalise = (
            self.args.torch_compile and schedule is not None and schedule.relu_steps < self.args.max_steps
        )
        self._loss = torch.zeros((), device=self.args.device)
        self._forward_passes = 0
        self._weight = 0.0
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
        self._weight = 0.0 if self._schedule is None else self._schedule.weight(self.state.global_step + 1)
        penalise = self._weight > 0 or self._always_penalise
        with self._l1.collecting(penalise):
            outputs = model(**inputs, use_cache=False)
        loss = outputs.loss
        self._loss += loss.detach()
        self._forward_passes += 1
        if penalise:
            loss = loss + self._weight * self._l1.take_norm()
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Replace ``loss``, which holds the penalty, and add λ, the sparsity and the speed."""
        if "loss" in logs:
            logs["loss"] = _mean_over_processes(self._loss / self._forward_passes)
            self._loss.zero_()
            self._forward_passes = 0
            if self._schedule is not None:
                logs["lambda"] = self._weight
                logs["sparsity"] = self._progress.sparsity
            logs |= self._progress.speed(self.state.global_step)
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, SafetensorError, RuntimeError) as error:
            # torch.save and safetensors report a full disk in words of their own.
            if isinstance(error, RuntimeError) and "write" not in str(error):
                raise
            folder = Path(self.args.output_dir)
            rmtree(workspace.checkpoint_folder(folder, self.state.global_step), ignore_errors=True)
            raise UserError(
                f"The checkpoint of step {self.state.global_step} cannot be written to {str(folder)!r}: {error}. Free some"
                f" space. {_last_good(folder)}"
            ) from None

    def _get_train_sampler(self, *_args: Any) -> SequentialSampler:
        # The windows have an order of their own.
        return SequentialSampler(self.train_dataset)


class _Progress(TrainerCallback):
    """Decides when the Trainer logs, evaluates and saves, prints what it logs, and steers λ towards a target."""

    def __init__(
        self,
        recipe: TrainingRecipe,
        runtime: Runtime,
        l1: ActivationL1,
        schedule: L1Weight | None,
        folder: Path,
        end: int,
    ) -> None:
        self.sparsity = 0.0
        """Share of exact zeros in x1 in the last step where it was counted."""
        self._recipe, self._runtime, self._l1, self._schedule, self._folder = recipe, runtime, l1, schedule, folder
        self._target = schedule if isinstance(schedule, SparsityTarget) else None
        self._end = end
        self._evaluate_every = -(-recipe.steps // _EVALUATIONS)
        self._save_every = runtime.save_every
        self._first_step = 0
        self._seconds_before = 0.0
        self._started = self._window_started = 0.0
        self._window_step = 0

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from the state that ``on_save`` left."""
        self._seconds_before = state["seconds"]
        if self._target is not None:
            self._target.restore(state["target"])

    def speed(self, step: int) -> dict[str, float]:
        """Seconds of training so far, those of earlier processes included, and tokens a second since the last log."""
        now = time.perf_counter()
        rate = (step - self._window_step) / (now - self._window_started)
        return {
            "tokens_per_second": rate * self._recipe.step_tokens,
            "seconds": self._seconds_before + now - self._started,
        }

    def _is_evaluated(self, step: int) -> bool:
        return step == self._recipe.steps or step % self._evaluate_every == 0

    def _is_saved(self, step: int) -> bool:
        # Step 1 of the method ends at relu_steps: its seconds are read from the log, and step 2 can start there.
        ends = self._schedule is not None and step == self._schedule.relu_steps
        ends |= step in (self._recipe.steps, self._end)
        return ends or (self._save_every > 0 and step % self._save_every == 0)

    def _is_logged(self, step: int) -> bool:
        # The tenth step comes early and, unlike the first, runs at full speed: it tells how long the run will take. What is
        # saved was logged, and a loss that is not finite thereby refused.
        every = self._runtime.progress_every
        return step in (1, 10) or step % every == 0 or self._is_evaluated(step) or self._is_saved(step)

    def _needs_sparsity(self, step: int) -> bool:
        return self._is_logged(step) or (self._target is not None and self._target.is_observed(step))

    def on_train_begin(self, _args: TrainingArguments, state: TrainerState, *_rest: Any, **_kwargs: Any) -> None:
        self._started = self._window_started = time.perf_counter()
        self._first_step = self._window_step = state.global_step
        if state.global_step:
            print(f"resuming after step {state.global_step} of {self._recipe.steps}", flush=True)

    def on_step_begin(self, _args: TrainingArguments, state: TrainerState, *_rest: Any, **_kwargs: Any) -> None:
        # Compiled, counting is next to free, but switching it on and off compiles the model twice.
        self._l1.counting = self._schedule is not None and (
            self._runtime.compile or self._needs_sparsity(state.global_step + 1)
        )

    def on_step_end(
        self, _args: TrainingArguments, state: TrainerState, control: TrainerControl, **_kwargs: Any
    ) -> None:
        step = state.global_step
        if self._l1.counting:
            sparsity = self._l1.take_sparsity()
            if self._needs_sparsity(step):
                self.sparsity = _mean_over_processes(sparsity)
            if self._target is not None and self._target.is_observed(step):
                self._target.observe(step, self.sparsity)
        if not self._save_every and step == self._first_step + 10:
            step_seconds = _of_first_process((time.perf_counter() - self._started) / 10)
            self._save_every = max(1, round(_SAVE_SECONDS / step_seconds))
        control.should_log = self._is_logged(step)
        control.should_evaluate = self._is_evaluated(step)
        control.should_save = self._is_saved(step)
        control.should_training_stop = step >= self._end

    def on_save(self, _args: TrainingArguments, state: TrainerState, *_rest: Any, **_kwargs: Any) -> None:
        if distributed.is_initialized():
            distributed.barrier()
        if self._runtime.is_first:
            workspace.mark_complete(
                workspace.checkpoint_folder(self._folder, state.global_step),
                {
                    "seconds": self._seconds_before + time.perf_counter() - self._started,
                    "target": None if self._target is None else self._target.state(),
                },
            )
        self._window_started = time.perf_counter()

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
        for name in ("loss", "grad_norm"):
            if not math.isfinite(logs.get(name, 0.0)):
                # Left in, it would be what a later process resumes with.
                raise UserError(
                    f"The {'loss' if name == 'loss' else 'gradient'} became {logs[name]} by step {step} of {steps}."
                    f" {_last_good(self._folder)} Lower --learning-rate or --l1, or lengthen --warmup, in a run of its own."
                )
        parts = [
            f"step {step:>{len(str(steps))}}/{steps}",
            f"loss {logs['loss']:.4f}",
            f"lr {logs['learning_rate']:.2e}",
        ]
        if "lambda" in logs:
            parts += [f"λ {logs['lambda']:.2e}", f"sparsity {logs['sparsity']:6.2%}"]
        rate = logs["tokens_per_second"]
        left = (steps - step) * self._recipe.step_tokens / rate
        print("  ".join([*parts, f"{rate:,.0f} tokens/s", f"left {timedelta(seconds=round(left))}"]), flush=True)
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


def _last_good(folder: Path) -> str:
    found = workspace.last_complete(folder)
    return "No checkpoint was saved yet." if found is None else f"The last good checkpoint is {str(found[0])!r}."


def _mean_over_processes(value: Tensor) -> float:
    if distributed.is_initialized():
        value = value.clone()
        distributed.all_reduce(value)
        value /= distributed.get_world_size()
    return value.item()


def _of_first_process(value: float) -> float:
    if not distributed.is_initialized():
        return value
    values = [value]
    distributed.broadcast_object_list(values, src=0)
    return values[0]
