"""Attention functions that models call. Each one chooses a kernel.

The platform of the ambient mesh decides, not the host's platform:

    tpu                   Pallas' splash attention, or `image_attention`
    gpu                   cuDNN's attention where it fits, else plain XLA
    others, or no mesh    plain XLA, block by block
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
"""Tile sizes along the sequence. The first one that divides the sequence's length is used."""
BIDIRECTIONAL = "bidirectional"
"""Name of the scope around splash attention without a causal mask. `plan.cost` reads the name: the kernels look like
causal ones, but do twice the work."""

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
      key_segments: conversation number of each key; 0 = padding.
      first_query: index, among the keys, of the first query (the filled length of a cache).

    Returns:
      True where a query may attend to a key: same segment, not padding, and no later position.
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

    The output of a query that may attend to nothing (padding) is finite, but has no meaning.

    Args:
      mask: True where a query may attend to a key. None: everywhere.
      causal: promises that queries and keys are the same positions, and that the mask hides every later position. A
        kernel may then skip the later positions.
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
    # cuDNN computes no gradients for odd lengths, so a key is added that no query attends to.
    padded = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (query, key, value))
    lengths = jnp.full(len(key), key.shape[1], jnp.int32)
    output = jax.nn.dot_product_attention(*padded, key_value_seq_lengths=lengths, implementation="cudnn")
    return output[:, :length]


def cached_attention(
    query: Float[Array, "batch queries heads dim"],
    key: Float[Array, "batch kv_heads slots dim"],
    value: Float[Array, "batch kv_heads slots dim"],
    mask: Bool[Array, "#batch 1 queries slots"],
) -> Float[Array, "batch queries heads dim"]:
    """`attention` to a cache, whose slots lie next to each other for each head: nothing of it is copied."""
    grouped = query.reshape(*query.shape[:2], key.shape[1], -1, query.shape[-1])
    scores = jnp.einsum("bqkgd,bksd->bkgqs", grouped, key, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, :, None], scores * query.shape[-1] ** -0.5, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bkgqs,bksd->bqkgd", weights, value).reshape(query.shape)


def causal_attention(
    query: Float[Array, "batch seq heads dim"],
    key: Float[Array, "batch seq kv_heads dim"],
    value: Float[Array, "batch seq kv_heads dim"],
    segments: Int[Array, "batch seq"],
    mask: Bool[Array, "batch 1 seq seq"] | None,
) -> Float[Array, "batch seq heads dim"]:
    """Causal self-attention of packed rows, inside each segment.

    Args:
      segments: conversation number of each position; 0 = padding.
      mask: `segment_mask(segments, segments)`, made once for all layers; None if `needs_mask()` is False.
    """
    if mask is not None:
        run = functools.partial(attention, causal=True)
        # The kernels below name their outputs themselves.
        return checkpoint_name(_by_device(run, ROWS, query, key, value, mask), SAVED_ATTENTION)
    if _platform() == "tpu" and query.shape[1] >= SPLASH_BLOCKS[-1]:
        return splash_attention(query, key, value, segments)
    return _by_device(packed_attention, ROWS, query, key, value, segments)


def needs_mask() -> bool:
    """Whether `causal_attention` needs a mask: cuDNN's kernel does, the other kernels read the segments."""
    return _platform() in ("gpu", "cuda")


def splash_attention(
    query: Float[Array, "batch seq heads dim"],
    key: Float[Array, "batch seq kv_heads dim"],
    value: Float[Array, "batch seq kv_heads dim"],
    segments: Int[Array, "batch seq"],
    causal: bool = True,
    interpret: bool = False,
) -> Float[Array, "batch seq heads dim"]:
    """Pallas' TPU kernel for attention inside segments, on each device for its own share of the batch.

    A length that no tile divides is padded; the padding is a segment of its own.

    Args:
      segments: conversation number of each position; 0 = padding. Padding positions attend to each other: their output
        is finite, but has no meaning.
      causal: True: a position attends to no later position, and the batch is split by rows and heads. False: a position
        attends to its whole segment, and the batch is a batch of images, split by images.
      interpret: interprets the kernel, which is slow but runs on any platform.
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
    """Attention from all positions to all positions, on TPU: `image_attention` where it fits, else `splash_attention`.

    Args:
      interpret: interprets the kernel, which is slow but runs on any platform.
    """
    dtype = query.dtype
    if _platform() == "tpu" and jax.config.jax_default_matmul_precision is None:
        dtype = jnp.bfloat16  # XLA's own products round their operands to it too
    if fits(query.shape, key.shape, dtype):
        return _image_attention(query, key, value, dtype, interpret)
    everywhere = jnp.ones(query.shape[:2], jnp.int32)
    rounded = (x.astype(dtype) for x in (query, key, value))
    with jax.named_scope(BIDIRECTIONAL):
        return splash_attention(*rounded, everywhere, causal=False, interpret=interpret).astype(query.dtype)


def _by_device(
    run: Callable[..., Array], axes: tuple[str | None, ...], query: Array, key: Array, value: Array, visibility: Array
) -> Array:
    """Calls `run(query, key, value, visibility)` on each device of the ambient mesh, on the device's own share.

    Args:
      axes: logical axes that split queries, keys and values.
      visibility: segments or a mask, split by rows only.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.are_all_axes_manual:
        return run(query, key, value, visibility)
    queries = partition(query.shape, axes, mesh)
    if partition(key.shape, axes, mesh) != queries:
        # The mesh's tensor axis divides the number of query heads, but not the smaller number of key heads.
        key, value = (jnp.repeat(x, query.shape[2] // key.shape[2], axis=2) for x in (key, value))
    specs = (queries, queries, queries, partition(visibility.shape, axes[:1], mesh))
    return jax.shard_map(run, in_specs=specs, out_specs=queries, check_vma=False)(query, key, value, visibility)


def _image_attention(query: Array, key: Array, value: Array, dtype: DTypeLike, interpret: bool) -> Array:
    """`image_attention` on each device for its own images.

    The kernel's inputs and outputs are `[batch, tokens, heads * dim]`, as projections write them. With a separate axis
    for the heads, XLA would copy every array to another layout and back.
    """
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
    """Platform of the ambient mesh's devices, as `tpu`; None without a mesh."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return None if device is None else device.platform


def _fits_cudnn(query: Array) -> bool:
    """Whether cuDNN's kernel can be used: on a GPU, in half precision, with heads of at most 128 values."""
    fits = query.dtype in (jnp.bfloat16, jnp.float16) and query.shape[-1] <= 128 and query.shape[-1] % 8 == 0
    return fits and _platform() in ("gpu", "cuda")
