"""config.json of exports: as imported, else written from the sizes in `RossConfig`. For transformers 4.43 and 5."""

import contextlib
import dataclasses
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ross_jax.config import UserError
from ross_jax.convert import autoencoder, language, vision
from ross_jax.convert.sources import ROSS_FAMILIES, read_json
from ross_jax.data.tokenizer import find_tokenizer, save_tokenizer
from ross_jax.models.denoiser import NUM_HEADS
from ross_jax.models.ross import RossConfig
from ross_jax.storage import copy_file

_ROSS_FIELDS = {
    *("_name_or_path", "ross_enable", "use_mm_proj", "use_mm_inv_proj", "freeze_mm_mlp_adapter", "tune_mm_mlp_adapter"),
    *("unfreeze_mm_vision_tower", "image_aspect_ratio", "image_grid_pinpoints", "image_embed_len", "image_mean"),
    *("image_std", "decode_image_size", "tokenizer_model_max_length", "tokenizer_padding_side"),
}


def _is_ross_field(name: str) -> bool:
    return name.startswith("mm_") or name in _ROSS_FIELDS


@dataclasses.dataclass(frozen=True)
class Described:
    """What a model directory says about itself, apart from its parameters.

    Attributes:
      files: folder `files` of the model directory.
      config: config of the model, without the components that are left out.
      foreign: component -> origin, layout, prefix and keys of its import. Empty for a component made by training.
      dtypes: component -> dtype of its parameters, such as `float32`.
      image_mode: how images become square, by the run or by the imported checkpoint. None if neither says it.
      trained: whether the model is a run's.
      tokens: `bos_token_id`, `eos_token_id` and `pad_token_id` of the tokenizer, as far as it has them.
      template: conversation template, as the user names it or training used it. None if neither says it.
    """

    files: Path
    config: RossConfig
    foreign: Mapping[str, Any]
    dtypes: Mapping[str, str]
    image_mode: str | None
    trained: bool
    tokens: Mapping[str, int]
    template: str | None = None

    def came_with(self, component: str, layout: str) -> bool:
        """Whether import read the component from a checkpoint of the layout: `ross`, `adapters`, `vision`, ..."""
        return self.foreign[component].get("layout") == layout


def _read_full(model: Described) -> tuple[dict[str, Any], str]:
    """config.json of the full checkpoint that was imported, and the family of its language model."""
    path = model.files / "ross" / "config.json"
    settings = read_json(path)
    family = ROSS_FAMILIES.get(str(settings.get("model_type")))
    if family is None:
        raise UserError(f"{path}: model_type {settings.get('model_type')!r} is not that of a full checkpoint")
    return settings, family


def component_settings(model: Described, name: str) -> dict[str, Any]:
    """config.json of a component. The language model's can come from a full checkpoint, without the fields of Ross.

    Raises:
      UserError: the imported file cannot be read, or no config.json can describe the component.
    """
    if name == "language" and model.came_with(name, "ross"):
        settings, family = _read_full(model)
        kept = {field: value for field, value in settings.items() if not _is_ross_field(field)}
        described = {"model_type": family, "architectures": [language.ARCHITECTURES[family]]}
        return language.for_both({**kept, **described})
    if model.foreign[name]:
        path = model.files / name / "config.json"
        settings = language.for_both(read_json(path))
        if name == "vision" and vision.vision_config(settings, str(path)).num_layers != model.config.vision.num_layers:
            settings.get("vision_config", settings)["num_hidden_layers"] = model.config.vision.num_layers
        return settings
    dtype = {"torch_dtype": model.dtypes[name], "dtype": model.dtypes[name]}
    config = getattr(model.config, name)
    if name == "language":
        return {**language.language_settings(config), **model.tokens, **dtype}
    if name == "autoencoder":
        return autoencoder.autoencoder_settings(config)
    return {**vision.vision_settings(config), **dtype}


def processor_settings(model: Described, name: str) -> dict[str, Any] | None:
    """preprocessor_config.json of a vision encoder that was never imported. None for other components."""
    if name not in ("vision", "teacher") or model.foreign[name]:
        return None
    config, prefix = model.config, "image" if name == "vision" else "teacher"
    mean, std = getattr(config, f"{prefix}_mean"), getattr(config, f"{prefix}_std")
    resample = config.image_resample if name == "vision" else 3
    return vision.processor_settings(getattr(config, name), mean, std, resample)


def full_settings(model: Described, layout: str, folders: Mapping[str, str] | None = None) -> dict[str, Any]:
    """config.json of a full checkpoint: as imported, with the fields of all components that came from elsewhere.

    Args:
      layout: `ross`, or `original-llava`, which has no fields of the reconstruction.
      folders: component -> folder that the config points to for it, if it is another than the origin of the import.

    Raises:
      UserError: the layout has no such language model.
    """
    config, folders = model.config, folders or {}
    if model.came_with("language", "ross"):
        settings, family = _read_full(model)
        settings = language.for_both(settings)
    else:
        settings, adapters = component_settings(model, "language"), model.files / "adapters" / "config.json"
        family = settings["model_type"]
        settings |= {"mm_use_im_start_end": False, "mm_use_im_patch_token": False, "mm_patch_merge_type": "flat"}
        settings |= {"image_aspect_ratio": "pad"} if config.vision else {}
        trained = read_json(adapters) if adapters.is_file() else {}
        settings |= {name: value for name, value in trained.items() if _is_ross_field(name) and name != "_name_or_path"}
        settings["ross_enable"] = bool(config.denoiser)
    added = {name for name in _FIELDS if getattr(config, name) is not None and not model.came_with(name, "ross")}
    if "projector" in added and settings.get("mm_projector_type") == _projector_type(model):
        added.remove("projector")  # an identity, which no import has tensors of
    for name in sorted(added):
        settings |= _component_fields(model, name)
    settings |= {_POINTERS[name]: folder for name, folder in folders.items()}
    written = settings.get("image_aspect_ratio") or "square"  # the reference's default
    if config.vision and model.image_mode not in (None, written):
        settings["image_aspect_ratio"] = model.image_mode
    if model.trained and config.denoiser is None and settings.get("ross_enable"):
        settings = settings_without(settings, ["denoiser"])  # the run left the denoiser of its first model behind
    if "denoiser" in added:
        seen = _component_fields(model, "vision") if config.vision else {}
        settings = {**seen, **settings, "ross_enable": True}  # LLaVA's config.json lacks some of what Ross reads
    if layout == "original-llava":
        settings = {name: value for name, value in settings.items() if not name.startswith(_OF_RECONSTRUCTION)}
    if layout != "ross" or "denoiser" in added or not model.came_with("language", "ross"):
        if family not in _ARCHITECTURES[layout]:
            raise UserError(f"{_READERS[layout]} has no language model {family}; use --format components or llava")
        name, architecture = _ARCHITECTURES[layout][family]
        settings |= {"model_type": name, "architectures": [architecture]}
    return settings


def adapters_settings(model: Described, folders: Mapping[str, str], without: Collection[str]) -> dict[str, Any] | None:
    """config.json of a folder of adapters. None: the imported file holds, or there is none.

    The reference writes that of the full checkpoint, which tells the selected layer, for one.
    """
    found = [model.files / name / "config.json" for name in ("adapters", "ross")]
    imported = next((path for path in found if path.is_file()), None)
    made = [n for n in ("vision", "projector", "denoiser") if getattr(model.config, n) and not model.foreign[n]]
    if made and model.config.language is not None:
        with contextlib.suppress(UserError):  # the reference has no such language model
            return settings_without(full_settings(model, "ross", folders), without)
    return settings_without(read_json(imported), without) if imported and without else None


_ARCHITECTURES = {
    "ross": {"qwen2": ("ross_qwen2", "RossQwen2ForCausalLM"), "llama": ("ross_llama", "RossLlamaForCausalLM")},
    "original-llava": {
        "qwen2": ("llava_qwen", "LlavaQwenForCausalLM"),
        "llama": ("llava_llama", "LlavaLlamaForCausalLM"),
    },
}
"""Layout -> family of the language model -> `model_type` and architecture."""
_READERS = {"ross": "the reference", "original-llava": "the first LLaVA code"}
_OF_RECONSTRUCTION = ("ross_", "mm_inv_", "use_mm_inv_", "mm_pixel_", "decode_image_size", "image_embed_len")
"""Beginnings of the names of fields that only the reference has."""
_POINTERS = {"vision": "mm_vision_tower", "autoencoder": "mm_pixel_decoder"}
"""Component -> field of a full checkpoint's config.json that names a folder or hub id with its settings."""


def _component_fields(model: Described, name: str) -> dict[str, Any]:
    """Fields of a full checkpoint's config.json that describe a component."""
    config, origin = model.config, model.foreign[name].get("origin")
    if name == "vision":
        # The reference ignores mm_vision_select_layer for SigLIP, import reads this one.
        other = config.vision.kind == "siglip" and config.vision.layers_used != config.vision.num_layers - 1
        return {
            **({"vision_feature_layer": config.vision.select_layer} if other else {}),
            "mm_vision_tower": origin,
            "mm_vision_select_layer": config.vision.select_layer,
            "mm_vision_select_feature": "patch",
            "mm_hidden_size": config.vision.hidden_size,
            "image_embed_len": config.vision.num_tokens,
            "decode_image_size": config.target_size,
            "image_mean": list(config.image_mean),
            "image_std": list(config.image_std),
        }
    if name == "projector":
        return {"use_mm_proj": True, "mm_projector_type": _projector_type(model)}
    if name == "denoiser":
        own = {"num_heads": NUM_HEADS, "prediction": "epsilon", "schedule": "cosine"}
        found = {f"mm_inv_{name}": getattr(config.denoiser, name) for name in own}
        return {name: value for name, value in found.items() if value != own[name.removeprefix("mm_inv_")]} | {
            "use_mm_inv_proj": True,
            "mm_inv_projector_type": f"denoiser_vit{config.denoiser.depth}x",
            "mm_inv_hidden_size": config.denoiser.latent_size,
        }
    return {"mm_pixel_decoder": origin}


_FIELDS = {
    "vision": (
        *("mm_vision_", "vision_feature_layer", "mm_hidden_size", "image_embed_len"),
        *("image_mean", "image_std", "decode_image_size"),
    ),
    "projector": ("use_mm_proj", "mm_projector_"),
    "denoiser": ("use_mm_inv_proj", "mm_inv_"),
    "autoencoder": ("mm_pixel_decoder",),
}
"""Component -> beginnings of the names of its fields in a full checkpoint's config.json."""


def settings_without(settings: dict[str, Any], without: Collection[str]) -> dict[str, Any]:
    """Removes what a full checkpoint's config.json says about the components left out.

    A regressor takes the denoiser's place. A run that trained one may have started from a checkpoint with a denoiser,
    whose config.json still describes it. `ross_enable` makes the reference compute the reconstruction loss, which needs
    denoiser and autoencoder.
    """
    names = {"denoiser" if name == "regressor" else name for name in without}
    gone = tuple(begin for name in names for begin in _FIELDS.get(name, ()))
    kept = {name: value for name, value in settings.items() if not name.startswith(gone)}
    return kept | {"ross_enable": False} if names & {"denoiser", "autoencoder"} else kept


def _projector_type(model: Described) -> str:
    projector = model.config.projector
    if projector.kind == "identity":
        return "identity"
    numbered = "0.weight" in (model.foreign["projector"].get("keys") or {})  # LLaVA's mlp1x_gelu: a list of one layer
    return "linear" if projector.depth == 1 and not numbered else f"mlp{projector.depth}x_gelu"


def copy_files(folders: list[Path], target: Path, names: Collection[str] | None = None) -> None:
    """Copies extra files: all, or only `names`. Where two folders have a file of the same name, the first one's."""
    for folder in reversed(folders):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if path.is_file() and (names is None or path.name in names):
                copy_file(path, target / path.name)


def copy_tokenizer(files: Path, target: Path) -> None:
    """Copies the model's tokenizer, in place of what other sources of the model had beside their weights."""
    folder = find_tokenizer(files)
    if folder is not None:
        save_tokenizer(folder, target)


def write_config(folder: Path, settings: dict[str, Any], dtype: str | None) -> None:
    """Writes config.json with `dtype`, if it has a dtype. A file that says the same already keeps its bytes."""
    for name in ("torch_dtype", "dtype"):
        if dtype and name in settings:
            settings = {**settings, name: dtype}
    path = folder / "config.json"
    if not path.is_file() or read_json(path) != settings:
        path.write_text(json.dumps(settings, indent=2) + "\n")
