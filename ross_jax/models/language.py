"""Language models: the Qwen2 / Qwen2.5 / Qwen3 and Llama 2 / 3 / 3.1 (Vicuna) families, one decoder.

Matches transformers' `Qwen2ForCausalLM`, `Qwen3ForCausalLM` and `LlamaForCausalLM`.
"""

import dataclasses
import math
from functools import partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ross_jax.config import Count, Layers, Positive, Size
from ross_jax.models.attention import cached_attention, causal_attention, needs_mask, segment_mask
from ross_jax.models.image_tokens import gather_images
from ross_jax.models.layers import (
    SAVED_ATTENTION,
    SAVED_GATE,
    SAVED_UP,
    Dense,
    RematPolicy,
    gradient_fusion_barrier,
    stack,
    transposed_linear,
)
from ross_jax.sharding import constrain

FINAL = -1
"""Tap that reads the output of the final norm."""


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Stretching of rotary frequencies for long contexts: `linear` (Vicuna 16k) or `llama3` (Llama 3.1)."""

    kind: Literal["linear", "llama3"]
    factor: Positive
    low_freq_factor: Positive = 1.0
    high_freq_factor: Positive = 4.0
    original_max_positions: Count = 8192


@dataclasses.dataclass(frozen=True)
class LanguageConfig:
    """Sizes of a decoder.

    Attributes:
      tied_head: the embedding is also the output head; the parameter tree then has no `head`.
      qk_norm: RMSNorm on each head's queries and keys (Qwen3).
    """

    vocab_size: Count
    hidden_size: Size
    intermediate_size: Size
    num_layers: Layers
    num_heads: Size
    num_kv_heads: Size
    head_dim: Size
    rope_theta: Positive
    norm_eps: Positive
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied_head: bool = False

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary embedding needs pairs")


LayerStates = Float[Array, "layers batch kv_heads slots dim"] | tuple[Float[Array, "1 batch kv_heads slots dim"], ...]
"""Keys or values of all layers. A model whose layers are not stacked has an array for each layer."""


class Cache(NamedTuple):
    """Keys and values of all positions read so far; a pytree of static shapes.

    A row holds one conversation. Slot i holds the conversation's position i; slots from `lengths` on hold nothing.

    Attributes:
      keys, values: rotated keys and values of each layer.
      lengths: number of filled slots of each row.
    """

    keys: LayerStates
    values: LayerStates
    lengths: Int[Array, " batch"]

    @property
    def slots(self) -> int:
        """Positions for which each row has room."""
        return jax.tree.leaves(self.keys)[0].shape[3]


class ImagePlaces(NamedTuple):
    """Places of images in the rows of a batch.

    Attributes:
      start: index of each image's first token; the row's length if the slot is empty.
      tokens: number of tokens of each image.
    """

    start: Int[Array, "batch images"]
    tokens: int


class LanguageOutput(NamedTuple):
    """Output of `LanguageModel`.

    Attributes:
      hidden: output of the final norm, which the output head and reconstruction read.
      cache: keys and values: of the given cache and the new positions, or on request of the new positions alone.
      hidden_states: on request: the input embeddings, then the output of every layer, with `hidden` in place of the
        last layer's output.
      taps: requested tap -> hidden states at the image positions.
    """

    hidden: Float[Array, "batch seq embed"]
    cache: Cache | None
    hidden_states: Float[Array, "states batch seq embed"] | None
    taps: dict[int, Float[Array, "batch images tokens embed"]]


def rotary_frequencies(config: LanguageConfig) -> np.ndarray:
    """Inverse frequencies `[head_dim / 2]` (radians per position) after scaling, float32.

    Rounded at the same steps as in torch: an error in a frequency's last bit rotates pairs at position 1e5 by 1e-2
    radians.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    freqs = 1.0 / np.power(config.rope_theta, exponents, dtype=np.float64).astype(np.float32)
    scaling = config.rope_scaling
    if scaling is None:
        return freqs
    if scaling.kind == "linear":
        return freqs / scaling.factor
    # Llama 3.1 stretches long waves, keeps short waves, and blends between the two.
    wavelengths = 2 * math.pi / freqs
    blend = (scaling.original_max_positions / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blend = np.clip(blend, 0.0, 1.0)
    return (1 - blend) * freqs / scaling.factor + blend * freqs


def rotate(
    x: Float[Array, "batch seq heads dim"],
    cos: Float[Array, "batch seq half"],
    sin: Float[Array, "batch seq half"],
) -> Float[Array, "batch seq heads dim"]:
    """Rotary embedding in float32. Pairs are value i of a head's first half and value i of its second half.

    The halves are swapped by a product with a constant matrix, which is exact. Slices would be slow on TPU, where a
    head's values share a register.
    """
    half = x.shape[-1] // 2
    swap = np.zeros((2, half, 2, half), np.float32)
    swap[0, :, 1], swap[1, :, 0] = np.eye(half), -np.eye(half)
    swap = swap.reshape(2 * half, 2 * half).astype(x.dtype)
    swapped = jnp.matmul(x, swap, precision="highest", preferred_element_type=jnp.float32)
    cos, sin = (jnp.tile(y, 2)[:, :, None] for y in (cos, sin))
    return (x.astype(jnp.float32) * cos + swapped * sin).astype(x.dtype)


class Decoder(nn.Module):
    """One layer: causal self-attention and a gated MLP, both pre-normed."""

    config: LanguageConfig
    dtype: DTypeLike
    collect: bool = False
    taps: tuple[int, ...] = ()
    keep: bool = False
    dropout: float = 0.0
    transposed: bool = False

    @nn.compact
    def __call__(self, carry, layer, cos, sin, segments, mask, lengths):
        """Runs layer number `layer`; returns the carry, and the layer's output and (key, value) as far as requested.

        The carry is a tuple of
          hidden states `[batch, seq, embed]`;
          the cached keys and values of all layers, updated in place, or None without a cache;
          hidden states `[batch, seq, embed]` for each of `taps`: the input of layer number `tap`, once it has run.
        """
        cfg = self.config
        x, keys, values, tapped = carry
        x = constrain(x, "batch")
        # A select in every layer, because splitting the scan at the taps would copy slices of the stacked parameters.
        # It reads the layer's input: beside the output it would slow the product down.
        tapped = tuple(jnp.where(layer == tap, x, held) for tap, held in zip(self.taps, tapped, strict=True))
        y = gradient_fusion_barrier(nn.RMSNorm(cfg.norm_eps, dtype=self.dtype, name="attention_norm")(x))
        query = self._heads(y, cfg.num_heads, "query")
        key = self._heads(y, cfg.num_kv_heads, "key")
        value = self._heads(y, cfg.num_kv_heads, "value")
        if cfg.qk_norm:
            query = nn.RMSNorm(cfg.norm_eps, dtype=self.dtype, name="query_norm")(query)
            key = nn.RMSNorm(cfg.norm_eps, dtype=self.dtype, name="key_norm")(key)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        query, key, value = (checkpoint_name(y, SAVED_ATTENTION) for y in (query, key, value))
        if keys is not None:
            keys, values = _append(keys, key, layer, lengths), _append(values, value, layer, lengths)
            all_keys = jax.lax.dynamic_index_in_dim(keys, layer, keepdims=False)
            all_values = jax.lax.dynamic_index_in_dim(values, layer, keepdims=False)
            y = cached_attention(query, all_keys, all_values, mask)
        else:
            y = causal_attention(query, key, value, segments, mask)
        x = x + self._dense(cfg.hidden_size, cfg.out_bias, "out")(y.reshape(*y.shape[:2], -1))
        y = gradient_fusion_barrier(nn.RMSNorm(cfg.norm_eps, dtype=self.dtype, name="mlp_norm")(x))
        gate = self._dense(cfg.intermediate_size, cfg.mlp_bias, "gate")(y)
        up = self._dense(cfg.intermediate_size, cfg.mlp_bias, "up")(y)
        gate = gradient_fusion_barrier(checkpoint_name(gate, SAVED_GATE))
        up = gradient_fusion_barrier(checkpoint_name(up, SAVED_UP))
        y = nn.silu(gate) * up
        x = x + self._dense(cfg.hidden_size, cfg.mlp_bias, "down")(y)
        return (x, keys, values, tapped), (
            x if self.collect else None,
            (_by_heads(key), _by_heads(value)) if self.keep else None,
        )

    def _dense(self, features: int, bias: bool, name: str) -> Dense:
        settings = {"gathered": True, "transposed": self.transposed, "dropout": self.dropout}
        return Dense(features, bias, self.dtype, nn.initializers.normal(0.02), name=name, **settings)

    def _heads(self, x: Float[Array, "batch seq embed"], heads: int, name: str):
        y = self._dense(heads * self.config.head_dim, self.config.qkv_bias, name)(x)
        return y.reshape(*y.shape[:2], heads, self.config.head_dim)


def _by_heads(states: Float[Array, "batch seq kv_heads dim"]) -> Float[Array, "batch kv_heads seq dim"]:
    """Keys or values as the cache holds them."""
    return states.swapaxes(1, 2)


def _append(states: Array, new: Float[Array, "batch seq kv_heads dim"], layer: Array, lengths: Array) -> Array:
    """Writes a layer's new keys or values into `states: [layers, batch, kv_heads, slots, dim]`, behind `lengths`."""

    def row(states: Array, new: Array, length: Array) -> Array:
        return jax.lax.dynamic_update_slice(states, new[None].astype(states.dtype), (layer, 0, length, 0))

    return jax.vmap(row, in_axes=(1, 0, 0), out_axes=1)(states, _by_heads(new), lengths)


class LanguageModel(nn.Module):
    """Maps token embeddings to hidden states, and hidden states to logits.

    Attributes:
      stacked: parameters of all layers are stacked, and program size does not grow with depth. False: parameters are
        those that `unstack` returns, with which a few tokens are quick on CPU. XLA copies a layer's stacked parameters
        there before it multiplies with them, and reads kernels faster along their inputs.
      dropout: of low-rank updates, as in `models.layers.Dense`.
    """

    config: LanguageConfig
    dtype: DTypeLike = jnp.float32
    remat: RematPolicy = "none"
    stacked: bool = True
    dropout: float = 0.0

    def input_spec(self, batch: int = 1, length: int = 2) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes of the arguments of `__call__`."""
        ids = jax.ShapeDtypeStruct((batch, length), jnp.int32)
        return (jax.ShapeDtypeStruct((batch, length, self.config.hidden_size), jnp.float32), ids, ids)

    def setup(self):
        cfg = self.config
        init = nn.initializers.normal(0.02)
        self.embedding = self.param("embedding", init, (cfg.vocab_size, cfg.hidden_size))
        if not cfg.tied_head:
            shape = (cfg.hidden_size, cfg.vocab_size)
            self.head = self.param("head", init, shape if self.stacked else shape[::-1])
        self.final_norm = nn.RMSNorm(cfg.norm_eps, dtype=self.dtype)

    def embed(self, tokens: Int[Array, "batch seq"]) -> Float[Array, "batch seq embed"]:
        """Embeddings of token ids."""
        # Split by columns first, like the embedding table, so that the table's gradient stays split while it is summed.
        columns = constrain(jnp.take(self.embedding, tokens, axis=0).astype(self.dtype), "replicas", None, "embed")
        return constrain(columns, "batch")

    def logits(self, hidden: Float[Array, "... embed"]) -> Float[Array, "... vocab"]:
        """Next-token scores, float32."""
        if not self.stacked:
            head = self.embedding if self.config.tied_head else self.head
            return transposed_linear(hidden.astype(self.dtype), head.astype(self.dtype)).astype(jnp.float32)
        kernel = self.head_kernel().astype(self.dtype)
        return jnp.matmul(hidden.astype(self.dtype), kernel, preferred_element_type=jnp.float32)

    def head_kernel(self) -> Float[Array, "embed vocab"]:
        """The matrix that `logits` multiplies with, in the parameters' dtype."""
        return self.embedding.T if self.config.tied_head else self.head

    @nn.compact
    def __call__(
        self,
        embeddings: Float[Array, "batch seq embed"],
        positions: Int[Array, "batch seq"],
        segments: Int[Array, "batch seq"],
        cache: Cache | None = None,
        hidden_states: bool = False,
        taps: tuple[int, ...] = (),
        places: ImagePlaces | None = None,
        keep: bool = False,
    ) -> LanguageOutput:
        """Runs the decoder.

        Args:
          embeddings: embeddings of tokens and images.
          positions: rotary position inside the segment.
          segments: conversation number, 0 = padding; attention never crosses segments.
          cache: keys and values of the positions before; the new ones are appended to each row, which must have `seq`
            free slots. Positions of segment 0 stand last in a row, and do not count as filled.
          hidden_states: also return every layer's output.
          taps: numbers of hidden states whose values at the images' places are returned, counted as in transformers'
            `hidden_states`: 0 the embeddings, k the output of k layers, -1 (`FINAL`) the output of the final norm.
          places: places of the images that `taps` read.
          keep: without a cache: also return one that holds the new positions, and has no room for others. Each row is
            one segment, with padding behind it.

        Raises:
          ValueError: the model has no such tap.
        """
        cfg = self.config
        angles = positions[..., None].astype(jnp.float32) * rotary_frequencies(cfg)
        keys = values = lengths = None
        if cache is None:
            mask = segment_mask(segments, segments) if needs_mask() else None
        else:
            keys, values, lengths = cache
            slots = lengths[:, None] + jnp.arange(segments.shape[1])
            mask = (jnp.arange(cache.slots) <= slots[..., None])[:, None]
        x = embeddings.astype(self.dtype)
        numbers = {tap: tap_number(cfg, tap) for tap in taps}
        inner = tuple(sorted({number for number in numbers.values() if 0 < number < cfg.num_layers}))
        constants = (jnp.cos(angles), jnp.sin(angles), segments, mask, lengths)
        tapped = tuple(jnp.zeros_like(x) for _ in inner)
        settings = (cfg, self.dtype, hidden_states, inner, keep, self.dropout)
        if self.stacked:
            layers = stack(Decoder, cfg.num_layers, self.remat, scanned=1, constant=len(constants))
            (x, keys, values, tapped), (states, new) = layers(*settings, name="layers")(
                (x, keys, values, tapped), jnp.arange(cfg.num_layers), *constants
            )
        else:
            x, keys, values, states, new = self._unrolled(x, keys, values, settings, constants)
        hidden = self.final_norm(x)
        found = dict(zip(inner, tapped, strict=True)) | {0: embeddings.astype(self.dtype), cfg.num_layers: hidden}
        count = (segments != 0).sum(1, dtype=jnp.int32)
        if cache is not None:
            cache = Cache(keys, values, lengths + count)
        elif keep:
            cache = Cache(*new, count)
        if hidden_states:
            states = jnp.concatenate([embeddings.astype(self.dtype)[None], states[:-1], hidden[None]])
        start, tokens = places or (None, 0)
        tapped_images = {tap: gather_images(found[number], start, tokens) for tap, number in numbers.items()}
        return LanguageOutput(hidden, cache, states, tapped_images)

    def _unrolled(self, x: Array, keys: Any, values: Any, settings: tuple[Any, ...], constants: tuple[Any, ...]):
        """All layers one after another, each with its own parameters and its own array of the cache; no taps."""
        found, first = [], jnp.zeros((), jnp.int32)
        pairs = [(None, None)] * self.config.num_layers if keys is None else zip(keys, values, strict=True)
        for i, pair in enumerate(pairs):
            layer = Decoder(*settings, transposed=True, name=f"layers_{i}")
            (x, *pair, _), (_, new) = layer((x, *pair, ()), first, *constants)
            found.append((*pair, *(new or (None, None))))
        keys, values, new_keys, new_values = zip(*found, strict=True)
        kept = None if new_keys[0] is None else ([key[None] for key in new_keys], [value[None] for value in new_values])
        return x, keys, values, None, kept and (tuple(kept[0]), tuple(kept[1]))


def unstack(params: dict[str, Any]) -> dict[str, Any]:
    """Parameters of a `LanguageModel` that is not stacked, from those of one that is.

    Layers stand apart, and kernels are transposed.
    """
    layers, rest = params["layers"], {name: leaf for name, leaf in params.items() if name != "layers"}
    if "head" in rest:
        rest["head"] = rest["head"].T

    def pick(i: int, path: tuple[Any, ...], leaf: Array) -> Array:
        return leaf[i].T if jax.tree_util.DictKey("kernel") in path else leaf[i]

    count = jax.tree.leaves(layers)[0].shape[0]
    return rest | {f"layers_{i}": jax.tree_util.tree_map_with_path(partial(pick, i), layers) for i in range(count)}


def tap_number(config: LanguageConfig, tap: int) -> int:
    """The number of a tap's hidden state, from 0 to `num_layers`. Negative taps count from the end.

    Raises:
      ValueError: there is no such hidden state.
    """
    states = config.num_layers + 1
    if not -states <= tap < states:
        raise ValueError(f"tap {tap}: a language model of {config.num_layers} layers has {-states} to {states - 1}")
    return tap % states


def empty_cache(
    config: LanguageConfig, batch: int, slots: int, dtype: DTypeLike = jnp.float32, stacked: bool = True
) -> Cache:
    """A cache with room for `slots` positions in each of `batch` rows."""

    def states(layers: int) -> Array:
        shape = (layers, batch, config.num_kv_heads, slots, config.head_dim)
        return constrain(jnp.zeros(shape, dtype), None, "batch", "heads")

    def all_states() -> LayerStates:
        return states(config.num_layers) if stacked else tuple(states(1) for _ in range(config.num_layers))

    return Cache(all_states(), all_states(), jnp.zeros(batch, jnp.int32))
