"""Ross^D: visual outputs must hold what a denoiser needs to recover the image's latents (paper section 4)."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int, Shaped

from ross_jax.config import required
from ross_jax.models.autoencoder import Posterior
from ross_jax.models.denoiser import Denoiser, normalise_condition
from ross_jax.models.language import FINAL
from ross_jax.models.layers import RematPolicy, apply
from ross_jax.models.ross import RossConfig
from ross_jax.objectives.diffusion import (
    SCHEDULES,
    Diffusion,
    Predict,
    add_noise,
    implied_noise,
    make_diffusion,
    prediction_target,
    sample_ancestral,
)
from ross_jax.objectives.objective import (
    DEFAULT_SAMPLING,
    Batch,
    Objective,
    Params,
    Reconstruction,
    Sampling,
    Taps,
    normalised_images,
)
from ross_jax.objectives.samplers import sample_ddim, sample_dpm
from ross_jax.objectives.targets import (
    autoencoder_settings,
    decode,
    encode,
    group_latents,
    normalised_latents,
    ungroup_latents,
)
from ross_jax.sharding import gather, logical_axes
from ross_jax.tree import flatten, unflatten


class NoiseSample(NamedTuple):
    """The randomness of an image's loss.

    Attributes:
      timesteps: t of each (t, epsilon) draw.
      noise: epsilon of each draw.
      posterior_noise: noise of the one draw of raw latents.
      dropped: draws in which the denoiser is not told the visual outputs. None: it always is.
    """

    timesteps: Int[Array, "*batch draws"]
    noise: Float[Array, "*batch draws tokens latent"]
    posterior_noise: Float[Array, "*batch height width channels"]
    dropped: Bool[Array, "*batch draws"] | None = None


@dataclasses.dataclass(frozen=True)
class DenoiseObjective(Objective):
    """Mean squared error of what the denoiser predicts, given visual outputs.

    Attributes:
      draws: (t, epsilon) draws per image; the posterior is sampled once.
      condition_dropout: share of draws in which zeros take the place of the normalised visual outputs.
      dtype: of the denoiser's activations.
      remat: what the backward pass through the denoiser recomputes.
    """

    kind = "denoise"
    title = "Ross^D"
    target_encoder = "autoencoder"
    draws: int = 4
    condition_dropout: float = 0.0
    dtype: str = "float32"
    remat: RematPolicy = "none"

    @classmethod
    def requires(cls, model: RossConfig) -> dict[str, dict[str, Any]]:
        """An autoencoder, and a denoiser of its latents."""
        sizes = {
            "condition_size": model.language and model.language.hidden_size,
            "latent_size": model.latent_size,
            "grid": model.vision and model.vision.grid,
        }
        return {"autoencoder": {}, "denoiser": sizes}

    @property
    def noise_levels(self) -> int:
        """Passes through the denoiser per image."""
        return self.draws

    @property
    def denoiser(self) -> Denoiser:
        """The denoiser's module."""
        return required(self.config.denoiser).build(jnp.dtype(self.dtype), self.remat)

    @functools.cached_property
    def process(self) -> Diffusion:
        """The noising process of training."""
        return make_diffusion(SCHEDULES[self.config.denoiser.schedule]())

    def targets(self, frozen: Params, batch: Batch, mask: Bool[Array, " items"] | None = None) -> Posterior:
        """The autoencoder's posterior of each image."""
        return encode(self.config, frozen, normalised_images(self.config, batch), mask)

    def target_settings(self) -> dict[str, Any]:
        """The autoencoder, and the size of the images that it sees."""
        return autoencoder_settings(self.config)

    def latents(
        self, targets: Posterior, posterior_noise: Float[Array, "*batch height width channels"]
    ) -> Float[Array, "*batch tokens latent"]:
        """Latent tokens, on the denoiser's scale, of one posterior draw."""
        latents = normalised_latents(self.config, targets.sample(posterior_noise))
        return group_latents(latents, required(self.config.latent_window))

    def draw(self, key: Array) -> NoiseSample:
        """The randomness of one image, from its key."""
        cfg = self.config.denoiser
        side = cfg.grid * required(self.config.latent_window)
        step_key, noise_key, posterior_key = jax.random.split(key, 3)
        dropped = None
        if self.condition_dropout:
            dropped = jax.random.bernoulli(jax.random.fold_in(key, 3), self.condition_dropout, (self.draws,))
        return NoiseSample(
            jax.random.randint(step_key, (self.draws,), 0, self.process.steps),
            jax.random.normal(noise_key, (self.draws, cfg.num_tokens, cfg.latent_size)),
            jax.random.normal(posterior_key, (side, side, self.config.autoencoder.latent_channels)),
            dropped,
        )

    def draw_losses(
        self,
        params: Params,
        visual_outputs: Float[Array, "items tokens embed"],
        targets: Posterior,
        draw: NoiseSample,
    ) -> Float[Array, "items draws"]:
        """Mean squared error of the prediction for each (t, epsilon) draw of each image, float32."""
        # Parameters are small, and read in every block, forward and backward: gathered once.
        leaves = flatten({"denoiser": params["denoiser"]})
        params = unflatten({path: gather(leaf, logical_axes(path)) for path, leaf in leaves.items()})
        condition = self._embed(params, visual_outputs)
        draws = draw.timesteps.shape[1]
        condition = jnp.repeat(condition, draws, axis=0)
        if draw.dropped is not None:
            nothing = self._embed(params, jnp.zeros_like(visual_outputs[:1]))
            condition = jnp.where(draw.dropped.reshape(-1, 1, 1), nothing, condition)
        latents = jnp.repeat(self.latents(targets, draw.posterior_noise), draws, axis=0)
        timesteps, noise = draw.timesteps.reshape(-1), rearrange(draw.noise, "b k n c -> (b k) n c")
        noised = add_noise(self.process, latents, timesteps, noise)
        predicted = apply(self.denoiser, params["denoiser"], noised, timesteps, condition, method="denoise")
        target = prediction_target(self.process, self.config.denoiser.prediction, latents, timesteps, noise)
        return jnp.mean(jnp.square(target - predicted), axis=(1, 2)).reshape(-1, draws)

    def _embed(self, params: Params, visual_outputs: Float[Array, "items tokens embed"]):
        context = normalise_condition(visual_outputs)
        return apply(self.denoiser, params["denoiser"], context, method="embed_condition")

    def loss(
        self, params: Params, frozen: Params, taps: Taps, targets: Posterior, keys: Shaped[Array, "batch images"]
    ) -> Float[Array, "batch images"]:
        """Loss of each image, averaged over its draws."""
        draw = jax.vmap(self.draw)(keys.reshape(-1))
        outputs = taps[FINAL].reshape(-1, *taps[FINAL].shape[2:])
        return self.draw_losses(params, outputs, targets, draw).mean(axis=1).reshape(keys.shape)

    def predictor(
        self, params: Params, visual_outputs: Float[Array, "items tokens embed"], guidance: float = 1.0
    ) -> Predict:
        """The noise that the denoiser sees in noised latent tokens, given visual outputs: what samplers ask for.

        Args:
          guidance: weight of the noise seen with visual outputs against the noise seen without (Ho and Salimans, 2022,
            with weight `guidance - 1`).
        """
        condition = self._embed(params, visual_outputs)
        nothing = self._embed(params, jnp.zeros_like(visual_outputs)) if guidance != 1.0 else None

        def noise(noised: Array, timesteps: Array, condition: Array) -> Array:
            predicted = apply(self.denoiser, params["denoiser"], noised, timesteps, condition, method="denoise")
            return implied_noise(self.process, self.config.denoiser.prediction, predicted, noised, timesteps)

        def predict(noised: Array, timesteps: Array) -> Array:
            if nothing is None:
                return noise(noised, timesteps, condition)
            both = noise(
                jnp.concatenate([noised, noised]),
                jnp.concatenate([timesteps, timesteps]),
                jnp.concatenate([condition, nothing]),
            )
            told, untold = jnp.split(both, 2)
            return untold + guidance * (told - untold)

        return predict

    def sample(
        self, params: Params, visual_outputs: Float[Array, "items tokens embed"], keys: Array, sampling: Sampling
    ) -> Float[Array, "items height width channels"]:
        """Latents on the denoiser's scale, sampled given visual outputs. One scan.

        Args:
          params: with `denoiser`.
          keys: `[items]`, one per image.

        Raises:
          ConfigError: a number of steps that the process cannot be respaced to.
        """
        process = make_diffusion(self.process.betas, str(sampling.steps))
        predict = self.predictor(params, visual_outputs.astype(jnp.float32), sampling.guidance)
        cfg = self.config.denoiser
        shape = (cfg.num_tokens, cfg.latent_size)
        pairs = jax.vmap(jax.random.split)(keys)
        initial = jax.vmap(lambda key: jax.random.normal(key, shape))(pairs[:, 0])
        if sampling.sampler == "ddpm":
            noise = jax.vmap(lambda key: jax.random.normal(key, (process.steps, *shape)), out_axes=1)(pairs[:, 1])
            tokens = sample_ancestral(process, predict, initial, noise, sampling.temperature)[-1]
        else:
            tokens = {"ddim": sample_ddim, "dpm": sample_dpm}[sampling.sampler](process, predict, initial)
        return ungroup_latents(tokens, required(self.config.latent_window))

    def reconstruct(
        self,
        params: Params,
        frozen: Params,
        visual_outputs: Float[Array, "items tokens embed"],
        keys: Array,
        sampling: Sampling = DEFAULT_SAMPLING,
    ) -> Reconstruction:
        """Samples latents and decodes them."""
        latents = self.sample(params, visual_outputs, keys, sampling)
        return Reconstruction(jnp.clip(decode(self.config, frozen, latents), -1.0, 1.0), latents)
