"""Repeating the measurement that a checkpoint's manifest records: held-out loss and sparsity, on this machine."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from sparse_backend.checkpoint import Checkpoint, Manifest, sha256_of
from sparse_backend.errors import UserError
from sparse_backend.prosparse import modeling
from sparse_backend.prosparse.checkpoints import load_model, load_tokenizer
from sparse_backend.prosparse.corpus import HELD_OUT_SHARE, Corpus, read_mixture
from sparse_backend.prosparse.evaluate import combined, measure
from sparse_backend.prosparse.recipe import STANDARD_LIBRARY, Data, Source
from sparse_backend.prosparse.tokens import HeldOutBlocks, token_stream

HELD_OUT_NAME = "held_out.jsonl"

# Another device and another number of threads round otherwise: bfloat16 has eight bits.
LOSS_TOLERANCE = 2e-3
SPARSITY_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Verification:
    """What was measured, beside what the manifest says."""

    loss: float
    sparsity: float
    recorded_loss: float
    recorded_sparsity: float

    @property
    def agrees(self) -> bool:
        """True if both figures are the manifest's, up to rounding."""
        return (
            abs(self.loss - self.recorded_loss) <= LOSS_TOLERANCE
            and abs(self.sparsity - self.recorded_sparsity) <= SPARSITY_TOLERANCE
        )


def write_held_out(folder: Path, corpus: Corpus) -> None:
    """Leave the held-out documents in a checkpoint's folder, one JSON object a line: domain and text."""
    with (folder / HELD_OUT_NAME).open("w") as file:
        for domain in corpus.domains:
            for text in domain.held_out:
                file.write(json.dumps({"domain": domain.name, "text": text}) + "\n")


def verify(checkpoint: Checkpoint, source: str | None = None) -> Verification:
    """Measure a checkpoint on its held-out text, in bfloat16 on the CPU.

    Args:
        checkpoint: with a manifest.
        source: the corpus it was made with, where its folder does not hold the held-out text; by default, this Python's
            standard library.

    Raises:
        UserError: there is no manifest, or the text is not at hand or another.
    """
    manifest = checkpoint.manifest
    if manifest is None:
        raise UserError(f"{checkpoint.folder} has no manifest, so there is nothing to verify. Leave out --verify.")
    texts = held_out_texts(checkpoint, source)
    modeling.register()
    transformers.utils.logging.disable_progress_bar()
    model = load_model(checkpoint.folder, torch.bfloat16)
    tokenizer = load_tokenizer(checkpoint.folder, model.config.vocab_size)
    context = _context(manifest)
    measured = combined(
        [measure(model, HeldOutBlocks(token_stream(tokenizer, documents), context)) for documents in texts.values()]
    )
    if measured.tokens != manifest.held_out.tokens:
        raise UserError(
            f"The held-out text gives {measured.tokens:,} tokens, the manifest says {manifest.held_out.tokens:,}: it is not"
            " the text that was measured."
        )
    return Verification(measured.loss, measured.mean_sparsity, manifest.held_out.loss, manifest.held_out.sparsity)


def held_out_texts(checkpoint: Checkpoint, source: str | None = None) -> dict[str, list[str]]:
    """The text a checkpoint was measured on, by domain: what its folder holds, else the held-out part of ``source``.

    Args:
        checkpoint: with a manifest.
        source: the corpus it was made with; by default, this Python's standard library.

    Raises:
        UserError: there is no manifest, the text in the folder was changed, or the corpus is another.
    """
    folder, manifest = checkpoint.folder, checkpoint.manifest
    if manifest is None:
        raise UserError(f"{folder} has no manifest, which would say what text was held out.")
    path = folder / HELD_OUT_NAME
    if path.is_file():
        if sha256_of(path) != manifest.held_out.text_sha256:
            raise UserError(f"{path} is not the file that the manifest was written for. Copy the checkpoint again.")
        texts: dict[str, list[str]] = {}
        for line in path.read_text().splitlines():
            record = json.loads(line)
            texts.setdefault(record["domain"], []).append(record["text"])
        return texts
    share = manifest.corpus.held_out_share or HELD_OUT_SHARE
    corpus = read_mixture(Data(sources=(Source(path=source or STANDARD_LIBRARY),), held_out=share))
    if corpus.sha256 != manifest.corpus.sha256:
        if source is None:
            raise UserError(
                f"{folder} does not hold its held-out text ({HELD_OUT_NAME}). Give the corpus it was made with:"
                f" --corpus SOURCE ({manifest.corpus.name})."
            )
        raise UserError(
            f"--corpus {source!r} is another text than the checkpoint was made with ({manifest.corpus.name}): its SHA-256 is"
            f" {corpus.sha256[:16]}…, the manifest says {manifest.corpus.sha256[:16]}…."
        )
    return {domain.name: domain.held_out for domain in corpus.domains}


def _context(manifest: Manifest) -> int:
    if manifest.held_out.context is not None:
        return manifest.held_out.context
    # Manifests of 0.1 have it among the training settings only.
    found = [phase.settings["context"] for phase in manifest.phases if "context" in phase.settings]
    if not found:
        raise UserError("The manifest does not say how many tokens a measured sequence has: nothing can be repeated.")
    return int(found[-1])
