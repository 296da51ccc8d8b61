"""Quantities of a golden file, computed by this project and named as in the golden file."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from ross_jax.config import UserError
from ross_jax.convert.importing import SCOPES, TABLES
from ross_jax.convert.mapping import expand
from ross_jax.inference.generate import Decoding, Prompts, generate
from ross_jax.models.denoiser import Denoiser, normalise_condition
from ross_jax.models.language import FINAL
from ross_jax.models.ross import Ross, RossConfig, RossOutput, build_autoencoder
from ross_jax.models.vision import VisionEncoder
from ross_jax.objectives.denoise import DenoiseObjective, NoiseSample
from ross_jax.objectives.diffusion import add_noise, make_diffusion, sample_ancestral, step_distribution
from ross_jax.objectives.loss import Loss, make_reduction
from ross_jax.objectives.objective import Taps
from ross_jax.objectives.targets import group_latents, target_pixels
from ross_jax.objectives.text import next_token_loss
from ross_jax.parity.golden import IGNORE, Golden, Merged, merge
from ross_jax.training.state import TrainState
from ross_jax.training.step import gradients
from ross_jax.tree import flatten

TRAINED = ("language", "projector", "denoiser")
"""Components whose gradients the reference records."""

Params = dict[str, Any]


class Group(NamedTuple):
    """A function that computes one part of a golden file.

    Attributes:
      compute: parameters -> values by golden name. A pure function, compiled once for any number of checkpoints.
      valid: golden name -> bool array: True at the positions that are compared. Its axes are the value's first axes.
        Values without an entry are compared everywhere.
    """

    compute: Callable[[Params], dict[str, Any]]
    valid: dict[str, np.ndarray] = {}


@dataclasses.dataclass(frozen=True)
class Reference:
    """Settings of a reference checkpoint.

    Attributes:
      full_tower: the config with every layer of the vision tower.
      selected: number of the tower's hidden state that holds the features.
      max_length: rows are cut to this length after images are inserted.
    """

    full_tower: RossConfig
    selected: int
    max_length: int

    @property
    def config(self) -> RossConfig:
        """The config with only those layers of the vision tower that training runs."""
        vision = dataclasses.replace(self.full_tower.vision, select_layer=self.selected)
        return dataclasses.replace(self.full_tower, vision=vision)

    def used(self, params: Params) -> Params:
        """The parameter tree without the vision tower's layers above the features."""
        vision = dict(params["vision"])
        layers = jax.tree.map(lambda leaf: leaf[: self.selected], vision.pop("layers"))
        return {**params, "vision": {**vision, "layers": layers} if self.selected else vision}


def to_grid(tokens: jax.Array) -> jax.Array:
    """[batch, tokens, channels] to the reference's [batch, channels, rows, columns]."""
    return rearrange(tokens, "b (h w) c -> b c h w", h=round(tokens.shape[1] ** 0.5))


def from_grid(grid: np.ndarray) -> jax.Array:
    """[batch, channels, rows, columns] to [batch, tokens, channels]: the inverse of `to_grid`."""
    return rearrange(jnp.asarray(grid), "b c h w -> b (h w) c")


def channels_first(images: jax.Array) -> jax.Array:
    """NHWC to NCHW."""
    return rearrange(images, "b h w c -> b c h w")


def channels_last(images: np.ndarray) -> jax.Array:
    """NCHW to NHWC."""
    return rearrange(jnp.asarray(images), "b c h w -> b h w c")


class Batch(NamedTuple):
    """A batch as the model reads it.

    Attributes:
      images: [batch, slots, height, width, 3] normalised.
      targets: [batch, length] labels, shifted by one position.
      real: [batch, slots] 1 where the slot holds an image, else 0.
    """

    merged: Merged
    images: jax.Array
    targets: np.ndarray
    real: np.ndarray


def make_batch(
    reference: Reference, golden: Golden, prefix: str, images: jax.Array, left: bool = False, rows: Any = slice(None)
) -> Batch:
    """The batch recorded under `prefix`.

    Args:
      images: all recorded images, normalised, channels last.
      left: pads on the left instead of the right.
      rows: selects rows of the recorded batch.
    """
    ids, labels, mask = (golden.take(f"{prefix}{name}")[rows] for name in ("input_ids", "labels", "attention_mask"))
    count, limit = reference.config.vision.num_tokens, reference.max_length
    if prefix == "edge/truncate/in/":  # the recorded rows were cut to one image and eight text tokens
        limit = count + 8
    merged = merge(ids, labels, mask, count, limit, left)
    targets = np.pad(merged.labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE)
    real = (merged.image_start < merged.tokens.shape[1]).astype(np.float32)
    return Batch(merged, images[merged.image_rows], targets, real)


def run(config: RossConfig, params: Params, batch: Batch, internals: bool = False) -> RossOutput:
    """The model's forward pass on a batch."""
    merged = batch.merged
    text = (jnp.asarray(array) for array in (merged.tokens, merged.positions, merged.mask))
    start = jnp.asarray(merged.image_start)
    return Ross(config).apply({"params": params}, *text, batch.images, start, internals)


def text_loss(config: RossConfig, params: Params, batch: Batch, hidden: jax.Array) -> jax.Array:
    """Mean cross-entropy over the batch's supervised tokens."""
    head = Ross(config).apply({"params": params}, method="head_kernel")
    total, count = next_token_loss(hidden, jnp.asarray(batch.targets), head, chunk=64)
    return total / count


def forward(reference: Reference, golden: Golden) -> Group:
    """`vision/*`, `merge/*`, `llm/*`: the forward pass in evaluation mode."""
    images = channels_last(golden.take("inputs/pixel_values"))
    batch = make_batch(reference, golden, "inputs/", images)
    config = reference.config

    def compute(params: Params) -> dict[str, Any]:
        encoder = VisionEncoder(reference.full_tower.vision)
        _, states = encoder.apply({"params": params["vision"]}, images, hidden_states=True)
        params = reference.used(params)
        projected = Ross(config).apply({"params": params}, images[:, None], method="encode_images")
        output = run(config, params, batch, internals=True)
        return {
            "vision/hidden_states": states,
            "vision/features": states[reference.selected][:, -config.vision.num_tokens :],
            "vision/projected": projected[:, 0],
            **merged_quantities("merge/", batch, output.internals["embeddings"]),
            "llm/hidden_states": output.internals["hidden_states"],
            "llm/logits": Ross(config).apply({"params": params}, output.hidden, method="logits"),
            "llm/lm_loss": text_loss(config, params, batch, output.hidden),
        }

    valid = batch.merged.mask.astype(bool)
    return Group(compute, {"llm/hidden_states": valid[None], "llm/logits": valid})


def merged_quantities(prefix: str, batch: Batch, embeddings: jax.Array) -> dict[str, Any]:
    """Outputs of the reference's `prepare_inputs_labels_for_multimodal`, whose embeddings are zero at padding."""
    merged = batch.merged
    return {
        f"{prefix}inputs_embeds": embeddings * merged.mask[..., None],
        f"{prefix}labels": merged.labels,
        f"{prefix}attention_mask": merged.mask,
        f"{prefix}position_ids": merged.positions,
        f"{prefix}boi_ids": merged.first,
        f"{prefix}eoi_ids": merged.last,
    }


def autoencoder(reference: Reference, golden: Golden) -> Group:
    """`vae/*`: encoding and decoding with the autoencoder."""
    images = channels_last(golden.take("inputs/pixel_values"))
    module = build_autoencoder(reference.config.autoencoder)
    window = reference.config.latent_window

    def compute(params: Params) -> dict[str, Any]:
        variables = {"params": params["autoencoder"]}
        pixels = target_pixels(reference.config, images)
        posterior = module.apply(variables, pixels, method="encode")
        latents = module.normalise(posterior.mean)
        decoded = module.apply(variables, module.denormalise(latents[:1]), method="decode")
        return {
            "vae/images_vae": channels_first(pixels),
            "vae/posterior_mean": channels_first(posterior.mean),
            "vae/posterior_logvar": channels_first(posterior.logvar),
            "vae/latents_mean": channels_first(latents),
            "vae/z_q_mean": to_grid(group_latents(latents, window)),
            "vae/decoded": channels_first(decoded),
        }

    return Group(compute)


def recorded_draw(golden: Golden, rows: int) -> NoiseSample:
    """The recorded noise for the first `rows` images.

    The reference repeats the batch once per draw, so its tensors are ordered [draws, images].
    """
    draws = len(golden.take("vm/t")) // len(golden.take("vm/posterior_noise"))
    timesteps = golden.take("vm/t")[: rows * draws].reshape(draws, rows).T
    noise = rearrange(from_grid(golden.take("vm/noise")[: rows * draws]), "(k b) n c -> b k n c", k=draws)
    return NoiseSample(jnp.asarray(timesteps), noise, channels_last(golden.take("vm/posterior_noise")[:rows]))


@dataclasses.dataclass(frozen=True)
class RecordedNoise(DenoiseObjective):
    """The denoiser's objective with recorded noise in place of random noise.

    Attributes:
      noise: recorded noise of every image of the batch.
    """

    noise: NoiseSample | None = None

    def loss(self, params: Params, frozen: Params, taps: Taps, targets: Any, keys: jax.Array) -> jax.Array:
        """Loss of each image, averaged over the image's recorded draws."""
        outputs = taps[FINAL].reshape(-1, *taps[FINAL].shape[2:])
        return self.draw_losses(params, outputs, targets, self.noise).mean(axis=1).reshape(keys.shape)


def recorded_loss(config: RossConfig, noise: NoiseSample, compat: str = "official", dtype: Any = jnp.float32) -> Loss:
    """The training loss with recorded noise."""
    objective = RecordedNoise(config, draws=noise.timesteps.shape[1], noise=noise)
    return Loss(Ross(config, dtype), objective, make_reduction(compat, objective), chunk=64)


def training_batch(config: RossConfig, batch: Batch) -> dict[str, jax.Array]:
    """A recorded batch as training reads it, with images converted back to uint8 pixels.

    Raises:
      UserError: the recorded images are not normalised uint8 pixels.
    """
    merged, mean, std = batch.merged, np.asarray(config.image_mean), np.asarray(config.image_std)
    exact = (np.asarray(batch.images, np.float64) * std + mean) * 255.0
    pixels = np.clip(np.round(exact), 0, 255)
    if np.abs(pixels - exact)[batch.real != 0].max(initial=0.0) > 1e-2:
        raise UserError("inputs/pixel_values: not normalised uint8 pixels, which the training step needs")
    arrays = {
        "tokens": merged.tokens,
        "targets": batch.targets,
        "positions": merged.positions,
        "segments": merged.mask,
        "images": pixels.astype(np.uint8),
        "image_start": merged.image_start,
        "image_ids": np.arange(batch.real.size, dtype=np.uint32).reshape(batch.real.shape),
    }
    return {name: jnp.asarray(array) for name, array in arrays.items()}


def loss_quantities(prefix: str, loss: Loss, params: Params, rows: dict[str, jax.Array]) -> dict[str, Any]:
    """A batch's `lm_loss`, `vm_loss` and `total_loss`, with `prefix` before the names."""
    total, losses = loss(params, params, rows, loss.counts(rows), jax.random.key(0))
    return {f"{prefix}lm_loss": losses.text, f"{prefix}vm_loss": losses.reconstruction, f"{prefix}total_loss": total}


def item_losses(loss: Loss, params: Params, batch: Batch, rows: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The loss of each draw, ordered [draws, images] as in the reference, and the visual outputs that it depends on."""
    outputs = run(loss.model.config, params, batch).visual_outputs[:, 0]
    targets = loss.objective.targets(params, rows)
    return loss.objective.draw_losses(params, outputs, targets, loss.objective.noise).T.reshape(-1), outputs


def reconstruction(reference: Reference, golden: Golden) -> Group:
    """`vm/*`, `grad/*`, `grad_norms/*`: losses and gradients of the training step, and the values they depend on."""
    images = channels_last(golden.take("inputs/pixel_values"))
    batch = make_batch(reference, golden, "inputs/", images)
    noise, config = recorded_draw(golden, len(images)), reference.config
    loss, rows = recorded_loss(config, noise), training_batch(config, batch)
    objective = loss.objective

    def compute(params: Params) -> dict[str, Any]:
        params = reference.used(params)
        trained = {name: params[name] for name in TRAINED}
        frozen = {name: leaves for name, leaves in params.items() if name not in TRAINED}
        state = TrainState(jnp.zeros((), jnp.int32), trained, None, frozen)
        losses, grads = gradients(loss, state, rows, loss.counts(rows), jax.random.key(0))
        items, outputs = item_losses(loss, params, batch, rows)
        context = normalise_condition(outputs)
        latents = objective.latents(objective.targets(params, rows), noise.posterior_noise)
        timesteps, epsilon = noise.timesteps[:, 0], noise.noise[:, 0]
        noised = add_noise(objective.process, latents, timesteps, epsilon)
        predicted = Denoiser(config.denoiser).apply({"params": params["denoiser"]}, noised, timesteps, context)
        named = dict(foreign_names(config, grads))
        return {
            "vm/lm_loss": losses.text,
            "vm/vm_loss": losses.reconstruction,
            "vm/total_loss": loss.weighted_sum(losses),
            "vm/loss_per_item": items,
            "vm/image_hidden_states": outputs,
            "vm/ln_pre": context,
            "vm/context": to_grid(context),
            "vm/z_q": to_grid(latents),
            "vm/x_t": to_grid(noised),
            "vm/pred_eps": to_grid(predicted),
            **{f"grad/{name}": value for name, value in named.items()},
            **{
                f"grad_norms/{name}": jnp.sqrt(jnp.sum(jnp.square(value)))
                for name, value in named.items()
                if not name.endswith(".pos_embed")
            },
        }

    return Group(compute)


def foreign_names(config: RossConfig, tree: Params) -> Iterator[tuple[str, jax.Array]]:
    """Yields the leaves of a parameter-shaped tree, named and laid out as in the reference."""
    for component, leaves in tree.items():
        flat = flatten(leaves)
        table = TABLES[component](getattr(config, component))
        for piece in expand(table, {path: leaf.shape for path, leaf in flat.items()}):
            leaf = flat[piece.path] if piece.layer is None else flat[piece.path][piece.layer]
            named = piece.transform.to_hf(leaf)
            for key in (piece.hf_key, *(copy for copy, source in table.copies.items() if source == piece.hf_key)):
                yield SCOPES[component] + key, named


def denoiser(reference: Reference, golden: Golden) -> Group:
    """`denoiser/*`: the denoiser and the diffusion process on recorded inputs."""
    process = make_diffusion()
    timesteps = jnp.asarray(golden.take("denoiser/t"))
    start, noise, context = (from_grid(golden.take(f"denoiser/{name}")) for name in ("x_start", "noise", "context"))
    module = Denoiser(reference.config.denoiser)

    def compute(params: Params) -> dict[str, Any]:
        noised = add_noise(process, start, timesteps, noise)
        variables = {"params": params["denoiser"]}
        predicted, internal = module.apply(variables, noised, timesteps, context, internals=True)
        step = step_distribution(process, predicted, noised, timesteps)
        values = {
            "x_t": to_grid(noised),
            "pred_eps": to_grid(predicted),
            "loss_per_sample": jnp.mean(jnp.square(noise - predicted), axis=(1, 2)),
            "pos_embed": params["denoiser"]["position_embedding"][None],
            "internal/x_emb": internal["latent_embedding"],
            "internal/t_emb": internal["timestep_embedding"],
            "internal/z_emb": internal["condition_embedding"],
            "p_mean_variance/mean": to_grid(step.mean),
            "p_mean_variance/pred_xstart": to_grid(step.start),
            "p_mean_variance/variance": step.variance,
            "p_mean_variance/log_variance": step.log_variance,
        }
        for i in range(reference.config.denoiser.depth):
            values |= {f"internal/block{i}": internal["blocks"][i], f"internal/block{i}_attn": internal["attention"][i]}
        return {f"denoiser/{name}": value for name, value in values.items()}

    return Group(compute)


def sampling(reference: Reference, golden: Golden) -> Group:
    """`sample/*`: ancestral sampling with recorded noise."""
    context, initial = (from_grid(golden.take(f"sample/{name}")) for name in ("context", "init_noise"))
    recorded = golden.take("sample/step_noise")
    process = make_diffusion(respacing=str(len(recorded)))
    noise = rearrange(jnp.asarray(recorded), "s b c h w -> s b (h w) c")
    module = Denoiser(reference.config.denoiser)
    names = [name for name in golden.children("sample/") if name.startswith(("trajectory", "final"))]

    def compute(params: Params) -> dict[str, Any]:
        def predict(noised, timesteps):
            return module.apply({"params": params["denoiser"]}, noised, timesteps, context)

        values: dict[str, Any] = {"sample/timestep_map": process.timestep_map}
        for name in names:  # such as final_clip_denoised_temperature_0.7
            temperature = float(name.partition("temperature_")[2] or 1.0)
            states = sample_ancestral(process, predict, initial, noise, temperature, "clip_denoised" in name)
            states = rearrange(states, "s b (h w) c -> s b c h w", h=reference.config.denoiser.grid)
            values[f"sample/{name}"] = states if name.startswith("trajectory") else states[-1]
        return values

    return Group(compute)


def generation(reference: Reference, golden: Golden) -> Group:
    """`generate/*`: greedy decoding of recorded prompts."""
    images = channels_last(golden.take("inputs/pixel_values"))
    prompts = {}
    for name in golden.children("generate/"):
        ids = golden.take(f"generate/{name}/input_ids")
        used = golden.take(f"generate/{name}/pixel_values_index") if golden.has(f"generate/{name}/pixel") else 0
        image = images[np.atleast_1d(used)][None]
        count = reference.config.vision.num_tokens
        merged = merge(ids, np.full_like(ids, IGNORE), np.ones_like(ids), count, reference.max_length)
        prompts[name] = merged, image, golden.tensors[f"generate/{name}/new_tokens"].shape[-1]

    def compute(params: Params) -> dict[str, Any]:
        values, params = {}, reference.used(params)
        for name, (merged, image, steps) in prompts.items():
            tokens, mask, start = (jnp.asarray(array) for array in (merged.tokens, merged.mask, merged.image_start))
            prompt = Prompts(tokens, mask.sum(1), image, start)
            result = generate(Decoding(reference.config), params, prompt, steps, return_logits=True)
            values[f"generate/{name}/new_tokens"] = result.tokens
            values[f"generate/{name}/logits"] = result.logits[0]
        return values

    return Group(compute)


def edges(reference: Reference, golden: Golden) -> Group:
    """`edge/*`: padding sides, truncation, several images per row, and batches with and without images."""
    images = channels_last(golden.take("inputs/pixel_values"))
    config = reference.config
    merges, batches = {}, {}
    for name in golden.children("edge/"):
        prefix = f"edge/{name}/"
        if golden.has(f"{prefix}in/"):
            used = images[golden.take(f"{prefix}in/pixel_values_index")]
            merges[prefix] = make_batch(reference, golden, f"{prefix}in/", used, left=name == "left_padding")
        else:
            rows = golden.take(f"{prefix}sample_index")
            batch = make_batch(reference, golden, "inputs/", images[rows], rows=rows)
            batches[prefix] = batch, recorded_loss(config, recorded_draw(golden, len(rows)))

    def compute(params: Params) -> dict[str, Any]:
        values, params = {}, reference.used(params)
        for prefix, batch in merges.items():
            tokens, start = jnp.asarray(batch.merged.tokens), jnp.asarray(batch.merged.image_start)
            projected = Ross(config).apply({"params": params}, batch.images, method="encode_images")
            embeddings = Ross(config).apply({"params": params}, tokens, projected, start, method="embed")
            values |= merged_quantities(prefix, batch, embeddings)
        for prefix, (batch, loss) in batches.items():
            rows = training_batch(config, batch)
            values |= loss_quantities(prefix, loss, params, rows)
            values[f"{prefix}loss_per_item"], _ = item_losses(loss, params, batch, rows)
        return values

    return Group(compute)


GROUPS: dict[str, tuple[Callable[[Reference, Golden], Group], tuple[str, ...]]] = {
    "vision/": (forward, ("vision", "projector", "language")),
    "vae/": (autoencoder, ("vision", "autoencoder")),
    "vm/": (reconstruction, ("vision", "projector", "language", "denoiser", "autoencoder")),
    "denoiser/": (denoiser, ("denoiser",)),
    "sample/": (sampling, ("denoiser",)),
    "generate/": (generation, ("vision", "projector", "language")),
    "edge/": (edges, ("vision", "projector", "language", "denoiser", "autoencoder")),
}
"""Prefix -> builder of a group, and the components that the group needs.

A group is computed if the golden file has names with its prefix. A group may also compute names with other prefixes.
"""
