"""Export refuses components that a layout cannot hold, and leaves components out on request."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from convert.foreign import (
    DINOV2,
    GOLDEN,
    LLAMA,
    assert_same,
    component,
    files_of,
    import_model,
    import_tree,
    state_of,
)
from ross_jax import checkpoints
from ross_jax.config import UserError, to_dict
from ross_jax.convert.exporting import export, read_config
from ross_jax.convert.importing import SCOPES
from ross_jax.models.denoiser import DenoiserConfig
from ross_jax.models.regressor import RegressorConfig
from ross_jax.models.ross import RossConfig, abstract_params
from ross_jax.tree import flatten, unflatten

CHECKPOINT = GOLDEN / "siglip_qwen2" / "checkpoint"
INVERSE = {"mm_inv_hidden_size", "mm_inv_projector_lr", "mm_inv_projector_type", "use_mm_inv_proj"}
"""Fields of the golden's config.json that describe its denoiser."""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """An imported golden with a DINOv2 teacher."""
    folder = tmp_path_factory.mktemp("model")
    return import_model(folder / "model", CHECKPOINT, teacher=str(component(folder / "dinov2", DINOV2)))


@pytest.fixture(scope="module")
def regressing(model, tmp_path_factory) -> Path:
    """Model directory of a run that started from `model` and trained a regressor instead of the denoiser."""
    folder, config = tmp_path_factory.mktemp("regressing") / "model", read_config(model)
    shutil.copytree(model / "files", folder / "files")
    shutil.copytree(model / "unused", folder / "unused")
    regressor = RegressorConfig("features", config.language.hidden_size, config.teacher.hidden_size, 5)
    config = dataclasses.replace(config, denoiser=None, regressor=regressor)
    shapes = abstract_params(config)
    tree = checkpoints.restore_model(model, {name: shapes[name] for name in shapes if name != "regressor"})
    tree["regressor"] = unflatten({p: np.ones(x.shape, np.float32) for p, x in flatten(shapes["regressor"]).items()})
    leaves = {
        path: checkpoints.StreamedLeaf(leaf.shape, leaf.dtype, lambda leaf=leaf: iter([(None, leaf)]))
        for path, leaf in flatten(tree).items()
    }
    checkpoints.save_streamed(folder / "params", unflatten(leaves))
    checkpoints.write_manifest(folder, checkpoints.read_manifest(model) | {"config": to_dict(config)})
    return folder


def settings_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def check_ross(exported: Path, left_out: list[str], fields: set[str], enabled: bool) -> None:
    """Checks that an export is the golden without the given components and fields."""
    original, expected = state_of(CHECKPOINT), settings_of(CHECKPOINT)
    scopes = tuple(SCOPES[name] for name in left_out)
    assert_same(state_of(exported), {key: x for key, x in original.items() if not scopes or not key.startswith(scopes)})
    assert fields < set(expected)
    expected = {key: value for key, value in expected.items() if key not in fields}
    assert settings_of(exported) == expected | {"ross_enable": enabled}
    found, golden = files_of(exported), files_of(CHECKPOINT)
    assert found.keys() == golden.keys()
    assert {name for name in found if found[name] != golden[name]} <= {"config.json", "model.safetensors"}


def test_a_teacher_left_out(model, tmp_path):
    export(model, tmp_path / "out", "ross", without=["teacher"])
    assert files_of(tmp_path / "out") == files_of(CHECKPOINT)


def test_a_denoiser_left_out(model, tmp_path):
    export(model, tmp_path / "out", "ross", without=["teacher", "denoiser"])
    check_ross(tmp_path / "out", ["denoiser"], INVERSE, False)


def test_nothing_that_reconstructs(model, tmp_path):
    """Without denoiser and autoencoder the export is a LLaVA checkpoint, and imports as one."""
    export(model, tmp_path / "out", "ross", without=["denoiser", "autoencoder", "teacher"])
    check_ross(tmp_path / "out", ["denoiser", "autoencoder"], INVERSE | {"mm_pixel_decoder"}, False)
    flags = {"vision_tower": CHECKPOINT.parent / "vision_tower"}
    expected = {
        path: leaf
        for path, leaf in import_tree(CHECKPOINT, **flags, autoencoder_folder=CHECKPOINT.parent / "vae").items()
        if not path.startswith(("denoiser/", "autoencoder/"))
    }
    assert_same(import_tree(tmp_path / "out", **flags), expected)


def test_a_regressor_left_out(regressing, tmp_path):
    """Export without the regressor also drops the settings of the denoiser that the regressor replaced."""
    export(regressing, tmp_path / "out", "ross", without=["regressor", "teacher"])
    check_ross(tmp_path / "out", ["denoiser"], INVERSE, False)
    export(regressing, tmp_path / "parts", "components", without=["regressor"])
    folders = sorted(path.name for path in (tmp_path / "parts").iterdir())
    assert folders == ["README.md", "adapters", "llm", "teacher", "vae", "vision_tower"]
    assert sorted(path.name for path in (tmp_path / "parts/adapters").iterdir()) == [
        "SHA256SUMS",
        "config.json",
        "mm_projector.safetensors",
    ]
    assert settings_of(tmp_path / "parts/adapters") == settings_of(tmp_path / "out")


def test_vision_and_projector_left_out(model, tmp_path):
    export(model, tmp_path / "out", "ross", without=["vision", "projector", "denoiser", "autoencoder", "teacher"])
    left = [name for name in settings_of(tmp_path / "out") if name.startswith(("mm_", "use_mm", "image", "decode"))]
    assert left == ["image_aspect_ratio", "mm_patch_merge_type", "mm_use_im_patch_token", "mm_use_im_start_end"]
    assert_same(
        import_tree(tmp_path / "out"), {k: v for k, v in import_tree(CHECKPOINT).items() if k.startswith("language/")}
    )


def test_components_left_out(model, tmp_path):
    export(model, tmp_path / "out", "components", without=["language", "projector", "denoiser", "autoencoder"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "teacher", "vision_tower"]


def refusal(model: Path, output: Path, layout: str, *without: str) -> str:
    with pytest.raises(UserError) as caught:
        export(model, output, layout, without=without)
    assert not output.exists()
    return str(caught.value)


REGRESSOR = "foreign layouts have no place for its regressor; leave it out with --without regressor"
TEACHER = (
    "a full checkpoint has no place for its teacher; use --format components, or leave it out with --without teacher"
)


def test_what_layouts_cannot_hold(model, regressing, tmp_path):
    out = tmp_path / "out"
    assert refusal(model, out, "ross") == f"{model}: {TEACHER}"
    assert refusal(regressing, out, "components") == f"{regressing}: {REGRESSOR}"
    assert refusal(regressing, out, "ross", "teacher") == f"{regressing}: {REGRESSOR}"
    both = refusal(regressing, out, "ross")
    assert both == f"{regressing}: 2 problem(s)\n  {regressing}: {REGRESSOR}\n  {regressing}: {TEACHER}"


def test_the_reference_has_no_dinov2(tmp_path):
    parts = [component(tmp_path / "llm", LLAMA), component(tmp_path / "dinov2", DINOV2)]
    model = import_model(tmp_path / "model", *parts)
    message = f"{model}: the reference has no vision tower dinov2; use --format components"
    assert refusal(model, tmp_path / "out", "ross") == message


@pytest.mark.parametrize("field, value", [("prediction", "v"), ("schedule", "sigmoid"), ("block", "vit")])
def test_denoisers_that_layouts_cannot_describe(field, value, tmp_path):
    config = RossConfig(denoiser=dataclasses.replace(DenoiserConfig(64, 64, 2, 32, 2, num_heads=4), **{field: value}))
    checkpoints.write_manifest(tmp_path, {"config": to_dict(config), "foreign": {}})
    for layout in ("ross", "components"):
        message = refusal(tmp_path, tmp_path / "out", layout)
        assert re.search(rf"denoiser has {field} '{value}', foreign layouts know only .* --without denoiser", message)


def test_names_that_are_none(model, tmp_path):
    have = "projector, denoiser, autoencoder, language, teacher"
    for names, said in {
        ("techer",): "'techer' (did you mean 'teacher'?)",
        ("regressor",): "'regressor'",
        ("teacher", "x", "y"): "'x', 'y'",
    }.items():
        expected = f"--without: {model} has no component {said}; it has vision, {have}"
        assert refusal(model, tmp_path / "out", "ross", *names) == expected
    everything = ["vision", *have.split(", ")]
    message = refusal(model, tmp_path / "out", "components", *everything)
    assert message == f"--without: nothing is left of {model}"
