"""Attention: what models call, whatever kernel runs behind it.

The platform of the ambient mesh chooses the kernel, not that of the host: Pallas' splash attention on TPU, cuDNN's on
GPU; elsewhere and without a mesh plain XLA, by blocks.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from ross_jax.models.blockwise import blockwise_attention
from ross_jax.models.image_attention import fits, image_attention
from ross_jax.models.layers import SAVED_ATTENTION
from ross_jax.models.packed_attention import packed_attention
from ross_jax.sharding import partition

SPLASH_BLOCKS = (512, 256, 128)
"""Tile sizes along the sequence; the first that divides its length counts."""
BIDIRECTIONAL = "bidirectional"
"""Name of the scope around splash attention that is not causal: its kernels look the same, and do twice the work."""

ROWS = ("batch", None, "heads")
"""Logical axes of queries, keys and values of packed rows."""


def segment_mask(
    query_segments: Int[Array, "batch queries"],
    key_segments: Int[Array, "batch keys"],
    first_query: int | Int[Array, ""] = 0,
) -> Bool[Array, "batch 1 queries keys"]:
    """Causal attention that never crosses a segment.

    Args:
      query_segments: conversation number of each query; 0 = padding.
      key_segments: the same for each key.
      first_query: index, among the keys, of the first query (the filled length of a cache).
    """
    same = query_segments[:, :, None] == key_segments[:, None, :]
    order = first_query + jnp.arange(query_segments.shape[1])[:, None] >= jnp.arange(key_segments.shape[1])
    return (same & order & (key_segments != 0)[:, None, :])[:, None]


def attention(
    query: Float[Array, "batch queries heads dim"],
    key: Float[Array, "batch keys kv_heads dim"],
    value: Float[Array, "batch keys kv_heads dim"],
    mask: Bool[Array, "#batch 1 queries keys"] | None = None,
    causal: bool = False,
) -> Float[Array, "batch queries heads dim"]:
    """Scaled dot-product attention; scores and softmax in float32, grouped-query heads when `kv_heads < heads`.

    A query that may attend to nothing (padding) yields a finite value that means nothing.

    Args:
      causal: the mask, between the same positions, hides all later ones: a kernel need not look at them.
    """
    length = query.shape[1]
    if mask is None and _platform() == "tpu" and length == key.shape[1] and length >= SPLASH_BLOCKS[-1]:
        return bidirectional_attention(query, key, value)
    if mask is None and _platform() in (None, "cpu"):
        return blockwise_attention(query, key, value)
    if not _fits_cudnn(query):
        return jax.nn.dot_product_attention(query, key, value, mask=mask)
    if length % 2 == key.shape[1] % 2 == 0:
        return jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=causal, implementation="cudnn")
    if mask is not None:
        return jax.nn.dot_product_attention(query, key, value, mask=mask)
    # cuDNN has no gradients of odd lengths: one more key, which nothing attends to.
    padded = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (query, key, value))
    lengths = jnp.full(len(key), key.shape[1], jnp.int32)
    output = jax.nn.dot_product_attention(*padded, key_value_seq_lengths=lengths, implementation="cudnn")
    return output[:, :length]


def causal_attention(
    query: Float[Array, "batch seq heads dim"],
    key: Float[Array, "batch seq kv_heads dim"],
    value: Float[Array, "batch seq kv_heads dim"],
    segments: Int[Array, "batch seq"],
    mask: Bool[Array, "batch 1 seq seq"] | None,
) -> Float[Array, "batch seq heads dim"]:
    """`attention` of packed rows to themselves.

    Args:
      segments: conversation number of each position; 0 = padding.
      mask: their `segment_mask`, made once for all layers; None if `needs_mask` says that no kernel asks for it.
    """
    if mask is not None:
        run = functools.partial(attention, causal=True)
        return checkpoint_name(
            _by_device(run, ROWS, query, key, value, mask), SAVED_ATTENTION
        )  # the others keep it themselves
    if _platform() == "tpu" and query.shape[1] >= SPLASH_BLOCKS[-1]:
        return splash_attention(query, key, value, segments)
    return _by_device(packed_attention, ROWS, query, key, value, segments)


def needs_mask() -> bool:
    """Whether `causal_attention` wants a mask: cuDNN does, the others read the segments."""
    return _platform() in ("gpu", "cuda")


def splash_attention(
    query: Float[Array, "batch seq heads dim"],
    key: Float[Array, "batch seq kv_heads dim"],
    value: Float[Array, "batch seq kv_heads dim"],
    segments: Int[Array, "batch seq"],
    causal: bool = True,
    interpret: bool = False,
) -> Float[Array, "batch seq heads dim"]:
    """Pallas' TPU kernel for attention inside segments; each device computes its rows and heads, or its pictures.

    Lengths that no tile divides are padded by a segment of their own.

    Args:
      segments: as in `causal_attention`. Positions of segment 0 attend to each other here: finite, and without meaning.
      causal: to earlier positions alone; rows are those of a batch. Else they are pictures.
      interpret: runs on any platform, slowly.
    """
    length = query.shape[1]
    padding = -length % SPLASH_BLOCKS[-1]
    arrays = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (query, key, value))
    run = functools.partial(_splash, causal=causal, interpret=interpret)
    axes = ROWS if causal else ("images",)
    return _by_device(run, axes, *arrays, jnp.pad(segments, ((0, 0), (0, padding))))[:, :length]


def bidirectional_attention(
    query: Float[Array, "batch tokens heads dim"],
    key: Float[Array, "batch tokens kv_heads dim"],
    value: Float[Array, "batch tokens kv_heads dim"],
    interpret: bool = False,
) -> Float[Array, "batch tokens heads dim"]:
    """Of all positions to all on TPU: `image_attention` where it fits, else `splash_attention`.

    Args:
      interpret: as in `splash_attention`.
    """
    dtype = query.dtype
    if _platform() == "tpu" and jax.config.jax_default_matmul_precision is None:
        dtype = jnp.bfloat16  # as XLA's products round operands
    if fits(query.shape, key.shape, dtype):
        return _image_attention(query, key, value, dtype, interpret)
    everywhere = jnp.ones(query.shape[:2], jnp.int32)
    rounded = (x.astype(dtype) for x in (query, key, value))
    with jax.named_scope(BIDIRECTIONAL):
        return splash_attention(*rounded, everywhere, causal=False, interpret=interpret).astype(query.dtype)


def _by_device(
    run: Callable[..., Array], axes: tuple[str | None, ...], query: Array, key: Array, value: Array, which: Array
) -> Array:
    """`run`, by each device of the ambient mesh for its part along the logical axes.

    Args:
      which: segments, or a mask, of which a device has those of its rows.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.are_all_axes_manual:
        return run(query, key, value, which)
    queries = partition(query.shape, axes, mesh)
    if partition(key.shape, axes, mesh) != queries:
        # The tensor axis splits the queries' heads but not the fewer ones of the keys.
        key, value = (jnp.repeat(x, query.shape[2] // key.shape[2], axis=2) for x in (key, value))
    specs = (queries, queries, queries, partition(which.shape, axes[:1], mesh))
    return jax.shard_map(run, in_specs=specs, out_specs=queries, check_vma=False)(query, key, value, which)


def _image_attention(query: Array, key: Array, value: Array, dtype: DTypeLike, interpret: bool) -> Array:
    """Each device computes its pictures. What surrounds the kernel sees heads side by side, as projections write them:
    else XLA moves them to rows of their own and back."""
    batch, tokens, heads, dim = query.shape
    flat = [x.reshape(batch, tokens, heads * dim).astype(dtype) for x in (query, key, value)]

    def run(*arrays: Array) -> Array:
        return image_attention(*arrays, dim, interpret)

    mesh = jax.sharding.get_abstract_mesh()
    if not (mesh.empty or mesh.are_all_axes_manual):
        images = partition(flat[0].shape, ("images",), mesh)
        run = jax.shard_map(run, in_specs=images, out_specs=images, check_vma=False)
    return run(*flat).astype(query.dtype).reshape(query.shape)


def _splash(query: Array, key: Array, value: Array, segments: Array, causal: bool, interpret: bool) -> Array:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length, heads, dim = query.shape[1:]
    block = next(block for block in SPLASH_BLOCKS if length % block == 0)
    sizes = dict.fromkeys(
        ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute"), block
    )
    mask = (splash.CausalMask if causal else splash.FullMask)((length, length))
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(**sizes, block_q_dq=block, block_kv_dq=block),
        residual_checkpoint_name=SAVED_ATTENTION,
        interpret=interpret,
    )

    def row(query: Array, key: Array, value: Array, ids: Array) -> Array:
        by_head = (x.swapaxes(0, 1) for x in (query * dim**-0.5, key, value))
        return kernel(*by_head, segment_ids=splash.SegmentIds(ids, ids)).swapaxes(0, 1)

    return jax.vmap(row)(query, key, value, segments)


def _platform() -> str | None:
    """Of the devices of the ambient mesh; None without one."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return None if device is None else device.platform


def _fits_cudnn(query: Array) -> bool:
    """Whether it runs on a GPU, in half precision, with heads of at most 128 values."""
    fits = query.dtype in (jnp.bfloat16, jnp.float16) and query.shape[-1] <= 128 and query.shape[-1] % 8 == 0
    return fits and _platform() in ("gpu", "cuda")
