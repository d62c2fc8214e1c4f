"""What vLLM's processes print: warnings, and of their progress the few steps a person waits for, as lines of ours.

vLLM passes a logging configuration file on to the processes it starts; ours holds the filter below.
"""

import json
import logging
import sys
from pathlib import Path

_WARM_UP = "weights loaded; warming up (a first start also compiles, which takes longer)"

# vLLM logger, start of its message -> our line. A contract test finds each message in vLLM's source.
STEPS = {
    ("vllm.v1.worker.cpu_model_runner", "Starting to load model"): "loading the weights",
    ("vllm.v1.worker.cpu_model_runner", "Warming up model for the compilation"): _WARM_UP,
    ("vllm.v1.worker.cpu.model_runner", "Warming up model for the compilation"): _WARM_UP,
    ("vllm.v1.worker.gpu_model_runner", "Starting to load model"): "loading the weights",
    ("vllm.v1.worker.gpu.model_runner", "Model loading took"): _WARM_UP,
}


# Warnings of vLLM's that describe what this product chose on purpose (a CPU without Triton or preloaded libraries)
# or what the user asked for (eager mode).
_EXPECTED = (
    "Triton is not installed",
    "Model Runner V2 requires Triton",
    "Reset SSM cache type",
    "%s is not found in LD_PRELOAD",
    "Enforce eager set",
    "Using custom scheduler class",
    "Inductor compilation was disabled by user settings",
    "TORCH_COMPILE_DISABLE is set",
)


def say(line: str) -> None:
    """One line of progress, on standard error."""
    print(f"prosparse: {line}", file=sys.stderr, flush=True)


class StepFilter(logging.Filter):
    """Lets the messages in ``STEPS`` pass, in our words, and nothing else."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Rewrite a known step; drop the rest."""
        for (logger, start), line in STEPS.items():
            if record.name == logger and isinstance(record.msg, str) and record.msg.startswith(start):
                record.msg, record.args = line, None
                return True
        return False


class ExpectedFilter(logging.Filter):
    """Drops warnings about what was chosen on purpose."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Let a record pass unless it is an expected warning."""
        return not (record.levelno == logging.WARNING and str(record.msg).startswith(_EXPECTED))


def write_logging_config(path: Path) -> None:
    """Write a ``logging.config.dictConfig`` file for vLLM: warnings and worse as they are, and our steps."""
    steps = sorted({logger for logger, _ in STEPS})
    config = {
        "version": 1,
        "disable_existing_loggers": False,
        "filters": {
            "steps": {"()": f"{__name__}.{StepFilter.__name__}"},
            "expected": {"()": f"{__name__}.{ExpectedFilter.__name__}"},
        },
        "formatters": {
            "steps": {"format": "prosparse: %(message)s"},
            "vllm": {"format": "%(levelname)s %(name)s: %(message)s"},
        },
        "handlers": {
            "steps": {
                "class": "logging.StreamHandler",
                "formatter": "steps",
                "filters": ["steps"],
                "stream": "ext://sys.stderr",
            },
            "vllm": {
                "class": "logging.StreamHandler",
                "formatter": "vllm",
                "filters": ["expected"],
                "level": "WARNING",
                "stream": "ext://sys.stderr",
            },
        },
        "loggers": {
            "vllm": {"handlers": ["vllm"], "level": "WARNING", "propagate": False},
            **{name: {"handlers": ["steps"], "level": "INFO"} for name in steps},
        },
    }
    path.write_text(json.dumps(config))
