"""What a request may ask for and how many may ask at once: settings, each documented by what happens at its limit."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field
from pydantic_settings import NoDecode


def split_commas(value: object) -> object:
    """A tuple setting as the environment and flags spell it."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _limit(default: Any, description: str, minimum: int = 0) -> Any:
    return Field(default, ge=minimum, description=description)


class RequestLimits(BaseModel):
    """What one request may ask for. Beyond a limit it is answered 400 (a body that is too long 413), naming the field."""

    max_body_bytes: int = _limit(
        2 << 20, "bytes of a request's body; a longer one is answered 413 and not read further", 1
    )
    max_prompts: int = _limit(32, "prompts in one completion request; more are answered 400", 1)
    max_n: int = _limit(8, "answers per prompt (`n`); more are answered 400", 1)
    max_stops: int = _limit(4, "stop strings and, apart, stop token ids; more are answered 400")
    max_logprobs: int = _limit(
        20, "alternatives per token (`logprobs`, `top_logprobs`, `prompt_logprobs`); more are answered 400"
    )
    max_tokens: int | None = Field(
        None,
        ge=1,
        description="generated tokens per answer; asking for more is answered 400, and a request that names no number stops"
        " there (default: what the model's context leaves)",
    )
    max_schema_bytes: int = _limit(
        32768, "bytes of a JSON schema, of a tool or an answer format; a longer one is answered 400"
    )
    max_schema_depth: int = _limit(16, "levels of a JSON schema; a deeper one is answered 400", 1)
    max_pattern_bytes: int = _limit(
        0,
        "bytes of a regular expression (`pattern`) in a JSON schema; a longer one is answered 400, with 0 any: compiling an"
        " expression can take any time",
    )
    max_tools: int = _limit(64, "tools in one request; more are answered 400")
    chat_template_kwargs: Annotated[tuple[str, ...], NoDecode, BeforeValidator(split_commas)] = Field(
        ("enable_thinking",),
        description="names, separated by commas, that `chat_template_kwargs` of a request may have; others are answered 400",
    )
    unknown_fields: Literal["refuse", "ignore"] = Field(
        "refuse",
        description="fields of a request that are not served: refuse answers 400 and names the first; ignore drops them."
        " Fields of OpenAI's that do not change the text (metadata, store, user, …) are always dropped",
    )
    request_timeout: float = Field(
        600.0,
        gt=0,
        allow_inf_nan=False,
        description="seconds from a request's arrival to the end of its answer; then its sequences are freed, and it is"
        " answered 504 or its stream ends with an error event",
    )
    header_timeout: float = Field(
        10.0,
        gt=0,
        allow_inf_nan=False,
        description="seconds a client gets to send its request's headers, and again its body; then the connection is closed"
        " or the request answered 408",
    )
    max_connections: int = _limit(2048, "open connections; further ones are closed at once", 1)


class AdmissionLimits(BaseModel):
    """How many requests are answered and wait at once. Beyond a limit a request is answered 429 with Retry-After."""

    max_running: int | None = Field(
        None,
        ge=1,
        description="sequences (prompts times `n`) computed at once; further requests wait (default: vLLM's --max-num-seqs)",
    )
    queue_requests: int = _limit(
        64,
        "requests that wait; one more is answered 429 with Retry-After, or takes the place of the newest of the key that has"
        " most waiting",
    )
    queue_tokens: int = _limit(
        262144,
        "tokens, of prompts and the most they may generate, that wait; beyond, as with queue_requests. A text counts as"
        " one token for each three bytes",
    )
    key_requests_per_minute: int | None = Field(
        None, ge=1, description="requests of one key in a minute; more are answered 429 with Retry-After (default: any)"
    )
    key_tokens_per_minute: int | None = Field(
        None,
        ge=1,
        description="tokens of one key in a minute, prompts and answers; more are answered 429 with Retry-After (default: any)",
    )


class Recovery(BaseModel):
    """When the engine counts as hung, and how often it is started anew."""

    stall_timeout: float = Field(
        8.0,
        gt=0,
        allow_inf_nan=False,
        description="seconds an engine that has work may take no step, or an idle one give no sign of life; then /readyz is 503",
    )
    restart_timeout: float = Field(
        20.0,
        gt=0,
        allow_inf_nan=False,
        description="the same, after which the engine is killed and started anew and its requests are answered 503; give more"
        " where one step may take longer",
    )
    max_restarts: int = _limit(
        3,
        "starts of a new engine after one died or hung, with none that served for ten minutes between; one failure more ends"
        " the process with status 1",
    )
