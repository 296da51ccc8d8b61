"""Foreign checkpoints that cannot be used: one error lists all problems and says what to do."""

import json
import os
import pickle
import random
import re
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from convert import torch_zip
from convert.foreign import (
    ABSENT,
    CLIP,
    LLAMA,
    ROSS,
    TINY,
    VAE,
    assert_says,
    component,
    component_state,
    edit_json,
    edit_tensors,
    full,
    golden,
    projector_state,
    refused,
    save,
    scoped,
    state_of,
)
from ross_jax.config import UserError
from ross_jax.convert.denoiser import table
from ross_jax.convert.importing import load, plan_import, write
from ross_jax.convert.mapping import expand
from ross_jax.models.denoiser import DenoiserConfig
from ross_jax.models.ross import RossConfig, abstract_params
from ross_jax.tree import flatten

TOWER = "model.vision_tower.vision_tower.vision_model."
EMBEDDING = "model.embed_tokens.weight"


# Tensors. One error lists the problems of headers and of values.


def zeros(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


def with_value(shape: tuple[int, ...], value: float, dtype: Any = np.float32) -> np.ndarray:
    array = np.zeros(shape, dtype)
    array.reshape(-1)[-1] = value
    return array


NORM = f"{TOWER}encoder.layers.2.layer_norm1.bias"  # unused, because its layer is above the selected one


@pytest.mark.parametrize(
    "changes, patterns",
    [
        ({EMBEDDING: zeros(8, 11)}, [rf"wrong shape: {EMBEDDING}, expected \[11, 8\], found \[8, 11\]"]),
        ({EMBEDDING: zeros()}, [r"expected \[11, 8\], found \[\]"]),
        ({EMBEDDING: zeros(0, 8)}, [r"expected \[11, 8\], found \[0, 8\]"]),
        ({EMBEDDING: ABSENT}, [rf"missing: {EMBEDDING}, expected shape \[11, 8\]"]),
        ({"model.layers.1.mlp.up_proj.weight": ABSENT}, [r"missing: model\.layers\.1\.mlp\.up_proj\.weight"]),
        ({"model.layers.3.mlp.up_proj.weight": zeros(12, 8)}, [r"unmapped: model\.layers\.3\.mlp\.up_proj\.weight"]),
        ({"model.extra": zeros(2)}, [r"unmapped: model\.extra, shape \[2\]"]),
        ({f"{TOWER}extra": zeros(2)}, ["model.vision_tower.vision_tower.vision_model.: unmapped: extra"]),
        ({"model.vision_tower.vision_tower.other.x": zeros(2)}, ["unmapped: model.vision_tower.vision_tower.other.x"]),
        ({"model.mm_projector.4.weight": zeros(8, 8)}, ["model.mm_projector.: unmapped: 4.weight"]),
        ({"model.mm_projector.0.bias": zeros(9)}, [r"model.mm_projector.: wrong shape: 0.bias, expected \[8\]"]),
        ({EMBEDDING: with_value((11, 8), np.nan)}, [f"{EMBEDDING} holds values that are not finite"]),
        ({EMBEDDING: with_value((11, 8), -np.inf, np.float16)}, [f"{EMBEDDING} holds values that are not finite"]),
        ({EMBEDDING: with_value((11, 8), np.inf, ml_dtypes.bfloat16)}, [f"{EMBEDDING} holds values that are not fin"]),
        ({EMBEDDING: zeros(11, 8, dtype=np.int8)}, [f"{EMBEDDING} has dtype I8; F32, F16, BF16 are read"]),
        ({EMBEDDING: zeros(11, 8, dtype=np.float64)}, [f"{EMBEDDING} has dtype F64; F32, F16, BF16 are read"]),
        ({EMBEDDING: zeros(11, 8, dtype=ml_dtypes.float8_e4m3fn)}, [f"{EMBEDDING} has dtype F8_E4M3"]),
        (
            {NORM: zeros(8, dtype=ml_dtypes.float8_e4m3fn), "model.extra": zeros(2)},
            [f"{NORM} has dtype F8_E4M3; BOOL, U8, .* are kept", r"unmapped: model\.extra"],
        ),
        (
            {
                EMBEDDING: zeros(8, 11),
                "model.norm.weight": ABSENT,
                "model.extra": zeros(1),
                "lm_head.weight": with_value((11, 8), np.nan),
                "model.layers.0.mlp.up_proj.weight": zeros(12, 8, dtype=np.int8),
                f"{TOWER}class_embedding": zeros(9),
                f"{TOWER}embeddings.class_embedding": zeros(7),
                NORM: with_value((8,), np.inf),
            },
            [
                r": 8 problem\(s\)",
                "wrong shape: model.embed_tokens.weight",
                "missing: model.norm.weight",
                "unmapped: model.extra",
                "lm_head.weight holds values that are not finite",
                "up_proj.weight has dtype I8",
                r"wrong shape: embeddings.class_embedding, expected \[8\], found \[7\]",
                r"unmapped: class_embedding, shape \[9\]",
                f"{NORM} holds values that are not finite",
            ],
        ),
    ],
)
def test_tensors(changes, patterns, copy):
    edit_tensors(copy / "model.safetensors", **changes)
    assert_says(refused(copy), f"^{copy}: ", *patterns)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_in_unused_tensors(value, copy, tmp_path):
    """One error names all tensors with values that are not finite, including unused ones."""
    edit_tensors(copy / "model.safetensors", **{NORM: with_value((8,), value), EMBEDDING: with_value((11, 8), value)})
    plan = plan_import([str(copy)])
    with pytest.raises(UserError) as caught:
        write(plan, tmp_path / "out")
    file = copy / "model.safetensors"
    assert_says(str(caught.value), r"2 problem\(s\)", f"{file}: {NORM} holds", f"{file}: {EMBEDDING} holds")
    assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]


def test_more_layers_than_tensors(copy):
    edit_json(copy / "config.json", num_hidden_layers=900)
    assert_says(refused(copy), "the config has 900 layers, more than there are tensors")


def test_a_checkpoint_without_its_language_model(copy):
    save(copy, {k: v for k, v in state_of(copy).items() if k.startswith("model.vision")}, None)
    assert_says(refused(copy), r"the config has 3 layers, more than there are tensors \(0\)")


def test_components_that_do_not_fit_together(tmp_path):
    tower, llm = component(tmp_path / "tower", CLIP), component(tmp_path / "llm", LLAMA)
    adapters = save(tmp_path / "adapters", projector_state([9, 8, 8]), None, "mm_projector")
    message = refused(tower, llm, adapters)
    assert_says(message, rf"{tower} \+ {llm} \+ {adapters}: components do not fit together: projector.in_size is 9")
    save(adapters, projector_state([8, 8, 9]), None, "mm_projector")
    assert_says(refused(tower, llm, adapters), "projector.out_size is 9 but language.hidden_size is 8")


@pytest.mark.parametrize("what", ["llm", "tower", "vae", "adapters", "full and tower", "same folder", "two adapters"])
def test_two_sources_with_the_same_component(what, tmp_path):
    settings = {"llm": LLAMA, "tower": CLIP, "vae": VAE}.get(what)
    name = {"llm": "language", "tower": "vision", "vae": "autoencoder", "full and tower": "vision"}.get(
        what, "projector"
    )
    if what == "full and tower":
        origins = [full(tmp_path), tmp_path / "towers/clip"]
    elif settings:
        origins = [component(tmp_path / str(i), settings) for i in range(2)]
    else:
        origins = [save(tmp_path / str(i), projector_state([2, 2]), None, "mm_projector") for i in range(2)]
        if what == "same folder":
            origins = [origins[0], origins[0]]
        elif what == "two adapters":  # in one folder
            save(origins[0], projector_state([2, 2]), None, "mm_inv_projector")
            origins = origins[:1]
    places = [str(origin) for origin in origins] if len(origins) > 1 else ["mm_projector.safe", "mm_inv_projector.safe"]
    assert_says(refused(*origins), f"{places[0]}.* and .*{places[1]}.* both hold the component {name}; name only one")


# Adapters and the denoiser.


@pytest.fixture(scope="module")
def inverse() -> dict[str, np.ndarray]:
    """Tensors of a small denoiser: two blocks, width 16, 4 tokens of 3 channels, condition 8."""
    config = DenoiserConfig(condition_size=8, latent_size=3, grid=2, width=16, depth=2)
    leaves = flatten(abstract_params(RossConfig(denoiser=config))["denoiser"])
    pieces = expand(table(config), {path: leaf.shape for path, leaf in leaves.items()})
    return scoped({piece.hf_key: np.zeros(piece.shape, np.float32) for piece in pieces}, "denoiser")


NET = "model.mm_inv_projector.net."


@pytest.mark.parametrize(
    "kind, changes, patterns",
    [
        ("denoiser_vit2x", {}, []),
        (None, {}, []),
        ("denoiser_vit3x", {}, ["mm_inv_projector_type 'denoiser_vit3x' has 3 blocks, the checkpoint 2"]),
        ("denoiser_vit02x", {}, ["'denoiser_vit02x' has 02 blocks, the checkpoint 2"]),
        ("denoiser_mlp", {}, ["mm_inv_projector_type 'denoiser_mlp' is not supported; expected denoiser_vitNx"]),
        ("linear", {}, ["mm_inv_projector_type 'linear' is not supported; expected denoiser_vitNx"]),
        (5, {}, ["mm_inv_projector_type is 5, expected a string"]),
        (None, {f"{NET}pos_embed": ABSENT}, ["cannot read the denoiser's sizes off pos_embed missing"]),
        (None, {f"{NET}pos_embed": zeros(4, 16)}, [r"sizes off pos_embed \[4, 16\]"]),
        (None, {f"{NET}pos_embed": zeros(1, 3, 16)}, [r"shape \[1, 3, 16\], expected \[1, a square number, 16\]"]),
        (None, {f"{NET}pos_embed": zeros(1, 4, 8)}, [r"pos_embed has shape \[1, 4, 8\], expected \[1, a square"]),
        (None, {f"{NET}x_embedder.proj.weight": zeros(0, 3, 1, 1)}, [r"x_embedder.proj.weight \[0, 3, 1, 1\]"]),
        (None, {f"{NET}x_embedder.proj.weight": zeros(16, 3, 2, 2)}, [r"wrong shape: x_embedder.proj.weight"]),
        (
            None,
            {f"{NET}x_embedder.proj.weight": zeros(20, 3, 1, 1), f"{NET}pos_embed": zeros(1, 4, 20)},
            ["mm_inv_projector: width 20 is not a multiple of num_heads 16"],
        ),
        (None, {f"{NET}blocks.0.attn.qkv.weight": ABSENT}, ["missing: blocks.0.attn.qkv.weight"]),
        (None, {f"{NET}blocks.7.attn.qkv.weight": zeros(48, 16)}, ["missing: blocks.6.attn.qkv.weight"]),
        (None, {f"{NET}blocks.x.y": zeros(1)}, ["unmapped: blocks.x.y"]),
        (None, {"model.embed_tokens.weight": zeros(1)}, ["model.embed_tokens.weight belongs to no adapter"]),
    ],
)
def test_denoisers(kind, changes, patterns, inverse, tmp_path):
    settings = {"model_type": "ross_llama", "mm_inv_projector_type": kind}
    state = {key: value for key, value in (inverse | changes).items() if value is not ABSENT}
    adapters = save(tmp_path / "adapters", state, settings, "mm_inv_projector")
    if not patterns:
        assert load(plan_import([str(adapters)]))["denoiser"]["position_embedding"].shape == (4, 16)
        return
    assert_says(refused(adapters), *patterns)


def test_another_inverse_projector_is_named(copy):
    """A head of Ross^R, whose keys differ from the denoiser's, is refused with its type."""
    edit_tensors(copy / "model.safetensors", **{"model.mm_inv_projector.0.weight": zeros(3, 8)})
    edit_json(copy / "config.json", mm_inv_projector_type="mlp2x_gelu")
    assert_says(refused(copy), "mm_inv_projector_type 'mlp2x_gelu' is not supported; expected denoiser_vitNx")


def test_an_identity_projector_needs_sizes(copy):
    rest = {key: value for key, value in state_of(copy).items() if ".mm_projector." not in key}
    save(copy, rest, None)
    edit_json(copy / "config.json", mm_projector_type="identity", mm_hidden_size=None)
    assert_says(refused(copy), "mm_hidden_size is missing, expected a whole number")
    edit_json(copy / "config.json", mm_hidden_size=9)
    assert_says(refused(copy), "mm_projector_type 'identity': an identity cannot map 9 features to 8")


def test_a_projector_without_matrices(tmp_path):
    save(tmp_path, {"model.mm_projector.bias": zeros(3)}, None, "mm_projector")
    assert_says(refused(tmp_path), "mm_projector: no weight matrix among its tensors")


def test_the_autoencoder_of_a_full_checkpoint(tmp_path):
    checkpoint = golden("clip_vicuna", tmp_path)
    edit_json(checkpoint / "config.json", mm_pixel_decoder="/home/alice/FLUX/vae")
    assert_says(refused(checkpoint), "mm_pixel_decoder is '/home/alice/FLUX/vae'.*pass --autoencoder DIR")
    vae = tmp_path / "clip_vicuna/vae"
    assert plan_import([str(checkpoint)], autoencoder_folder=vae).problems == []
    edit_json(vae / "config.json", block_out_channels=[8, 16, 24, 32])
    message = refused(checkpoint, autoencoder_folder=vae)
    assert_says(message, r"wrong shape: encoder\.conv_out\.weight, expected \[32, 32, 3, 3\], found \[32, 24, 3, 3\]")
    assert message.count("wrong shape") > 10


# Files.


def test_paths(tmp_path):
    assert_says(refused("/nowhere/at/all"), "/nowhere/at/all: no such folder")
    original = component(tmp_path / "llm", LLAMA)
    assert_says(refused(original / "model.safetensors"), "model.safetensors: is a file; name the folder that holds it")
    assert_says(refused("/nowhere/a", "/nowhere/b"), r"2 problem\(s\)", "/nowhere/a: no such", "/nowhere/b: no such")
    (original / "config.json").unlink()
    assert_says(refused(original), rf"{original}/config\.json: missing or empty; it decides all sizes")
    (tmp_path / "empty").mkdir()
    assert_says(refused(tmp_path / "empty"), "config.json: missing or empty")


def shard(folder: Path) -> list[Path]:
    state = state_of(folder)
    (folder / "model.safetensors").unlink()
    names = [f"model-{i + 1:05d}-of-00003.safetensors" for i in range(3)]
    for i, name in enumerate(names):
        save(folder, {key: state[key] for key in list(state)[i::3]}, None, name.removesuffix(".safetensors"))
    weight_map = {key: names[i % 3] for i, key in enumerate(state)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return [folder / name for name in names]


def test_missing_and_damaged_shards_are_all_named(copy):
    shards = shard(copy)
    shards[0].unlink()
    shards[2].write_bytes(shards[2].read_bytes()[:-1])
    message = refused(copy)
    assert_says(message, "2 problems", rf"{shards[0]}: missing", rf"{shards[2]}: truncated, or .*copy it again")


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", r"truncated, or not a safetensors file \(.*\); download or copy it again"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n",
            "git-lfs pointer, .*run `git lfs pull`",
        ),
        (struct.pack("<Q", 2**60), "not a safetensors file"),
    ],
)
def test_weights_that_are_none(content, message, copy):
    (copy / "model.safetensors").write_bytes(content)
    assert_says(refused(copy), rf"{copy}/model\.safetensors: .*{message}")


def test_no_weights(copy):
    (copy / "model.safetensors").unlink()
    assert_says(refused(copy), f"{copy}: no weights; looked for model.safetensors, ")


class Evil:
    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_malicious_pickles_are_not_executed(tmp_path):
    canary = tmp_path / "canary"
    torch_zip.torch_zip(
        tmp_path / "a/mm_projector.bin", b"", extra={"data.pkl": pickle.dumps(Evil(f"touch {canary}"), 2)}
    )
    message = refused(tmp_path / "a")
    assert_says(message, r"mm_projector\.bin: refused: its pickle names '.*\.system'.*\(nothing was executed\)")
    assert not canary.exists()


def test_weights_that_shrink_while_they_are_read(copy, tmp_path):
    plan = plan_import([str(copy)])
    file = copy / "model.safetensors"
    with file.open("r+b") as handle:
        handle.truncate(file.stat().st_size // 2)
    with pytest.raises(UserError, match=rf"{file}: cannot read the tensor '.*' \("):
        write(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Random damage. Import succeeds or raises a UserError.

VALUES = [None, True, -1, 0, 1, 3, 10**6, 2**40, 1e9, -0.5, float("inf"), "", "x", "8", [], [1], {}, {"a": 1}, [[]]]


def damage_json(generator: random.Random, text: str) -> bytes:
    """Changes values or names of some fields, nested ones included, or some bytes of the text."""
    if generator.random() < 0.15:
        content = bytearray(text.encode())
        for _ in range(generator.randint(1, 3)):
            position = generator.randrange(len(content))
            content[position : position + generator.randint(0, 2)] = bytes([generator.randrange(256)])
        return bytes(content)
    values = json.loads(text)
    for _ in range(generator.randint(1, 2)):
        place = values
        while (inner := [v for v in place.values() if isinstance(v, dict) and v]) and generator.random() < 0.5:
            place = generator.choice(inner)
        if not place:
            break
        name = generator.choice(sorted(place))
        action = generator.random()
        value = place.pop(name)
        if action < 0.75:
            place[name] = generator.choice(VALUES)
        elif action < 0.85:
            place[name + "x"] = value
        elif isinstance(value, int):
            place[name] = value + generator.choice([-1, 1, 7])
    return json.dumps(values).encode()


def ends_well(*origins: Path) -> bool:
    try:
        load(plan_import([str(origin) for origin in origins]))
    except UserError as error:
        assert str(error)
        return False
    return True


FUZZED = [
    LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "head_dim": 4},
    LLAMA | {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 5, "tie_word_embeddings": False},
    {"model_type": "clip", "vision_config": CLIP},
    VAE,
    TINY,
    ROSS | {"image_embed_len": 4, "image_mean": [0.5] * 3, "mm_vision_select_layer": -2, "image_aspect_ratio": "pad"},
]


@pytest.mark.parametrize("settings", FUZZED, ids=["llama", "qwen2", "clip", "vae", "tiny", "ross"])
def test_damaged_settings(settings, tmp_path):
    if "mm_projector_type" in settings:
        folder = full(tmp_path, settings)
    else:
        inner = settings.get("vision_config", settings)
        stem = "diffusion_pytorch_model" if "_class_name" in settings else "model"
        folder = save(tmp_path / "original", component_state(inner), settings, stem)
    assert ends_well(folder)
    text = (folder / "config.json").read_text()
    generator = random.Random(0)
    results = []
    for _ in range(60):
        (folder / "config.json").write_bytes(damage_json(generator, text))
        results.append(ends_well(folder))
    assert 0 < sum(results) < 60  # some settings are accepted, some refused


@pytest.mark.parametrize("kind", ["adapters", "llm"])
def test_damaged_headers(kind, inverse, tmp_path):
    """Headers with damaged shapes, dtypes, names or offsets import or raise a UserError."""
    if kind == "llm":
        folder = component(tmp_path / "original", LLAMA)
    else:
        folder = save(tmp_path / "original", inverse, None, "mm_inv_projector")
    (file,) = folder.glob("*.safetensors")
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header, data = content[8 : 8 + length].decode(), content[8 + length :]
    generator = random.Random(1)
    results = []
    for i in range(60):
        if i % 3:
            damaged = damage_json(generator, header)
        else:  # a tensor's name gets a suffix, another number, or is cut
            names = [name for name in json.loads(header) if name != "__metadata__"]
            old, new = generator.sample(names, 2)
            new = generator.choice([new + "x", re.sub(r"\d+", str(generator.choice([5, 10**12])), old), old[:-3]])
            damaged = header.replace(f'"{old}"', f'"{new}"', 1).encode()
        file.write_bytes(struct.pack("<Q", len(damaged)) + damaged + data)
        results.append(ends_well(folder))
    assert 0 < sum(results) < 60  # some headers are accepted, some refused
