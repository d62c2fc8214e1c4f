"""Traffic to replay: when requests come, how long their prompts and answers are, and of which class they are."""

import difflib
import math
import random
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sparse_backend.errors import UserError

_FOLDER = resources.files("sparse_backend.bench") / "traces"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Lengths(_Part):
    """A log-normal distribution of token counts, cut off above."""

    median: float = Field(gt=0)
    spread: float = Field(ge=0)
    """Standard deviation of the logarithm."""
    most: int = Field(ge=1)

    def draw(self, generator: random.Random, scale: float) -> int:
        """One length, times ``scale``."""
        length = self.median * math.exp(self.spread * generator.gauss(0, 1))
        return max(1, round(min(length, self.most) * scale))


class TrafficClass(_Part):
    """Requests of one kind."""

    share: float = Field(gt=0)
    """Of all requests, relative to the other classes'."""
    density: float = Field(ge=0, le=1)
    """Of the synthetic checkpoint's tokens of this class; a real checkpoint has its own."""
    prompt_tokens: Lengths
    output_tokens: Lengths


@dataclass(frozen=True)
class TraceRequest:
    """One request to be sent."""

    at_s: float
    """After the start."""
    traffic_class: str
    prompt_tokens: int
    output_tokens: int


class Trace(_Part):
    """A kind of traffic. With the same seed, rate and scale it is the same requests each time."""

    description: str
    burstiness: float = Field(ge=0)
    """Coefficient of variation of the gamma-distributed times between arrivals: 1 is a Poisson process, 0 a metronome."""
    classes: dict[str, TrafficClass] = Field(min_length=1)

    @classmethod
    def load(cls, name: str) -> Self:
        """One that comes with the product, by its name, or one of the user's, by the path of its YAML file.

        Raises:
            UserError: there is none, or it has fields or values that a trace cannot have; the text lists those it can.
        """
        file = Path(name) if name.endswith((".yaml", ".yml")) else None
        if file is None and name not in names():
            raise UserError(
                f"--trace {name!r} is no trace. Known are {', '.join(names())}, or the path of a .yaml file."
            )
        try:
            text = file.read_text() if file is not None else (_FOLDER / f"{name}.yaml").read_text()
            return cls.model_validate(yaml.safe_load(text))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(f"--trace {name} cannot be read: {' '.join(str(error).split())}.") from None
        except ValidationError as error:
            raise UserError(f"--trace {name}: {_describe(error)}") from None

    def requests(self, *, seed: int, rate: float, count: int, scale: float = 1.0) -> list[TraceRequest]:
        """``count`` requests, ``rate`` per second on average, lengths times ``scale``."""
        generator = random.Random(seed)  # noqa: S311 - reproducible sampling, nothing secret
        names_, shares = list(self.classes), [of_class.share for of_class in self.classes.values()]
        requests, at = [], 0.0
        for _ in range(count):
            # The lengths do not depend on the rate: a seed is the same requests at every load.
            name = generator.choices(names_, shares)[0]
            of_class = self.classes[name]
            lengths = of_class.prompt_tokens.draw(generator, scale), of_class.output_tokens.draw(generator, scale)
            gap = generator.gammavariate(self.burstiness**-2, self.burstiness**2) if self.burstiness else 1.0
            at += gap / rate
            requests.append(TraceRequest(at, name, *lengths))
        return requests


def names() -> list[str]:
    """Of the traces that come with the product."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _FOLDER.iterdir() if entry.name.endswith(".yaml"))


def _describe(error: ValidationError) -> str:
    errors = error.errors(include_url=False)
    # A misspelt field is missing under its right name, too; what was written says more.
    first = next((one for one in errors if one["type"] == "extra_forbidden"), errors[0])
    where = ".".join(str(part) for part in first["loc"]) or "the file"
    if first["type"] != "extra_forbidden":
        return f"{where}: {first['msg']}."
    known = _fields_at(first["loc"])
    near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"there is no field {where}{hint}. Known are {', '.join(known)}."


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    """Fields of the part that holds an unknown one."""
    depth = len(location)
    model = Trace if depth == 1 else TrafficClass if depth == 3 else Lengths
    return list(model.model_fields)
