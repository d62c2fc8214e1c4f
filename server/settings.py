"""The server's settings: flag over environment (``PROSPARSE_…``) over the file given as ``--config``."""

import argparse
import os
import shlex
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin

import yaml
from pydantic import BeforeValidator, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, InitSettingsSource, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from server.auth import MetricsAccess, parse_key
from server.cli import nearest
from server.limits import AdmissionLimits, Recovery, RequestLimits, split_commas
from sparse_backend.errors import UserError

PREFIX = "PROSPARSE_"

# Environment keys with our prefix that other rooms read; everything else under the prefix must be a setting.
OTHER_ENVIRONMENT_KEYS = frozenset({"PROSPARSE_CACHE_DIR", "PROSPARSE_CPU_ISA", "PROSPARSE_BATCHING_SETTINGS"})

# What PROSPARSE_CPU_ISA may be. The kernels decide what this CPU has of them, but only once the engine's workers are up.
CPU_ISAS = ("amx", "avx512_bf16", "avx512f", "avx2", "portable")

# vLLM flags whose place a setting of ours has taken.
_OUR_FLAGS = {
    "--model": "model",
    "--served-model-name": "served_model_name",
    "--dtype": "dtype",
    "--host": "host",
    "--port": "port",
    "--api-key": "api_key",
    "--config": "config",
    "--shutdown-timeout": "drain_timeout",
    "--additional-config": "ffn_path",
    "--scheduler-cls": "batching",
    "--log-level": "log_level",
}

# vLLM flags that are refused, with the reason.
_REFUSED_FLAGS = {
    "--trust-remote-code": "a checkpoint is data here, code in it is never run; served architectures need none",
    "--hf-overrides": "the server sets it, to map the checkpoint to its sparse model class",
    "--worker-extension-cls": "the server sets it, to read the sparsity counters",
    "--headless": "one `prosparse serve` runs one server",
    "--api-server-count": "one `prosparse serve` runs one server",
    "--enable-tokenizer-info-endpoint": "its path is not served",
    "--enable-server-load-tracking": "its path is not served",
    "--help": "`vllm serve --help` shows vLLM's own flags",
    "-h": "`vllm serve --help` shows vLLM's own flags",
}

# So are those by which vLLM's replicas answer to several servers.
_REFUSED_FLAGS |= dict.fromkeys(
    (
        *("--data-parallel-rank", "-dpn", "--data-parallel-start-rank", "-dpr"),
        *("--data-parallel-hybrid-lb", "-dph", "--data-parallel-external-lb", "-dpe"),
        *("--data-parallel-multi-port-external-lb", "-dpm"),
    ),
    "one `prosparse serve` runs all replicas, and --data-parallel-size says how many",
)


def _split_words(value: object) -> object:
    return shlex.split(value) if isinstance(value, str) else value


def _split_keys(value: object) -> object:
    # An empty part stays: it is refused, since leaving it out could leave no key at all.
    return value.split(",") if isinstance(value, str) else value


class Settings(RequestLimits, AdmissionLimits, Recovery, BaseSettings):
    """Everything ``prosparse serve`` can be told. Each description says what the setting does at its limit."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True)

    model: Path = Field(description="checkpoint folder: config.json, tokenizer, *.safetensors; never downloaded")
    config: Path | None = Field(None, description="settings file, YAML or TOML; keys are the names of these settings")
    host: str = Field("127.0.0.1", description="address to listen on; the default is reachable from this machine only")
    port: int = Field(
        8000, ge=1, le=65535, description="TCP port to listen on; if it is taken the server does not start"
    )
    served_model_name: str | None = Field(
        None,
        min_length=1,
        description="name clients give as `model` (default: the folder's name); any other name is answered 404",
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto",
        description="number format of weights and activations; auto: the checkpoint's, but bfloat16 for a float16 one on a"
        " CPU. float16 needs a GPU; float32 is computed densely there",
    )
    ffn_path: Literal["auto", "sparse", "dense"] = Field(
        "auto",
        description="how feed-forward layers compute: auto takes the sparse path up to the row count where it was"
        " measured to win on this machine, and the dense path beyond; sparse and dense force one path",
    )
    batching: Literal["fcfs", "sparse"] = Field(
        "fcfs",
        description="what a step is made of: fcfs, whatever has come, in that order, as vLLM does it; sparse, as much of the"
        " waiting prompts as the objectives leave room for, by the predicted time of the step",
    )
    itl_slo_ms: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="with --batching sparse: objective for the milliseconds between two tokens of a request; longer prompts are"
        " read in smaller pieces to keep it. One that not even a single request can meet is said at start-up",
    )
    ttft_slo_ms: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="with --batching sparse: objective for the milliseconds to a request's first token",
    )
    max_unfairness_ms: float = Field(
        1000,
        ge=0,
        allow_inf_nan=False,
        description="with --batching sparse and an objective: shorter prompts are let in before longer ones, but none before one"
        " that came so many milliseconds earlier; 0 keeps the order in which they came",
    )
    step_log: Path | None = Field(
        None,
        description="file that each of the engine's steps is appended to as a line of JSON: what it was made of, how long it"
        " took, what had been predicted. About 250 bytes a step, and it is never cut; for work on the cost model",
    )
    api_key: Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(_split_keys)] = Field(
        (),
        description="key that requests must carry as `Authorization: Bearer KEY`, written KEY or NAME KEY, where KEY may be"
        " sha256: and its hash; repeat the flag (commas in the environment) for several; without any key everybody is"
        " served. A flag is visible in the process list: prefer PROSPARSE_API_KEY or --api-key-file",
    )
    api_key_file: Path | None = Field(
        None,
        description="file with one key per line, written likewise, in addition to --api-key; empty lines and # comments are"
        " skipped. It is read anew when it changes",
    )
    metrics_access: MetricsAccess = Field(
        "key",
        description="who may read /metrics: whoever has a key (everybody if there are none), everybody, nobody (404)",
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode, BeforeValidator(split_commas)] = Field(
        (),
        description="origins, separated by commas, whose pages may call the server from a browser, or *; the default allows"
        " none",
    )
    request_log: Literal["on", "off"] = Field(
        "on", description="one line of JSON on standard output for each request, probes and /metrics aside"
    )
    log_prompts: bool = Field(
        False, description="true: those lines hold the prompt or messages; false: no text of a request is logged"
    )
    drain_timeout: float = Field(
        30.0,
        ge=0,
        allow_inf_nan=False,
        description="seconds that running requests get to finish after SIGTERM; then they are cut",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "warning",
        description="least severe messages shown, vLLM's included; our own lines on the server's progress always are",
    )
    vllm_flags: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split_words)] = Field(
        (), description="flags for vLLM's engine; on the command line everything after `--`"
    )

    @field_validator("api_key")
    @classmethod
    def _check_keys(cls, keys: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        for position, key in enumerate(keys, 1):
            parse_key(key.get_secret_value(), position)
        return keys

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags (as ``init_settings``) over the environment over the file."""
        config = {**env_settings(), **init_settings()}.get("config")
        in_file = {} if config is None else _read_file(Path(config))
        return init_settings, env_settings, InitSettingsSource(settings_cls, in_file)

    @classmethod
    def load(cls, flags: Mapping[str, Any]) -> Self:
        """Settings from ``flags`` (only those given), the environment, and the file that either of them names.

        Raises:
            UserError: a value cannot be used, or the file has a key that is no setting.
        """
        try:
            settings = cls(**flags)
        except ValidationError as error:
            raise UserError(_describe(error, flags)) from None
        _check_vllm_flags(settings.vllm_flags)
        for name in ("itl_slo_ms", "ttft_slo_ms", "max_unfairness_ms"):
            if settings.batching == "fcfs" and getattr(settings, name) != cls.model_fields[name].default:
                raise UserError(f"{flag_of(name)} is for --batching sparse. Give that as well, or leave it out.")
        return settings

    @property
    def model_name(self) -> str:
        """The name that clients give as ``model``."""
        return self.served_model_name or self.model.resolve().name


def flag_of(name: str) -> str:
    """The command-line spelling of a setting."""
    return {"model": "MODEL", "vllm_flags": "flags after `--`"}.get(name, "--" + name.replace("_", "-"))


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Declare a flag for each setting. A flag that is not given leaves no trace in the namespace."""
    for name, field in Settings.model_fields.items():
        help_text = (field.description or "").replace("%", "%%")
        if name == "vllm_flags":
            parser.epilog = f"-- FLAGS: {field.description}"
            continue
        if field.default not in (None, ()) and not field.is_required():
            help_text += f" (default: {field.default})"
        if name == "model":
            parser.add_argument(name, nargs="?", metavar="MODEL", default=argparse.SUPPRESS, help=help_text)
        elif name == "api_key":
            parser.add_argument(
                flag_of(name), action="append", metavar="KEY", default=argparse.SUPPRESS, help=help_text
            )
        else:
            choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
            metavar = f"{{{','.join(choices)}}}" if choices else name.split("_")[-1].upper()
            parser.add_argument(flag_of(name), metavar=metavar, default=argparse.SUPPRESS, help=help_text)


def check_environment() -> None:
    """Check the environment's keys under our prefix, for every command.

    Raises:
        UserError: a key is no setting, or ``PROSPARSE_CPU_ISA`` names no instruction set that we have kernels for.
    """
    known = {PREFIX + name.upper() for name in Settings.model_fields} | OTHER_ENVIRONMENT_KEYS
    for key in os.environ:
        if key.upper().startswith(PREFIX) and key.upper() not in known:
            raise UserError(
                f"the environment has {key}, which is no setting{nearest(key.upper(), known)}. Unset it;"
                f" `prosparse serve --help` lists the settings, each of which can be given as {PREFIX}NAME."
            )
    isa = os.environ.get("PROSPARSE_CPU_ISA")
    if isa and isa not in CPU_ISAS:
        raise UserError(
            f"PROSPARSE_CPU_ISA is {isa!r}; known are {', '.join(CPU_ISAS)}. Set it to one that this CPU has, or unset it"
            " to take the best."
        )


def _check_vllm_flags(flags: tuple[str, ...]) -> None:
    for flag in flags:
        name = flag.split("=", 1)[0].split(".", 1)[0].replace("_", "-")
        if name in _OUR_FLAGS:
            raise UserError(
                f"{name} after `--` is for us to set: give {flag_of(_OUR_FLAGS[name])} before the `--` instead."
            )
        if reason := _REFUSED_FLAGS.get(name):
            raise UserError(f"{name} is refused: {reason}. Leave it out.")


def _read_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text()
        if path.suffix == ".toml":
            content: object = tomllib.loads(text)
        elif path.suffix in (".yaml", ".yml"):
            content = yaml.safe_load(text)
        else:
            raise UserError(f"--config {path}: the name must end in .toml, .yaml or .yml, which says how to read it.")
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"--config {path} cannot be read: {' '.join(str(error).split())}.") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(
            f"--config {path} holds {type(content).__name__} where settings as `name: value` were expected."
        )
    settings = {str(key).replace("-", "_"): value for key, value in content.items()}
    for key in settings:
        if key not in Settings.model_fields or key == "config":
            raise UserError(
                f"--config {path} has the key {key!r}, which is no setting{nearest(key, Settings.model_fields)}."
            )
    return settings


def _describe(error: ValidationError, flags: Mapping[str, Any]) -> str:
    first = error.errors(include_url=False)[0]
    name = str(first["loc"][0])
    if first["type"] == "missing":
        return f"{flag_of(name)} is missing: {Settings.model_fields[name].description}."
    variable = PREFIX + name.upper()
    if name in flags:
        where = flag_of(name)
    elif variable in os.environ:
        where = f"{variable} in the environment"
    else:
        where = f"{name} in the settings file"
    given = "" if name == "api_key" else f" {first['input']!r}"
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}{given}: {message}. It means: {Settings.model_fields[name].description}."
