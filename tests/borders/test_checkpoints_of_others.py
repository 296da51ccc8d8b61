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


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4\n"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": LFS, "model.safetensors": LFS}, r"config\.json: .*a git-lfs pointer; run `git lfs pull`"),
        (
            {"tokenizer.json": LFS, "vocab.json": LFS},
            r"pointers, not the files: tokenizer\.json, vocab\.json; run `",
        ),
        ({"ross_jax.json": b"{}"}, "is a model directory of this package already; load it"),
        ({"adapter_config.json": b'{"peft_type": "IA3", "base_model_name_or_path": "a/b"}'}, "IA3 deltas .* model a/b"),
        ({"adapter_model.bin": b"x", "mm_projector.bin": b"x"}, r"holds LoRA deltas \(adapter_model\.bin\)"),
        (
            {"global_step500/mp_rank_00_model_states.pt": b"x", "zero_to_fp32.py": b""},
            "DeepSpeed's shards.*zero_to",
        ),
        ({"__0_0.distcp": b"x"}, r"shards of torch\.distributed.*accelerate merge-weights"),
        ({"consolidated.00.pth": b"x", "params.json": b"{}"}, "in Meta's own layout; convert it"),
        ({"qwen2-q4.gguf": b"x"}, r"quantised weights of llama\.cpp"),
        ({"flax_model.msgpack": b"x"}, r"weights for other programs \(flax_model\.msgpack\)"),
        ({"model.safetensors.part": b"x"}, r"an unfinished download \(model\.safetensors\.part\)"),
        (
            {"checkpoint-10/config.json": b"{}", "checkpoint-20/config.json": b"{}"},
            "one of .*checkpoint-20",
        ),
        ({"snapshots/a1b2/config.json": b"{}", "refs/main": b""}, "name its subfolder: .*snapshots/a1b2"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_a_folder_is(files, message, call, tmp_path):
    """Folders that hold something else than a checkpoint of Hugging Face are named as what they are."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    if "tokenizer.json" in files:
        shutil.copytree(GOLDEN / "siglip_qwen2" / "llm", folder, dirs_exist_ok=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    status, _, said = call("convert", "import", "--from", folder, "--output", tmp_path / "model")
    assert status == 1 and said.startswith(f"error: {folder}") and re.search(message, said), said
    assert not (tmp_path / "model").exists()


def test_unmerged_deltas_inside_the_weights(call, tmp_path):
    folder = shutil.copytree(GOLDEN / "siglip_qwen2" / "llm", tmp_path / "llm")
    state = load_file(folder / "model.safetensors")
    deltas = {f"model.layers.0.self_attn.q_proj.lora_{side}.weight": np.zeros((2, 2), np.float32) for side in "AB"}
    save_file(state | deltas, folder / "model.safetensors")
    status, _, said = call("convert", "import", "--from", folder, "--output", tmp_path / "model")
    assert status == 1 and "unmerged LoRA deltas" in said and "merge" in said


def test_an_archive(call, tmp_path):
    (tmp_path / "llava.tar.gz").write_bytes(b"x")
    status, _, said = call("convert", "import", "--from", tmp_path / "llava.tar.gz", "--output", tmp_path / "model")
    assert status == 1 and said.endswith("is an archive; unpack it, and name the folder that holds config.json\n")


@pytest.mark.parametrize("resample", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC], ids=["bilinear", "bicubic"])
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
