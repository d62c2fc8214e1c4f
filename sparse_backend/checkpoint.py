"""The checkpoint folder: a plain Hugging Face folder, plus our manifest ``prosparse.json`` where the offline job made it."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sparse_backend.activation import Activation
from sparse_backend.errors import UserError
from sparse_backend.families import check_config, check_tensors, family_of

MANIFEST_NAME = "prosparse.json"

# The files that hold a tokenizer; the others beside them are its settings.
TOKENIZERS = ("tokenizer.json", "tokenizer.model")


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class CorpusRecord(_Record):
    """The text a checkpoint was trained and measured on."""

    name: str
    sha256: str = Field(description="SHA-256 over all documents, training and held-out, in order")
    documents: int
    held_out_documents: int
    held_out_share: float | None = Field(default=None, description="share of the documents that was to be held out")
    train_tokens: int = Field(description="tokens in the training split, each counted once")
    held_out_tokens: int


class PhaseRecord(_Record):
    """One phase of the offline job as it ran."""

    name: str
    steps: int
    tokens: int
    seconds: float
    settings: dict[str, Any] = Field(description="every setting of the phase, with its value")


class HeldOutRecord(_Record):
    """What was measured on the held-out documents with the finished checkpoint."""

    tokens: int
    loss: float = Field(description="mean next-token cross-entropy, nats")
    base_loss: float = Field(description="the same for the model the job started from")
    sparsity: float = Field(
        description="exact zeros in relu(gate)*up, mean over tokens, neurons and layers", ge=0, le=1
    )
    context: int | None = Field(default=None, description="tokens in one measured sequence")
    text_sha256: str | None = Field(default=None, description="SHA-256 of held_out.jsonl, where the folder holds it")


class DomainRecord(_Record):
    """The same for the held-out documents of one domain of the corpus."""

    name: str
    weight: float | None = Field(
        default=None, description="share of the training tokens, relative to other domains'; none: by length"
    )
    tokens: int
    loss: float
    base_loss: float
    sparsity: float = Field(ge=0, le=1)


class LayerRecord(_Record):
    """One feed-forward layer, measured on the held-out documents."""

    layer: int
    sparsity: float = Field(ge=0, le=1)
    neuron_frequency: list[float] = Field(description="per neuron, share of held-out tokens for which it is active")


class Manifest(_Record):
    """``prosparse.json``: how the checkpoint was made, what it measured, and the SHA-256 of each of its files."""

    format_version: Literal[1] = 1
    command: str = Field(description="the command line that made the checkpoint")
    architecture: str
    activation: Activation
    base_activation: str = Field(description="hidden_act of the model the job started from")
    corpus: CorpusRecord
    phases: list[PhaseRecord]
    seed: int
    versions: dict[str, str]
    device: str
    held_out: HeldOutRecord
    domains: list[DomainRecord] = []
    layers: list[LayerRecord]
    files: dict[str, str] = Field(description="SHA-256 of every other file of the folder that is loaded, by name")

    def write(self, folder: Path) -> None:
        """Write ``prosparse.json`` into ``folder``; a reader sees the old file or the new one, never a part."""
        temporary = folder / (MANIFEST_NAME + ".tmp")
        temporary.write_text(self.model_dump_json(indent=1) + "\n")
        temporary.replace(folder / MANIFEST_NAME)


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of a checkpoint folder that a loader reads: weights, configs, tokenizer; not the manifest."""
    return {name: sha256_of(folder / name) for name in _loaded_files(folder)}


def _loaded_files(folder: Path) -> list[str]:
    return sorted(
        path.name
        for path in folder.iterdir()
        if (path.suffix in {".safetensors", ".json", ".model", ".jinja"} or path.name == "merges.txt")
        and path.name != MANIFEST_NAME
        and path.is_file()
    )


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder that passed every check a loader would otherwise trip over."""

    folder: Path
    config: Mapping[str, Any]
    activation: Activation
    shards: Sequence[Path]
    manifest: Manifest | None

    @classmethod
    def open(cls, folder: str | os.PathLike[str], *, verify: bool = True) -> Self:
        """Check a folder and read what it says of itself; no tensor is loaded.

        Args:
            folder: a local Hugging Face folder: config.json, tokenizer, safetensors shards.
            verify: compare every file with its SHA-256 in the manifest, where there is a manifest.

        Raises:
            UserError: the folder is no such checkpoint; the text names the file or field at fault.
        """
        path = Path(folder)
        if not _is_folder(path):
            raise UserError(
                f"MODEL {str(folder)!r} is not a folder on this machine. Give the path of a checkpoint folder (config.json,"
                " tokenizer, *.safetensors); models are never downloaded."
            )
        _check_links(path)
        config = read_json(
            path, "config.json", "It is not a Hugging Face checkpoint folder; give the folder that holds it."
        )
        family_of(config, path / "config.json")
        check_config(config, path / "config.json")
        activation = Activation.from_hf_config(config)
        _check_tokenizer(path)
        shards = _find_shards(path)
        check_tensors(config, shards, path)
        checkpoint = cls(path, config, activation, shards, _read_manifest(path))
        if verify:
            checkpoint._verify()
        return checkpoint

    @property
    def model_class(self) -> str:
        """The vLLM model class of ours that computes it."""
        return family_of(self.config).model_class

    @property
    def n_layers(self) -> int:
        """Number of decoder layers, each with one feed-forward layer."""
        return int(self.config["num_hidden_layers"])

    @property
    def context_length(self) -> int:
        """The longest sequence the model was made for, in tokens."""
        return int(self.config["max_position_embeddings"])

    @property
    def layer_densities(self) -> list[float] | None:
        """Per layer, the share of active neurons measured when the checkpoint was made; None without a manifest."""
        if self.manifest is None:
            return None
        return [1.0 - layer.sparsity for layer in self.manifest.layers]

    def engine_dtype(self, requested: str, *, float16: bool = False) -> str:
        """The dtype to compute in: ``requested``, or for "auto" the one the weights are stored in where we compute in it.

        ``float16``: whether we do so in float16, which is for GPUs. Anything else becomes bfloat16.
        """
        if requested != "auto":
            return requested
        stored = self.config.get("dtype") or self.config.get("torch_dtype")
        return stored if stored == "float32" or (stored == "float16" and float16) else "bfloat16"

    def _verify(self) -> None:
        manifest = self.manifest
        if manifest is None:
            return
        where = self.folder / MANIFEST_NAME
        if manifest.activation != self.activation:
            raise UserError(
                f"{where} says the activation is {manifest.activation}, config.json says {self.activation}. One of them was"
                " edited after the checkpoint was made: restore it, or delete the manifest if you mean the change."
            )
        numbers = [layer.layer for layer in manifest.layers]
        if len(numbers) != self.n_layers or numbers != list(range(len(numbers))):
            raise UserError(
                f"{where} lists {len(numbers)} layers, numbered {numbers}; config.json has num_hidden_layers {self.n_layers}, so"
                f" they must be 0 to {self.n_layers - 1} in order. Copy the checkpoint again."
            )
        d_ff = self.config["intermediate_size"]
        for layer in manifest.layers:
            if len(layer.neuron_frequency) != d_ff:
                raise UserError(
                    f"{where}: neuron_frequency of layer {layer.layer} has {len(layer.neuron_frequency)} entries, config.json"
                    f" has intermediate_size {d_ff}. Copy the checkpoint again."
                )
        unlisted = [name for name in _loaded_files(self.folder) if name not in manifest.files]
        if unlisted:
            raise UserError(
                f"{where} has no SHA-256 for {', '.join(unlisted)}: the folder and its manifest do not belong together. Copy"
                " the checkpoint again, or delete what was added."
            )
        present = {path.name for path in self.folder.iterdir() if path.is_file()}
        for name, expected in manifest.files.items():
            if name not in present:
                raise UserError(f"{where} lists {name}, which is missing from the folder. Copy the checkpoint again.")
            file = self.folder / name
            found = sha256_of(file)
            if found != expected:
                raise UserError(
                    f"{file} is not the file the manifest was written for: its SHA-256 is {found[:16]}…, {MANIFEST_NAME} says"
                    f" {expected[:16]}…. Copy the checkpoint again, or delete {MANIFEST_NAME} if you changed the file on purpose."
                )


def read_json(folder: Path, name: str, advice: str = "") -> dict[str, Any]:
    """The object in a JSON file of a model folder.

    Raises:
        UserError: there is no such file, with ``advice`` behind it, or it does not hold one JSON object.
    """
    path = folder / name
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} has no {name}. {advice}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}. Copy the checkpoint again.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {type(value).__name__} where an object was expected. Copy the checkpoint again.")
    return value


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name that no folder can have, or a parent that may not be read
        return False


def _check_links(folder: Path) -> None:
    """Whoever wrote a checkpoint must not choose which other files of this machine are read."""
    inside = folder.resolve()
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() and not _target(path).is_relative_to(inside):
            raise UserError(
                f"{path} is a symbolic link that leaves the checkpoint's folder. Copy the folder with what its links point to"
                " (`cp -rL`), and give the copy."
            )


def _target(link: Path) -> Path:
    try:
        return link.resolve()
    except (OSError, RuntimeError):  # a loop of links, which Python 3.13 no longer reports
        return Path("/")


def _check_tokenizer(folder: Path) -> None:
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise UserError(
            f"{folder} holds no tokenizer ({' or '.join(TOKENIZERS)}). Copy the tokenizer files of the model it was trained"
            " from into the folder."
        )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (folder / name).exists():
            read_json(folder, name)


def _find_shards(folder: Path) -> list[Path]:
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        others = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for path in folder.glob(pattern))
        found = (
            f" It has {', '.join(others)}: only safetensors are loaded, since other formats can run code."
            if others
            else ""
        )
        raise UserError(f"{folder} holds no *.safetensors weights.{found} Convert or copy the weights as safetensors.")
    index_path = folder / "model.safetensors.index.json"
    if index_path.is_file():
        weight_map = read_json(folder, index_path.name).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{index_path} has no weight_map. Copy the checkpoint again.")
        missing = sorted({str(name) for name in weight_map.values()} - {shard.name for shard in shards})
        if missing:
            raise UserError(
                f"{index_path} lists {', '.join(missing)}, missing from the folder. Copy the checkpoint again."
            )
    return shards


def _read_manifest(folder: Path) -> Manifest | None:
    path = folder / MANIFEST_NAME
    # A link whose target is gone is no missing manifest: taken for one, it would turn verification off unseen.
    if not path.is_symlink() and not path.exists():
        return None
    content = read_json(
        folder,
        MANIFEST_NAME,
        "What is there is a symbolic link whose target is gone: restore the target, or delete the link to load the folder"
        " without a manifest.",
    )
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"{path} is not a manifest of this version: {field!r}: {first['msg']}. Restore the file the offline job wrote, or"
            " delete it to load the folder without one."
        ) from None
