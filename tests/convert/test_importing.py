"""Import followed by export gives the same bytes."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from convert import torch_zip
from convert.foreign import (
    CLIP,
    DINOV2_GIANT,
    GOLDEN,
    LLAMA,
    QWEN2,
    QWEN3,
    ROSS,
    SIGLIP,
    VAE,
    assert_same,
    component,
    component_state,
    files_of,
    full,
    golden,
    import_model,
    import_tree,
    round_trip,
    save,
    state_of,
)
from ross_jax import checkpoints
from ross_jax.checkpoints import StreamedLeaf
from ross_jax.config import UserError
from ross_jax.convert.exporting import export
from ross_jax.convert.importing import load, plan_import
from ross_jax.convert.mapping import ConversionError
from ross_jax.tree import flatten, unflatten

GOLDENS = ["siglip_qwen2", "clip_vicuna"]


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """Name of a golden -> model directory of its imported full checkpoint."""
    folder = tmp_path_factory.mktemp("imported")
    return {name: import_model(folder / name, GOLDEN / name / "checkpoint") for name in GOLDENS}


# The goldens.


@pytest.mark.parametrize("name", GOLDENS)
def test_full_checkpoint_comes_back_byte_for_byte(name, imported, tmp_path):
    export(imported[name], tmp_path / "out", "ross")
    assert files_of(tmp_path / "out") == files_of(GOLDEN / name / "checkpoint")


@pytest.mark.parametrize("name", GOLDENS)
def test_components_of_a_full_checkpoint(name, imported, tmp_path):
    export(imported[name], tmp_path / "out", "components")
    out, original = files_of(tmp_path / "out"), files_of(GOLDEN / name)
    settings = json.loads(out.pop("llm/config.json"))
    assert settings == json.loads(original["llm/config.json"])
    adapters = {key: out.pop(key) for key in sorted(out) if key.startswith("adapters/")}
    assert list(adapters) == [f"adapters/{n}" for n in ("config.json", "mm_inv_projector.safetensors")] + [
        "adapters/mm_projector.safetensors"
    ]
    assert adapters["adapters/config.json"] == original["checkpoint/config.json"]
    assert out == {key: original[key] for key in out} and len(out) == 7
    whole = state_of(GOLDEN / name / "checkpoint")
    found = state_of(tmp_path / "out/adapters/mm_projector.safetensors")
    found |= state_of(tmp_path / "out/adapters/mm_inv_projector.safetensors")
    assert_same(found, {key: whole[key] for key in whole if key.startswith(("model.mm_projector", "model.mm_inv"))})


@pytest.mark.parametrize("name", GOLDENS)
def test_components_make_the_same_model(name, imported, tmp_path):
    """Adapters in torch files and folders of other components give the full checkpoint's tree and export."""
    whole, folder = state_of(GOLDEN / name / "checkpoint"), tmp_path / "stage1"
    for stem in ("mm_projector", "mm_inv_projector"):
        state = {key: value for key, value in whole.items() if key.startswith(f"model.{stem}.")}
        torch_zip.save(folder / f"{stem}.bin", state)
    shutil.copy(GOLDEN / name / "checkpoint/config.json", folder)
    parts = [GOLDEN / name / part for part in ("llm", "vision_tower", "vae")]
    assert_same(import_tree(folder, *parts), import_tree(GOLDEN / name / "checkpoint"))
    exported = round_trip(tmp_path, "ross", folder, *parts)
    assert (exported / "model.safetensors").read_bytes() == (
        GOLDEN / name / "checkpoint/model.safetensors"
    ).read_bytes()
    settings, original = (
        json.loads((path / "config.json").read_text()) for path in (exported, GOLDEN / name / "checkpoint")
    )
    changed = {
        key: (settings.get(key), original.get(key))
        for key in settings | original
        if settings.get(key) != original.get(key)
    }
    assert changed == {
        "_name_or_path": (None, f"{name}/llm"),
        "mm_pixel_decoder": (str(GOLDEN / name / "vae"), f"{name}/vae"),
        "mm_vision_tower": (str(GOLDEN / name / "vision_tower"), f"{name}/vision_tower"),
    }
    assert_same(import_tree(exported), import_tree(GOLDEN / name / "checkpoint"))


@pytest.mark.parametrize(
    "name, path, layer, key",
    [
        (
            "siglip_qwen2",
            "language/layers/query/kernel",
            1,
            "model.layers.1.self_attn.q_proj.weight",
        ),
        (
            "clip_vicuna",
            "autoencoder/encoder/conv_in/kernel",
            None,
            "model.pixel_decoder.pixel_decoder.encoder.conv_in.weight",
        ),
        (
            "clip_vicuna",
            "denoiser/position_embedding",
            None,
            "model.mm_inv_projector.net.pos_embed",
        ),
    ],
)
def test_an_edit_and_nothing_else_is_exported(name, path, layer, key, imported, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(imported[name], model, ignore=shutil.ignore_patterns("params"))
    tree = checkpoints.abstract(imported[name] / "params")
    leaves = flatten(checkpoints.restore(imported[name] / "params", tree))
    (leaves[path] if layer is None else leaves[path][layer]).reshape(-1)[5] += 1.0
    save_arrays(model / "params", leaves)
    export(model, tmp_path / "out", "ross")
    before, after = state_of(GOLDEN / name / "checkpoint"), state_of(tmp_path / "out")
    assert [k for k in before if before[k].tobytes() != after[k].tobytes()] == [key]
    difference = after[key] - before[key]
    assert np.count_nonzero(difference) == 1 and abs(difference.sum() - 1.0) < 1e-6
    del before[key], after[key]
    assert_same(before, after)


def save_arrays(folder: Path, leaves: dict[str, np.ndarray]) -> None:
    """Writes arrays (path -> array) as a checkpoint."""
    streamed = {k: StreamedLeaf(v.shape, v.dtype, lambda v=v: iter([(None, v)])) for k, v in leaves.items()}
    checkpoints.save_streamed(folder, unflatten(streamed))


# Kinds of sources.


COMPONENTS = {"llm": LLAMA, "vision_tower": CLIP, "vae": VAE}


@pytest.mark.parametrize(
    "folder, settings, dtype",
    [
        ("llm", LLAMA, np.float32),
        ("llm", LLAMA | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}, ml_dtypes.bfloat16),
        ("llm", QWEN2, np.float16),
        ("llm", QWEN3, ml_dtypes.bfloat16),
        ("vision_tower", SIGLIP, np.float16),
        ("vision_tower", CLIP, np.float32),
        ("vae", VAE, np.float32),
        ("vae", VAE, ml_dtypes.bfloat16),
    ],
)
def test_component_folders_come_back(folder, settings, dtype, tmp_path):
    original = component(tmp_path / "original", settings, dtype=dtype)
    exported = round_trip(tmp_path, "components", original)
    assert files_of(exported / folder) == files_of(original)
    assert {path.name for path in exported.iterdir()} == {folder, "README.md"}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtype(dtype, tmp_path):
    settings = SIGLIP | {"torch_dtype": "float32"}
    state = component_state(settings)
    state |= {"vision_model.embeddings.position_ids": np.arange(4)[None]}
    exported = round_trip(tmp_path, "components", save(tmp_path / "original", state, settings), dtype=dtype)
    target = np.dtype(getattr(ml_dtypes, dtype, dtype))
    expected = {k: v.astype(target) if v.dtype == np.float32 else v for k, v in state.items()}
    assert_same(state_of(exported / "vision_tower"), expected)
    assert json.loads((exported / "vision_tower/config.json").read_text()) == settings | {"torch_dtype": dtype}


def test_values_that_a_dtype_cannot_hold_are_refused(tmp_path):
    state = component_state(LLAMA)
    state["model.layers.1.mlp.up_proj.weight"][2, 3] = 1e5
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight: has values that float16 cannot hold"):
        round_trip(tmp_path, "components", save(tmp_path / "original", state, LLAMA), dtype="float16")
    assert [path.name for path in tmp_path.iterdir() if "exported" in path.name] == []


def test_layers_of_different_dtypes_come_back(tmp_path):
    """Layers of a stacked leaf keep their bits although their dtypes differ: also -0, subnormal and largest numbers."""
    state = component_state(LLAMA)
    name = "model.layers.{}.mlp.up_proj.weight"
    for i, dtype in enumerate([np.float16, ml_dtypes.bfloat16]):
        values = state[name.format(i)].astype(dtype)
        values.reshape(-1)[:4] = [-0.0, ml_dtypes.finfo(dtype).smallest_subnormal, ml_dtypes.finfo(dtype).max, 0.1]
        state[name.format(i)] = values
    assert len({state[name.format(i)].dtype for i in range(3)}) == 3
    original = save(tmp_path / "original", state, LLAMA)
    assert files_of(round_trip(tmp_path, "components", original) / "llm") == files_of(original)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("settings, folder", [(QWEN2, "llm"), (DINOV2_GIANT, "vision_tower")])
def test_sharded_files(settings, folder, suffix, tmp_path):
    state = component_state(settings)
    original = save(tmp_path / "original", {}, settings)
    (original / "model.safetensors").unlink()
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    weight_map = {}
    for i in range(3):
        name = f"{stem}-{i + 1:05d}-of-00003.{suffix}"
        part = {key: state[key] for key in list(state)[i::3]}
        if suffix == "bin":
            torch_zip.save(original / name, part)
        else:
            safetensors.numpy.save_file(part, original / name)
        weight_map |= dict.fromkeys(part, name)
    (original / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    exported = round_trip(tmp_path, "components", original)
    assert_same(state_of(exported / folder), state)
    assert sorted(path.name for path in (exported / folder).iterdir()) == [
        "SHA256SUMS",
        "config.json",
        "model.safetensors",
    ]


def test_full_checkpoint_as_torch_file(tmp_path):
    original = full(tmp_path)
    state = state_of(original)
    torch_zip.save(original / "pytorch_model.bin", state)
    (original / "model.safetensors").unlink()
    assert_same(state_of(round_trip(tmp_path, "ross", original)), state)


@pytest.mark.parametrize("copy", [False, True])
def test_tied_head(copy, tmp_path):
    settings = QWEN2 | {"tie_word_embeddings": True}
    state = component_state(settings)
    assert "lm_head.weight" not in state
    if copy:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    exported = round_trip(tmp_path, "components", save(tmp_path / "original", state, settings))
    assert_same(state_of(exported / "llm"), state)
    # Export also writes an edited embedding to its copy.
    leaves = flatten(
        checkpoints.restore(tmp_path / "imported/params", checkpoints.abstract(tmp_path / "imported/params"))
    )
    leaves["language/embedding"] += 1
    shutil.rmtree(tmp_path / "imported/params")
    save_arrays(tmp_path / "imported/params", leaves)
    export(tmp_path / "imported", tmp_path / "edited", "components")
    after = state_of(tmp_path / "edited/llm")
    assert sorted(k for k in state if state[k].tobytes() != after[k].tobytes()) == sorted(
        k for k in state if k in ("lm_head.weight", "model.embed_tokens.weight")
    )


@pytest.mark.parametrize(
    "change", [lambda x: x + 1e-3, lambda x: x.astype(np.float16), lambda x: x.astype(ml_dtypes.float8_e4m3fn)]
)
def test_copy_of_a_tied_head_that_differs_is_refused(change, tmp_path):
    settings = QWEN2 | {"tie_word_embeddings": True}
    state = component_state(settings)
    state["lm_head.weight"] = change(state["model.embed_tokens.weight"])
    plan = plan_import([str(save(tmp_path / "original", state, settings))])
    for _ in range(2):
        with pytest.raises(
            ConversionError, match=r"1 problem.*\n.*lm_head\.weight differs from model\.embed_tokens\.weight"
        ):
            load(plan)


@pytest.mark.parametrize(
    "missing", [["denoiser", "autoencoder"], ["vision"], ["vision", "projector", "denoiser", "autoencoder"]]
)
def test_full_checkpoints_without_some_components(missing, tmp_path):
    scopes = {
        "denoiser": "model.mm_inv_projector.",
        "autoencoder": "model.pixel_decoder.",
        "vision": "model.vision_tower.",
        "projector": "model.mm_projector.",
    }
    checkpoint = golden("clip_vicuna", tmp_path)
    state = state_of(checkpoint)
    dropped = tuple(scopes[name] for name in missing)
    state = {key: value for key, value in state.items() if not key.startswith(dropped)}
    safetensors.numpy.save_file(state, checkpoint / "model.safetensors", {"format": "pt"})
    if "autoencoder" in missing:
        shutil.rmtree(tmp_path / "clip_vicuna/vae")  # not needed without the autoencoder
    exported = round_trip(tmp_path, "ross", checkpoint)
    assert files_of(exported) == files_of(checkpoint)
    tree = import_tree(checkpoint)
    assert {path.split("/")[0] for path in tree} == {
        "vision",
        "projector",
        "language",
        "denoiser",
        "autoencoder",
    } - set(missing)


def test_a_tower_completes_a_full_checkpoint_that_lacks_it(tmp_path):
    whole = full(tmp_path, ROSS | {"mm_vision_select_layer": -3, "image_mean": [0.1, 0.2, 0.3]})
    plan = plan_import([str(whole)])
    state = {key: value for key, value in state_of(whole).items() if not key.startswith("model.vision_tower.")}
    safetensors.numpy.save_file(state, whole / "model.safetensors")
    tower = save(tmp_path / "tower", component_state(CLIP, seed=1), CLIP)
    composed = plan_import([str(whole), str(tower)])
    assert composed.config == plan.config and plan.config.vision.select_layer == -3
    assert composed.config.image_mean == (0.1, 0.2, 0.3)
    assert_same(flatten(load(composed)), flatten(load(plan)))


def test_digests_of_exports(tmp_path):
    """An export lists the digests of its files, and import compares them; those of another form are left alone."""
    out = tmp_path / "out"
    export(import_model(tmp_path / "imported", GOLDEN / "siglip_qwen2" / "checkpoint"), out, "ross")
    listed = {line.split("  ")[1] for line in (out / "SHA256SUMS").read_text().splitlines()}
    present = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert listed == present - {"SHA256SUMS"}
    path = max(out.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=rf"^{path}: damaged: its SHA-256 is not the one in {out}/SHA256SUMS"):
        plan_import([str(out)])
    (out / "SHA256SUMS").write_text("of somebody else")
    with pytest.raises(UserError, match="mm_vision_tower"):  # and no more of digests
        plan_import([str(out)])
