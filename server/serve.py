"""``prosparse serve``: check everything that can be checked, listen, start the engine, serve, drain."""

import argparse
import os
import tempfile
import time
from pathlib import Path

import uvloop

from server.auth import KeyRing
from server.batching import batching_settings
from server.lifecycle import Server
from server.listener import listen
from server.progress import say, write_logging_config
from server.settings import Settings, add_flags
from sparse_backend.checkpoint import Checkpoint
from sparse_backend.errors import UserError
from sparse_backend.vllm_plugin.batching import SETTINGS_VARIABLE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags: one for each setting."""
    add_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal says to stop; returns the exit status."""
    flags = vars(arguments)
    if not flags["vllm_flags"]:
        del flags["vllm_flags"]
    settings = Settings.load(flags)
    keys = KeyRing([key.get_secret_value() for key in settings.api_key], settings.api_key_file)
    began = time.monotonic()
    # Sockets, shared memory, temporary files and compiled kernels are for this user only.
    os.umask(0o077)
    with tempfile.TemporaryDirectory(prefix="prosparse-", ignore_cleanup_errors=True) as folder:
        prepare_environment(settings, Path(folder))
        # Hashing a large checkpoint takes minutes.
        say(f"checking {settings.model}")
        checkpoint = Checkpoint.open(settings.model)
        verified = "every file matches its manifest" if checkpoint.manifest else "no manifest"
        say(f"checkpoint {settings.model}: {checkpoint.activation}, {checkpoint.n_layers} layers, {verified}")
        with listen(settings.host, settings.port) as listener:
            return uvloop.run(Server(settings, checkpoint, keys, began, Path(folder)).run(listener))


def prepare_environment(settings: Settings, folder: Path) -> None:
    """Set what vLLM and its processes read from the environment, where the user has not; before torch is imported.

    Raises:
        UserError: the environment asks for pickled objects on vLLM's sockets.
    """
    if os.environ.get("VLLM_ALLOW_INSECURE_SERIALIZATION", "0") not in ("0", ""):
        raise UserError(
            "VLLM_ALLOW_INSECURE_SERIALIZATION is set: it lets whoever reaches vLLM's sockets run code. Unset it."
        )
    defaults = {
        # Models come from folders, and a private server reports to nobody.
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_LOGGING_LEVEL": settings.log_level.upper(),
        # Sockets between vLLM's processes, in a folder that only this user can enter and that goes with the server; those
        # that must be TCP are on the loopback device.
        "VLLM_RPC_BASE_PATH": str(folder),
        "VLLM_HOST_IP": "127.0.0.1",
        SETTINGS_VARIABLE: batching_settings(settings, folder).model_dump_json(),
    }
    if settings.log_level == "warning" and not {"VLLM_LOGGING_CONFIG_PATH", "VLLM_LOGGING_LEVEL"} & os.environ.keys():
        defaults["VLLM_LOGGING_CONFIG_PATH"] = str(folder / "logging.json")
        # Warnings of torch and Python for the developers of vLLM.
        defaults["TORCH_CPP_LOG_LEVEL"] = "ERROR"
        defaults["TORCH_LOGS"] = "-torch._library.triton"
        defaults["PYTHONWARNINGS"] = "ignore::FutureWarning,ignore::UserWarning:multiprocessing.resource_tracker"
        write_logging_config(folder / "logging.json")
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
