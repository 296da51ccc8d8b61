"""Full-size checkpoints with random weights keep their bits through import and export, in bounded memory.

By default Qwen2-7B has four of its layers: the largest tensors, which memory depends on, are all there.
`ROSS_TEST_FULL=1 pytest -m slow -s tests/convert/test_full_size.py` prints the memory table of
`ross_jax/convert/README.md`.
"""

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from ross_jax.convert import known
from ross_jax.convert.autoencoder import autoencoder_config
from ross_jax.convert.importing import SCOPES, TABLES
from ross_jax.convert.language import language_config
from ross_jax.convert.mapping import expand
from ross_jax.convert.safetensors_writer import SafetensorsWriter
from ross_jax.convert.tensors import open_tensors
from ross_jax.convert.vision import vision_config
from ross_jax.models.denoiser import DenoiserConfig
from ross_jax.models.projector import ProjectorConfig
from ross_jax.models.ross import RossConfig, abstract_params
from ross_jax.tree import flatten
from tokenizer_fixtures import byte_level_tokenizer

REPOSITORY = Path(__file__).parents[2]
META = """
import sys, torch, transformers
with torch.device("meta"):
    model, found = transformers.AutoModelForImageTextToText.from_pretrained(
        sys.argv[1], output_loading_info=True, device_map="meta"
    )
print({name: sorted(keys) for name, keys in found.items() if keys}, sum(p.numel() for p in model.parameters()))
"""
TOWER, AUTOENCODER = "google/siglip-so400m-patch14-384", "black-forest-labs/FLUX.1-dev/vae"
WHOLE = "ROSS_TEST_FULL" in os.environ
QWEN2_7B = {
    "model_type": "ross_qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28 if WHOLE else 4,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
}
VICUNA_13B = {
    "model_type": "ross_llama",
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
}
ROSS = {
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "mm_vision_tower": TOWER,
    "mm_vision_select_layer": -2,
    "mm_hidden_size": 1152,
    "mm_projector_type": "mlp2x_gelu",
    "mm_inv_projector_type": "denoiser_vit3x",
    "mm_pixel_decoder": AUTOENCODER,
    "image_embed_len": 729,
    "decode_image_size": 432,
}


def shapes(settings: dict) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the full checkpoint, with unused tensors."""
    family = settings["model_type"].removeprefix("ross_")
    language = language_config(family, settings, "config.json")
    tower = vision_config(known.VISION_TOWERS[TOWER], "tower")
    object.__setattr__(tower, "select_layer", -1)
    config = RossConfig(
        vision=tower,
        projector=ProjectorConfig("mlp", 1152, language.hidden_size, 2),
        language=language,
        denoiser=DenoiserConfig(language.hidden_size, 64, 27, 1024, 3),
        autoencoder=autoencoder_config(known.AUTOENCODERS[AUTOENCODER], "vae"),
    )
    found = {}
    for name, tree in abstract_params(config).items():
        prefix = SCOPES[name] + ("vision_model." if name == "vision" else "")
        table = TABLES[name](getattr(config, name))
        for piece in expand(table, {path: leaf.shape for path, leaf in flatten(tree).items()}):
            found[prefix + piece.hf_key] = piece.shape
    head = SCOPES["vision"] + "vision_model."
    found |= {head + "post_layernorm.weight": (1152,), head + "post_layernorm.bias": (1152,)}
    found |= {head + "head.probe": (1, 1, 1152), head + "head.attention.in_proj_weight": (3456, 1152)}
    return found


def write_checkpoint(folder: Path, settings: dict) -> dict[str, str]:
    """Writes random finite bfloat16 weights, and returns the digest of each tensor."""
    infos = {key: ("BF16", shape) for key, shape in shapes(settings).items()}
    rng, digests = np.random.default_rng(0), {}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(settings))
    with SafetensorsWriter(folder, "model", infos) as writer:
        for key, (_, shape) in infos.items():
            bits = rng.integers(0, 2**16, size=shape, dtype=np.uint16)
            bits &= 0xBFFF  # keeps the exponent below that of infinity
            writer.write(key, bits.view(ml_dtypes.bfloat16))
            digests[key] = hashlib.blake2b(bits.tobytes(), digest_size=16).hexdigest()
    return digests


MEASURED = """
import atexit, runpy, sys
from ross_jax.process import peak_memory
atexit.register(lambda: print(peak_memory()))
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def convert(*args: str) -> float:
    """Runs the launcher, and returns its peak memory in GB."""
    command = [sys.executable, "-c", MEASURED, str(REPOSITORY / "launch" / "convert.py"), *args]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, f"{args} failed: {done.stderr[-2000:]}"
    return int(done.stdout.split()[-1]) / 1e9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "disk", "limit"),
    [pytest.param(QWEN2_7B, 36, 12.0, id="qwen2_7b"), pytest.param(VICUNA_13B, 60, 17.0, id="vicuna_13b")],
)
def test_full_size_round_trip(tmp_path, settings, disk, limit):
    if settings is VICUNA_13B and not WHOLE:
        pytest.skip("set ROSS_TEST_FULL=1 for conversions of all layers (60 GB of disk, some 20 minutes)")
    if shutil.disk_usage(tmp_path).free < disk * 1e9:
        pytest.skip(f"needs {disk} GB of free disk")
    source, model, back = tmp_path / "source", tmp_path / "model", tmp_path / "back"
    digests = write_checkpoint(source, {**ROSS, **settings})
    try:
        importing = convert("import", "--from", str(source), "--output", str(model))
        shutil.rmtree(source)
        exporting = convert("export", "--from", str(model), "--format", "ross", "--output", str(back))
        shutil.rmtree(model)
        print(f"\npeak memory: import {importing:.2f} GB, export {exporting:.2f} GB")
        assert max(importing, exporting) < limit
        with open_tensors(back) as files:
            assert sorted(files) == sorted(digests)
            for key, digest in digests.items():
                assert hashlib.blake2b(files.read(key).tobytes(), digest_size=16).hexdigest() == digest, key
    finally:
        for folder in (source, model, back):
            shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
def test_full_size_llava(tmp_path):
    """An export of SigLIP and Qwen2-7B to transformers' LLaVA needs less than 8 GB; transformers finds every tensor."""
    pytest.importorskip("torch")
    if not WHOLE:
        pytest.skip("set ROSS_TEST_FULL=1 for an export of all layers")
    if shutil.disk_usage(tmp_path).free < 40e9:
        pytest.skip("needs 40 GB of free disk")
    source, model, back = tmp_path / "source", tmp_path / "model", tmp_path / "back"
    digests = write_checkpoint(source, {**ROSS, **QWEN2_7B})
    byte_level_tokenizer().save_pretrained(source)
    try:
        convert("import", "--from", str(source), "--output", str(model))
        shutil.rmtree(source)
        command = ("export", "--from", str(model), "--format", "llava", "--template", "v1", "--output", str(back))
        peak = convert(*command)
        shutil.rmtree(model)
        print(f"\npeak memory: export to LLaVA {peak:.2f} GB")
        assert peak < 8
        done = subprocess.run([sys.executable, "-c", META, str(back)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        expected = sum(map(math.prod, _llava_shapes().values()))
        assert done.stdout.split() == ["{}", str(expected)]
        with open_tensors(back) as files:
            for key, digest in digests.items():
                name = llava_name(key)
                if name is not None:
                    assert hashlib.blake2b(files.read(name).tobytes(), digest_size=16).hexdigest() == digest, key
    finally:
        for folder in (source, model, back):
            shutil.rmtree(folder, ignore_errors=True)


def llava_name(key: str) -> str | None:
    """Name in transformers' LLaVA of a tensor of a full checkpoint; None for one that stays behind."""
    names = {
        SCOPES["vision"] + "vision_model.head": None,
        SCOPES["vision"]: "vision_tower.",
        "model.mm_projector.0": "multi_modal_projector.linear_1",
        "model.mm_projector.2": "multi_modal_projector.linear_2",
        "model.mm_inv": None,
        "model.pixel_decoder": None,
        "": "language_model.",
    }
    begin = next(each for each in names if key.startswith(each))
    return None if names[begin] is None else names[begin] + key.removeprefix(begin)


def _llava_shapes() -> dict[str, tuple[int, ...]]:
    return {key: shape for key, shape in shapes({**ROSS, **QWEN2_7B}).items() if llava_name(key) is not None}
