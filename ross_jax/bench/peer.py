"""A recipe's model and training step in PyTorch: transformers' encoder and language model, diffusers' autoencoder.

The module needs the extra `parity`. No library has the denoiser, so it is written here as in the reference. The step
uses what makes eager PyTorch fast: fused attention and AdamW, no gradients of frozen parameters, no computation for
empty image slots, and noise that is drawn beforehand. In bfloat16 the optimizer moves float32 copies of the weights, as
in the reference.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import torch
import transformers
from diffusers import AutoencoderKL
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ross_jax.config import ConfigError
from ross_jax.convert.importing import TABLES
from ross_jax.convert.language import language_settings
from ross_jax.convert.mapping import Table, expand
from ross_jax.data.conversation import IGNORE
from ross_jax.models.autoencoder import AutoencoderConfig
from ross_jax.models.denoiser import CONDITION_EPS, NORM_EPS, TIMESTEP_FEATURES, DenoiserConfig
from ross_jax.models.language import LanguageConfig
from ross_jax.models.projector import ProjectorConfig
from ross_jax.models.ross import RossConfig
from ross_jax.models.vision import VisionConfig
from ross_jax.objectives.denoise import NoiseSample
from ross_jax.objectives.reconstruction import make_objective
from ross_jax.training.recipe import RunConfig
from ross_jax.tree import flatten


class Peer:
    """A training step of the recipe's model: loss, gradients, clipping, AdamW.

    Args:
      params: all parameters of the JAX model, to begin with.
      batch: the host's arrays of a batch. Each step takes this batch.

    Raises:
      ConfigError: a recipe that this step does not compute.
    """

    def __init__(self, config: RunConfig, params: Mapping[str, Any], batch: Mapping[str, np.ndarray]):
        check(config)
        self.threads = torch.get_num_threads()
        self.device = torch.device("cuda" if jax.default_backend() == "gpu" else "cpu")
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # the denoiser's products, as XLA's, in TF32
        self._config, self._batch = config, batch
        dtype = getattr(torch, config.step.dtype)
        self._model = Model(config.model, config.step.remat == "full", dtype).to(self.device)
        self._pairs = self._load(params)
        self._moved = [moved for _, moved in self._pairs]
        optimizer = config.optimizer
        self._optimizer = torch.optim.AdamW(
            self._moved,
            optimizer.learning_rate,
            (optimizer.b1, optimizer.b2),
            optimizer.eps,
            optimizer.weight_decay,
            fused=True,
        )
        self._rows = Rows(config.model, batch, self.device)
        self._draws: dict[int, tuple[torch.Tensor, ...]] = {}

    def _load(self, params: Mapping[str, Any]) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Copies the JAX parameters into the model, through the tables of conversion.

        Returns:
          For each trained parameter: the model's parameter, and the parameter that the optimizer moves. Both are one in
          float32; in bfloat16 the second is a float32 copy.
        """
        pairs = []
        for name, module in self._model.named_children():
            table = TABLES[name](getattr(self._config.model, name))
            for path, own, value in copy_parameters(module, table, params[name]):
                own.requires_grad_(self._config.freeze.trains(f"{name}/{path}"))
                if own.requires_grad:
                    pairs.append((own, own if own.dtype == value.dtype else nn.Parameter(value)))
        return pairs

    def __call__(self, step: int) -> dict[str, float]:
        """Runs one step with the noise that the JAX step `step` draws, and returns its losses."""
        if step not in self._draws:
            self._draws[step] = self._draw(step)
        text_loss, reconstruction_loss = self._model.losses(self._rows, *self._draws[step])
        weights = self._config.text.weight, self._config.reconstruction.weight
        (weights[0] * text_loss + weights[1] * reconstruction_loss).backward()
        for own, moved in self._pairs:
            if own is not moved:
                moved.grad, own.grad = own.grad.float(), None
        nn.utils.clip_grad_norm_(self._moved, self._config.optimizer.max_gradient_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        with torch.no_grad():
            for own, moved in self._pairs:
                if own is not moved:
                    own.copy_(moved)
        return {"text_loss": text_loss.item(), "reconstruction_loss": reconstruction_loss.item()}

    def _draw(self, step: int) -> tuple[torch.Tensor, ...]:
        """Timesteps, noise and the posterior's noise of each real image, as the JAX step draws them."""
        config = self._config
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), 1), step)
        identities = self._batch["image_ids"][self._batch["image_ids"] != 0]
        objective = make_objective(config.model, config.reconstruction)
        draw: NoiseSample = jax.jit(jax.vmap(lambda i: objective.draw(jax.random.fold_in(key, i))))(identities)
        timesteps, noise, posterior = (np.array(part) for part in draw[:3])
        return (
            torch.from_numpy(timesteps).long().to(self.device),
            torch.from_numpy(noise).to(self.device),
            torch.from_numpy(posterior).permute(0, 3, 1, 2).contiguous().to(self.device),
        )


def copy_parameters(
    module: nn.Module, table: Table, params: Mapping[str, Any]
) -> Iterator[tuple[str, nn.Parameter, torch.Tensor]]:
    """Copies a component's JAX parameters into a module: path, the module's parameter, and its values in float32."""
    flat = {path: np.asarray(leaf) for path, leaf in flatten(params).items()}
    state = dict(module.named_parameters())
    for piece in expand(table, {path: leaf.shape for path, leaf in flat.items()}):
        leaf = flat[piece.path] if piece.layer is None else flat[piece.path][piece.layer]
        own = state[piece.hf_key]
        # Contiguous as its gradient will be, since fused AdamW reads both in order of memory.
        value = torch.tensor(np.ascontiguousarray(piece.transform.to_hf(leaf), np.float32), device=own.device)
        with torch.no_grad():
            own.copy_(value)
        yield piece.path, own, value


def check(config: RunConfig) -> None:
    """Raises ConfigError if the PyTorch step does not compute the recipe; names every reason."""
    model, language, optimizer = config.model, config.model.language, config.optimizer
    denoiser = model.denoiser
    wrong = {
        "model.vision.kind must be siglip": model.vision.kind != "siglip" or model.vision.final_norm,
        "model.language must be Qwen2's: qkv_bias, no other biases, norms of heads or scaling of positions": (
            not language.qkv_bias
            or language.out_bias
            or language.mlp_bias
            or language.qk_norm
            or language.rope_scaling is not None
        ),
        "model.projector.kind must be mlp, with two layers or more": (
            model.projector.kind != "mlp" or model.projector.depth < 2
        ),
        "reconstruction.kind must be denoise, without condition_dropout": (
            config.reconstruction.kind != "denoise" or bool(config.reconstruction.condition_dropout)
        ),
        "reconstruction.compat must be default": config.reconstruction.compat != "default",
        "model.denoiser must predict epsilon on the cosine schedule with adaln blocks": (
            denoiser is None
            or (denoiser.prediction, denoiser.schedule, denoiser.block) != ("epsilon", "cosine", "adaln")
        ),
        "model.autoencoder.kind must be kl": getattr(model.autoencoder, "kind", None) != "kl",
        "step.dtype, freeze.dtype and freeze.autoencoder_dtype must all be float32, or all bfloat16": (
            {config.step.dtype, config.freeze.dtype, config.freeze.autoencoder_dtype} not in ({"float32"}, {"bfloat16"})
        ),
        "reconstruction.dtype must be float32": config.reconstruction.dtype != "float32",
        "step.remat must be none or full": config.step.remat not in ("none", "full"),
        "the vision encoder must be frozen": any(
            config.freeze.trains(f"vision/{path}") for path in ("layers/norm1/scale", "position_embedding")
        ),
        "optimizer.algorithm must be adamw, with one learning rate, no warmup and no weight decay": (
            optimizer.algorithm != "adamw"
            or bool(optimizer.groups)
            or bool(optimizer.warmup_ratio)
            or bool(optimizer.weight_decay)
        ),
        "text.weight must be positive": not config.text.weight,
        "lora.rank must be 0": bool(config.lora.rank),
        "the mesh must be one device, a CPU or a GPU": (
            jax.device_count() != 1 or jax.default_backend() not in ("cpu", "gpu")
        ),
    }
    found = [problem for problem, is_wrong in wrong.items() if is_wrong]
    if found:
        raise ConfigError(f"the recipe cannot be compared with PyTorch: {'; '.join(found)}")


class Rows:
    """A batch as tensors, of which only real images are kept.

    Attributes:
      mask: bool[rows, 1, S, S]: True where a position may attend. Padding attends to itself, so no softmax is empty.
      images: [images, 3, H, W], normalised.
      pixels: [images, 3, H', W'] in [-1, 1], as the autoencoder reads them.
      places: [images, N], places of the images' tokens in the flattened rows.
    """

    def __init__(self, config: RossConfig, batch: Mapping[str, np.ndarray], device: torch.device):
        def tensor(name: str) -> torch.Tensor:
            return torch.from_numpy(np.array(batch[name])).long().to(device)

        self.tokens, self.positions, self.targets = tensor("tokens"), tensor("positions"), tensor("targets")
        segments, length = tensor("segments"), self.tokens.shape[1]
        order = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        self.mask = ((segments[:, :, None] == segments[:, None, :]) & order)[:, None]
        row, slot = np.nonzero(batch["image_start"] < length)
        pixels = torch.from_numpy(batch["images"][row, slot].copy()).to(device).permute(0, 3, 1, 2).float() / 255.0
        mean, std = (
            torch.tensor(values, device=device).view(3, 1, 1) for values in (config.image_mean, config.image_std)
        )
        self.images = ((pixels - mean) / std).contiguous()
        unit = (self.images * std + mean).mul(2.0).sub(1.0).clamp(-1.0, 1.0)
        self.pixels = functional.interpolate(unit, size=(config.target_size,) * 2, mode="bilinear")
        start = torch.from_numpy(row * length + batch["image_start"][row, slot]).long().to(device)
        self.places = start[:, None] + torch.arange(config.vision.num_tokens, device=device)


class Model(nn.Module):
    """All components, under the names of the JAX model. All but the denoiser have type `dtype`."""

    def __init__(self, config: RossConfig, checkpointing: bool, dtype: torch.dtype):
        super().__init__()
        self._dtype = dtype
        self.vision = vision_tower(config.vision).to(dtype)
        self.projector = projector(config.projector).to(dtype)
        self.language = language_model(config.language).to(dtype)
        self.autoencoder = autoencoder(config.autoencoder).to(dtype)
        self.denoiser = Denoiser(config.denoiser, checkpointing)
        self._window = config.latent_window
        if checkpointing:
            self.language.gradient_checkpointing_enable({"use_reentrant": False})
            self.language.train()

    def losses(
        self, rows: Rows, timesteps: torch.Tensor, noise: torch.Tensor, posterior: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Text loss and reconstruction loss.

        Args:
          timesteps: [images, draws].
          noise: [images, draws, tokens, latent].
          posterior: [images, channels, h, w], noise of the latents' posterior.
        """
        with torch.no_grad():
            embedded = self.vision.embeddings(rows.images.to(self._dtype))
            features = self.vision.encoder(inputs_embeds=embedded).last_hidden_state
            latents = self._latents(rows.pixels.to(self._dtype), posterior)
        embeddings = self.language.get_input_embeddings()(rows.tokens)
        flat = embeddings.flatten(0, 1).index_copy(0, rows.places.flatten(), self.projector(features).flatten(0, 1))
        hidden = self.language.model(
            inputs_embeds=flat.view_as(embeddings),
            attention_mask={"full_attention": rows.mask},
            position_ids=rows.positions,
            use_cache=False,
        ).last_hidden_state
        flat = hidden.flatten(0, 1)
        logits = self.language.lm_head(flat).float()
        text_loss = functional.cross_entropy(logits, rows.targets.flatten(), ignore_index=IGNORE)
        return text_loss, self._reconstruction_loss(flat[rows.places].float(), latents, timesteps, noise)

    def _latents(self, pixels: torch.Tensor, posterior: torch.Tensor) -> torch.Tensor:
        """[images, tokens, latent], on the denoiser's scale."""
        distribution, settings = self.autoencoder.encode(pixels).latent_dist, self.autoencoder.config
        sample = distribution.mean.float() + distribution.std.float() * posterior
        scaled = (sample - settings.shift_factor) * settings.scaling_factor
        return functional.pixel_unshuffle(scaled, self._window).flatten(2).transpose(1, 2)

    def _reconstruction_loss(
        self, visual_outputs: torch.Tensor, latents: torch.Tensor, timesteps: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        draws = timesteps.shape[1]
        context = functional.layer_norm(visual_outputs, visual_outputs.shape[-1:], eps=CONDITION_EPS)
        condition = self.denoiser.z_embedder(context).repeat_interleave(draws, dim=0)
        steps, noise = timesteps.flatten(), noise.flatten(0, 1)
        signal = _signal().to(steps.device)[steps].view(-1, 1, 1)
        noised = signal.sqrt() * latents.repeat_interleave(draws, dim=0) + (1.0 - signal).sqrt() * noise
        return functional.mse_loss(self.denoiser(noised.float(), steps, condition), noise)


def _signal() -> torch.Tensor:
    """float64[1000]: share of the signal's variance that is left after each cosine step."""
    t = torch.arange(1001, dtype=torch.float64) / 1000
    alpha = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    return torch.cumprod(1.0 - (1.0 - alpha[1:] / alpha[:-1]).clamp(max=0.999), dim=0)


def vision_tower(config: VisionConfig) -> nn.Module:
    """transformers' SigLIP, without the layers above the selected one and the pooling head."""
    activation = {"gelu_tanh": "gelu_pytorch_tanh"}.get(config.activation, config.activation)
    settings = transformers.SiglipVisionConfig(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.layers_used,
        num_attention_heads=config.num_heads,
        image_size=config.image_size,
        patch_size=config.patch_size,
        hidden_act=activation,
        layer_norm_eps=config.norm_eps,
        vision_use_head=False,
        attn_implementation="sdpa",
    )
    return transformers.SiglipVisionModel(settings).eval()


def projector(config: ProjectorConfig) -> nn.Module:
    """Linear layers with GELU between."""
    layers = [nn.Linear(config.in_size, config.out_size)]
    for _ in range(config.depth - 1):
        layers += [nn.GELU(), nn.Linear(config.out_size, config.out_size)]
    return nn.Sequential(*layers)


def language_model(config: LanguageConfig) -> nn.Module:
    """transformers' model of the same family."""
    settings = language_settings(config)
    made = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    return transformers.AutoModelForCausalLM.from_config(made, attn_implementation="sdpa", dtype=torch.float32)


def autoencoder(config: AutoencoderConfig) -> nn.Module:
    """diffusers' AutoencoderKL."""
    down = [("Attn" if attends else "") + "DownEncoderBlock2D" for attends in config.down_attention]
    up = [("Attn" if attends else "") + "UpDecoderBlock2D" for attends in config.up_attention]
    fields = dataclasses.asdict(config)
    same = ("layers_per_block", "latent_channels", "scaling_factor", "shift_factor")
    return AutoencoderKL(
        **{name: fields[name] for name in same},
        block_out_channels=config.channels,
        norm_num_groups=config.norm_groups,
        down_block_types=down,
        up_block_types=up,
        mid_block_add_attention=config.mid_attention,
        use_quant_conv=config.quant_conv,
        use_post_quant_conv=config.post_quant_conv,
    ).eval()


class Block(nn.Module):
    """A transformer block, shifted, scaled and gated token by token."""

    def __init__(self, config: DenoiserConfig):
        super().__init__()
        width, hidden = config.width, int(config.width * config.mlp_ratio)
        self.heads = config.num_heads
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, dim=-1)
        qkv = self.attn["qkv"](_modulate(x, shift1, scale1)).unflatten(-1, (3, self.heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x = x + gate1 * self.attn["proj"](y)
        y = functional.gelu(self.mlp["fc1"](_modulate(x, shift2, scale2)), approximate="tanh")
        return x + gate2 * self.mlp["fc2"](y)


def _modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return functional.layer_norm(x, x.shape[-1:], eps=NORM_EPS) * (1 + scale) + shift


class Denoiser(nn.Module):
    """The reference's denoiser, with the reference's names of parameters. Latents come as tokens."""

    def __init__(self, config: DenoiserConfig, checkpointing: bool):
        super().__init__()
        width = config.width
        self._checkpointing = checkpointing
        self.pos_embed = nn.Parameter(torch.zeros(1, config.num_tokens, width))
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(config.latent_size, width, 1)})
        self.z_embedder = nn.Sequential(nn.SiLU(), nn.Linear(config.condition_size, width))
        time = nn.Sequential(nn.Linear(TIMESTEP_FEATURES, width), nn.SiLU(), nn.Linear(width, width))
        self.t_embedder = nn.ModuleDict({"mlp": time})
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.final_layer = nn.ModuleDict(
            {"adaLN_modulation": modulation, "linear": nn.Linear(width, config.latent_size)}
        )

    def forward(self, noised: torch.Tensor, steps: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        half = TIMESTEP_FEATURES // 2
        exponents = torch.arange(half, dtype=torch.float32, device=steps.device) / half
        angles = steps[:, None] * torch.exp(-math.log(10000.0) * exponents)
        time = self.t_embedder["mlp"](torch.cat([angles.cos(), angles.sin()], dim=1))
        embed = self.x_embedder["proj"]
        x = functional.linear(noised, embed.weight.flatten(1), embed.bias) + self.pos_embed
        condition = time[:, None] + condition
        for block in self.blocks:
            x = checkpoint(block, x, condition, use_reentrant=False) if self._checkpointing else block(x, condition)
        shift, scale = self.final_layer["adaLN_modulation"](condition).chunk(2, dim=-1)
        return self.final_layer["linear"](_modulate(x, shift, scale))
