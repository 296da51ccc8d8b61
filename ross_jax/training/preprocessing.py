"""How a recipe's samples become arrays."""

import json
from typing import Any

from ross_jax.config import ConfigError, to_dict
from ross_jax.data.encoders import build_training_encoder
from ross_jax.data.images import decode, decode_official
from ross_jax.data.precomputed import Precomputed
from ross_jax.data.reading import Preprocessing
from ross_jax.training.cached import needs_pixels
from ross_jax.training.recipe import RunConfig


def make_preprocessing(config: RunConfig, tokenizer: Any, cached: Precomputed | None = None) -> Preprocessing:
    """How samples of the run become arrays.

    Args:
      tokenizer: of `config.text`.
      cached: arrays that the run reads for every image.

    Raises:
      UserError: the tokenizer fits neither the template nor the language model.
    """
    model, text = config.model, config.text
    size = max(tokenizer.get_vocab().values()) + 1
    if size > model.language.vocab_size:
        raise ConfigError(
            f"config.text.tokenizer: {size} ids, but the language model embeds {model.language.vocab_size}"
        )
    return Preprocessing(
        build_training_encoder(text.template, tokenizer, text.compat, text_loss=bool(text.weight)),
        config.images,
        model.vision.num_tokens,
        encode_key=json.dumps([to_dict(text), len(tokenizer)]),
        decode=decode_official if text.compat == "official" else decode,
        precomputed=cached,
        pixels=needs_pixels(config, cached.parts if cached else ()),
    )
