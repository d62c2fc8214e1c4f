import importlib.util
import json
import logging
import logging.config
from pathlib import Path

import pytest

from server.progress import STEPS, ExpectedFilter, StepFilter, write_logging_config

VLLM = Path(importlib.util.find_spec("vllm").origin).parent


def record(name: str, message: str, *arguments: object, level: int = logging.INFO) -> logging.LogRecord:
    return logging.LogRecord(name, level, "", 0, message, arguments, None)


@pytest.mark.parametrize(("logger", "start"), STEPS, ids=" ".join)
def test_vllm_logs_each_step_under_the_name_we_know(logger, start):
    source = (VLLM / logger.removeprefix("vllm.").replace(".", "/")).with_suffix(".py").read_text()
    assert f'"{start}' in source


def test_steps_pass_in_our_words_and_nothing_else_does():
    filter_ = StepFilter()
    step = record("vllm.v1.worker.cpu_model_runner", "Starting to load model %s...", "/home/me/model")
    assert filter_.filter(step)
    assert step.getMessage() == "loading the weights"
    assert not filter_.filter(record("vllm.v1.worker.cpu_model_runner", "Warming up done."))
    assert not filter_.filter(record("vllm.other", "Starting to load model %s...", "m"))


def test_expected_warnings_are_dropped_and_others_are_not():
    filter_ = ExpectedFilter()
    assert not filter_.filter(record("vllm.platforms.cpu", "Triton is not installed. …", level=logging.WARNING))
    assert filter_.filter(record("vllm.core", "Request %s was preempted", "r", level=logging.WARNING))
    assert filter_.filter(record("vllm.core", "Triton is not installed. …", level=logging.ERROR))


def test_the_logging_configuration_shows_warnings_and_steps(tmp_path, capfd):
    write_logging_config(tmp_path / "logging.json")
    config = json.loads((tmp_path / "logging.json").read_text())
    loggers = [logging.getLogger(name) for name in config["loggers"]]
    try:
        logging.config.dictConfig(config)
        logging.getLogger("vllm.v1.worker.cpu_model_runner").info("Starting to load model %s...", "m")
        logging.getLogger("vllm.core").info("chatter")
        logging.getLogger("vllm.core").warning("Request was preempted")
        logging.getLogger("vllm.core").warning("Model Runner V2 requires Triton; using V1")
    finally:
        for logger in loggers:
            logger.handlers.clear()
            logger.setLevel(logging.NOTSET)
            logger.propagate = True
    assert capfd.readouterr().err == "prosparse: loading the weights\nWARNING vllm.core: Request was preempted\n"
