"""Import of what transformers saves as LLaVA: the same parameters under every naming, and the same answers."""

import dataclasses
import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convert.foreign import identical, import_model, import_tree, refused, state_of
from parity.test_llava import QUESTIONS, our_ids
from ross_jax import load
from ross_jax.convert.exporting import export, read_config
from ross_jax.convert.importing import plan_import
from ross_jax.data.conversation import V1_SYSTEM
from ross_jax.models.denoiser import DenoiserConfig
from ross_jax.training.run import Run
from ross_jax.tree import flatten, merge
from tiny import CONFIG
from training.test_run import data, make_config  # noqa: F401

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LLAVA_7B = """{"architectures": ["LlavaForConditionalGeneration"], "ignore_index": -100, "image_token_index": 32000,
"model_type": "llava", "pad_token_id": 32001, "projector_hidden_act": "gelu", "text_config": {"_name_or_path":
"lmsys/vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 4096, "model_type": "llama",
"rms_norm_eps": 1e-05, "torch_dtype": "float16", "vocab_size": 32064}, "tie_word_embeddings": false, "torch_dtype":
"float16", "transformers_version": "4.36.0.dev0", "vision_config": {"hidden_size": 1024, "image_size": 336,
"intermediate_size": 4096, "model_type": "clip_vision_model", "num_attention_heads": 16, "num_hidden_layers": 24,
"patch_size": 14, "projection_dim": 768, "vocab_size": 32000}, "vision_feature_layer": -2,
"vision_feature_select_strategy": "default", "vocab_size": 32064}"""
WIDER = {"hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40, "num_hidden_layers": 40}
SIGLIP_26 = {
    **{"hidden_size": 1152, "image_size": 384, "intermediate_size": 4304, "model_type": "siglip_vision_model"},
    **{"num_attention_heads": 16, "num_hidden_layers": 26, "patch_size": 14, "vision_use_head": False},
}
SMALL = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_hidden_layers": 24}
QWEN = {"model_type": "qwen2", "rope_theta": 1000000.0, "vocab_size": 152000}


def published(name: str) -> dict:
    """Settings of a repository of llava-hf. They omit the sizes in which transformers' defaults are meant."""
    settings = json.loads(LLAVA_7B)
    if name == "llava-1.5-7b":
        return settings
    if name == "llava-1.5-13b":
        return settings | {"text_config": settings["text_config"] | WIDER | {"num_key_value_heads": 40}}
    settings |= {"vision_config": SIGLIP_26, "vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    if name == "interleave-0.5b":
        text = QWEN | SMALL | {"num_key_value_heads": 16, "tie_word_embeddings": True}
        return settings | {"text_config": text, "image_token_index": 151646}
    return settings | {"text_config": QWEN | {"intermediate_size": 11008}, "image_token_index": 151646}


def write_headers(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Writes a safetensors file whose zeros take no room on the disk."""
    header, start = {}, 0
    for key, shape in shapes.items():
        end = start + 2 * int(np.prod(shape))
        header[key] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + start)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava-1.5-7b", "llava-1.5-13b", "interleave-0.5b", "interleave-7b"])
def test_published_sizes(name, tmp_path):
    """The tensors that transformers makes of a published config.json are exactly those that import expects."""
    settings = published(name)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig.from_pretrained(tmp_path))
    shapes = {key: tuple(values.shape) for key, values in model.state_dict().items()}
    tied = settings["text_config"].get("tie_word_embeddings", False)
    write_headers(tmp_path, {key: shape for key, shape in shapes.items() if not (tied and key == "lm_head.weight")})
    plan = plan_import([str(tmp_path)])
    plan.close()
    assert not plan.problems
    config = plan.config
    read = sum(len(pieces) for leaves in plan.leaves.values() for pieces in leaves.values())
    assert read + sum(map(len, plan.unused.values())) == len(shapes) - tied
    assert config.vision.layers_used == (26 if "interleave" in name else 23)
    assert config.vision.num_tokens == (729 if "interleave" in name else 576)
    assert config.language.tied_head == tied
    theirs = model.config.text_config
    assert config.language.num_layers == theirs.num_hidden_layers
    assert config.language.num_kv_heads == theirs.num_key_value_heads
    assert config.language.rope_theta == theirs.rope_parameters["rope_theta"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["clip_llama", "siglip_qwen2"])
def test_every_naming(kind, tmp_path):
    """Equal parameters under each naming, transformers' answers, and an export with the bits of the original."""
    from convert.llava_models import make_model, make_processor, save_namings

    theirs, processor = make_model(kind), make_processor(kind)
    folders = save_namings(theirs, tmp_path)
    keys = {name: frozenset(state_of(folder)) for name, folder in folders.items()}
    assert len(set(keys.values())) == 3
    for folder in folders.values():
        processor.save_pretrained(folder)
    processor.image_processor.save_pretrained(folders["loaded"])  # preprocessor_config.json, as transformers 4 writes
    whole = json.loads((folders["loaded"] / "processor_config.json").read_text())
    del whole["image_processor"]
    (folders["loaded"] / "processor_config.json").write_text(json.dumps(whole))
    trees = {name: import_tree(folder) for name, folder in folders.items()}
    first = trees.pop("loaded")
    for tree in trees.values():
        assert tree.keys() == first.keys()
        assert all(identical(tree[path], values) for path, values in first.items())

    model = import_model(tmp_path / "model", folders["in_memory"])
    export(model, tmp_path / "back", "llava", template="v1")
    original, back = state_of(folders["loaded"]), state_of(tmp_path / "back")
    assert original.keys() == back.keys()
    assert all(identical(original[key], values) for key, values in back.items())
    own, again = load(model, template="v1"), load(import_model(tmp_path / "again", tmp_path / "back"))
    assert (again.template, again.image_config) == ("v1", own.image_config)  # told by chat template and processor
    if kind == "clip_llama":
        return  # its answers are those of the golden of this kind
    check_full_checkpoints(model, theirs, first, tmp_path)
    images = [Image.fromarray(x) for x in np.random.default_rng(0).integers(0, 256, (3, 40, 70, 3), np.uint8)]
    answers = our_ids(own, images, QUESTIONS)
    assert len({tuple(ids) for ids in answers}) == len(answers)
    texts = [f"{V1_SYSTEM} USER: <image>\n{question} ASSISTANT:" for question in QUESTIONS]
    inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
    ends = [own.tokenizer.eos_token_id]
    ids = theirs.generate(
        **inputs, do_sample=False, max_new_tokens=12, eos_token_id=ends, pad_token_id=own.tokenizer.pad_token_id
    )
    ids = ids[:, inputs["input_ids"].shape[1] :].tolist()
    assert [row[: row.index(ends[0]) + 1] if ends[0] in row else row for row in ids] == answers


def check_full_checkpoints(model, theirs, parameters, folder: Path) -> None:
    """Readers that take SigLIP's hidden state -2 get the features of its last layer, which transformers selects."""
    pixels = torch.randn(2, 3, 30, 30)
    expected = theirs.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
    for layout, template in (("ross", None), ("original-llava", "v1")):
        export(model, folder / layout, layout, template=template)
        tower = transformers.SiglipVisionModel.from_pretrained(folder / layout / "siglip_vision_tower")
        assert torch.equal(tower(pixels, output_hidden_states=True).hidden_states[-2], expected)
        again = import_tree(folder / layout)
        assert all(identical(again[path], values) for path, values in parameters.items())


REFUSED = {
    "projector_hidden_act": ("relu", "projector_hidden_act 'relu' is not supported; expected 'gelu'"),
    "vision_feature_layer": ([-2, -5], r"vision_feature_layer \[-2, -5\] is not supported; expected one layer of 3"),
    "vision_feature_select_strategy": ("full", "vision_feature_select_strategy 'full' is not supported"),
    "quantization_config": ({"bits": 4}, "quantization_config .* is not supported"),
    "text_config": (
        {"model_type": "mistral"},
        "text_config .*mistral.* is not supported; expected a model_type of",
    ),
    "vision_config": ({"model_type": "pixtral"}, "vision_config .*pixtral.* is not supported"),
}


@pytest.mark.slow
def test_what_cannot_be_read_is_named(tmp_path):
    """Settings that compute something else, images of another size, and tensors of no component."""
    from convert.foreign import assert_says, edit_json, edit_tensors
    from convert.llava_models import make_model, make_processor

    folder = tmp_path / "model"
    make_model("clip_llama").save_pretrained(folder)
    make_processor("clip_llama").save_pretrained(folder)
    for field, (value, message) in REFUSED.items():
        changed = shutil.copytree(folder, tmp_path / field)
        edit_json(changed / "config.json", **{field: value})
        assert_says(refused(changed), message)
    changed = shutil.copytree(folder, tmp_path / "images")
    settings = json.loads((folder / "processor_config.json").read_text())
    settings["image_processor"]["size"] = {"shortest_edge": 30}
    (changed / "processor_config.json").write_text(json.dumps(settings))
    assert_says(
        refused(changed), r"processor_config.json: image_processor: size \{'shortest_edge': 30\} is not supported"
    )
    edit_tensors(folder / "model.safetensors", image_newline=np.zeros(32, np.float32))
    assert_says(refused(folder), "image_newline belongs to no component of LLaVA")


@pytest.mark.slow
def test_a_run_starts_from_it(data, tmp_path):  # noqa: F811
    """A Ross run begins with the imported parameters, trains, and its export is LLaVA again."""
    from convert.llava_models import make_model, make_processor

    make_model("siglip_qwen2").save_pretrained(tmp_path / "foreign")
    make_processor("siglip_qwen2").save_pretrained(tmp_path / "foreign")
    model = import_model(tmp_path / "model", tmp_path / "foreign")
    sizes = dataclasses.replace(
        read_config(model), denoiser=DenoiserConfig(32, 64, 2, 32, 2, num_heads=4), autoencoder=CONFIG.autoencoder
    )
    run = Run(make_config(data, model=sizes, init=(str(model),), image_mode="square"), tmp_path / "run")
    imported, begun = import_tree(tmp_path / "foreign"), flatten(merge(run.state.params, run.state.frozen))
    for path, values in imported.items():
        np.testing.assert_array_equal(np.asarray(begun[path]), values, err_msg=path)
    run.train(stop_at=lambda step: step == 2)  # the first step's learning rate is zero
    export(tmp_path / "run", tmp_path / "back", "llava")
    moved = {
        path for path, values in import_tree(tmp_path / "back").items() if not np.array_equal(values, imported[path])
    }
    assert moved and all(path.startswith(("language/", "projector/")) for path in moved)
