"""Models of a real one's shape with random weights and a chosen density, for timing.

Made while vLLM loads them (``synthetic_loader``), never stored.

Every neuron is active as often as wanted because coordinate 0 of the residual stream is the same for every token: the embedding
puts a constant there and no layer writes to it, so that the gate's column 0 shifts each gate value by a chosen amount. What
layers add to the rest of the stream is small, so that a hidden state stays, up to RMSNorm's scale, the token's random embedding.

The output head is the embedding moved on by one row: token t is followed by t + 1. Sequences thus never fall in with each other,
as greedy decoding of other random weights lets them, and then all rows of a step would activate the same neurons.

Tokens can be of classes, each with a density of its own: the vocabulary is cut into equal ranges, each class has a coordinate of
its own in place of coordinate 0, and the last token of a range is followed by its first.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from sparse_backend.activation import Activation
from sparse_backend.bench.patterns import Frequencies, read_frequencies
from sparse_backend.checkpoint import Checkpoint
from sparse_backend.ffn import synthetic

CONTEXT = 4096

_LAYER_SCALE = 0.05  # standard deviation of what an attention layer adds to a stream of unit variance, at most


@dataclass(frozen=True)
class Shape:
    """What config.json says of a LLaMA's size."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int


SHAPES = {
    "7b": Shape(4096, 11008, 32, 32, 32, 32000),
    "13b": Shape(5120, 13824, 40, 40, 40, 32000),
    "1b": Shape(1536, 3840, 52, 24, 8, 73440),
    "tiny": Shape(64, 256, 2, 2, 1, 512),
}
"""LLaMA2-7B and 13B, MiniCPM-S-1B, and one for tests."""


@dataclass(frozen=True)
class SyntheticModel:
    """A shape, and how often its neurons are active."""

    shape: Shape
    density: float
    """Of every neuron, unless there is a file."""
    frequencies: Path | None = None
    """A file of neuron frequencies, as ``read_frequencies`` takes it; the model's layers take its layers in turn."""
    classes: tuple[float, ...] = ()
    """The density of each class of tokens, in place of ``density``."""

    def layer_frequencies(self) -> list[torch.Tensor]:
        """Per layer, how often each neuron [d_ff] is active; the same at each call."""
        n_layers, d_ff = self.shape.num_hidden_layers, self.shape.intermediate_size
        if self.frequencies is None:
            density = sum(self.classes) / len(self.classes) if self.classes else self.density
            return [torch.full((d_ff,), density, dtype=torch.float32, device="cpu")] * n_layers
        pattern = Frequencies(read_frequencies(self.frequencies))
        generator = torch.Generator().manual_seed(0)
        return [pattern.draw(index, d_ff, generator) for index in range(n_layers)]

    def layer_densities(self) -> list[float]:
        """Per layer, the mean of its neurons' frequencies."""
        return [frequencies.mean().item() for frequencies in self.layer_frequencies()]

    def class_tokens(self, index: int) -> range:
        """The token ids of a class; all of them without classes."""
        count = max(1, len(self.classes))
        return range(self.shape.vocab_size * index // count, self.shape.vocab_size * (index + 1) // count)

    def class_frequencies(self) -> list[list[torch.Tensor]]:
        """Per layer and class, how often each neuron [d_ff] is active; one class if there are none."""
        if not self.classes:
            return [[frequencies] for frequencies in self.layer_frequencies()]
        d_ff = self.shape.intermediate_size
        of_class = [torch.full((d_ff,), density, dtype=torch.float32, device="cpu") for density in self.classes]
        return [of_class] * self.shape.num_hidden_layers

    def prompts(self, count: int, length: int) -> list[list[int]]:
        """Random token ids."""
        generator = random.Random(0)  # noqa: S311 - reproducible sampling, nothing secret
        return [[generator.randrange(self.shape.vocab_size) for _ in range(length)] for _ in range(count)]


def write_config(folder: Path, shape: Shape) -> Checkpoint:
    """Write the config.json of a ReLU LLaMA, all that vLLM reads of the folder; the weights come from the loader."""
    activation = Activation(kind="relu")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        **asdict(shape),
        **activation.to_hf_config(),
    }
    (folder / "config.json").write_text(json.dumps(config))
    return Checkpoint(folder, config, activation, shards=(), manifest=None)


def weights(model: SyntheticModel, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's tensors under their Hugging Face names, the same each time on the same kind of device."""
    generator = torch.Generator(device).manual_seed(0)
    shape = model.shape
    d_model, d_ff = shape.hidden_size, shape.intermediate_size
    classes = [model.class_tokens(index) for index in range(max(1, len(model.classes)))]
    constant = (d_model / 64) ** 0.5  # a 64th of the stream's energy

    def normal(rows: int, columns: int, scale: float) -> torch.Tensor:
        values = torch.randn(rows, columns, generator=generator, device=device, dtype=torch.float32)
        return values.mul_(scale).to(dtype)

    def into_stream(columns: int) -> torch.Tensor:
        values = normal(d_model, columns, _LAYER_SCALE * columns**-0.5)
        values[: len(classes)] = 0
        return values

    ones = torch.ones(d_model, device=device, dtype=dtype)
    embedding = normal(shape.vocab_size, d_model, 1.0)
    embedding[:, : len(classes)] = 0
    for index, tokens in enumerate(classes):
        embedding[tokens.start : tokens.stop, index] = constant
    yield "model.embed_tokens.weight", embedding
    yield "lm_head.weight", torch.cat([embedding[tokens.start : tokens.stop].roll(1, dims=0) for tokens in classes])
    yield "model.norm.weight", ones
    head = d_model // shape.num_attention_heads
    for index, of_class in enumerate(model.class_frequencies()):
        layer = f"model.layers.{index}"
        yield f"{layer}.input_layernorm.weight", ones
        yield f"{layer}.post_attention_layernorm.weight", ones
        for name, heads in (
            ("q", shape.num_attention_heads),
            ("k", shape.num_key_value_heads),
            ("v", shape.num_key_value_heads),
        ):
            yield f"{layer}.self_attn.{name}_proj.weight", normal(heads * head, d_model, d_model**-0.5)
        yield f"{layer}.self_attn.o_proj.weight", into_stream(d_model)
        gate = normal(d_ff, d_model, d_model**-0.5)
        for column, frequencies in enumerate(of_class):
            gate[:, column] = synthetic.shift_of(frequencies).to(gate) / constant
        yield f"{layer}.mlp.gate_proj.weight", gate
        yield f"{layer}.mlp.up_proj.weight", normal(d_ff, d_model, d_model**-0.5)
        yield f"{layer}.mlp.down_proj.weight", into_stream(d_ff)
