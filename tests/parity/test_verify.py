"""Verification accepts the goldens and detects each perturbed quantity and weight."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ross_jax.config import UserError
from ross_jax.parity.golden import merge, read_golden
from ross_jax.parity.verify import Verifier, format_table, load_reference
from ross_jax.tree import flatten, unflatten

GOLDEN = Path(__file__).parents[1] / "golden"
RTOL = 1e-4
GROUP_OF = {
    "vision": "vision/",
    "projector": "vision/",
    "language": "vision/",
    "denoiser": "denoiser/",
    "autoencoder": "vae/",
}
"""Component -> the group in which a row must fail if one of its weights changes."""


class Fixture:
    """A golden file, its checkpoint, and the compiled verifier."""

    def __init__(self, name: str):
        self.folder = GOLDEN / name
        self.golden = read_golden(self.folder / "golden.safetensors")
        self.reference, self.params = load_reference(self.folder / "checkpoint", self.golden.facts)
        self.verifier = Verifier(self.reference, self.golden)


@pytest.fixture(scope="module", params=["siglip_qwen2", pytest.param("clip_vicuna", marks=pytest.mark.slow)])
def fixture(request) -> Fixture:
    return Fixture(request.param)


def test_every_quantity_agrees(fixture):
    rows = fixture.verifier.rows(fixture.params, RTOL)
    assert [row for row in rows if row.verdict != "ok"] == []
    outputs = set(fixture.golden.tensors) - fixture.golden.inputs
    assert {row.name for row in rows} == outputs | {f"grad_norms/{name}" for name in fixture.golden.gradient_norms}
    # Recorded inputs are these only, so that no output counts as an input.
    inputs = re.compile(r"inputs/|.*/in/|.*/sample_index|vm/(t|noise|posterior_noise)$|generate/.*/(input_ids|pixel.*)")
    others = {"denoiser/t", "denoiser/x_start", "denoiser/noise", "denoiser/context"}
    others |= {"sample/context", "sample/init_noise", "sample/step_noise"}
    assert [name for name in fixture.golden.inputs if not inputs.match(name) and name not in others] == []


def test_every_perturbed_golden_fails(fixture):
    """Each row fails if one element of each recorded tensor moves by ten tolerances."""
    golden = fixture.golden
    kept, norms = dict(golden.tensors), dict(golden.gradient_norms)
    rng = np.random.default_rng(0)
    valid = {name: mask for group in fixture.verifier.groups.values() for name, mask in group.valid.items()}
    try:
        for name, value in kept.items():
            if name in golden.inputs:
                continue
            moved = value.copy()
            where = np.ones(value.shape, bool)
            if name in valid:
                where = valid[name].reshape(*valid[name].shape, *(1,) * (value.ndim - valid[name].ndim))
                where = np.broadcast_to(where, value.shape)
            index = tuple(rng.choice(np.argwhere(where))) if value.ndim else ()
            step = 1 if value.dtype.kind == "i" else 10 * RTOL * (10 if "clip" in name else np.abs(value).max() or 1)
            moved[index] += step
            golden.tensors[name] = moved
        for name, value in norms.items():
            golden.gradient_norms[name] = value * (1 + 10 * RTOL)
        rows = fixture.verifier.rows(fixture.params, RTOL)
    finally:
        golden.tensors.update(kept)
        golden.gradient_norms.update(norms)
    assert [row.name for row in rows if row.verdict == "ok"] == []


def invisible(fixture: Fixture, path: str) -> bool:
    """Whether the parameter is a bias that cannot affect any output.

    A key's bias adds the same score to every key, which softmax ignores, except in the language model, where rotary
    embedding follows. A bias before a group norm with one channel per group is subtracted again. In the decoder's last
    level this includes biases that are added to a stream that only such norms read.
    """
    if not path.startswith("language") and path.endswith("key/bias"):
        return True
    config = fixture.reference.config.autoencoder
    if config.channels[0] != config.norm_groups:
        return False
    last = len(config.channels) - 1
    before_norm = rf"autoencoder/(encoder/down_0|decoder/up_{last})/resnet_\d/conv1/bias"
    only_normed = rf"autoencoder/decoder/up_{last}/resnet_\d/(conv2|shortcut)/bias"
    return bool(re.fullmatch(f"{before_norm}|{only_normed}", path))


def test_every_perturbed_weight_fails(fixture):
    """A row of the component fails if a used weight of one layer changes by 1 %.

    First all elements change by the same factor. A convolution before a group norm of single channels ignores a common
    factor, so then the signs are random.
    """
    flat, rng = flatten(fixture.params), np.random.default_rng(0)

    def seen(path: str, layer, signs) -> bool:
        moved = flat[path].copy()
        moved[layer] *= 1 + 0.01 * signs
        group = GROUP_OF[path.partition("/")[0]]
        rows = fixture.verifier.rows(unflatten({**flat, path: moved}), RTOL, only=[group])
        return any(row.verdict == "FAIL" for row in rows)

    wrong = []
    for path, leaf in flat.items():
        for layer in range(leaf.shape[0]) if re.search(r"/(layers|blocks)/", path) else [...]:
            signs = rng.choice([-1, 1], size=leaf[layer].shape)
            visible = seen(path, layer, 1) or seen(path, layer, signs)
            if visible == invisible(fixture, path):
                wrong.append((path, layer))
    assert wrong == []


def test_the_last_vision_layer_is_not_used(fixture):
    """Weights above the selected layer change the recorded hidden states only."""
    flat = flatten(fixture.params)
    path = "vision/layers/mlp/down/kernel"
    moved = flat[path].copy()
    moved[fixture.reference.selected :] *= 1.01
    rows = fixture.verifier.rows(unflatten({**flat, path: moved}), RTOL)
    assert [row.name for row in rows if row.verdict == "FAIL"] == ["vision/hidden_states"]


def test_what_is_not_computed_is_not_covered(fixture):
    golden = fixture.golden
    golden.tensors["vision/invented"] = np.zeros(3, np.float32)
    try:
        rows = {row.name: row for row in fixture.verifier.rows(fixture.params, RTOL)}
    finally:
        del golden.tensors["vision/invented"]
    assert rows["vision/invented"].verdict == "not covered"
    assert "1 not covered" in format_table(list(rows.values()))


def test_another_shape_or_nan_fails(fixture):
    golden = fixture.golden
    kept = golden.tensors["llm/logits"], golden.tensors["vision/features"]
    golden.tensors["llm/logits"] = kept[0][:, :-1]
    golden.tensors["vision/features"] = np.full_like(kept[1], np.nan)
    try:
        rows = {row.name: row for row in fixture.verifier.rows(fixture.params, RTOL, only=["vision/"])}
    finally:
        golden.tensors["llm/logits"], golden.tensors["vision/features"] = kept
    assert rows["llm/logits"].verdict == rows["vision/features"].verdict == "FAIL"


def test_merge_of_several_images_and_truncation():
    ids = np.array([[7, -200, 8, -200, 9], [5, 6, 0, 0, 0]])
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    merged = merge(ids, ids, mask, image_tokens=2, max_length=6)
    assert merged.tokens.tolist() == [[7, 0, 0, 8, 0, 0], [5, 6, 0, 0, 0, 0]]
    assert merged.image_start.tolist() == [[1, 4], [6, 6]]
    assert merged.image_rows.tolist() == [[0, 1], [2, 0]]  # the text-only row takes the dummy image, 2
    assert merged.first.tolist() == [1, -1] and merged.last.tolist() == [2, -1]


def launch(*args) -> subprocess.CompletedProcess:
    script = Path(__file__).parents[2] / "launch" / "verify.py"
    return subprocess.run([sys.executable, str(script), *map(str, args)], capture_output=True, text=True, check=False)


def test_launcher_exit_status(tmp_path):
    """The exit status is 0 if a golden file agrees and 1 if not; an error has no traceback."""
    from safetensors.numpy import load_file, save_file

    folder = GOLDEN / "clip_vicuna"
    tensors = load_file(folder / "golden.safetensors")
    part = {name: value for name, value in tensors.items() if name.startswith("denoiser/")}
    save_file(part, tmp_path / "golden.safetensors")
    arguments = ("--checkpoint", folder / "checkpoint", "--golden", tmp_path / "golden.safetensors")
    done = launch(*arguments)
    assert done.returncode == 0, done.stderr
    assert "denoiser/pred_eps" in done.stdout and "0 FAIL, 0 not covered" in done.stdout
    save_file({**part, "denoiser/pred_eps": part["denoiser/pred_eps"] * 1.01}, tmp_path / "golden.safetensors")
    done = launch(*arguments)
    assert done.returncode == 1 and "1 FAIL" in done.stdout
    done = launch("--checkpoint", folder / "checkpoint", "--golden", tmp_path / "absent.safetensors")
    assert done.returncode == 1 and "no such file" in done.stderr and "Traceback" not in done.stderr


def test_golden_that_cannot_be_read(tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="not a safetensors file"):
        read_golden(tmp_path / "bad.safetensors")
    with pytest.raises(UserError, match="has no vision"):
        load_reference(GOLDEN / "clip_vicuna" / "llm", {})
