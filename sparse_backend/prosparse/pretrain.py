"""``prosparse pretrain``: a tokenizer and a small Swish LLaMA from scratch, to have a base where none is at hand."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree

from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from sparse_backend.checkpoint import PhaseRecord
from sparse_backend.errors import UserError
from sparse_backend.prosparse.checkpoints import load_tokenizer, save_pretraining, save_weights
from sparse_backend.prosparse.command import add_shared_arguments, building, command_line, main, runtime_from
from sparse_backend.prosparse.corpus import read_corpus
from sparse_backend.prosparse.recipe import TrainingRecipe
from sparse_backend.prosparse.recipe_flags import add_flags, with_flags
from sparse_backend.prosparse.tokens import read_text, train_tokenizer
from sparse_backend.prosparse.trainer import train

NAME = "pretrain"
DESCRIPTION = (
    "Train a byte-level BPE tokenizer and a small LLaMA (Swish, tied embeddings, bfloat16) from scratch on text."
)


@dataclass(frozen=True)
class Preset:
    """A model's shape, and how it is trained unless flags say otherwise."""

    vocab_size: int
    d_model: int
    d_ff: int
    layers: int
    heads: int
    kv_heads: int
    recipe: TrainingRecipe


PRESETS = {
    # 7.3 M parameters, 14 MiB in bfloat16.
    "demo": Preset(
        vocab_size=4096,
        d_model=256,
        d_ff=768,
        layers=8,
        heads=4,
        kv_heads=2,
        recipe=TrainingRecipe(tokens=100_000_000, context=2048, batch=32, learning_rate=3e-3),
    ),
    # 91 M parameters: the control runs' base. The rate stays up, for the runs that go on from it to bring it down.
    "91m": Preset(
        vocab_size=8192,
        d_model=768,
        d_ff=2048,
        layers=12,
        heads=12,
        kv_heads=12,
        recipe=TrainingRecipe(
            tokens=80_000_000, context=512, batch=64, learning_rate=8e-4, learning_rate_schedule="constant"
        ),
    ),
    # 0.2 M parameters, trained in seconds on a CPU: for tests of the commands, not for its text.
    "tiny": Preset(
        vocab_size=512,
        d_model=64,
        d_ff=256,
        layers=2,
        heads=2,
        kv_heads=1,
        recipe=TrainingRecipe(tokens=200_000, context=128, batch=16, learning_rate=5e-3),
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to create")
    parser.add_argument(
        "--preset", choices=PRESETS, default="demo", help="shape and defaults of the training (default: demo)"
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FOLDER",
        help="a folder with a tokenizer, in place of one trained on this corpus; the model's vocabulary is of its size",
    )
    add_shared_arguments(parser)
    add_flags(parser, TrainingRecipe, defaults="of the preset")


def run(args: argparse.Namespace) -> int:
    """Train the tokenizer, then the model, and write both to OUT."""
    preset = PRESETS[args.preset]
    recipe = with_flags(preset.recipe, args)
    if recipe.learning_rate_schedule == "wsd":
        raise UserError("--learning-rate-schedule wsd falls during a recipe's last stage, and pretraining has none.")
    runtime = runtime_from(args)
    with building(args.out) as folder:
        corpus = read_corpus(args.corpus, args.corpus_name)
        if args.tokenizer is None:
            tokenizer = train_tokenizer(corpus.training, preset.vocab_size, recipe.context)
        else:
            tokenizer = load_tokenizer(args.tokenizer)
            tokenizer.model_max_length = recipe.context
        text = read_text(corpus, tokenizer, recipe.context)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=preset.d_model,
            intermediate_size=preset.d_ff,
            num_hidden_layers=preset.layers,
            num_attention_heads=preset.heads,
            num_key_value_heads=preset.kv_heads,
            max_position_embeddings=recipe.context,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        set_seed(recipe.seed)
        model = LlamaForCausalLM(config)
        print(
            f"model: {model.num_parameters():,} parameters, {recipe.steps} steps of {recipe.step_tokens:,} tokens",
            flush=True,
        )
        seconds = train(model, text, recipe, runtime, folder / "trainer").seconds_at(recipe.steps)
        rmtree(folder / "trainer")
        save_weights(model, folder)
        tokenizer.save_pretrained(folder)
        save_pretraining(
            folder,
            PhaseRecord(
                name="pretraining",
                steps=recipe.steps,
                tokens=recipe.steps * recipe.step_tokens,
                seconds=round(seconds, 1),
                settings={"command": command_line(NAME), **recipe.model_dump()},
            ),
        )
    print(f"wrote {args.out}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(NAME, DESCRIPTION, add_arguments, run))
