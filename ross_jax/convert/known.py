"""Published models by hub id, with the settings of their config.json.

A checkpoint that names one of these vision encoders or autoencoders converts offline. Recipes take the sizes of all
models from here.
"""

from typing import Any


def _siglip(**sizes: int) -> dict[str, Any]:
    common = {"model_type": "siglip_vision_model", "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
    return {"architectures": ["SiglipVisionModel"], **common, "num_channels": 3, "attention_dropout": 0.0, **sizes}


def _siglip_so400m(image_size: int, patch_size: int) -> dict[str, Any]:
    sizes = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    return _siglip(**sizes, image_size=image_size, patch_size=patch_size)


def _siglip_base(image_size: int) -> dict[str, Any]:
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    return _siglip(**sizes, image_size=image_size, patch_size=16)


def _siglip_large(image_size: int) -> dict[str, Any]:
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    return _siglip(**sizes, image_size=image_size, patch_size=16)


def _clip(hidden: int, mlp: int, layers: int, heads: int, image_size: int, patch_size: int, projection: int):
    return {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "num_channels": 3,
        "attention_dropout": 0.0,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": image_size,
        "patch_size": patch_size,
        "projection_dim": projection,
    }


def _dinov2(hidden: int, layers: int, heads: int, registers: int = 0) -> dict[str, Any]:
    settings = {
        "architectures": ["Dinov2WithRegistersModel" if registers else "Dinov2Model"],
        "model_type": "dinov2_with_registers" if registers else "dinov2",
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "num_channels": 3,
        "qkv_bias": True,
        "mlp_ratio": 4,
        "use_swiglu_ffn": hidden == 1536,
        "layerscale_value": 1.0,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": 518,
        "patch_size": 14,
    }
    return settings | ({"num_register_tokens": registers} if registers else {})


def _autoencoder(latent: int, quant: bool, scaling: float, shift: float | None = None) -> dict[str, Any]:
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": latent,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "mid_block_add_attention": True,
        "use_quant_conv": quant,
        "use_post_quant_conv": quant,
        "scaling_factor": scaling,
        "shift_factor": shift,
    }


def _tiny_autoencoder(latent: int) -> dict[str, Any]:
    return {
        "_class_name": "AutoencoderTiny",
        "act_fn": "relu",
        "encoder_block_out_channels": [64] * 4,
        "decoder_block_out_channels": [64] * 4,
        "num_encoder_blocks": [1, 3, 3, 3],
        "num_decoder_blocks": [3, 3, 3, 1],
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": latent,
        "latent_magnitude": 3,
        "latent_shift": 0.5,
        "scaling_factor": 1.0,
        "upsampling_scaling_factor": 2,
    }


VISION_TOWERS: dict[str, dict[str, Any]] = {
    "google/siglip-so400m-patch14-384": _siglip_so400m(384, 14),
    "google/siglip-so400m-patch14-224": _siglip_so400m(224, 14),
    "google/siglip2-so400m-patch14-384": _siglip_so400m(384, 14),
    "google/siglip2-so400m-patch14-224": _siglip_so400m(224, 14),
    "google/siglip2-so400m-patch16-256": _siglip_so400m(256, 16),
    "google/siglip2-so400m-patch16-384": _siglip_so400m(384, 16),
    "google/siglip2-so400m-patch16-512": _siglip_so400m(512, 16),
    "google/siglip-base-patch16-224": _siglip_base(224),
    "google/siglip-base-patch16-256": _siglip_base(256),
    "google/siglip-base-patch16-384": _siglip_base(384),
    "google/siglip-base-patch16-512": _siglip_base(512),
    "google/siglip-large-patch16-256": _siglip_large(256),
    "google/siglip-large-patch16-384": _siglip_large(384),
    "openai/clip-vit-large-patch14-336": _clip(1024, 4096, 24, 16, 336, 14, 768),
    "openai/clip-vit-large-patch14": _clip(1024, 4096, 24, 16, 224, 14, 768),
    "openai/clip-vit-base-patch16": _clip(768, 3072, 12, 12, 224, 16, 512),
    "openai/clip-vit-base-patch32": _clip(768, 3072, 12, 12, 224, 32, 512),
    "facebook/dinov2-small": _dinov2(384, 12, 6),
    "facebook/dinov2-base": _dinov2(768, 12, 12),
    "facebook/dinov2-large": _dinov2(1024, 24, 16),
    "facebook/dinov2-giant": _dinov2(1536, 40, 24),
    "facebook/dinov2-with-registers-small": _dinov2(384, 12, 6, 4),
    "facebook/dinov2-with-registers-base": _dinov2(768, 12, 12, 4),
    "facebook/dinov2-with-registers-large": _dinov2(1024, 24, 16, 4),
    "facebook/dinov2-with-registers-giant": _dinov2(1536, 40, 24, 4),
}
"""Hub id -> config.json of the vision encoder, without the text model that SigLIP and CLIP come with."""


def published_resample(hub_id: Any) -> int:
    """The resampling filter of a published tower's processor: SigLIP 2's is bilinear (2), the others' bicubic (3)."""
    return 2 if isinstance(hub_id, str) and hub_id.startswith("google/siglip2-") else 3


_FLUX = _autoencoder(16, False, 0.3611, 0.1159)
AUTOENCODERS: dict[str, dict[str, Any]] = {
    "black-forest-labs/FLUX.1-dev": _FLUX,
    "black-forest-labs/FLUX.1-schnell": _FLUX,
    "black-forest-labs/FLUX.1-dev/vae": _FLUX,
    "black-forest-labs/FLUX.1-schnell/vae": _FLUX,
    "stabilityai/sd-vae-ft-mse": _autoencoder(4, True, 0.18215),
    "stabilityai/sd-vae-ft-ema": _autoencoder(4, True, 0.18215),
    "stabilityai/sdxl-vae": _autoencoder(4, True, 0.13025),
    "madebyollin/taesd": _tiny_autoencoder(4),
    "madebyollin/taesdxl": _tiny_autoencoder(4),
    "madebyollin/taesd3": _tiny_autoencoder(16),
    "madebyollin/taef1": _tiny_autoencoder(16),
}
"""Hub id -> config.json of the autoencoder."""


def _llama(hidden: int, mlp: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 4096,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
        **more,
    }


def _qwen(kind: str, hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    names = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
    own = {"head_dim": 128, "max_position_embeddings": 40960} if kind == "qwen3" else {}
    sizes = _llama(hidden, mlp, layers, heads, num_key_value_heads=kv_heads, rope_theta=1000000.0)
    return sizes | {
        "architectures": [names[kind]],
        "model_type": kind,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
        **own,
        **more,
    }


def _llama3(hidden: int, mlp: int, layers: int, heads: int, factor: float | None = None, **more: Any) -> dict[str, Any]:
    scaling: dict[str, Any] = {}
    if factor is not None:
        bands = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        scaling = {"rope_scaling": {"rope_type": "llama3", "factor": factor, **bands}}
    common = {"num_key_value_heads": 8, "rope_theta": 500000.0, "vocab_size": 128256}
    return _llama(hidden, mlp, layers, heads, **common, **scaling, **more)


_UNTIED = {"vocab_size": 152064, "tie_word_embeddings": False}
_LONG = {"max_position_embeddings": 131072}
LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2-7B-Instruct": _qwen("qwen2", 3584, 18944, 28, 28, 4, **_UNTIED),
    "Qwen/Qwen2.5-0.5B-Instruct": _qwen("qwen2", 896, 4864, 24, 14, 2),
    "Qwen/Qwen2.5-1.5B-Instruct": _qwen("qwen2", 1536, 8960, 28, 12, 2),
    "Qwen/Qwen2.5-3B-Instruct": _qwen("qwen2", 2048, 11008, 36, 16, 2),
    "Qwen/Qwen2.5-7B-Instruct": _qwen("qwen2", 3584, 18944, 28, 28, 4, **_UNTIED),
    "Qwen/Qwen3-0.6B": _qwen("qwen3", 1024, 3072, 28, 16, 8),
    "Qwen/Qwen3-1.7B": _qwen("qwen3", 2048, 6144, 28, 16, 8),
    "Qwen/Qwen3-4B": _qwen("qwen3", 2560, 9728, 36, 32, 8),
    "Qwen/Qwen3-8B": _qwen("qwen3", 4096, 12288, 36, 32, 8, tie_word_embeddings=False),
    "lmsys/vicuna-7b-v1.5": _llama(4096, 11008, 32, 32),
    "lmsys/vicuna-13b-v1.5": _llama(5120, 13824, 40, 40),
    "meta-llama/Meta-Llama-3-8B-Instruct": _llama3(4096, 14336, 32, 32, max_position_embeddings=8192),
    "meta-llama/Llama-3.1-8B-Instruct": _llama3(4096, 14336, 32, 32, 8.0, **_LONG),
    "meta-llama/Llama-3.2-1B-Instruct": _llama3(
        2048, 8192, 16, 32, 32.0, head_dim=64, tie_word_embeddings=True, **_LONG
    ),
    "meta-llama/Llama-3.2-3B-Instruct": _llama3(
        3072, 8192, 28, 24, 32.0, head_dim=128, tie_word_embeddings=True, **_LONG
    ),
}
"""Hub id -> config.json of the language model."""
