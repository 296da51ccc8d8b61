"""Full-size configs have the published numbers of parameters, without allocating arrays."""

import math

import jax
import jax.numpy as jnp
import pytest

from ross_jax.convert.autoencoder import autoencoder_config
from ross_jax.convert.known import AUTOENCODERS, VISION_TOWERS
from ross_jax.convert.language import language_config
from ross_jax.convert.projector import projector_config
from ross_jax.convert.vision import teacher_config, vision_config
from ross_jax.models.denoiser import DenoiserConfig, default_width
from ross_jax.models.language import FINAL
from ross_jax.models.ross import Ross, RossConfig, abstract_params, components


def llama(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, vocab: int, **settings) -> dict:
    return {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
        **settings,
    }


# Family, settings of config.json, and published number of parameters.
LANGUAGE = {
    "Qwen2-7B": ("qwen2", llama(3584, 18944, 28, 28, 4, 152064), 7_615_616_512),
    "Qwen2-0.5B": ("qwen2", llama(896, 4864, 24, 14, 2, 151936, tie_word_embeddings=True), 494_032_768),
    "Qwen2.5-1.5B": ("qwen2", llama(1536, 8960, 28, 12, 2, 151936, tie_word_embeddings=True), 1_543_714_304),
    "Qwen3-8B": ("qwen3", llama(4096, 12288, 36, 32, 8, 151936, head_dim=128), 8_190_735_360),
    "Llama-3-8B": ("llama", llama(4096, 14336, 32, 32, 8, 128256), 8_030_261_248),
    "Vicuna-7B": ("llama", llama(4096, 11008, 32, 32, 32, 32000), 6_738_415_616),
    "Vicuna-13B": ("llama", llama(5120, 13824, 40, 40, 40, 32000), 13_015_864_320),
}
# Published number of parameters of the whole tower. `unused_by_vision` counts those that our tree lacks.
VISION = {
    "google/siglip-so400m-patch14-384": 428_225_600,
    "google/siglip-base-patch16-224": 92_884_224,
    "openai/clip-vit-large-patch14-336": 303_507_456,
    "openai/clip-vit-large-patch14": 303_179_776,
    "facebook/dinov2-small": 22_056_576,
    "facebook/dinov2-base": 86_580_480,
    "facebook/dinov2-large": 304_368_640,
    "facebook/dinov2-giant": 1_136_480_768,
    "facebook/dinov2-with-registers-base": 86_583_552,
}
AUTOENCODER = {
    "black-forest-labs/FLUX.1-dev": 83_819_683,
    "stabilityai/sd-vae-ft-mse": 83_653_863,
    "madebyollin/taesd": 2_445_063,
    "madebyollin/taef1": 2_458_899,
}


def count(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def vision_of(name: str):
    return vision_config(VISION_TOWERS[name], name)


def language_of(name: str):
    family, settings, _ = LANGUAGE[name]
    return language_config(family, settings, name)


def unused_by_vision(settings: dict, teacher: bool = False) -> int:
    """Number of a tower's parameters that our tree lacks.

    SigLIP's pooling head and DINOv2's mask token never run. A vision encoder also lacks its last layer and last norm,
    a CLIP teacher its last norm.
    """
    width, kind = settings["hidden_size"], settings["model_type"].split("_")[0]
    attention = 4 * (width * width + width)
    mlp, matrices = settings.get("intermediate_size", 4 * width), 2
    if settings.get("use_swiglu_ffn"):
        mlp, matrices = 4096, 3
    feed_forward = matrices * width * mlp + (matrices - 1) * mlp + width
    layer = attention + feed_forward + 4 * width + (2 * width if kind == "dinov2" else 0)
    final_norm = 2 * width
    # SigLIP's head: a learned query, attention, a norm and an MLP.
    never = {"siglip": width + attention + 2 * width + feed_forward, "clip": 0, "dinov2": width}[kind]
    if teacher:
        return never + (final_norm if kind == "clip" else 0)
    return never + layer + final_norm


@pytest.mark.parametrize("name", LANGUAGE)
def test_language(name):
    tree = abstract_params(RossConfig(language=language_of(name)))
    assert count(tree["language"]) == LANGUAGE[name][2]
    assert ("head" in tree["language"]) is not LANGUAGE[name][1]["tie_word_embeddings"]


@pytest.mark.parametrize("name", VISION)
def test_vision(name):
    tree = abstract_params(RossConfig(vision=vision_of(name)))
    assert count(tree["vision"]) == VISION[name] - unused_by_vision(VISION_TOWERS[name])


@pytest.mark.parametrize("name", VISION)
def test_teacher(name):
    tree = abstract_params(RossConfig(teacher=teacher_config(VISION_TOWERS[name], name)))
    assert count(tree["teacher"]) == VISION[name] - unused_by_vision(VISION_TOWERS[name], teacher=True)


@pytest.mark.parametrize("name", AUTOENCODER)
def test_autoencoder(name):
    config = RossConfig(autoencoder=autoencoder_config(AUTOENCODERS[name], name))
    assert count(abstract_params(config)["autoencoder"]) == AUTOENCODER[name]


def denoiser_of(condition: int, depth: int) -> DenoiserConfig:
    return DenoiserConfig(condition_size=condition, latent_size=64, grid=27, width=default_width(depth), depth=depth)


def denoiser_parameters(config: DenoiserConfig) -> int:
    def dense(i: int, o: int) -> int:
        return i * o + o

    w = config.width
    block = dense(w, 6 * w) + dense(w, 3 * w) + dense(w, w) + dense(w, 4 * w) + dense(4 * w, w)
    embeddings = 27 * 27 * w + dense(64, w) + dense(config.condition_size, w) + dense(256, w) + dense(w, w)
    return embeddings + config.depth * block + dense(w, 2 * w) + dense(w, 64)


@pytest.mark.parametrize(("depth", "width"), [(3, 1024), (8, 1280), (12, 1536)])
def test_denoiser(depth, width):
    config = denoiser_of(3584, depth)
    assert config.width == width
    assert count(abstract_params(RossConfig(denoiser=config))["denoiser"]) == denoiser_parameters(config)


def ross_7b() -> RossConfig:
    """Config of Ross-Qwen2-7B with all its components."""
    name = "google/siglip-so400m-patch14-384"
    return RossConfig(
        vision=vision_of(name),
        projector=projector_config("mlp2x_gelu", 1152, 3584, ""),
        language=language_of("Qwen2-7B"),
        denoiser=denoiser_of(3584, 3),
        autoencoder=autoencoder_config(AUTOENCODERS["black-forest-labs/FLUX.1-dev"], ""),
    )


def test_whole_model():
    config = ross_7b()
    tree = abstract_params(config, jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype(jnp.bfloat16)}
    name = "google/siglip-so400m-patch14-384"
    assert count(tree["projector"]) == (1152 + 1) * 3584 + (3584 + 1) * 3584
    assert count(tree) == sum(
        (
            VISION[name] - unused_by_vision(VISION_TOWERS[name]),
            count(tree["projector"]),
            LANGUAGE["Qwen2-7B"][2],
            denoiser_parameters(config.denoiser),
            AUTOENCODER["black-forest-labs/FLUX.1-dev"],
        )
    )


def test_input_spec_is_what_modules_take():
    """Each component and the composition accept the arrays that their `input_spec` describes, at full size."""
    config = ross_7b()
    tokens = config.vision.num_tokens
    for name, module in components(config).items():
        for batch in (1, 3):
            spec = module.input_spec(batch)
            output, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), *spec)
            assert jax.tree.leaves(output)[0].shape[0] == batch
            assert count(variables) == count(abstract_params(RossConfig(**{name: getattr(config, name)})))
    ross = Ross(config)
    spec = ross.input_spec(batch=2, images=3)
    output, variables = jax.eval_shape(ross.init_with_output, jax.random.key(0), *spec)
    assert output.hidden.shape == (2, 3 * tokens + 2, 3584)
    assert output.taps[FINAL].shape == (2, 3, tokens, 3584)
    tree = abstract_params(RossConfig(vision=config.vision, projector=config.projector, language=config.language))
    assert jax.tree.map(jnp.shape, dict(variables["params"])) == jax.tree.map(jnp.shape, tree)


@pytest.mark.parity
def test_torch_modules_have_these_sizes():
    """The torch modules, built on the meta device, have the published numbers of parameters."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    diffusers = pytest.importorskip("diffusers")

    def parameters(build) -> int:
        with torch.device("meta"):
            module = build()
        return sum({id(p): p.numel() for p in module.parameters()}.values())

    families = {"qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama"}
    for family, settings, published in LANGUAGE.values():
        config = getattr(transformers, f"{families[family]}Config")(**settings)
        module = getattr(transformers, f"{families[family]}ForCausalLM")
        assert parameters(lambda config=config, module=module: module(config)) == published
    for name, published in VISION.items():
        kind = {"siglip_vision_model": "SiglipVision", "clip_vision_model": "CLIPVision", "dinov2": "Dinov2"}.get(
            VISION_TOWERS[name]["model_type"], "Dinov2WithRegisters"
        )
        config = getattr(transformers, f"{kind}Config")(**VISION_TOWERS[name])
        module = getattr(transformers, f"{kind}Model")
        assert parameters(lambda config=config, module=module: module(config)) == published
    for name, published in AUTOENCODER.items():
        kind = getattr(diffusers, AUTOENCODERS[name]["_class_name"])
        settings = {key: value for key, value in AUTOENCODERS[name].items() if not key.startswith("_")}
        assert parameters(lambda settings=settings, kind=kind: kind(**settings)) == published
