"""Splits the sources of an import into components, and reads the config of each."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ross_jax.config import ConfigError, UserError, from_dict, to_dict
from ross_jax.convert import autoencoder, denoiser, fields, generation, known, language, projector, vision
from ross_jax.convert.mapping import collecting
from ross_jax.convert.settings import Settings
from ross_jax.convert.sources import ROSS_FAMILIES, Source, read_json, resolve_settings
from ross_jax.convert.tensors import TensorFiles
from ross_jax.models.denoiser import DenoiserConfig
from ross_jax.models.ross import TARGET_PIXELS
from ross_jax.models.vision import VisionConfig

SCOPES = {
    "vision": "model.vision_tower.vision_tower.",
    "projector": "model.mm_projector.",
    "denoiser": "model.mm_inv_projector.net.",
    "autoencoder": "model.pixel_decoder.pixel_decoder.",
    "language": "",
}
"""Component -> prefix of its keys in a full Ross checkpoint. All other keys belong to the language model."""
_INVERSE = "model.mm_inv_projector."
_POINTERS = {
    "vision": ("mm_vision_tower", "--vision-tower", known.VISION_TOWERS),
    "autoencoder": ("mm_pixel_decoder", "--autoencoder", known.AUTOENCODERS),
}
"""Component -> (field, flag, published settings by hub id).

A full checkpoint has no settings for these components: the field of its config.json points to them, and the flag of
`launch/convert.py import` names a folder instead.
"""


_NAMES = {"vision": "vision tower", "autoencoder": "autoencoder"}


@dataclasses.dataclass(frozen=True)
class Part:
    """One component in one source.

    A tensor's key is scope + prefix + the key in the component's table:
    `model.vision_tower.vision_tower.` + `vision_model.` + `embeddings.class_embedding`.

    Attributes:
      component: name of the component.
      source: checkpoint that holds it.
      files: weights that hold it.
      scope: prefix that the layout of the source gives to the component.
      keys: the component's keys, without the scope.
      prefix: prefix that the component's own library gives to its keys.
      settings: parsed config.json of the component, if it has one of its own.
      folder: where the settings are from.
    """

    component: str
    source: Source
    files: TensorFiles
    scope: str
    keys: tuple[str, ...]
    prefix: str = ""
    settings: Mapping[str, Any] | None = None
    folder: Path | None = None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Key below scope and prefix -> shape."""
        return {
            key.removeprefix(self.prefix): self.files[self.scope + key].shape
            for key in self.keys
            if key.startswith(self.prefix)
        }


def split(sources: Sequence[Source], errors: list[UserError]) -> dict[str, Part]:
    """Finds the components of all sources.

    Args:
      sources: opened checkpoints.
      errors: gets an error for each component that is there twice, and for each key that belongs to none.
    """
    parts: dict[str, Part] = {}
    for source in sources:
        for files in source.files:
            for part in _split(source, files, errors):
                if part.component in parts:
                    places = f"{_place(parts[part.component])} and {_place(part)}"
                    errors.append(
                        UserError(f"{places} both hold the component {part.component}; name only one of them")
                    )
                parts[part.component] = part
    return parts


def _place(part: Part) -> str:
    return next((str(info.file) for info in part.files.values()), part.source.origin)


def _split(source: Source, files: TensorFiles, errors: list[UserError]) -> list[Part]:
    if source.kind not in ("ross", "adapters"):
        prefix = _tower_prefix(files) if source.kind in ("vision", "teacher") else ""
        return [Part(source.kind, source, files, "", tuple(files), prefix, source.settings, source.folder)]
    parts, left = [], list(files)
    for component, scope in SCOPES.items():
        keys = tuple(key.removeprefix(scope) for key in left if key.startswith(scope))
        left = [key for key in left if not key.startswith(scope)]
        if component == "language" and source.kind == "adapters":
            errors += [UserError(f"{files[key].file}: {key} belongs to no adapter") for key in keys]
        elif keys or component == "language":
            prefix = _tower_prefix(keys) if component == "vision" else ""
            parts.append(Part(component, source, files, scope, keys, prefix))
    return parts


def _tower_prefix(keys: Sequence[str] | TensorFiles) -> str:
    found = (prefix for prefix in vision.PREFIXES if any(prefix + anchor in keys for anchor in vision.ANCHORS))
    return next(found, vision.PREFIXES[0])


def read_configs(
    sources: Sequence[Source], parts: dict[str, Part], folders: Mapping[str, Path | None], num_heads: int
) -> tuple[dict[str, Any], list[UserError], list[str]]:
    """Reads the configs of all components.

    Args:
      sources: opened checkpoints.
      parts: components by name. A part without settings that a config.json points to is replaced by one with them.
      folders: component -> folder with its config.json, if the user named one.
      num_heads: attention heads of the denoiser.

    Returns:
      Fields of `RossConfig`, everything that is wrong, and notes for the user.
    """
    readers = {
        "vision": _read_tower,
        "language": _read_language,
        "autoencoder": _read_autoencoder,
        "projector": _read_projector,
        "denoiser": functools.partial(_read_denoiser, num_heads=num_heads),
        "teacher": _read_teacher,
    }
    errors: list[UserError] = []
    configs: dict[str, Any] = {}
    about = _about(sources)
    for component, part in parts.items():
        with collecting(errors):
            if component in _POINTERS and part.settings is None:
                part = parts[component] = _pointed_to(part, about, folders.get(component))
            configs |= readers[component](part, about)
    if "projector" not in parts and about.text("mm_projector_type", "") == "identity":
        sizes = about.size("mm_hidden_size"), about.size("hidden_size")
        with collecting(errors):
            configs["projector"] = projector.projector_config("identity", *sizes, about.where)
    if "vision" in configs:
        grid = configs["vision"].grid
        about.only("image_embed_len", grid**2)
        about.only("decode_image_size", grid * TARGET_PIXELS)
    with collecting(errors):
        about.check()
    for one in _beside(sources):
        with collecting(errors):
            name = Path(one.where).name
            fields.FILES[name].check(one)
            if name == generation.GENERATION_CONFIG:
                one.ids("eos_token_id")
            one.check()
    return configs, errors, [] if errors else _absent(parts, about) + _ignored(sources, parts)


def _ignored(sources: Sequence[Source], parts: Mapping[str, Part]) -> list[str]:
    """Notes on the fields of all configs that have no effect, one for each file."""
    kinds = {"language": fields.LANGUAGE, "vision": fields.VISION, "teacher": fields.VISION}
    notes = []
    for component, part in parts.items():
        if component in kinds and part.settings is not None and part.folder is not None:
            notes += kinds[component].ignored(part.settings, str(part.folder / "config.json"))
            if "vision_config" in part.settings:
                inner = part.settings["vision_config"]
                notes += fields.VISION.ignored(inner, f"{part.folder / 'config.json'}: vision_config")
        processor = _processor(part) if component in ("vision", "teacher") else None
        if processor:
            notes += fields.PROCESSOR.ignored(processor.values, processor.where)
    for source in sources:
        if source.kind in ("ross", "adapters") and source.settings:
            left = {name: value for name, value in source.settings.items() if not fields.LANGUAGE.knows(name)}
            notes += fields.FULL.ignored(left, str(source.folder / "config.json"))
    for one in _beside(sources):
        notes += fields.FILES[Path(one.where).name].ignored(one.values, one.where)
    return notes


def _beside(sources: Sequence[Source]) -> Iterator[Settings]:
    """Files beside config.json whose fields are known. One that is no JSON is copied, and refused when it is needed."""
    for path in (path for source in sources for path in source.extra_files() if path.name in fields.FILES):
        with contextlib.suppress(UserError):
            yield Settings(read_json(path), str(path))


def _absent(parts: Mapping[str, Part], about: Settings) -> list[str]:
    """Notes on components that a full checkpoint names and no source holds."""
    needed = {"vision": "language", "autoencoder": "denoiser"}
    notes = []
    for component, user in needed.items():
        named = about.values.get(_POINTERS[component][0])
        if user in parts and component not in parts and isinstance(named, str) and named:
            effect = "the model will not see images" if component == "vision" else "it will not reconstruct images"
            notes.append(
                f"{about.where}: names the {_NAMES[component]} {named}, whose weights are not in the checkpoint, so "
                f"{effect}. Add --from {named}, or --from with the folder of these weights"
            )
    return notes


def _about(sources: Sequence[Source]) -> Settings:
    """Merges the config.json files of full checkpoints and adapters, and refuses settings that are not supported."""
    found = [source for source in sources if source.kind in ("ross", "adapters") and source.settings]
    values = {name: value for source in found for name, value in source.settings.items()}
    about = Settings(values, " + ".join(str(source.folder / "config.json") for source in found))
    for source in found:
        one = Settings(source.settings, about.where, problems=about.problems)
        fields.FULL.check(one)
        kind = one.text("mm_inv_projector_type", "denoiser")
        other = any(key.startswith(_INVERSE) for files in source.files for key in files)
        if other and not kind.startswith("denoiser"):
            one.refuse("mm_inv_projector_type", "denoiser_vitNx")
    return about


def _pointed_to(part: Part, about: Settings, folder: Path | None) -> Part:
    field, flag, published = _POINTERS[part.component]
    settings, folder = resolve_settings(about.values.get(field), part.source.folder, published, folder, field, flag)
    return dataclasses.replace(part, settings=settings, folder=folder)


def _where(part: Part, about: Settings) -> str:
    return str(part.folder / "config.json") if part.folder else about.where


def _read_tower(part: Part, about: Settings) -> dict[str, Any]:
    """Reads the vision encoder and how its images are normalised."""
    where = _where(part, about)
    if part.settings.get("model_type") not in vision.model_types():
        kind = part.settings.get("model_type")
        raise ConfigError(f"{where}: model_type {kind!r} is no vision tower; expected one of {vision.model_types()}")
    config = vision.vision_config(part.settings, where)
    name = "vision_feature_layer" if "vision_feature_layer" in about.values else "mm_vision_select_layer"
    if config.kind != "siglip" or name == "vision_feature_layer":  # the reference ignores its setting for SigLIP
        try:
            config = dataclasses.replace(config, select_layer=about.integer(name, -2))
        except ValueError as error:
            raise ConfigError(f"{about.where}: {name.removesuffix('select_layer')}{error}") from error
    mean, std = _normalisation(part, config.kind, about)
    resample = _resample(part, config, about)
    return {"vision": config, "image_mean": mean, "image_std": std, "image_resample": resample}


def _read_teacher(part: Part, about: Settings) -> dict[str, Any]:
    """Reads the teacher. The settings of full checkpoints, `about`, do not describe it."""
    where = _where(part, about)
    config = vision.teacher_config(part.settings, where)
    mean, std = _normalisation(part, config.kind, Settings({}, where))
    return {"teacher": config, "teacher_mean": mean, "teacher_std": std}


def _normalisation(part: Part, kind: str, about: Settings) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of images: from the checkpoint, else the tower's processor, else as published."""
    processor = _processor(part)
    read = about if "image_mean" in about.values or processor is None else processor
    if read is processor:
        fields.PROCESSOR.check(read)
    mean, std = vision.NORMALISATION[kind]
    found = read.numbers("image_mean", mean), read.numbers("image_std", std)
    if read is not about:
        read.check()
    return found


def _processor(part: Part) -> Settings | None:
    """The preprocessor_config.json of a vision encoder, if it has one."""
    path = part.folder / "preprocessor_config.json" if part.folder else None
    if part.source.within:
        found = part.source.contents.get("preprocessor_config.json")
        return None if found is None else Settings(found, str(path))
    return Settings(read_json(path), str(path)) if path and path.is_file() else None


def _resample(part: Part, config: VisionConfig, about: Settings) -> int:
    """Number of Pillow's filter with which images are resized. Refuses a processor that makes other images."""
    read = _processor(part)
    if read is None:
        return known.published_resample(about.values.get("mm_vision_tower"))
    fields.PROCESSOR.check(read)
    resample = read.integer("resample", 3)
    if resample not in range(6):
        read.refuse("resample", "the number of one of Pillow's filters, 0 to 5")
    crops = config.kind == "clip"
    if config.kind != "dinov2":  # DINOv2 is trained at more sizes than its processor has
        size = {name: config.image_size for name in (("shortest_edge",) if crops else ("height", "width"))}
        read.only("size", size, *([config.image_size] if crops or not read.values.get("do_center_crop") else []))
        read.only("do_center_crop", crops)
        if crops:
            read.only("crop_size", config.image_size, {"height": config.image_size, "width": config.image_size})
    read.check()
    return resample


def _read_language(part: Part, about: Settings) -> dict[str, Any]:
    settings = part.source.settings
    family = ROSS_FAMILIES.get(settings["model_type"], settings["model_type"])
    return {"language": language.language_config(family, settings, str(part.source.folder / "config.json"))}


def _read_autoencoder(part: Part, about: Settings) -> dict[str, Any]:
    return {"autoencoder": autoencoder.autoencoder_config(part.settings, _where(part, about))}


def _read_projector(part: Part, about: Settings) -> dict[str, Any]:
    found = projector.read_projector_config(part.shapes())
    kind = about.text("mm_projector_type", "")
    if not kind:
        return {"projector": found}
    sizes = about.size("mm_hidden_size", found.in_size), about.size("hidden_size", found.out_size)
    return {"projector": projector.projector_config(kind, *sizes, about.where)}


def _read_denoiser(part: Part, about: Settings, num_heads: int) -> dict[str, Any]:
    kind = about.text("mm_inv_projector_type", "") or None
    num_heads = about.size("mm_inv_num_heads", num_heads)
    config = denoiser.read_denoiser_config(part.shapes(), kind, num_heads)
    kinds = {name: about.text(f"mm_inv_{name}", getattr(config, name)) for name in ("prediction", "schedule")}
    return {"denoiser": from_dict(DenoiserConfig, {**to_dict(config), **kinds}, f"{about.where}: mm_inv_")}
