"""Layers shared by several models: norms, activations, dense layers, and stacks of identical blocks."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ross_jax import lora
from ross_jax.models.quantization import dequantize
from ross_jax.sharding import gather, logical_axes, scatter

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "silu"]
RematPolicy = Literal["none", "full", "attention", "gate", "mlp", "offload", "dots"]
SAVED_ATTENTION = "attention"
"""Checkpoint name of queries, keys, values and the output of attention. In the denoiser also of the outputs of a
block's branches, before their gates."""
SAVED_GATE = "gate"
"""Checkpoint name of the input of an MLP's activation."""
SAVED_UP = "up"
"""Checkpoint name of the factor that multiplies the activation in a gated MLP."""

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "silu": jax.nn.silu,
}


def apply(module: nn.Module, params: Any, *args: Any, **options: Any) -> Any:
    """`module.apply` with parameters alone. flax's own may return updated variables too, which no module here has."""
    return module.apply({"params": params}, *args, **options)


def activate(name: Activation, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The activation called `name` (`quick_gelu` is CLIP's)."""
    return _ACTIVATIONS[name](x)


def layer_norm(eps: float, dtype: DTypeLike, *, affine: bool = True, name: str | None = None) -> nn.LayerNorm:
    """LayerNorm with float32 two-pass statistics, as PyTorch computes it."""
    return nn.LayerNorm(eps, dtype=dtype, use_bias=affine, use_scale=affine, use_fast_variance=False, name=name)


ONES = 8
"""Rows of ones in the product that sums a bias's gradient. XLA would turn a single row back into a sum."""


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
      axes: logical axes of the kernel, which is gathered along them. Empty: XLA decides.
      dtype: dtype of the product. None: the operands' dtype.
    """
    return _linear_forward(x, kernel, bias, axes, dtype)[0]


def _linear_forward(x: Array, kernel: Array, bias: Array | None, axes: tuple[str | None, ...], dtype):
    y = jnp.matmul(x, gather(kernel, axes), preferred_element_type=dtype)
    return y if bias is None else y + bias, (x, kernel, bias)  # the gathered kernel would take memory


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


FEW = 64
"""Most rows that `transposed_linear` takes for few."""


def transposed_linear(
    x: Float[Array, "*batch inputs"],
    kernel: Float[Array, "outputs inputs"],
    bias: Float[Array, " outputs"] | None = None,
) -> Float[Array, "*batch outputs"]:
    """`x @ kernel.T + bias`. For few rows the kernel is the left operand, which XLA for CPU reads in order."""
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) > FEW:
        y = rows @ kernel.T
    else:
        y = jax.lax.optimization_barrier(kernel @ rows.T).T  # without the barrier XLA would exchange the operands
    y = y.reshape(*x.shape[:-1], len(kernel))
    return y if bias is None else y + bias


class Dense(nn.Module):
    """Linen's Dense with a custom derivative, which compiles to faster programs.

    Kernel gradient: the narrower of the two factors is transposed, which is faster on CPU. JAX always transposes the
    output's gradient. Bias gradient: a product with ones instead of a sum over rows, which XLA for TPU computes slowly
    and with a float32 copy of the rows.

    Attributes:
      gathered: the kernel is gathered before the product, by its logical axes in `sharding.PARAMETER_AXES`. False: XLA
        decides.
      outputs: number of arrays that the features are split into. Each array has the same width and is computed by its
        own product, which costs less than splitting the result of one product.
      transposed: the kernel is stored as `[features, inputs]`, and has no gradient. See `transposed_linear`.
      dropout: share of the low-rank update's inputs that are zeroed, where there is an rng named `dropout`.

    Parameters beside the kernel that `ross_jax.lora` names are a low-rank update. `init` makes none. The kernel may be
    one of 8 bits, see `models.quantization`.
    """

    features: int
    use_bias: bool = True
    dtype: DTypeLike = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    gathered: bool = False
    outputs: int = 1
    transposed: bool = False
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "*batch inputs"]):
        """`[*batch, features]`. With several outputs: a list of `[*batch, features / outputs]`."""
        shape = (self.features, x.shape[-1]) if self.transposed else (x.shape[-1], self.features)
        kernel = dequantize(self.param("kernel", self.kernel_init, shape), self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype) if self.use_bias else None
        axes = self._axes("kernel", kernel)
        x = x.astype(self.dtype)
        if self.outputs == 1:
            y = transposed_linear(x, kernel, bias) if self.transposed else linear(x, kernel, bias, axes)
            return y + self._update(x) if self.has_variable("params", lora.A) else y
        kernels = jnp.split(kernel, self.outputs, axis=-1)
        biases = jnp.split(bias, self.outputs) if self.use_bias else [None] * self.outputs
        return [linear(x, *each, axes) for each in zip(kernels, biases, strict=True)]

    def _axes(self, name: str, leaf: Array) -> tuple[str | None, ...]:
        return logical_axes("/".join((*self.path, name)), leaf.ndim) if self.gathered else ()

    def _update(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
        """The low-rank update of the output."""
        a, b, scale = (self.get_variable("params", name) for name in (lora.A, lora.B, lora.SCALE))
        if self.dropout and self.has_rng("dropout"):
            x = nn.Dropout(self.dropout, deterministic=False)(x)
        inner = linear(x, a.astype(self.dtype), None, self._axes(lora.A, a))
        return linear((scale * inner).astype(self.dtype), b.astype(self.dtype), None, self._axes(lora.B, b))


@jax.custom_vjp
def fusion_barrier(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns `x`. XLA never fuses an operation that computes `x` with an operation that reads it.

    The gradient of `x` passes through a barrier too.

    Placed next to float32 products. XLA for TPU would otherwise fuse both products of an MLP, or a product with the
    sums in norms and gates, and run slower.
    """
    return jax.lax.optimization_barrier(x)


fusion_barrier.defvjp(lambda x: (fusion_barrier(x), None), lambda _, gradient: (fusion_barrier(gradient),))


@jax.custom_vjp
def gradient_fusion_barrier(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns `x`. Only the gradient of `x` passes through a barrier, as in `fusion_barrier`.

    Placed between a norm and a matrix product. XLA for TPU would otherwise compute the gradient of the norm's scale
    inside the gradient of the product, and run slower.
    """
    return x


gradient_fusion_barrier.defvjp(lambda x: (x, None), lambda _, gradient: (jax.lax.optimization_barrier(gradient),))


class Mlp(nn.Module):
    """Two linear layers with an activation between. Vision encoders and the denoiser use it."""

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
        attention  everything but values named `SAVED_ATTENTION`
        offload    everything but values named `SAVED_ATTENTION`, which wait in the host's memory
        gate       everything but values named `SAVED_ATTENTION` or `SAVED_GATE`
        mlp        everything but values named `SAVED_ATTENTION`, `SAVED_GATE` or `SAVED_UP`
        dots       everything but matrix products
      scanned: number of arguments after the carry that are split along their leading axis, one slice per layer.
      constant: number of arguments after the scanned ones that every layer receives unsplit.
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
        split_rngs={"params": True, "dropout": True},
        in_axes=(0,) * scanned + (nn.broadcast,) * constant,
        length=length,
    )
