"""Images inside rows of tokens: writes projected images into rows, and reads hidden states at the images' places.

    row      t t t i i i i t t i i i i t         image_start = [3, 9], N = 4

Images are written and read as blocks of N tokens, because an index per token compiles to much larger programs on TPU.
No row reads or writes another row, so a sharded batch needs no communication. JAX's own derivatives compile to many
narrow copies on TPU, so scatter and gather are each other's custom VJP.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def scatter_images(
    embeddings: Float[Array, "batch seq embed"],
    projected: Float[Array, "batch images tokens embed"],
    image_start: Int[Array, "batch images"],
) -> Float[Array, "batch seq embed"]:
    """Writes each image's tokens over its place in the row. An image that does not fit writes nothing.

    Args:
      image_start: index of each image's first token; the row's length if the slot is empty. Images must not overlap.
    """
    return _write(embeddings, projected.astype(embeddings.dtype), image_start)


@jax.custom_vjp
def _write(embeddings: Array, images: Array, image_start: Array) -> Array:
    if images.shape[2] > embeddings.shape[1]:
        return embeddings
    piece = jax.lax.ScatterDimensionNumbers((1, 2), inserted_window_dims=(), scatter_dims_to_operand_dims=(0,))
    write = functools.partial(jax.lax.scatter, dimension_numbers=piece, mode="drop", unique_indices=True)
    return jax.vmap(write)(embeddings, image_start[..., None], images)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def gather_images(
    hidden: Float[Array, "batch seq embed"], image_start: Int[Array, "batch images"], tokens: int
) -> Float[Array, "batch images tokens embed"]:
    """Reads the hidden states at each image's place; zeros for images that `scatter_images` does not write."""
    last = hidden.shape[1] - tokens
    if last < 0:
        return jnp.zeros((*image_start.shape, tokens, hidden.shape[-1]), hidden.dtype)

    def read(row: Array, start: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(row, start, tokens)

    images = jax.vmap(jax.vmap(read, (None, 0)))(hidden, jnp.minimum(image_start, last))
    return jnp.where((image_start <= last)[..., None, None], images, 0)


def _write_forward(embeddings: Array, images: Array, image_start: Array):
    return _write(embeddings, images, image_start), (images, image_start)


def _write_backward(residuals: tuple[Array, Array], gradient: Array):
    images, image_start = residuals
    tokens, length = images.shape[2], gradient.shape[1]
    offset = jnp.arange(length) - image_start[..., None]
    covered = ((offset >= 0) & (offset < tokens) & (image_start <= length - tokens)[..., None]).any(axis=1)
    return jnp.where(covered[..., None], 0, gradient), gather_images(gradient, image_start, tokens), None


def _gather_forward(hidden: Array, image_start: Array, tokens: int):
    return gather_images(hidden, image_start, tokens), (hidden, image_start)


def _gather_backward(tokens: int, residuals: tuple[Array, Array], gradient: Array):
    hidden, image_start = residuals
    return _write(jnp.zeros_like(hidden), gradient, image_start), None


_write.defvjp(_write_forward, _write_backward)
gather_images.defvjp(_gather_forward, _gather_backward)
