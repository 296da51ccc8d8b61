"""Import and export of unused tensors, extra files, settings of Ross, and models composed of several sources."""

import json

import numpy as np
import pytest

from convert.foreign import (
    ABSENT,
    CLIP,
    LLAMA,
    QWEN3,
    ROSS,
    SIGLIP,
    VAE,
    assert_same,
    component,
    component_state,
    edit_json,
    files_of,
    full,
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
from ross_jax.config import UserError
from ross_jax.convert.exporting import export
from ross_jax.convert.importing import load, plan_import

# Unused tensors and extra files.


def whole_model(settings: dict, dtype=np.float32) -> tuple[dict[str, np.ndarray], dict]:
    """Tensors and settings of a whole SigLIP or CLIP: with text model, projections, logit scale and buffers."""
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
    original = save(tmp_path / "original", *whole_model(settings, dtype))
    assert files_of(round_trip(tmp_path, "components", original) / "vision_tower") == files_of(original)
    tower = component(tmp_path / "tower", settings, dtype=dtype)
    assert_same(import_tree(original), import_tree(tower))


def test_only_the_tower_of_a_whole_clip_goes_into_a_full_checkpoint(tmp_path):
    whole = save(tmp_path / "whole", *whole_model(CLIP))
    exported = round_trip(tmp_path, "ross", whole, component(tmp_path / "llm", LLAMA))
    expected = {k: v for k, v in whole_model(CLIP)[0].items() if k.startswith("vision_model.")}
    expected = scoped(expected, "vision") | component_state(LLAMA)
    assert_same(state_of(exported), expected)


def test_a_full_checkpoint_has_the_reference_s_names(tmp_path):
    """A full checkpoint has the reference's keys, although transformers 5 and old diffusers use others."""
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
    # Components that are exported as folders keep their original keys.
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


EXTRA_FILES = ["tokenizer.json", "tokenizer.model", "merges.txt", "chat_template.jinja", "generation_config.json"]
LEFT = ["README.md", "trainer_state.json", "training_args.bin", "model.safetensors.index.fp16.json", "script.py"]


@pytest.mark.parametrize("kind", ["full", "llm", "tower"])
def test_tokenizer_and_processor_files_pass_through(kind, tmp_path):
    if kind == "full":
        original, folder = full(tmp_path), "."
    else:
        original, folder = tmp_path / "original", {"llm": "llm", "tower": "vision_tower"}[kind]
        component(original, {"llm": LLAMA, "tower": CLIP}[kind])
    expected = files_of(original)
    for i, name in enumerate([*EXTRA_FILES, *LEFT]):
        (original / name).write_bytes(bytes([i, 255, 0]))
    exported = round_trip(tmp_path, "ross" if kind == "full" else "components", original)
    expected |= {name: bytes([i, 255, 0]) for i, name in enumerate(EXTRA_FILES)}
    assert files_of(exported / folder) == expected


def test_a_run_s_tokenizer_replaces_that_of_its_first_model(tmp_path):
    """No file of the other is left, which a reader would mix with it. Other files stay."""
    checkpoint = full(tmp_path)
    for name in ("tokenizer.json", "tokenizer.model", "added_tokens.json", "generation_config.json"):
        (checkpoint / name).write_text(f'{{"of": "the first", "name": "{name}"}}')
    model = import_model(tmp_path / "model_dir", checkpoint)
    (model / "files" / "language").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / "files" / "language" / name).write_text(f'{{"of": "the run", "name": "{name}"}}')
    for layout, folder in {"ross": "ross", "components": "components/llm"}.items():
        export(model, tmp_path / layout, layout)
        found = {path.name: path.read_text() for path in (tmp_path / folder).glob("*.json")}
        of_run = {name for name, text in found.items() if "the run" in text}
        assert (of_run, found.keys() - of_run) == (
            {"tokenizer.json", "tokenizer_config.json"},
            {"config.json", "generation_config.json"},
        )
        assert not (tmp_path / folder / "tokenizer.model").exists()


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
    # The exported adapters hold the same projector.
    if depth:
        assert plan_import([str(adapters)]).config.projector == config
        again, first = import_tree(adapters), import_tree(checkpoint)
        assert {k: v.tobytes() for k, v in again.items() if k.startswith("projector/")} == {
            k: v.tobytes() for k, v in first.items() if k.startswith("projector/")
        }


def test_a_composed_linear_projector_has_the_name_of_its_keys(tmp_path):
    """`linear` and `mlp1x_gelu` of LLaVA have different keys for the same tensors, and are told apart by them."""
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
    model = import_model(tmp_path / "tower", component(tmp_path / "original", CLIP))
    with pytest.raises(
        UserError, match="has no language model, so it is no full Ross checkpoint; use --format components"
    ):
        export(model, tmp_path / "out", "ross")
    model = import_model(tmp_path / "qwen3", component(tmp_path / "llm", QWEN3))
    with pytest.raises(UserError, match="the reference has no language model qwen3; use --format components"):
        export(model, tmp_path / "out", "ross")
    assert not (tmp_path / "out").exists()
