import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sparse_backend.activation import Activation
from sparse_backend.checkpoint import (
    MANIFEST_NAME,
    Checkpoint,
    CorpusRecord,
    HeldOutRecord,
    LayerRecord,
    Manifest,
    PhaseRecord,
    hash_files,
    sha256_of,
)
from sparse_backend.errors import UserError
from tests.checkpoints import edit_config, write_tiny_checkpoint


def manifest_for(folder: Path, layers: int = 2, d_ff: int = 256) -> Manifest:
    """A manifest that belongs to the folder as it is."""
    return Manifest(
        command="prosparse sparsify base out --corpus stdlib",
        architecture="LlamaForCausalLM",
        activation=Activation(kind="relu"),
        base_activation="silu",
        corpus=CorpusRecord(
            name="text", sha256="0" * 64, documents=100, held_out_documents=2, train_tokens=10_000, held_out_tokens=200
        ),
        phases=[
            PhaseRecord(name="ReLU substitution", steps=1, tokens=100, seconds=0.5, settings={"learning_rate": 1e-3}),
            PhaseRecord(
                name="activation threshold", steps=0, tokens=0, seconds=0.1, settings={"sweep": [{"loss": 3.0}]}
            ),
        ],
        seed=0,
        versions={"torch": "2.13.0"},
        device="CPU",
        held_out=HeldOutRecord(tokens=200, loss=3.0, base_loss=2.9, sparsity=0.9),
        layers=[
            LayerRecord(layer=layer, sparsity=0.9, neuron_frequency=[0.0, 0.6] + [0.1] * (d_ff - 2))
            for layer in range(layers)
        ],
        files=hash_files(folder),
    )


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")
    manifest_for(folder).write(folder)
    return folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    """A checkpoint with a manifest, to be damaged."""
    return Path(shutil.copytree(pristine, tmp_path / "tiny"))


def test_opens_a_folder_with_its_manifest(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.activation == Activation(kind="relu")
    assert (checkpoint.n_layers, checkpoint.context_length) == (2, 256)
    assert checkpoint.layer_densities == pytest.approx([0.1, 0.1])
    assert checkpoint.manifest == manifest_for(folder)


def test_opens_a_folder_without_a_manifest(folder: Path) -> None:
    (folder / MANIFEST_NAME).unlink()
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.manifest is None
    assert checkpoint.layer_densities is None


def test_opens_a_published_prosparse_folder_without_its_remote_code(folder: Path) -> None:
    (folder / MANIFEST_NAME).unlink()
    edit_config(
        folder,
        architectures=["SparseLlamaForCausalLM"],
        model_type="sparsellama",
        hidden_act="fatrelu",
        hidden_act_param=0.01,
        auto_map={"AutoModelForCausalLM": "modeling_sparsellama.SparseLlamaForCausalLM"},
    )
    assert Checkpoint.open(folder).activation == Activation(kind="fatrelu", threshold=0.01)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _edit_manifest(folder: Path, **fields: object) -> None:
    path = folder / MANIFEST_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _edit_layer(folder: Path, number: int, **fields: object) -> None:
    layers = json.loads((folder / MANIFEST_NAME).read_text())["layers"]
    layers[number] |= fields
    _edit_manifest(folder, layers=layers)


def _unlist(folder: Path, name: str) -> None:
    files = json.loads((folder / MANIFEST_NAME).read_text())["files"]
    del files[name]
    _edit_manifest(folder, files=files)


def _replace_manifest(folder: Path, make: Callable[[Path], object]) -> None:
    (folder / MANIFEST_NAME).unlink()
    make(folder / MANIFEST_NAME)


def _without_manifest(edit: Callable[[Path], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        (folder / MANIFEST_NAME).unlink()
        edit(folder)

    return damage


DAMAGE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no config": (lambda f: (f / "config.json").unlink(), ["config.json", "Hugging Face"]),
    "config is not JSON": (lambda f: (f / "config.json").write_text("{"), ["config.json", "JSON"]),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), ["config.json", "list"]),
    "other architecture": (
        _without_manifest(lambda f: edit_config(f, architectures=["OPTForCausalLM"])),
        ["architecture", "OPTForCausalLM"],
    ),
    "no layers": (
        _without_manifest(lambda f: edit_config(f, num_hidden_layers=0)),
        ["num_hidden_layers", "positive integer"],
    ),
    "d_ff no multiple of 8": (
        _without_manifest(lambda f: edit_config(f, intermediate_size=100)),
        ["intermediate_size", "100", "multiples of 8"],
    ),
    "biases": (_without_manifest(lambda f: edit_config(f, mlp_bias=True)), ["mlp_bias"]),
    "Swish": (_without_manifest(lambda f: edit_config(f, hidden_act="silu")), ["Swish", "prosparse sparsify"]),
    "NaN threshold": (
        _without_manifest(lambda f: edit_config(f, hidden_act="fatrelu", hidden_act_param=float("nan"))),
        ["hidden_act_param", "nan"],
    ),
    "infinite threshold in float32": (
        _without_manifest(lambda f: edit_config(f, hidden_act="fatrelu", hidden_act_param=1e39)),
        ["hidden_act_param is 1e+39", "float32"],
    ),
    "threshold beyond any float": (
        _without_manifest(lambda f: edit_config(f, hidden_act="fatrelu", hidden_act_param=10**400)),
        ["hidden_act_param is 1000"],
    ),
    "config too deep": (lambda f: (f / "config.json").write_text("[" * 200_000), ["config.json", "JSON"]),
    "config is not UTF-8": (lambda f: (f / "config.json").write_bytes(b'{"a": "\xff"}'), ["config.json", "JSON"]),
    "config is a folder": (
        lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()),
        ["config.json", "directory"],
    ),
    "other model type": (_without_manifest(lambda f: edit_config(f, model_type="mistral")), ["model_type", "mistral"]),
    "layers as a truth value": (
        _without_manifest(lambda f: edit_config(f, num_hidden_layers=True)),
        ["num_hidden_layers is True"],
    ),
    "more layers than memory": (
        lambda f: edit_config(f, num_hidden_layers=2**31 - 1),
        ["num_hidden_layers 2147483647", "model.layers.2.mlp.gate_proj.weight"],
    ),
    "layers beyond any integer": (
        _without_manifest(lambda f: edit_config(f, num_hidden_layers=2**31)),
        ["num_hidden_layers is 2147483648"],
    ),
    "heads in words": (
        _without_manifest(lambda f: edit_config(f, num_attention_heads="four")),
        ["num_attention_heads is 'four'"],
    ),
    "no heads": (
        _without_manifest(lambda f: edit_config(f, num_attention_heads=None)),
        ["num_attention_heads is None"],
    ),
    "heads that do not divide": (
        _without_manifest(lambda f: edit_config(f, num_attention_heads=3)),
        ["hidden_size is 64", "num_attention_heads, 3"],
    ),
    "key-value heads that do not divide": (
        _without_manifest(lambda f: edit_config(f, num_key_value_heads=4)),
        ["num_attention_heads is 2", "num_key_value_heads, 4"],
    ),
    "no vocabulary": (_without_manifest(lambda f: edit_config(f, vocab_size=0)), ["vocab_size is 0"]),
    "head size of a half": (_without_manifest(lambda f: edit_config(f, head_dim=0.5)), ["head_dim is 0.5"]),
    "tokenizer is not JSON": (
        _without_manifest(lambda f: (f / "tokenizer.json").write_text("garbage")),
        ["tokenizer.json", "JSON"],
    ),
    "tokenizer's settings are not JSON": (
        _without_manifest(lambda f: (f / "tokenizer_config.json").write_text("garbage")),
        ["tokenizer_config.json", "JSON"],
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), ["tokenizer.json", "Copy"]),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["safetensors"]),
    "pickled weights": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        ["pytorch_model.bin", "can run code"],
    ),
    "truncated shard": (_without_manifest(lambda f: _truncate(f / "model.safetensors")), ["model.safetensors"]),
    "shard is text": (
        _without_manifest(lambda f: (f / "model.safetensors").write_text("not a tensor in sight" * 10)),
        ["model.safetensors", "not a complete safetensors file"],
    ),
    "index names a missing shard": (
        _without_manifest(
            lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
        ),
        ["gone.safetensors", "missing"],
    ),
    "index without a map": (
        _without_manifest(lambda f: (f / "model.safetensors.index.json").write_text("{}")),
        ["weight_map"],
    ),
    "manifest is not JSON": (lambda f: (f / MANIFEST_NAME).write_text("?"), [MANIFEST_NAME, "JSON"]),
    "manifest of another version": (lambda f: _edit_manifest(f, format_version=2), [MANIFEST_NAME, "format_version"]),
    "manifest with an unknown field": (lambda f: _edit_manifest(f, colour="red"), [MANIFEST_NAME, "colour"]),
    "manifest with another activation": (
        lambda f: _edit_manifest(f, activation={"kind": "fatrelu", "threshold": 0.5}),
        ["FATReLU (threshold 0.5)", "ReLU"],
    ),
    "manifest with fewer layers": (lambda f: _edit_manifest(f, layers=[]), ["0 layers", "num_hidden_layers 2"]),
    "manifest with a layer twice": (lambda f: _edit_layer(f, 1, layer=0), ["[0, 0]", "0 to 1 in order"]),
    "manifest with too few neurons": (
        lambda f: _edit_layer(f, 1, neuron_frequency=[0.5]),
        ["neuron_frequency of layer 1", "1 entries", "intermediate_size 256"],
    ),
    "manifest with no number": (lambda f: _edit_layer(f, 0, sparsity=float("nan")), ["layers.0.sparsity"]),
    "manifest is a dangling link": (
        lambda f: _replace_manifest(f, lambda path: path.symlink_to("gone.json")),
        [MANIFEST_NAME, "symbolic link"],
    ),
    "manifest is a folder": (lambda f: _replace_manifest(f, Path.mkdir), [MANIFEST_NAME, "directory"]),
    "manifest without the config": (lambda f: _unlist(f, "config.json"), ["no SHA-256 for config.json"]),
    "manifest without the tokenizer": (lambda f: _unlist(f, "tokenizer.json"), ["no SHA-256 for tokenizer.json"]),
    "tokenizer added": (
        lambda f: (f / "tokenizer.model").write_bytes(b"other"),
        ["no SHA-256 for tokenizer.model", "delete what was added"],
    ),
    "tokens added": (lambda f: (f / "added_tokens.json").write_text("{}"), ["no SHA-256 for added_tokens.json"]),
    "merges added": (lambda f: (f / "merges.txt").write_text("a b"), ["no SHA-256 for merges.txt"]),
    "shard added": (
        lambda f: shutil.copyfile(f / "model.safetensors", f / "more.safetensors"),
        ["no SHA-256 for more.safetensors"],
    ),
    "manifest without the shard": (
        lambda f: _edit_manifest(f, files={"config.json": "0" * 64}),
        ["model.safetensors", "SHA-256"],
    ),
    "manifest that points outside": (
        lambda f: _edit_manifest(f, files={"../tiny/config.json": sha256_of(f / "config.json"), **hash_files(f)}),
        ["../tiny/config.json", "missing from the folder"],
    ),
    "manifest with an endless name": (
        lambda f: _edit_manifest(f, files={"a" * 5000: "0" * 64, **hash_files(f)}),
        ["aaaa", "missing from the folder"],
    ),
    "file gone": (lambda f: (f / "generation_config.json").unlink(), ["generation_config.json", "missing"]),
    "config edited": (lambda f: edit_config(f, rms_norm_eps=0.1), ["config.json", "SHA-256", "prosparse.json"]),
    "one bit of the weights": (
        lambda f: (f / "model.safetensors").write_bytes(
            (data := (f / "model.safetensors").read_bytes())[:-1] + bytes([data[-1] ^ 1])
        ),
        ["model.safetensors", "SHA-256"],
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_folder_is_refused_and_the_culprit_named(folder: Path, case: str) -> None:
    damage, words = DAMAGE[case]
    damage(folder)
    with pytest.raises(UserError) as caught:
        Checkpoint.open(folder)
    text = str(caught.value)
    assert [word for word in words if word not in text] == []
    assert "\n" not in text


def test_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="never downloaded"):
        Checkpoint.open("SparseLLM/prosparse-llama-2-7b")
    with pytest.raises(UserError, match="not a folder"):
        Checkpoint.open(tmp_path / "nothing")
    with pytest.raises(UserError, match="not a folder"):
        Checkpoint.open("a" * 5000)
    with pytest.raises(UserError, match="not a folder"):
        Checkpoint.open("nul\0")


def test_without_verification_hashes_are_not_compared(folder: Path) -> None:
    edit_config(folder, rms_norm_eps=0.1)
    assert Checkpoint.open(folder, verify=False).config["rms_norm_eps"] == 0.1


def test_manifest_leaves_no_temporary_file(folder: Path) -> None:
    before = {path.name for path in folder.iterdir()}
    manifest_for(folder).write(folder)
    assert {path.name for path in folder.iterdir()} == before


def test_files_that_no_loader_reads_may_be_added(folder: Path) -> None:
    (folder / "README.md").write_text("About this model")
    assert Checkpoint.open(folder).manifest is not None


def test_hashes_cover_every_file_that_a_loader_reads(folder: Path) -> None:
    for name in ("merges.txt", "README.md"):
        (folder / name).write_text("a b")
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert set(hash_files(folder)) == names | {"merges.txt"}


@pytest.mark.parametrize(
    ("stored", "computed", "computed_with_float16"),
    [
        ({"dtype": "float32"}, "float32", "float32"),
        ({"dtype": None, "torch_dtype": "float32"}, "float32", "float32"),
        ({"dtype": "bfloat16"}, "bfloat16", "bfloat16"),
        ({"dtype": "float16"}, "bfloat16", "float16"),
        ({"dtype": None}, "bfloat16", "bfloat16"),
    ],
)
def test_engine_computes_in_the_dtype_of_the_weights_where_it_can(
    folder: Path, stored: dict[str, object], computed: str, computed_with_float16: str
) -> None:
    edit_config(folder, **stored)
    checkpoint = Checkpoint.open(folder, verify=False)
    assert checkpoint.engine_dtype("auto") == computed
    assert checkpoint.engine_dtype("auto", float16=True) == computed_with_float16
    assert checkpoint.engine_dtype("float32") == "float32"
    assert checkpoint.engine_dtype("bfloat16") == "bfloat16"
