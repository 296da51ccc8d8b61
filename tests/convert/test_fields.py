"""Every field that transformers writes for the supported families: followed, refused, or known to say nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from convert.foreign import CLIP, DINOV2_REGISTERS, LLAMA, QWEN2, QWEN3, ROSS, SIGLIP, component, full
from ross_jax.config import UserError
from ross_jax.convert import fields
from ross_jax.convert.generation import end_ids
from ross_jax.convert.importing import plan_import
from ross_jax.data.tokenizer import fingerprint, load_tokenizer
from tokenizer_fixtures import CHATML, byte_level_tokenizer, sentencepiece_tokenizer

# Fields that transformers 4.43.1 writes and 5 does not, from its PretrainedConfig, GenerationConfig and processors.
OLD = {
    "config": "torchscript torch_dtype use_bfloat16 tf_legacy_loss pruned_heads is_decoder cross_attention_hidden_size "
    "add_cross_attention tie_encoder_decoder finetuning_task tokenizer_class prefix sep_token_id "
    "decoder_start_token_id task_specific_params",
    "generation": "num_beam_groups forced_decoder_ids return_legacy_cache generation_kwargs max_length use_cache",
    "language": "rope_theta rope_scaling",
    "processor": "_valid_processor_keys feature_extractor_type _processor_class",
    "tokenizer": "split_special_tokens additional_special_tokens tokenizer_file padding_side truncation_side legacy "
    "sp_model_kwargs use_default_system_prompt spaces_between_special_tokens add_bos_token add_eos_token",
}
NEW = {
    "siglip": (fields.VISION, transformers.SiglipVisionConfig, "config"),
    "siglip, whole": (fields.VISION, transformers.SiglipConfig, "config"),
    "clip": (fields.VISION, transformers.CLIPVisionConfig, "config"),
    "clip, whole": (fields.VISION, transformers.CLIPConfig, "config"),
    "dinov2": (fields.VISION, transformers.Dinov2Config, "config"),
    "dinov2 with registers": (fields.VISION, transformers.Dinov2WithRegistersConfig, "config"),
    "qwen2": (fields.LANGUAGE, transformers.Qwen2Config, "config language"),
    "qwen3": (fields.LANGUAGE, transformers.Qwen3Config, "config language"),
    "llama": (fields.LANGUAGE, transformers.LlamaConfig, "config language"),
    "generation": (fields.GENERATION, transformers.GenerationConfig, "generation"),
    "siglip's processor": (fields.PROCESSOR, transformers.SiglipImageProcessor, "processor"),
    "clip's processor": (fields.PROCESSOR, transformers.CLIPImageProcessor, "processor"),
    "dinov2's processor": (fields.PROCESSOR, transformers.BitImageProcessor, "processor"),
}


@pytest.mark.parametrize("name", NEW)
def test_every_field_is_known(name):
    known, cls, old = NEW[name]
    written = set(cls().to_dict()).union(*(OLD[part].split() for part in old.split()))
    assert [field for field in sorted(written) if not known.knows(field)] == []


def test_every_field_of_a_tokenizer_is_known(tmp_path):
    byte_level_tokenizer().save_pretrained(tmp_path)
    written = {*json.loads((tmp_path / "tokenizer_config.json").read_text()), *OLD["tokenizer"].split()}
    assert [field for field in sorted(written) if not fields.TOKENIZER.knows(field)] == []


def other(value: Any) -> Any:
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value * 2 + 1
    return {"str": "other", "list": [], "dict": {"other": 1}}.get(type(value).__name__, 7)


SIZES = {"num_attention_heads", "hidden_size", "image_size", "patch_size"}
SIZES |= {"num_hidden_layers", "num_key_value_heads", "use_sliding_window"}
"""Fields that others depend on: the error may name those."""
WINDOWS = {"sliding_window", "max_window_layers"}
DINOV2_ONLY = {"mlp_ratio", "qkv_bias", "use_swiglu_ffn", "num_register_tokens"}
SMALL = {
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "max_window_layers": 0,
}
MODELS = {
    "llama": (LLAMA | SMALL, fields.LANGUAGE, WINDOWS | {"use_sliding_window"}),
    "qwen2": (QWEN2 | SMALL, fields.LANGUAGE, WINDOWS | {"attention_bias", "mlp_bias"}),
    "qwen3": (QWEN3 | SMALL, fields.LANGUAGE, WINDOWS | {"mlp_bias"}),
    "siglip": (
        SIGLIP,
        fields.VISION,
        DINOV2_ONLY | {"vision_config"},
    ),
    "clip": (CLIP, fields.VISION, DINOV2_ONLY | {"vision_config"}),
    "dinov2": (DINOV2_REGISTERS, fields.VISION, {"intermediate_size", "vision_config"}),
}
"""Model -> its config.json, its fields, and those that are other models' or count only beside others."""


def read(folder: Path, **changes: Any) -> Any:
    """What an import would be after changes of config.json, or the error."""
    path = folder / "config.json"
    before = path.read_text()
    path.write_text(json.dumps({name: v for name, v in (json.loads(before) | changes).items() if v != "absent"}))
    try:
        plan = plan_import([str(folder)])
        plan.close()
        return plan.config, tuple(plan.problems), tuple(plan.notes), end_ids(folder) if plan.config.language else ()
    except UserError as error:
        return str(error)
    finally:
        path.write_text(before)


@pytest.mark.parametrize("name", MODELS)
def test_another_value_of_each_field(name, tmp_path):
    """Changes what is imported, or is refused with the field's name. A field without meaning changes nothing."""
    settings, known, others = MODELS[name]
    component(tmp_path, settings)
    first = read(tmp_path)
    assert not isinstance(first, str) and not first[2]
    rope = {"rope_type": "linear", "factor": 2.0}
    given = {"rope_parameters": rope, "rope_scaling": rope, "layer_types": ["sliding_attention"] * 3}
    for field in sorted(known.read - others):
        found = read(tmp_path, **{field: given.get(field, other(settings.get(field, 1.5)))})
        assert found != first, field
        assert not isinstance(found, str) or field in found or "rope" in field or field in SIZES, (field, found)
    for field, accepted in known.fixed.items():
        found = read(tmp_path, **{field: other(accepted[0])})
        assert isinstance(found, str) and field in found, field
    assert read(tmp_path, **dict.fromkeys(known.irrelevant, "other")) == first
    *_, notes, _ = read(tmp_path, rotary_pct=0.5, nothing=None)
    assert notes == (f"{tmp_path}/config.json: these fields have no effect here: rotary_pct 0.5",)


@pytest.mark.parametrize("name", ["siglip", "clip"])
def test_another_value_of_each_field_of_a_processor(name, tmp_path):
    component(tmp_path, MODELS[name][0])
    path = tmp_path / "preprocessor_config.json"
    crop = {"do_center_crop": True, "crop_size": {"height": 9, "width": 9}, "size": {"shortest_edge": 9}}
    size = crop if name == "clip" else {"size": {"height": 9, "width": 9}}
    good = {
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "resample": 3,
        "rescale_factor": 1 / 255,
    } | size
    good |= size | {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    path.write_text(json.dumps(good))
    first = read(tmp_path)
    assert not isinstance(first, str) and not first[2]
    for field, value in (good | {"image_mean": [0.1] * 3, "image_std": [0.1] * 3, "do_pad": False}).items():
        path.write_text(json.dumps(good | {field: value if field.startswith("image_") else other(value)}))
        found = read(tmp_path)
        assert found != first and (not isinstance(found, str) or f"{path}: {field}" in found), (field, found)
    path.write_text(json.dumps(good | dict.fromkeys(fields.PROCESSOR.irrelevant, "other")))
    assert read(tmp_path) == first
    path.write_text(json.dumps(good | {"resample": 2, "max_num_patches": 256, "unheard_of": 1}))
    assert "max_num_patches 256 is not supported" in read(tmp_path)


def test_settings_of_generation(tmp_path):
    """What would change greedy answers and is not followed is named. Settings of sampling say nothing."""
    component(tmp_path, LLAMA)
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [1, 2], "temperature": 0.7, "do_sample": True, "top_k": 20}))
    assert read(tmp_path)[2:] == ((), (1, 2))
    path.write_text(json.dumps({"repetition_penalty": 1.05, "num_beams": 1}))
    assert read(tmp_path)[2] == (f"{path}: these fields have no effect here: repetition_penalty 1.05",)
    path.write_text(json.dumps({"eos_token_id": "</s>"}))
    assert f"{path}: eos_token_id is '</s>'" in read(tmp_path)


def tokenizer_state(folder: Path) -> Any:
    """What training and inference use of a tokenizer, or the error."""
    try:
        tokenizer = load_tokenizer(folder)
    except UserError as error:
        return str(error)
    text = "A</s>an <zz> cat's"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "an"}], tokenize=False)
    named = tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token, tokenizer.pad_token
    return fingerprint(tokenizer), tokenizer(text).input_ids, chat, named, tokenizer.model_max_length


@pytest.mark.parametrize("cls", ["Qwen2Tokenizer", "LlamaTokenizer"])
def test_another_value_of_each_field_of_a_tokenizer(cls, tmp_path):
    """Changes ids, special tokens, template or length in the family that has the field."""
    (sentencepiece_tokenizer if cls == "LlamaTokenizer" else byte_level_tokenizer)().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    (tmp_path / "chat_template.jinja").unlink()
    names = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
    values = dict.fromkeys(names, "<zz>") | {
        "additional_special_tokens": ["<zz>"],
        "extra_special_tokens": ["<zz>"],
        "model_specific_special_tokens": {"zz": "<zz>"},
        "added_tokens_decoder": {"5": {"content": "<zz>", "special": True}},
        "chat_template": "{{ messages }}",
        "model_max_length": 77,
        "tokenizer_class": "BertTokenizer",
        "legacy": True,
        "add_bos_token": False,
        "add_prefix_space": cls == "Qwen2Tokenizer",
    }
    assert values.keys() == fields.TOKENIZER.read
    base = json.loads(path.read_text()) | {"tokenizer_class": cls, "chat_template": CHATML, "legacy": False}
    base |= {"add_bos_token": True, "add_prefix_space": cls == "LlamaTokenizer"}
    del base["extra_special_tokens"]
    path.write_text(json.dumps(base))
    first = tokenizer_state(tmp_path)
    assert not isinstance(first, str)
    others = {"legacy", "add_bos_token"} if cls == "Qwen2Tokenizer" else set()
    for field, value in values.items():
        path.write_text(json.dumps(base | {field: value}))
        assert (tokenizer_state(tmp_path) != first) == (field not in others), field
    shaped = {
        "padding_side": "left",
        "truncation_side": "left",
        "model_input_names": ["input_ids"],
        "auto_map": {},
        "init_inputs": [],
    }
    for field in fields.TOKENIZER.irrelevant:
        path.write_text(json.dumps(base | {field: shaped.get(field, other(base.get(field, True)))}))
        assert tokenizer_state(tmp_path) == first, field
    for field, value in (("add_eos_token", True), ("sp_model_kwargs", {"enable_sampling": True})):
        component(tmp_path / field, LLAMA)
        (tmp_path / field / "tokenizer_config.json").write_text(json.dumps({field: value}))
        assert f"{field} {value} is not supported" in read(tmp_path / field)


@pytest.mark.parametrize("mode", ["pad", "square", "crop"])
def test_aspect_ratio_both_ways(mode, tmp_path):
    from convert.foreign import import_model
    from ross_jax.checkpoints import write_manifest
    from ross_jax.convert.exporting import export
    from ross_jax.inference.model import load

    checkpoint = full(tmp_path)
    path = checkpoint / "config.json"
    path.write_text(json.dumps(ROSS | {"image_aspect_ratio": mode}))
    model = import_model(tmp_path / "imported", checkpoint)
    assert load(model, ("vision",)).image_config.mode == mode
    manifest = json.loads((model / "ross_jax.json").read_text())
    write_manifest(model, manifest | {"image_mode": "pad"})  # as training with pad writes it
    export(model, tmp_path / "out", "ross")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["image_aspect_ratio"] == "pad"
