"""A mid-size Ross for benchmarks on a CPU: the default recipe of `launch/bench.py step`.

The layout is that of the full-size recipe, at a tenth of its width: a SigLIP tower, a Qwen2-like language model, FLUX's
autoencoder with fewer channels, and three denoiser blocks with heads of 64 values. The same components train as in the
full-size stage 2. At most half the positions of a row are supervised, and the text loss reads only these. The recipe
reads neither data nor a tokenizer.
"""

from ml_collections import ConfigDict

from ross_jax.config import to_dict
from ross_jax.models.autoencoder import AutoencoderConfig
from ross_jax.models.denoiser import DenoiserConfig
from ross_jax.models.language import LanguageConfig
from ross_jax.models.projector import ProjectorConfig
from ross_jax.models.ross import RossConfig
from ross_jax.models.vision import VisionConfig
from ross_jax.training.recipe import complete

MODEL = RossConfig(
    vision=VisionConfig("siglip", 224, 14, 384, 1536, 7, 6, "gelu_tanh", 1e-6),
    projector=ProjectorConfig("mlp", 384, 512, 2),
    language=LanguageConfig(16384, 512, 1536, 8, 8, 4, 64, 1e6, 1e-6, qkv_bias=True),
    denoiser=DenoiserConfig(512, 64, 16, 256, 3, num_heads=4),
    autoencoder=AutoencoderConfig((32, 64, 128, 128), 2, 16, 32, 0.3611, 0.1159, (False,) * 4, (False,) * 4),
)


def get_config() -> ConfigDict:
    """The recipe as a ConfigDict that command-line flags can override."""
    return complete(
        {
            "model": to_dict(MODEL),
            "text": {"template": "qwen_2", "tokenizer": "none"},
            "data": {
                "sources": [{"path": "none"}],
                "packing": {"length": 1024, "images": 2, "supervised": 512},
                "batch": 4,
            },
            "freeze": {
                "trainable": [r"(language|projector|denoiser)/.*"],
                "dtype": "float32",
                "autoencoder_dtype": "float32",
            },
            "optimizer": {"learning_rate": 1e-4, "warmup_ratio": 0.0},
            "step": {"dtype": "float32", "remat": "full"},
            "mesh": {"data": 1, "fsdp": -1, "tensor": 1},
        }
    )
