"""Checkpoints as other programs leave them: import follows what they say, or tells what is missing."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from ross_jax.data.images import preprocess
from ross_jax.inference.model import load

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="LoRA deltas are not recognised")
def test_lora_deltas_are_named(call, tmp_path):
    """A folder as LLaVA's finetune_lora.sh leaves it: deltas, which must be merged into their base model first."""
    folder = tmp_path / "deltas"
    folder.mkdir()
    shutil.copyfile(GOLDEN / "siglip_qwen2" / "checkpoint" / "config.json", folder / "config.json")
    shutil.copyfile(GOLDEN / "siglip_qwen2" / "llm" / "model.safetensors", folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "non_lora_trainables.bin").write_bytes(b"x")
    status, _, said = call("convert", "import", "--from", folder, "--output", tmp_path / "model")
    said = said.replace(str(tmp_path), "").replace("non_lora_trainables", "")
    assert status == 1
    assert re.search(r"(?i)\blora\b", said) and re.search(r"(?i)\bmerge", said), said


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="nothing is said of the missing vision tower")
@pytest.mark.parametrize("golden", ["clip_vicuna", "siglip_qwen2"])
def test_a_checkpoint_without_its_vision_tower(golden, call, tmp_path):
    """LLaVA-1.5 is published without the weights of its vision tower; config.json only names them."""
    theirs, folder = GOLDEN / golden / "checkpoint", tmp_path / "towerless"
    folder.mkdir()
    absent = ("vision_tower", "pixel", "mm_inv")
    state = load_file(theirs / "model.safetensors")
    save_file(
        {key: value for key, value in state.items() if not any(name in key for name in absent)},
        folder / "model.safetensors",
    )
    config = json.loads((theirs / "config.json").read_text())
    config = {key: value for key, value in config.items() if "inv" not in key and "pixel" not in key}
    config |= {
        "ross_enable": False,
        "model_type": {"ross_qwen2": "llava_qwen", "ross_llama": "llava_llama"}[config["model_type"]],
    }
    (folder / "config.json").write_text(json.dumps(config))
    _, _, said = call("convert", "import", "--from", folder, "--output", tmp_path / "model")
    assert "--from" in said and config["mm_vision_tower"] in said, said


@pytest.mark.parametrize(
    "resample",
    [
        pytest.param(
            Image.Resampling.BILINEAR,
            marks=pytest.mark.xfail(strict=True, raises=AssertionError, reason="every image is resized with bicubic"),
        ),
        Image.Resampling.BICUBIC,
    ],
    ids=["bilinear", "bicubic"],
)
def test_images_are_resized_as_the_processor_says(resample, call, tmp_path):
    """SigLIP 2's processor resizes with the bilinear filter, SigLIP's with the bicubic one."""
    shutil.copytree(GOLDEN / "siglip_qwen2" / "vision_tower", tmp_path / "tower")
    path = tmp_path / "tower" / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"resample": int(resample)}))
    status, _, said = call("convert", "import", "--from", tmp_path / "tower", "--output", tmp_path / "model")
    if status:
        assert "resample" in said
        return
    pixels = np.random.default_rng(0).integers(0, 256, (80, 80, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    settings = load(tmp_path / "model", components=("vision",)).image_config
    np.testing.assert_array_equal(preprocess(image, settings), image.resize((56, 56), resample))
