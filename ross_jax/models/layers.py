"""What several models share: norms, activations, and the stacking of identical blocks."""

import functools
from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ross_jax.sharding import gather, scatter

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "silu"]
RematPolicy = Literal["none", "full", "attention", "gate", "mlp", "offload", "dots"]
SAVED_ATTENTION = "attention"
"""Name of what the policies `attention` and `offload` keep: queries, keys, values, and what attention made of them; of
the denoiser also what both branches of a block add, which its gates multiply."""
SAVED_GATE = "gate"
"""Name of what the policies `gate` and `mlp` keep beside that: what an MLP's activation reads."""
SAVED_UP = "up"
"""Name of what the policy `mlp` keeps beside that: what a gated MLP's activation is multiplied with."""

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "silu": jax.nn.silu,
}


def activate(name: Activation, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The activation called `name` (`quick_gelu` is CLIP's)."""
    return _ACTIVATIONS[name](x)


def layer_norm(eps: float, dtype: DTypeLike, *, affine: bool = True, name: str | None = None) -> nn.LayerNorm:
    """LayerNorm with float32 two-pass statistics, as PyTorch computes it."""
    return nn.LayerNorm(eps, dtype=dtype, use_bias=affine, use_scale=affine, use_fast_variance=False, name=name)


ONES = 8
"""Rows of ones that a bias's gradient is multiplied with; of a single one XLA makes a sum."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def linear(
    x: Float[Array, "*batch inputs"],
    kernel: Float[Array, "inputs outputs"],
    bias: Float[Array, " outputs"] | None = None,
    axes: tuple[str | None, ...] = (),
    dtype: DTypeLike | None = None,
) -> Float[Array, "*batch outputs"]:
    """`x @ kernel + bias`, with the gradients that `Dense` describes.

    Args:
      axes: as in `Dense`.
      dtype: of the product if not the operands'.
    """
    return _linear_forward(x, kernel, bias, axes, dtype)[0]


def _linear_forward(x: Array, kernel: Array, bias: Array | None, axes: tuple[str | None, ...], dtype):
    y = jnp.matmul(x, gather(kernel, axes), preferred_element_type=dtype)
    return y if bias is None else y + bias, (x, kernel, bias)  # not the gathered one, which takes memory


def _linear_backward(
    axes: tuple[str | None, ...], dtype, residuals: tuple[Array, Array, Array | None], gradient: Array
):
    x, kernel, bias = residuals
    rows = tuple(range(x.ndim - 1))
    product = functools.partial(jax.lax.dot_general, preferred_element_type=dtype)
    grad_x = product(gradient, gather(kernel, axes), (((x.ndim - 1,), (1,)), ((), ()))).astype(x.dtype)
    if kernel.shape[0] > kernel.shape[1]:
        grad_kernel = product(gradient, x, ((rows, rows), ((), ()))).T
    else:
        grad_kernel = product(x, gradient, ((rows, rows), ((), ())))
    grad_kernel = scatter(grad_kernel.astype(kernel.dtype), axes)
    if bias is None:
        return grad_x, grad_kernel, None
    ones = jax.lax.optimization_barrier(jnp.ones((*gradient.shape[:-1], ONES), gradient.dtype))
    return grad_x, grad_kernel, product(ones, gradient, ((rows, rows), ((), ())))[0].astype(bias.dtype)


linear.defvjp(_linear_forward, _linear_backward)


class Dense(nn.Module):
    """Linen's, with gradients that are computed in another way.

    For the kernel's, whichever factor is narrower is turned round; JAX's own always turns the gradient of the output,
    and XLA takes up to twice as long on a CPU. The bias's, the sum of all rows, is a product too: XLA for TPU sums
    columns at a fourth of its memory's speed, and keeps the rows in float32 for it.

    Attributes:
      axes: logical axes of the kernel, to be gathered before it is multiplied with; without them XLA decides.
      outputs: into how many arrays of equal width the features go, each by a product of its own, which costs less than
        to take the result of one product apart.
    """

    features: int
    use_bias: bool = True
    dtype: DTypeLike = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    axes: tuple[str | None, ...] = ()
    outputs: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "*batch inputs"]):
        """`[*batch, features]`; a list of arrays if there are several outputs."""
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features)).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype) if self.use_bias else None
        x = x.astype(self.dtype)
        if self.outputs == 1:
            return linear(x, kernel, bias, self.axes)
        kernels = jnp.split(kernel, self.outputs, axis=-1)
        biases = jnp.split(bias, self.outputs) if self.use_bias else [None] * self.outputs
        return [linear(x, *each, self.axes) for each in zip(kernels, biases, strict=True)]


@jax.custom_vjp
def fusion_barrier(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x`; neither it nor its gradient is fused with what uses it.

    Next to products in float32. Between that of an MLP and its activation, XLA for TPU otherwise makes one fusion of
    both products, or of a gradient and the bias's; before and after others, of a product and the sums of norms or
    gates. Either takes twice as long.
    """
    return jax.lax.optimization_barrier(x)


fusion_barrier.defvjp(lambda x: (fusion_barrier(x), None), lambda _, gradient: (fusion_barrier(gradient),))


@jax.custom_vjp
def gradient_fusion_barrier(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x`; what computes its gradient is not fused with what uses it.

    Between a norm and a matrix product: XLA for TPU otherwise has the product's gradient also sum up that of the norm's
    scale, and takes twice as long for both.
    """
    return x


gradient_fusion_barrier.defvjp(lambda x: (x, None), lambda _, gradient: (jax.lax.optimization_barrier(gradient),))


class Mlp(nn.Module):
    """Two linear layers with an activation between, as in every transformer block here but the language model's."""

    features: int
    activation: Activation
    dtype: DTypeLike = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Float[Array, "... embed"]) -> Float[Array, "... embed"]:
        width = x.shape[-1]
        x = Dense(self.features, dtype=self.dtype, kernel_init=self.kernel_init, name="up")(x)
        x = activate(self.activation, fusion_barrier(checkpoint_name(x, SAVED_GATE)))
        return Dense(width, dtype=self.dtype, kernel_init=self.kernel_init, name="down")(x)


def stack(block: type[nn.Module], length: int, remat: RematPolicy = "none", scanned: int = 0, constant: int = 0):
    """`length` copies of `block` as one `nn.scan`, so that program size does not grow with depth.

    The block is called as `block(carry, *scanned, *constant) -> (carry, output)`; outputs are stacked, parameters too
    (leading axis = layer).

    Args:
      remat: what the backward pass recomputes.
        none       nothing
        full       everything
        attention  everything but what is named `SAVED_ATTENTION`
        offload    likewise; what is named goes to the host's memory and back
        gate       everything but what is named `SAVED_ATTENTION` or `SAVED_GATE`
        mlp        everything but what is named `SAVED_ATTENTION`, `SAVED_GATE` or `SAVED_UP`
        dots       everything but matrix products
      scanned: how many of the arguments after the carry are split along their leading axis.
      constant: how many arguments follow that every layer sees whole.
    """
    if remat != "none":
        policies = jax.checkpoint_policies
        policy = {
            "full": None,
            "attention": policies.save_only_these_names(SAVED_ATTENTION),
            "gate": policies.save_only_these_names(SAVED_ATTENTION, SAVED_GATE),
            "mlp": policies.save_only_these_names(SAVED_ATTENTION, SAVED_GATE, SAVED_UP),
            "offload": policies.save_and_offload_only_these_names(
                names_which_can_be_saved=[],
                names_which_can_be_offloaded=[SAVED_ATTENTION],
                offload_src="device",
                offload_dst="pinned_host",
            ),
            "dots": policies.dots_with_no_batch_dims_saveable,
        }[remat]
        block = nn.remat(block, policy=policy, prevent_cse=False)
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(0,) * scanned + (nn.broadcast,) * constant,
        length=length,
    )
