"""What a request may contain, field by field, and how much work it asks for."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from server.errors import RefusalError
from server.limits import RequestLimits
from server.paths import CHAT_PATH, COMPLETIONS_PATH, DETOKENIZE_PATH, TOKENIZE_PATH
from server.schemas import check_schema

Body = dict[str, Any]

_SAMPLING = frozenset(
    {
        "model", "frequency_penalty", "logit_bias", "logprobs", "max_tokens", "n", "presence_penalty", "seed", "stop", "stream",
        "stream_options", "temperature", "top_p", "response_format",
        # vLLM's own.
        "top_k", "min_p", "repetition_penalty", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "min_tokens",
        "skip_special_tokens", "spaces_between_special_tokens", "truncate_prompt_tokens", "truncation_side",
        "allowed_token_ids", "prompt_logprobs", "bad_words", "echo", "add_special_tokens", "structured_outputs", "cache_salt",
        "return_tokens_as_token_ids", "return_token_ids",
    }
)  # fmt: skip

# The fields that are served, by path. Everything else is refused or dropped and never reaches vLLM: templates, prompt
# embeddings, media options, transfer parameters, beam search, …
SERVED_FIELDS = {
    COMPLETIONS_PATH: _SAMPLING | {"prompt", "suffix"},
    CHAT_PATH: _SAMPLING
    | {
        "messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice", "parallel_tool_calls", "reasoning_effort",
        "include_reasoning", "add_generation_prompt", "continue_final_message", "chat_template_kwargs",
    },
    TOKENIZE_PATH: {
        "model", "prompt", "messages", "add_special_tokens", "return_token_strs", "add_generation_prompt",
        "continue_final_message", "chat_template_kwargs", "tools",
    },
    DETOKENIZE_PATH: {"model", "tokens"},
}  # fmt: skip

# Fields of OpenAI's that the official clients may send and that do not change the text: dropped.
DROPPED_FIELDS = frozenset(
    {
        "metadata", "prediction", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "safety_identifier",
        "service_tier", "store", "user", "verbosity",
    }
)  # fmt: skip

# Constraints on the output other than by schema or choice let a client write grammars and regular expressions of its own.
_CONSTRAINTS = frozenset({"json", "json_object", "choice", "disable_any_whitespace", "disable_additional_properties"})

_MOST_LEVELS = 64
_LONGEST_STOP = 1024
_MOST_BIASES = 1024
_BYTES_PER_TOKEN = 3


@dataclass(frozen=True)
class Work:
    """How much a request asks for at most."""

    sequences: int
    prompt_tokens: int
    output_tokens: int
    """Of all sequences together."""

    @property
    def tokens(self) -> int:
        """Prompts and answers."""
        return self.prompt_tokens + self.output_tokens


class RequestPolicy:
    """Checks request bodies against the limits."""

    def __init__(self, limits: RequestLimits, context_length: int) -> None:
        """Hold the bounds.

        Args:
            limits: what one request may ask for.
            context_length: tokens of the longest sequence, which bounds an answer where nothing else does.
        """
        self._limits = limits
        self._longest = min(context_length, limits.max_tokens or context_length)

    def parse(self, path: str, content: bytes) -> Body:
        """The body of a request with its served fields only; what vLLM is to get.

        Raises:
            RefusalError: 400, with what is wrong.
        """
        body = _parse_object(content)
        served = SERVED_FIELDS[path]
        for field in [field for field in body if field not in served]:
            if body[field] is not None and field not in DROPPED_FIELDS and not _is_text_only(field, body[field]):
                self._refuse_unknown(field)
            del body[field]
        self._check(body)
        return body

    def work(self, body: Body) -> Work:
        """How much a checked body asks for."""
        prompts = _prompts(body)
        sequences = len(prompts) * _whole(body, "n", 1)
        asked = _whole(body, "max_completion_tokens", 0) or _whole(body, "max_tokens", 0)
        if not asked:
            asked = self._longest if "messages" in body else 16
        return Work(sequences, sum(map(_count_tokens, prompts)), sequences * min(asked, self._longest))

    def _refuse_unknown(self, field: str) -> None:
        if self._limits.unknown_fields == "refuse" or field == "chat_template":
            name = field if len(field) <= 64 and field.isprintable() else "a field"
            raise RefusalError(400, f"{name} is not served. Leave it out.", param=name)

    def _check(self, body: Body) -> None:
        for field, value in body.items():
            if (check := _CHECKS.get(field)) is not None and value is not None:
                check(field, value, self._limits)


def serialise(body: Body) -> bytes:
    """The JSON that vLLM gets: exactly what was checked."""
    return json.dumps(body, ensure_ascii=False).encode()


def _parse_object(content: bytes) -> Body:
    try:
        body = json.loads(content, parse_constant=_no_constant)
        # A lone surrogate can be written in JSON but is no text: tokenizers fail on it.
        json.dumps(body, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise RefusalError(400, "The body is not valid JSON in UTF-8.") from None
    if not isinstance(body, dict):
        raise RefusalError(400, "The body is not a JSON object.")
    if _levels_exceed(body, _MOST_LEVELS):
        raise RefusalError(400, f"The body has more than {_MOST_LEVELS} levels.")
    return body


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _levels_exceed(value: object, limit: int) -> bool:
    level: list[object] = [value]
    for _ in range(limit):
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
        ]
        if not level:
            return False
    return any(isinstance(node, dict | list) for node in level)


def _is_text_only(field: str, value: object) -> bool:
    """Some clients say on every request that they want text."""
    return field == "modalities" and value == ["text"]


def _prompts(body: Body) -> list[object]:
    if "messages" in body:
        return [body["messages"]]
    prompt = body.get("prompt")
    return prompt if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else [prompt]


def _count_tokens(prompt: object) -> int:
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], int):
        return len(prompt)
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)
    return -(-len(text.encode()) // _BYTES_PER_TOKEN)


def _whole(body: Body, field: str, default: int) -> int:
    """A count; a value that is none is vLLM's to refuse."""
    value = body.get(field)
    return value if isinstance(value, int) and value > 0 else default


def _too_many(field: str, what: str, most: int) -> NoReturn:
    raise RefusalError(400, f"{field} asks for more than {most} {what}.", param=field)


def _check_prompt(field: str, value: object, limits: RequestLimits) -> None:
    if isinstance(value, list) and value and not isinstance(value[0], int) and len(value) > limits.max_prompts:
        _too_many(field, "prompts", limits.max_prompts)


def _check_n(field: str, value: object, limits: RequestLimits) -> None:
    if isinstance(value, int | float) and value > limits.max_n:
        _too_many(field, "answers", limits.max_n)


def _check_stops(field: str, value: object, limits: RequestLimits) -> None:
    stops = value if isinstance(value, list) else [value]
    if len(stops) > limits.max_stops:
        _too_many(field, "stops", limits.max_stops)
    if any(isinstance(stop, str) and len(stop) > _LONGEST_STOP for stop in stops):
        raise RefusalError(400, f"{field} has a text of more than {_LONGEST_STOP} characters.", param=field)


def _check_logprobs(field: str, value: object, limits: RequestLimits) -> None:
    # −1 asks for the whole vocabulary.
    if isinstance(value, int | float) and not isinstance(value, bool) and not 0 <= value <= limits.max_logprobs:
        raise RefusalError(400, f"{field} is not from 0 to {limits.max_logprobs}.", param=field)


def _check_tokens(field: str, value: object, limits: RequestLimits) -> None:
    if limits.max_tokens is not None and isinstance(value, int | float) and value > limits.max_tokens:
        _too_many(field, "tokens", limits.max_tokens)


def _check_biases(field: str, value: object, limits: RequestLimits) -> None:
    if isinstance(value, dict | list) and len(value) > _MOST_BIASES:
        _too_many(field, "entries", _MOST_BIASES)


def _check_tools(field: str, value: object, limits: RequestLimits) -> None:
    if not isinstance(value, list):
        return
    if len(value) > limits.max_tools:
        _too_many(field, "tools", limits.max_tools)
    for tool in value:
        function = tool.get("function") if isinstance(tool, dict) else None
        if isinstance(function, dict):
            check_schema(function.get("parameters"), field, limits)


def _check_response_format(field: str, value: object, limits: RequestLimits) -> None:
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(value, dict) or kind not in ("text", "json_object", "json_schema"):
        raise RefusalError(400, f"{field} is none of text, json_object and json_schema.", param=field)
    described = value.get("json_schema")
    if isinstance(described, dict):
        check_schema(described.get("schema"), field, limits)


def _check_structured_outputs(field: str, value: object, limits: RequestLimits) -> None:
    if not isinstance(value, dict):
        raise RefusalError(400, f"{field} is not an object.", param=field)
    for constraint, content in value.items():
        if content is not None and constraint not in _CONSTRAINTS:
            raise RefusalError(400, f"{field} has something other than json, json_object and choice.", param=field)
    schema = value.get("json")
    if isinstance(schema, str):
        schema = _parse_object(schema.encode())
    check_schema(schema, field, limits)
    check_schema({"enum": value.get("choice")}, field, limits)


def _check_messages(field: str, value: object, limits: RequestLimits) -> None:
    if value == []:
        raise RefusalError(400, f"{field} is empty.", param=field)
    for message in value if isinstance(value, list) else []:
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else []:
            kind = part.get("type") if isinstance(part, dict) else "text"
            if kind not in ("text", "refusal") or (
                isinstance(part, dict) and not part.keys() <= {"type", "text", "refusal"}
            ):
                raise RefusalError(400, f"{field} has a part that is not text; only text is served.", param=field)


def _check_template_kwargs(field: str, value: object, limits: RequestLimits) -> None:
    if isinstance(value, dict) and not value.keys() <= set(limits.chat_template_kwargs):
        known = ", ".join(limits.chat_template_kwargs) or "none"
        raise RefusalError(400, f"{field} has a name that is not served; served are: {known}.", param=field)


_CHECKS: dict[str, Callable[[str, object, RequestLimits], None]] = {
    "prompt": _check_prompt,
    "n": _check_n,
    "stop": _check_stops,
    "stop_token_ids": _check_stops,
    "bad_words": _check_stops,
    "logprobs": _check_logprobs,
    "top_logprobs": _check_logprobs,
    "prompt_logprobs": _check_logprobs,
    "max_tokens": _check_tokens,
    "max_completion_tokens": _check_tokens,
    "min_tokens": _check_tokens,
    "logit_bias": _check_biases,
    "allowed_token_ids": _check_biases,
    "tools": _check_tools,
    "response_format": _check_response_format,
    "structured_outputs": _check_structured_outputs,
    "messages": _check_messages,
    "chat_template_kwargs": _check_template_kwargs,
}
