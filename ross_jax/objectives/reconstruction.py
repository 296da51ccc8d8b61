"""The reconstruction objective: visual outputs must hold what a denoiser needs to recover the picture's latents.

Ross^D, paper section 4. Targets are deterministic (a posterior); every draw comes from a key per picture, so a
picture's loss does not depend on its neighbours, on packing or on devices.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from ross_jax.models.autoencoder import Posterior
from ross_jax.models.denoiser import Denoiser, normalise_condition
from ross_jax.models.ross import TARGET_PIXELS, RossConfig, build_autoencoder
from ross_jax.objectives.diffusion import (
    Diffusion,
    Predict,
    add_noise,
    implied_noise,
    make_diffusion,
    prediction_target,
)

Params = Any


class Draw(NamedTuple):
    """The randomness of one picture's loss.

    Attributes:
      timesteps: of each (t, epsilon) draw.
      noise: epsilon of each.
      posterior_noise: of the one draw of raw latents.
    """

    timesteps: Int[Array, "*batch draws"]
    noise: Float[Array, "*batch draws tokens latent"]
    posterior_noise: Float[Array, "*batch height width channels"]


def target_pixels(
    config: RossConfig, images: Float[Array, "batch height width 3"]
) -> Float[Array, "batch side side 3"]:
    """What the targets are made of: normalised pictures back to [-1, 1], resized bilinearly without antialiasing."""
    mean, std = jnp.asarray(config.image_mean, jnp.float32), jnp.asarray(config.image_std, jnp.float32)
    pixels = jnp.clip((images.astype(jnp.float32) * std + mean) * 2.0 - 1.0, -1.0, 1.0)
    shape = (images.shape[0], config.target_size, config.target_size, 3)
    return jax.image.resize(pixels, shape, "linear", antialias=False)


def group_latents(
    latents: Float[Array, "*batch height width channels"], size: int
) -> Float[Array, "*batch tokens latent"]:
    """Windows of `size` x `size` latents as tokens, row by row; channel index is `c * size^2 + row * size + column`."""
    return rearrange(latents, "... (h i) (w j) c -> ... (h w) (c i j)", i=size, j=size)


def ungroup_latents(
    tokens: Float[Array, "*batch tokens latent"], size: int
) -> Float[Array, "*batch height width channels"]:
    """The inverse of `group_latents` for a square picture."""
    side = round(tokens.shape[-2] ** 0.5)
    return rearrange(tokens, "... (h w) (c i j) -> ... (h i) (w j) c", h=side, i=size, j=size)


@dataclasses.dataclass(frozen=True)
class DenoiseObjective:
    """Ross^D: mean squared error of what the denoiser predicts, given visual outputs.

    Attributes:
      config: with vision, denoiser and autoencoder.
      draws: (t, epsilon) draws per picture; the posterior is sampled once.
      process: the noising process of training.
    """

    config: RossConfig
    draws: int = 4
    process: Diffusion = dataclasses.field(default_factory=make_diffusion)

    @property
    def window(self) -> int:
        """Latents per token, along a side."""
        return TARGET_PIXELS // self.config.autoencoder.downsampling

    def targets(self, frozen: Params, images: Float[Array, "batch height width 3"]) -> Posterior:
        """The posterior of each normalised picture; deterministic, so it can be cached."""
        module = build_autoencoder(self.config.autoencoder)
        pixels = target_pixels(self.config, images)
        return module.apply({"params": frozen["autoencoder"]}, pixels, method="encode")

    def latents(
        self, targets: Posterior, posterior_noise: Float[Array, "*batch height width channels"]
    ) -> Float[Array, "*batch tokens latent"]:
        """Latent tokens, on the denoiser's scale, of one posterior draw."""
        module = build_autoencoder(self.config.autoencoder)
        return group_latents(module.normalise(targets.sample(posterior_noise)), self.window)

    def draw(self, key: Array) -> Draw:
        """The randomness of one picture, from its key."""
        cfg = self.config.denoiser
        side = cfg.grid * self.window
        step_key, noise_key, posterior_key = jax.random.split(key, 3)
        return Draw(
            jax.random.randint(step_key, (self.draws,), 0, self.process.steps),
            jax.random.normal(noise_key, (self.draws, cfg.num_tokens, cfg.latent_size)),
            jax.random.normal(posterior_key, (side, side, self.config.autoencoder.latent_channels)),
        )

    def draw_losses(
        self,
        params: Params,
        visual_outputs: Float[Array, "items tokens embed"],
        targets: Posterior,
        draw: Draw,
    ) -> Float[Array, "items draws"]:
        """Mean squared error of the prediction for each (t, epsilon) draw of each picture, float32."""
        module = Denoiser(self.config.denoiser)
        variables = {"params": params["denoiser"]}
        condition = module.apply(variables, normalise_condition(visual_outputs), method="embed_condition")
        draws = draw.timesteps.shape[1]
        latents = jnp.repeat(self.latents(targets, draw.posterior_noise), draws, axis=0)
        timesteps, noise = draw.timesteps.reshape(-1), rearrange(draw.noise, "b k n c -> (b k) n c")
        noised = add_noise(self.process, latents, timesteps, noise)
        predicted = module.apply(variables, noised, timesteps, jnp.repeat(condition, draws, axis=0), method="denoise")
        target = prediction_target(self.process, self.config.denoiser.prediction, latents, timesteps, noise)
        return jnp.mean(jnp.square(target - predicted), axis=(1, 2)).reshape(-1, draws)

    def loss(
        self,
        params: Params,
        frozen: Params,
        visual_outputs: Float[Array, "batch images tokens embed"],
        targets: Posterior,
        keys: Array,
    ) -> Float[Array, "batch images"]:
        """Loss of each picture.

        Args:
          params: trainable tree with `denoiser`.
          frozen: unused here; the interface that all objectives share.
          visual_outputs: of `Ross`.
          targets: of `targets`, for `batch * images` pictures.
          keys: `[batch, images]`, one per picture.
        """
        del frozen
        draw = jax.vmap(self.draw)(keys.reshape(-1))
        outputs = visual_outputs.reshape(-1, *visual_outputs.shape[2:])
        return self.draw_losses(params, outputs, targets, draw).mean(axis=1).reshape(keys.shape)

    def predictor(self, params: Params, visual_outputs: Float[Array, "items tokens embed"]) -> Predict:
        """The noise that the denoiser sees in noised latent tokens, given visual outputs: what samplers ask for."""
        module, variables = Denoiser(self.config.denoiser), {"params": params["denoiser"]}
        condition = module.apply(variables, normalise_condition(visual_outputs), method="embed_condition")

        def predict(noised, timesteps):
            predicted = module.apply(variables, noised, timesteps, condition, method="denoise")
            return implied_noise(self.process, self.config.denoiser.prediction, predicted, noised, timesteps)

        return predict


def picture_mean(losses: Float[Array, "*items"], real: Float[Array, "*items"]) -> Float[Array, ""]:
    """Mean over the pictures that exist; 0 without any."""
    return jnp.sum(losses * real) / jnp.maximum(jnp.sum(real), 1.0)


def official_mean(losses: Float[Array, "*items"], real: Float[Array, "*items"], draws: int = 4) -> Float[Array, ""]:
    """The reference's reduction (`compat = "official"`): text-only rows count too, as soon as one picture exists."""
    pictures = draws * jnp.sum(real)
    return jnp.mean(losses) * pictures / (pictures + 1e-6)
