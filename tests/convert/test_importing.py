"""Import and export: what comes in goes out again, bit for bit, and nothing else."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from convert import torch_zip
from convert.foreign import (
    ABSENT,
    CLIP,
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
    edit_json,
    full,
    golden,
    import_model,
    import_tree,
    projector_state,
    random_arrays,
    round_trip,
    save,
    scoped,
    state_of,
)
from ross_jax import checkpoints
from ross_jax.checkpoints import StreamedLeaf
from ross_jax.config import UserError
from ross_jax.convert.exporting import export
from ross_jax.convert.importing import load, plan_import
from ross_jax.convert.mapping import ConversionError, flatten, unflatten

GOLDENS = ["siglip_qwen2", "clip_vicuna"]


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """The goldens' full checkpoints, imported."""
    folder = tmp_path_factory.mktemp("imported")
    return {name: import_model(folder / name, GOLDEN / name / "checkpoint") for name in GOLDENS}


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# The goldens.


@pytest.mark.parametrize("name", GOLDENS)
def test_full_checkpoint_comes_back_byte_for_byte(name, imported, tmp_path):
    export(imported[name], tmp_path / "out", "ross")
    assert files_of(tmp_path / "out") == files_of(GOLDEN / name / "checkpoint")


@pytest.mark.parametrize("name", GOLDENS)
def test_components_of_a_full_checkpoint(name, imported, tmp_path):
    export(imported[name], tmp_path / "out", "components")
    out, theirs = files_of(tmp_path / "out"), files_of(GOLDEN / name)
    settings = json.loads(out.pop("llm/config.json"))
    assert settings == json.loads(theirs["llm/config.json"])
    adapters = {key: out.pop(key) for key in sorted(out) if key.startswith("adapters/")}
    assert list(adapters) == [f"adapters/{n}" for n in ("config.json", "mm_inv_projector.safetensors")] + [
        "adapters/mm_projector.safetensors"
    ]
    assert adapters["adapters/config.json"] == theirs["checkpoint/config.json"]
    assert out == {key: theirs[key] for key in out} and len(out) == 7
    whole = state_of(GOLDEN / name / "checkpoint")
    ours = state_of(tmp_path / "out/adapters/mm_projector.safetensors")
    ours |= state_of(tmp_path / "out/adapters/mm_inv_projector.safetensors")
    assert_same(ours, {key: whole[key] for key in whole if key.startswith(("model.mm_projector", "model.mm_inv"))})


@pytest.mark.parametrize("name", GOLDENS)
def test_components_make_the_same_model(name, imported, tmp_path):
    """Adapters as torch files, the other components as folders: one tree, and one full checkpoint again."""
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
    settings, theirs = (
        json.loads((path / "config.json").read_text()) for path in (exported, GOLDEN / name / "checkpoint")
    )
    changed = {
        key: (settings.get(key), theirs.get(key)) for key in settings | theirs if settings.get(key) != theirs.get(key)
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
    """Leaves by path, as a checkpoint."""
    streamed = {k: StreamedLeaf(v.shape, v.dtype, lambda v=v: iter([(None, v)])) for k, v in leaves.items()}
    checkpoints.save_streamed(folder, unflatten(streamed))


# Every kind of source.


COMPONENTS = {"llm": LLAMA, "vision_tower": CLIP, "vae": VAE}


@pytest.mark.parametrize(
    "folder, settings",
    [
        ("llm", LLAMA),
        ("llm", LLAMA | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("llm", QWEN2),
        ("llm", QWEN3),
        ("vision_tower", SIGLIP),
        ("vision_tower", CLIP),
        ("vae", VAE),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_component_folders_come_back(folder, settings, dtype, tmp_path):
    theirs = component(tmp_path / "theirs", settings, dtype=dtype)
    exported = round_trip(tmp_path, "components", theirs)
    assert files_of(exported / folder) == files_of(theirs)
    assert [path.name for path in exported.iterdir()] == [folder]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtype(dtype, tmp_path):
    settings = SIGLIP | {"torch_dtype": "float32"}
    state = component_state(settings)
    state |= {"vision_model.embeddings.position_ids": np.arange(4)[None]}
    exported = round_trip(tmp_path, "components", save(tmp_path / "theirs", state, settings), dtype=dtype)
    target = np.dtype(getattr(ml_dtypes, dtype, dtype))
    expected = {k: v.astype(target) if v.dtype == np.float32 else v for k, v in state.items()}
    assert_same(state_of(exported / "vision_tower"), expected)
    assert json.loads((exported / "vision_tower/config.json").read_text()) == settings | {"torch_dtype": dtype}


def test_values_that_a_dtype_cannot_hold_are_refused(tmp_path):
    state = component_state(LLAMA)
    state["model.layers.1.mlp.up_proj.weight"][2, 3] = 1e5
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight: has values that float16 cannot hold"):
        round_trip(tmp_path, "components", save(tmp_path / "theirs", state, LLAMA), dtype="float16")
    assert [path.name for path in tmp_path.iterdir() if "exported" in path.name] == []


def test_layers_of_different_dtypes_come_back(tmp_path):
    """They share a stacked leaf, and keep their bits: subnormal, negative zero, largest."""
    state = component_state(LLAMA)
    name = "model.layers.{}.mlp.up_proj.weight"
    for i, dtype in enumerate([np.float16, ml_dtypes.bfloat16]):
        values = state[name.format(i)].astype(dtype)
        values.reshape(-1)[:4] = [-0.0, ml_dtypes.finfo(dtype).smallest_subnormal, ml_dtypes.finfo(dtype).max, 0.1]
        state[name.format(i)] = values
    assert len({state[name.format(i)].dtype for i in range(3)}) == 3
    theirs = save(tmp_path / "theirs", state, LLAMA)
    assert files_of(round_trip(tmp_path, "components", theirs) / "llm") == files_of(theirs)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_sharded_files(suffix, tmp_path):
    state = component_state(QWEN2)
    theirs = save(tmp_path / "theirs", {}, QWEN2)
    (theirs / "model.safetensors").unlink()
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    weight_map = {}
    for i in range(3):
        name = f"{stem}-{i + 1:05d}-of-00003.{suffix}"
        part = {key: state[key] for key in list(state)[i::3]}
        if suffix == "bin":
            torch_zip.save(theirs / name, part)
        else:
            safetensors.numpy.save_file(part, theirs / name)
        weight_map |= dict.fromkeys(part, name)
    (theirs / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    exported = round_trip(tmp_path, "components", theirs)
    assert_same(state_of(exported / "llm"), state)
    assert sorted(path.name for path in (exported / "llm").iterdir()) == ["config.json", "model.safetensors"]


def test_full_checkpoint_as_torch_file(tmp_path):
    theirs = full(tmp_path)
    state = state_of(theirs)
    torch_zip.save(theirs / "pytorch_model.bin", state)
    (theirs / "model.safetensors").unlink()
    assert_same(state_of(round_trip(tmp_path, "ross", theirs)), state)


@pytest.mark.parametrize("copy", [False, True])
def test_tied_head(copy, tmp_path):
    settings = QWEN2 | {"tie_word_embeddings": True}
    state = component_state(settings)
    assert "lm_head.weight" not in state
    if copy:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    exported = round_trip(tmp_path, "components", save(tmp_path / "theirs", state, settings))
    assert_same(state_of(exported / "llm"), state)
    # An edit of the embedding shows in its copy too.
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


def test_copy_of_a_tied_head_that_differs_is_refused(tmp_path):
    settings = QWEN2 | {"tie_word_embeddings": True}
    state = component_state(settings)
    state["lm_head.weight"] = state["model.embed_tokens.weight"] + 1e-3
    plan = plan_import([str(save(tmp_path / "theirs", state, settings))])
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
        shutil.rmtree(tmp_path / "clip_vicuna/vae")  # nothing asks for it
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


# What is kept though it is never used, and what travels along.


def whole_model(settings: dict, dtype=np.float32) -> tuple[dict[str, np.ndarray], dict]:
    """A whole SigLIP/CLIP: with text model, projections, logit scale and buffers."""
    state = component_state(settings, dtype)
    more = {"text_model.final_layer_norm.weight": (8,), "logit_scale": (), "visual_projection.weight": (3, 8)}
    state |= random_arrays(more | {"text_model.encoder.layers.0.mlp.fc1.weight": (4, 8)}, dtype, seed=3)
    for name in ("text", "vision"):
        state[f"{name}_model.embeddings.position_ids"] = np.arange(5)[None]
    kind = settings["model_type"].removesuffix("_vision_model")
    return state, {"model_type": kind, "text_config": {"hidden_size": 8}, "vision_config": settings}


@pytest.mark.parametrize("settings", [SIGLIP, CLIP])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_whole_siglip_and_clip_come_back(settings, dtype, tmp_path):
    theirs = save(tmp_path / "theirs", *whole_model(settings, dtype))
    assert files_of(round_trip(tmp_path, "components", theirs) / "vision_tower") == files_of(theirs)
    tower = component(tmp_path / "tower", settings, dtype=dtype)
    assert_same(import_tree(theirs), import_tree(tower))


def test_only_the_tower_of_a_whole_clip_goes_into_a_full_checkpoint(tmp_path):
    whole = save(tmp_path / "whole", *whole_model(CLIP))
    exported = round_trip(tmp_path, "ross", whole, component(tmp_path / "llm", LLAMA))
    expected = {k: v for k, v in whole_model(CLIP)[0].items() if k.startswith("vision_model.")}
    expected = scoped(expected, "vision") | component_state(LLAMA)
    assert_same(state_of(exported), expected)


def test_a_full_checkpoint_has_the_reference_s_names(tmp_path):
    """Whatever those of the component folders: towers of transformers 5, autoencoders of old diffusers."""
    tower = {key.removeprefix("vision_model."): value for key, value in component_state(SIGLIP).items()}
    save(tmp_path / "tower", tower, SIGLIP)
    vae, old = component_state(VAE), {}
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for key, value in vae.items():
        for new, name in names.items() if "attentions" in key else ():
            key = key.replace(f".{new}.", f".{name}.")
        old[key] = value
    assert old.keys() != vae.keys()
    save(tmp_path / "vae", old, VAE, "diffusion_pytorch_model")
    parts = [tmp_path / "tower", tmp_path / "vae", component(tmp_path / "llm", LLAMA)]
    exported = round_trip(tmp_path, "ross", *parts)
    expected = scoped(component_state(SIGLIP), "vision") | scoped(vae, "autoencoder") | component_state(LLAMA)
    assert_same(state_of(exported), expected)
    # Exported as components again, each keeps the names that it came with.
    export(tmp_path / "imported", tmp_path / "components", "components")
    assert files_of(tmp_path / "components/vision_tower") == files_of(tmp_path / "tower")
    assert files_of(tmp_path / "components/vae") == files_of(tmp_path / "vae")


def test_buffers_pass_through(tmp_path):
    checkpoint = full(tmp_path)
    buffers = {"model.rotary_emb.inv_freq": np.float32([1, 0.5])}
    buffers |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.float16([1, 0.5]) for i in range(3)}
    buffers |= {"model.vision_tower.vision_tower.vision_model.embeddings.position_ids": np.arange(5)[None]}
    save(checkpoint, state_of(checkpoint) | buffers, None)
    exported = round_trip(tmp_path, "ross", checkpoint)
    assert files_of(exported) == files_of(checkpoint)
    assert state_of(exported)["model.vision_tower.vision_tower.vision_model.embeddings.position_ids"].dtype == np.int64


PASSENGERS = ["tokenizer.json", "tokenizer.model", "merges.txt", "chat_template.jinja", "generation_config.json"]
LEFT = ["README.md", "trainer_state.json", "training_args.bin", "model.safetensors.index.fp16.json", "script.py"]


@pytest.mark.parametrize("kind", ["full", "llm", "tower"])
def test_tokenizer_and_processor_files_pass_through(kind, tmp_path):
    if kind == "full":
        theirs, folder = full(tmp_path), "."
    else:
        theirs, folder = tmp_path / "theirs", {"llm": "llm", "tower": "vision_tower"}[kind]
        component(theirs, {"llm": LLAMA, "tower": CLIP}[kind])
    expected = files_of(theirs)
    for i, name in enumerate([*PASSENGERS, *LEFT]):
        (theirs / name).write_bytes(bytes([i, 255, 0]))
    exported = round_trip(tmp_path, "ross" if kind == "full" else "components", theirs)
    expected |= {name: bytes([i, 255, 0]) for i, name in enumerate(PASSENGERS)}
    assert files_of(exported / folder) == expected


def test_the_tower_s_processor_travels_with_a_full_checkpoint(tmp_path):
    checkpoint = full(tmp_path)
    (tmp_path / "towers/clip/preprocessor_config.json").write_text('{"image_mean": [1, 2, 3], "image_std": [4, 5, 6]}')
    model = import_model(tmp_path / "model_dir", checkpoint)
    export(model, tmp_path / "out", "components")
    tower = files_of(tmp_path / "towers/clip") | {"model.safetensors": b""}
    assert files_of(tmp_path / "out/vision_tower") | {"model.safetensors": b""} == tower
    config = checkpoints.read_manifest(model)["config"]
    assert (config["image_mean"], config["image_std"]) == ([1, 2, 3], [4, 5, 6])


# Settings of Ross.


@pytest.mark.parametrize("layer, used", [(-1, 3), (-2, 2), (-3, 1), (-4, 0), (0, 0), (1, 1), (3, 3)])
def test_selected_layer_of_clip(layer, used, tmp_path):
    checkpoint = full(tmp_path, ROSS | {"mm_vision_select_layer": layer})
    plan = plan_import([str(checkpoint)])
    vision = load(plan)["vision"]
    assert (plan.config.vision.select_layer, plan.config.vision.layers_used) == (layer, used)
    assert vision["layers"]["norm1"]["scale"].shape[0] == used if used else "layers" not in vision
    if layer in (-1, 0):
        assert files_of(round_trip(tmp_path, "ross", checkpoint)) == files_of(checkpoint)


def test_the_reference_ignores_the_selected_layer_for_siglip(tmp_path):
    tower = component(tmp_path / "towers/clip", SIGLIP)
    checkpoint = full(tmp_path, ROSS | {"mm_vision_select_layer": -3})
    component(tower, SIGLIP)
    state = {k: v for k, v in state_of(checkpoint).items() if ".vision_tower." not in k}
    save(checkpoint, state | scoped(component_state(SIGLIP), "vision"), None)
    assert plan_import([str(checkpoint)]).config.vision.select_layer == -2


@pytest.mark.parametrize(
    "kind, state, depth",
    [
        ("mlp1x_gelu", projector_state([8, 8]), 1),
        ("linear", projector_state([8, 8], first=""), 1),
        ("mlp2x_gelu", projector_state([8, 8, 8]), 2),
        ("mlp3x_gelu", projector_state([8, 8, 8, 8]), 3),
        ("identity", {}, None),
        (ABSENT, projector_state([8, 8, 8]), 2),
    ],
)
def test_projectors(kind, state, depth, tmp_path):
    checkpoint = full(tmp_path, ROSS | {"mm_projector_type": None})
    edit_json(checkpoint / "config.json", mm_projector_type=kind)
    rest = {k: v for k, v in state_of(checkpoint).items() if not k.startswith("model.mm_projector.")}
    save(checkpoint, rest | state, None)
    config = plan_import([str(checkpoint)]).config.projector
    assert config.kind == ("mlp" if depth else "identity") and depth in (config.depth, None)
    assert files_of(round_trip(tmp_path, "ross", checkpoint)) == files_of(checkpoint)
    export(tmp_path / "imported", tmp_path / "components", "components")
    adapters = tmp_path / "components/adapters"
    assert_same(state_of(adapters / "mm_projector.safetensors") if depth else {}, state)
    # The adapters alone, and with the other components, are the same projector.
    if depth:
        assert plan_import([str(adapters)]).config.projector == config
    again = [adapters] if depth else [checkpoint]
    tree = import_tree(*again)
    assert {k: v.tobytes() for k, v in tree.items() if k.startswith("projector/")} == {
        k: v.tobytes() for k, v in import_tree(checkpoint).items() if k.startswith("projector/")
    }


def test_a_composed_linear_projector_has_the_name_of_its_keys(tmp_path):
    """LLaVA's `linear` and `mlp1x_gelu` are the same numbers under different names."""
    for i, (first, kind) in enumerate([("", "linear"), ("0.", "mlp1x_gelu")]):
        folder = tmp_path / str(i)
        adapters = save(folder / "adapters", projector_state([8, 8], first), None, "mm_projector")
        exported = round_trip(
            folder, "ross", adapters, component(folder / "llm", LLAMA), component(folder / "clip", CLIP)
        )
        assert json.loads((exported / "config.json").read_text())["mm_projector_type"] == kind
        assert f"model.mm_projector.{first}weight" in state_of(exported)


def test_adapters_settings_reach_the_composed_model(tmp_path):
    settings = {"model_type": "ross_llama", "mm_vision_select_layer": -3, "image_aspect_ratio": "square"}
    settings |= {"mm_projector_type": "mlp2x_gelu", "tokenizer_model_max_length": 99, "hidden_size": 8}
    adapters = save(tmp_path / "adapters", projector_state([8, 8, 8]), settings, "mm_projector")
    parts = [adapters, component(tmp_path / "llm", LLAMA), component(tmp_path / "clip", CLIP)]
    assert plan_import([str(part) for part in parts]).config.vision.select_layer == -3
    exported = json.loads((round_trip(tmp_path, "ross", *parts) / "config.json").read_text())
    assert (
        exported.items()
        >= (settings | LLAMA | {"model_type": "ross_llama", "architectures": ["RossLlamaForCausalLM"]}).items()
    )
    assert (exported["mm_vision_tower"], exported["image_embed_len"]) == (str(tmp_path / "clip"), 4)


def test_settings_named_by_a_flag(tmp_path):
    checkpoint = full(tmp_path, ROSS | {"mm_vision_tower": "/nowhere/clip"})
    tree = import_tree(checkpoint, vision_tower=tmp_path / "towers/clip")
    assert tree["vision/class_embedding"].shape == (8,)


def test_a_model_is_exported_only_as_what_it_is(tmp_path):
    model = import_model(tmp_path / "tower", component(tmp_path / "theirs", CLIP))
    with pytest.raises(
        UserError, match="has no language model, so it is no full Ross checkpoint; use --format components"
    ):
        export(model, tmp_path / "out", "ross")
    model = import_model(tmp_path / "qwen3", component(tmp_path / "llm", QWEN3))
    with pytest.raises(UserError, match="the reference has no Ross model with a qwen3; use --format components"):
        export(model, tmp_path / "out", "ross")
    assert not (tmp_path / "out").exists()
