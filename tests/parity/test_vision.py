"""Vision encoders equal transformers' `SiglipVisionModel`, `CLIPVisionModel` and `Dinov2Model`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parity.helpers import assert_bfloat16, assert_close, imported, numpy, randomise, torch
from ross_jax.convert import importing
from ross_jax.models.vision import VisionEncoder

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
pytestmark = pytest.mark.parity


@dataclasses.dataclass(frozen=True)
class Tower:
    """Sizes of a torch vision encoder. For DINOv2, `mlp` is the ratio of hidden to model width."""

    kind: str
    image_size: int
    patch_size: int
    layers: int
    heads: int
    width: int
    mlp: int
    activation: str
    eps: float
    swiglu: bool = False
    registers: int = 0

    @property
    def extra(self) -> int:
        """Number of tokens before the patches."""
        return {"siglip": 0, "clip": 1, "dinov2": 1 + self.registers}[self.kind]

    def settings(self) -> dict:
        mlp = {"intermediate_size": self.mlp}
        if self.kind == "dinov2":
            mlp = {"mlp_ratio": self.mlp, "use_swiglu_ffn": self.swiglu}
        return mlp | {
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "hidden_act": self.activation,
            "layer_norm_eps": self.eps,
        }

    def module(self):
        if self.kind == "siglip":
            return randomise(transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**self.settings())))
        if self.kind == "clip":
            return randomise(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**self.settings())))
        if not self.registers:
            return randomise(transformers.Dinov2Model(transformers.Dinov2Config(**self.settings())))
        settings = self.settings() | {"num_register_tokens": self.registers}
        return randomise(transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**settings)))


TOWERS = {
    "siglip_60_14": Tower("siglip", 60, 14, 3, 4, 32, 72, "gelu_pytorch_tanh", 1e-6),
    "siglip_32_16": Tower("siglip", 32, 16, 2, 2, 24, 40, "gelu", 1e-2),
    "siglip_quick": Tower("siglip", 28, 14, 2, 3, 36, 50, "quick_gelu", 1e-6),
    "clip_56_14": Tower("clip", 56, 14, 3, 4, 32, 64, "quick_gelu", 1e-5),
    "clip_50_16": Tower("clip", 50, 16, 2, 2, 40, 24, "gelu", 1e-2),
    "clip_tanh": Tower("clip", 20, 7, 2, 1, 16, 33, "gelu_new", 1e-5),
    "dinov2_60_14": Tower("dinov2", 60, 14, 3, 4, 32, 4, "gelu", 1e-6),
    "dinov2_swiglu_28_14": Tower("dinov2", 28, 14, 3, 2, 20, 3, "gelu", 1e-2, swiglu=True),
    "dinov2_registers": Tower("dinov2", 50, 16, 2, 2, 24, 2, "gelu_new", 1e-6, registers=3),
    "dinov2_registers_swiglu": Tower("dinov2", 33, 8, 2, 3, 24, 4, "gelu", 1e-6, True, 1),
}
SELECTED = [(name, select) for name in TOWERS for select in ((-1, -2, -3, 0, 1) if name.endswith("14") else (-2,))]


def random_images(tower: Tower, batch: int = 2) -> np.ndarray:
    size = tower.image_size
    return np.random.default_rng(1).normal(size=(batch, size, size, 3)).astype(np.float32)


def their_states(module, images: np.ndarray) -> list[np.ndarray]:
    """Input of the first block and output of each block of the torch module, read with hooks."""
    states = []
    layers = module.encoder.layer if hasattr(module.encoder, "layer") else module.encoder.layers
    hooks = [layers[0].register_forward_pre_hook(lambda _, args: states.append(args[0]))]
    hooks += [
        layer.register_forward_hook(lambda _, args, out: states.append(out[0] if isinstance(out, tuple) else out))
        for layer in layers
    ]
    dtype = next(module.parameters()).dtype
    with torch.no_grad():
        module(torch.tensor(images).movedim(-1, 1).to(dtype))
    for hook in hooks:
        hook.remove()
    return [numpy(state) for state in states]


def our_features(config, params, images, **kwargs):
    encoder = VisionEncoder(config, kwargs.pop("dtype", jnp.float32))
    return jax.jit(lambda p, x: encoder.apply({"params": p}, x, **kwargs))(params, jnp.asarray(images))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Function: name -> (sizes, torch module, folder that it was saved to)."""

    @functools.cache
    def save(name: str):
        folder, module = tmp_path_factory.mktemp(name), TOWERS[name].module()
        module.save_pretrained(folder)
        return TOWERS[name], module, folder

    return save


@pytest.mark.parametrize(("name", "select"), SELECTED)
def test_features(saved, name, select):
    sizes, module, folder = saved(name)
    config, params = imported(folder, select_layer=select)
    used = select if select >= 0 else sizes.layers + 1 + select
    assert [leaf.shape[0] for leaf in jax.tree.leaves(params.get("layers", {}))][:1] == [used] * (used > 0)
    images = random_images(sizes)
    theirs = their_states(module, images)
    assert len(theirs) == sizes.layers + 1
    features, states = our_features(config, params, images, hidden_states=True)
    assert_close(features, theirs[select][:, sizes.extra :])
    assert_close(states, np.stack(theirs[: used + 1]))
    assert features.shape[1] == (sizes.image_size // sizes.patch_size) ** 2 == config.num_tokens
    if select == -2:
        np.testing.assert_array_equal(features, our_features(config, params, images))


@pytest.mark.parametrize("name", TOWERS)
def test_hidden_states_are_those_of_transformers(saved, name):
    """transformers' `hidden_states` are the blocks' inputs and outputs, without a final norm."""
    sizes, module, _ = saved(name)
    images = torch.tensor(random_images(sizes)).movedim(-1, 1)
    with torch.no_grad():
        named = module(images, output_hidden_states=True).hidden_states
    assert_close(np.stack([numpy(state) for state in named]), np.stack(their_states(module, random_images(sizes))), 0)


@pytest.mark.parametrize("name", TOWERS)
def test_teacher(saved, name):
    """Features of a teacher are `last_hidden_state`, which for SigLIP and DINOv2 is after the final norm."""
    sizes, module, folder = saved(name)
    plan = importing.plan_import([], teacher=str(folder))
    params = importing.load(plan)["teacher"]
    plan.close()
    config = plan.config.teacher
    assert (config.select_layer, config.final_norm) == (-1, sizes.kind != "clip") == (-1, "final_norm" in params)
    images = random_images(sizes)
    with torch.no_grad():
        theirs = numpy(module(torch.tensor(images).movedim(-1, 1)).last_hidden_state)
    assert_close(our_features(config, params, images), theirs[:, sizes.extra :])
    _, states = our_features(config, params, images, hidden_states=True)
    assert_close(states, np.stack(their_states(module, images)))


@pytest.mark.parametrize("name", ["siglip_60_14", "clip_50_16", "dinov2_60_14", "dinov2_registers_swiglu"])
def test_last_pixels_are_not_seen(saved, name):
    """Pixels beyond the last whole patch do not change the features."""
    sizes, _, folder = saved(name)
    config, params = imported(folder)
    images = random_images(sizes)
    seen = sizes.image_size // sizes.patch_size * sizes.patch_size
    changed = images.copy()
    changed[:, seen:], changed[:, :, seen:] = 9.0, 9.0
    encode = jax.jit(lambda x: VisionEncoder(config).apply({"params": params}, x))
    np.testing.assert_array_equal(encode(images), encode(changed))


@pytest.mark.parametrize("name", ["siglip_60_14", "clip_56_14"])
def test_whole_model(name, tmp_path):
    """A checkpoint with a text encoder gives the vision encoder; its other tensors are kept as unused."""
    sizes = TOWERS[name]
    text = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {
        "vocab_size": 40,
        "max_position_embeddings": 8,
        "projection_size": 16,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    kwargs = {"vision_config": sizes.settings(), "text_config": text}
    if sizes.kind == "siglip":
        module = transformers.SiglipModel(transformers.SiglipConfig(**kwargs))
    else:
        module = transformers.CLIPModel(transformers.CLIPConfig(**kwargs, projection_dim=16))
    randomise(module).save_pretrained(tmp_path)
    keys = set(safetensors.load_file(tmp_path / "model.safetensors"))
    plan = importing.plan_import([str(tmp_path)])
    assert {key for key in keys if not key.startswith("vision_model.")} <= set(plan.unused["vision"])
    config, params = imported(tmp_path)
    theirs = their_states(module.vision_model, random_images(sizes))[-2]
    assert_close(our_features(config, params, random_images(sizes)), theirs[:, sizes.kind == "clip" :])


@pytest.mark.parametrize("prefix", ["", "vision_model."])
@pytest.mark.parametrize("name", ["siglip_60_14", "clip_56_14"])
def test_key_prefix(name, prefix, tmp_path):
    """Keys may start with `vision_model.`, and position ids may be a tensor, as in older transformers."""
    sizes = TOWERS[name]
    module = sizes.module()
    module.save_pretrained(tmp_path)
    weights = safetensors.load_file(tmp_path / "model.safetensors")
    bare = {key.removeprefix("vision_model."): value for key, value in weights.items()}
    bare["embeddings.position_ids"] = torch.arange(len(bare["embeddings.position_embedding.weight"]))[None]
    safetensors.save_file({prefix + key: value for key, value in bare.items()}, tmp_path / "model.safetensors")
    config, params = imported(tmp_path)
    theirs = their_states(module, random_images(sizes))[-2]
    assert_close(our_features(config, params, random_images(sizes)), theirs[:, sizes.kind == "clip" :])


@pytest.mark.parametrize(
    "name", ["siglip_60_14", "clip_56_14", "dinov2_60_14", "dinov2_swiglu_28_14", "dinov2_registers"]
)
def test_bfloat16(name, tmp_path):
    """With bfloat16 weights, float32 results equal torch's, and bfloat16 results are as close to float32 as torch's."""
    sizes, skip = TOWERS[name], TOWERS[name].extra
    module = sizes.module().bfloat16()
    module.save_pretrained(tmp_path)
    config, params = imported(tmp_path)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    images = random_images(sizes, batch=8)
    rounded = their_states(module, images)[-2][:, skip:]
    exact = their_states(module.float(), images)[-2][:, skip:]
    assert_close(our_features(config, params, images), exact)
    ours = our_features(config, params, images, dtype=jnp.bfloat16)
    assert ours.dtype == jnp.bfloat16
    assert_bfloat16(ours, rounded, exact)
