"""Import and export of DINOv2, and of vision encoders as teachers."""

import json

import ml_dtypes
import numpy as np
import pytest

from convert.foreign import (
    CLIP,
    DINOV2,
    DINOV2_GIANT,
    DINOV2_REGISTERS,
    LLAMA,
    SIGLIP,
    assert_same,
    component,
    component_state,
    files_of,
    full,
    import_model,
    import_tree,
    refused,
    round_trip,
    save,
    state_of,
)
from ross_jax.convert.exporting import export, read_config
from ross_jax.convert.importing import plan_import
from ross_jax.convert.vision import NORMALISATION

ENCODERS = {
    "siglip": SIGLIP,
    "clip": CLIP,
    "dinov2": DINOV2,
    "giant": DINOV2_GIANT,
    "registers": DINOV2_REGISTERS,
    "registers_giant": DINOV2_REGISTERS | {"use_swiglu_ffn": True},
}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", [name for name in ENCODERS if name not in ("siglip", "clip")])
def test_dinov2_comes_back(name, dtype, tmp_path):
    original = component(tmp_path / "original", ENCODERS[name], dtype=dtype)
    assert files_of(round_trip(tmp_path, "components", original) / "vision_tower") == files_of(original)
    # Layers above the selected one, the last norm and the mask token are unused.
    unused = state_of(tmp_path / "imported/unused/vision.safetensors")
    assert {key for key in unused if not key.startswith("encoder.layer.2.")} == {
        "embeddings.mask_token",
        "layernorm.weight",
        "layernorm.bias",
    }


def test_gate_and_input_of_a_gated_mlp(tmp_path):
    """The first half of DINOv2's `weights_in` is the gate, the second half the input."""
    original = component(tmp_path / "original", DINOV2_GIANT)
    tree, state = import_tree(original), component_state(DINOV2_GIANT)
    kernel = state["encoder.layer.1.mlp.weights_in.weight"]
    assert kernel.shape == (32, 8) and tree["vision/layers/mlp/gate_up/kernel"].shape == (2, 8, 2, 16)
    np.testing.assert_array_equal(tree["vision/layers/mlp/gate_up/kernel"][1, :, 0], kernel[:16].T)
    np.testing.assert_array_equal(tree["vision/layers/mlp/gate_up/kernel"][1, :, 1], kernel[16:].T)
    bias = state["encoder.layer.1.mlp.weights_in.bias"]
    np.testing.assert_array_equal(tree["vision/layers/mlp/gate_up/bias"][1], [bias[:16], bias[16:]])


@pytest.mark.parametrize("name", ENCODERS)
def test_a_teacher_comes_back(name, tmp_path):
    """The tree has all layers and the last norm, and the exported folder imports as a teacher."""
    original = component(tmp_path / "original", ENCODERS[name])
    (original / "preprocessor_config.json").write_text('{"image_mean": [1, 2, 3], "image_std": [4, 5, 6]}')
    model = import_model(tmp_path / "model", teacher=str(original))
    export(model, tmp_path / "out", "components")
    assert files_of(tmp_path / "out") == {f"teacher/{path}": data for path, data in files_of(original).items()}
    config = read_config(model)
    assert (config.teacher.layers_used, config.teacher.select_layer) == (3, -1)
    assert (config.teacher_mean, config.teacher_std) == ((1, 2, 3), (4, 5, 6)) and config.vision is None
    tree = import_tree(teacher=str(original))
    assert ("teacher/final_norm/scale" in tree) == config.teacher.final_norm == (name != "clip")
    assert_same(import_tree(teacher=str(tmp_path / "out/teacher")), tree)


@pytest.mark.parametrize("name", ["siglip", "clip", "dinov2"])
def test_a_teacher_beside_the_vision_encoder(name, tmp_path):
    """A teacher and a vision encoder of the same kind stay apart; a full checkpoint leaves the teacher out."""
    checkpoint = full(tmp_path)
    settings = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(settings | {"image_mean": [1, 2, 3], "image_std": [4, 5, 6]}))
    teacher = component(tmp_path / "teacher", ENCODERS[name], seed=5)
    model = import_model(tmp_path / "imported", checkpoint, teacher=str(teacher))
    config, alone = read_config(model), plan_import([str(checkpoint)]).config
    assert (config.vision, config.image_mean, config.image_std) == (alone.vision, (1, 2, 3), (4, 5, 6))
    assert (config.teacher_mean, config.teacher_std) == NORMALISATION[name]
    export(model, tmp_path / "out", "components")
    assert files_of(tmp_path / "out/teacher") == files_of(teacher)
    export(model, tmp_path / "again", "ross", without=["teacher"])
    assert files_of(tmp_path / "again") == files_of(checkpoint)
    # The exported folders give the same model again.
    parts = [tmp_path / "out" / part for part in ("llm", "vision_tower", "adapters")]
    again = import_tree(*parts, teacher=str(tmp_path / "out/teacher"))
    assert_same(again, import_tree(checkpoint, teacher=str(teacher)))


def test_a_teacher_that_is_part_of_a_whole_clip(tmp_path):
    state = component_state(CLIP) | {
        "logit_scale": np.ones((), np.float32),
        "text_model.x.weight": np.ones(2, np.float32),
    }
    original = save(tmp_path / "original", state, {"model_type": "clip", "vision_config": CLIP})
    model = import_model(tmp_path / "model", teacher=str(original))
    export(model, tmp_path / "out", "components")
    assert files_of(tmp_path / "out/teacher") == files_of(original)


def test_what_is_no_teacher(tmp_path):
    llm = component(tmp_path / "llm", LLAMA)
    assert refused(teacher=str(llm)) == (
        f"--teacher {llm}: is a language checkpoint; expected one of SigLIP, CLIP or DINOv2"
    )
    assert refused(llm, teacher=str(tmp_path / "nowhere")) == f"{tmp_path}/nowhere: no such folder"
    state = component_state(DINOV2)
    del state["layernorm.bias"]
    state["encoder.layer.3.norm1.weight"] = state["encoder.layer.0.norm1.weight"]
    original = save(tmp_path / "original", state, DINOV2)
    assert refused(teacher=str(original)) == (
        f"{original}: 2 problem(s)\n  {original}: : missing: layernorm.bias, expected shape [8]\n"
        f"  {original}: : unmapped: encoder.layer.3.norm1.weight, shape [8]"
    )
    # A checkpoint without the last norm is still a vision encoder.
    del state["encoder.layer.3.norm1.weight"]
    assert import_tree(save(tmp_path / "original", state, DINOV2))
