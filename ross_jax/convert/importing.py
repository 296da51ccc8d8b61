"""Import: foreign checkpoints to a model directory, or straight into memory. Tensors stream, one layer at a time."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ross_jax import checkpoints
from ross_jax.checkpoints import StreamedLeaf
from ross_jax.config import ConfigError, UserError, thaw
from ross_jax.convert import autoencoder, denoiser, known, language, projector, vision
from ross_jax.convert.mapping import ConversionError, Piece, Table, flatten, match, unflatten
from ross_jax.convert.safetensors_writer import SafetensorsWriter
from ross_jax.convert.sources import ROSS_FAMILIES, Source, open_source, read_json, resolve_settings
from ross_jax.convert.tensors import TensorFiles
from ross_jax.models.denoiser import NUM_HEADS
from ross_jax.models.ross import RossConfig, abstract_params

Progress = Callable[[str], None]

TABLES: dict[str, Callable[[Any], Table]] = {
    "vision": vision.table,
    "projector": projector.table,
    "language": language.table,
    "denoiser": denoiser.table,
    "autoencoder": autoencoder.table,
}
SCOPES = {
    "vision": "model.vision_tower.vision_tower.",
    "projector": "model.mm_projector.",
    "denoiser": "model.mm_inv_projector.net.",
    "autoencoder": "model.pixel_decoder.pixel_decoder.",
    "language": "",
}
"""Where a full Ross checkpoint keeps each component; what lies nowhere else belongs to the language model."""
_FLOATS = ("F32", "F16", "BF16")
_REFUSED = {
    "mm_use_im_start_end": (False, None),
    "mm_patch_merge_type": ("flat", None),
    "mm_vision_select_feature": ("patch", None),
    "image_aspect_ratio": ("pad", "square", "crop", None),
}
"""Settings of a full checkpoint that change what is computed -> the values that we compute."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One component of one source.

    Attributes:
      scope: prefix of the component's keys in the source's layout.
      keys: the component's keys, without the scope.
      prefix: what of each key is not in the table, below the scope (`vision_model.`).
      settings: its own config.json, if it has one, and the folder that came from.
    """

    component: str
    source: Source
    files: TensorFiles
    scope: str
    keys: tuple[str, ...]
    prefix: str = ""
    settings: dict[str, Any] | None = None
    folder: Path | None = None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every key below scope and prefix."""
        return {
            key.removeprefix(self.prefix): self.files[self.scope + key].shape
            for key in self.keys
            if key.startswith(self.prefix)
        }


@dataclasses.dataclass
class Plan:
    """An import, checked against headers, before any tensor is read.

    Attributes:
      leaves: component -> our path -> [(piece, its full key)].
      unused: component -> keys kept aside, without the scope.
      copies: (component, key, the key it must equal), full keys.
      problems: found so far.
    """

    config: RossConfig
    sources: list[Source]
    parts: dict[str, Part]
    leaves: dict[str, dict[str, list[tuple[Piece, str]]]]
    unused: dict[str, list[str]]
    copies: list[tuple[str, str, str]]
    problems: list[str]

    def close(self) -> None:
        """Closes the files."""
        for source in self.sources:
            for files in source.files:
                files.close()


def plan_import(
    origins: list[str],
    vision_tower: Path | None = None,
    autoencoder_folder: Path | None = None,
    whole_tower: bool = False,
    num_heads: int = NUM_HEADS,
) -> Plan:
    """Opens foreign checkpoints and holds their keys against the tables.

    Args:
      origins: folders or hub ids; together they make one model, each component from one of them.
      vision_tower, autoencoder_folder: folders with the config.json of what a full checkpoint only points to.
      whole_tower: keep all layers of the vision tower, above the selected one too.
      num_heads: of the denoiser; no file records them.

    Raises:
      UserError: nothing that can be read, or settings that we do not compute.
    """
    sources = [open_source(origin) for origin in origins]
    parts: dict[str, Part] = {}
    configs: dict[str, Any] = {}
    for source in sources:
        found, settings = _read_source(source, vision_tower, autoencoder_folder, num_heads)
        for part in found:
            if part.component in parts:
                other = parts[part.component].source.origin
                raise UserError(f"both {other} and {source.origin} hold a {part.component} component; name one of them")
            parts[part.component] = part
        configs |= settings
    if whole_tower and "vision" in configs:
        configs["vision"] = dataclasses.replace(configs["vision"], select_layer=-1)
    try:
        config = RossConfig(**configs)
    except ValueError as error:
        raise ConfigError(f"{' + '.join(origins)}: components do not fit together: {error}") from error
    return _match_parts(config, sources, parts)


def _read_source(
    source: Source, vision_tower: Path | None, autoencoder_folder: Path | None, num_heads: int
) -> tuple[list[Part], dict[str, Any]]:
    """The parts of a source and the fields of `RossConfig` that it decides."""
    where = str(source.folder / "config.json")
    if source.kind == "vision":
        return _read_tower(source)
    if source.kind in ("language", "autoencoder"):
        files = source.files[0]
        part = Part(source.kind, source, files, "", tuple(files), "", source.settings, source.folder)
        if source.kind == "language":
            return [part], {"language": language.language_config(source.settings["model_type"], source.settings, where)}
        return [part], {"autoencoder": autoencoder.autoencoder_config(source.settings, where)}
    parts = {part.component: part for files in source.files for part in _split(source, files)}
    configs: dict[str, Any] = {}
    settings = source.settings
    if settings:
        _refuse_unsupported(settings, where)
    if source.kind == "ross":
        family = ROSS_FAMILIES[settings["model_type"]]
        configs["language"] = language.language_config(family, settings, where)
        if settings.get("mm_projector_type") == "identity":
            sizes = settings.get("mm_hidden_size", 0), settings["hidden_size"]
            configs["projector"] = projector.projector_config("identity", *sizes, where)
    if "vision" in parts:
        found, folder = resolve_settings(
            settings.get("mm_vision_tower"),
            source.folder,
            known.VISION_TOWERS,
            vision_tower,
            "mm_vision_tower",
            "--vision-tower",
        )
        if found.get("model_type") not in vision.model_types():
            raise ConfigError(
                f"{folder or where}: model_type {found.get('model_type')!r} is no vision tower that we read"
            )
        parts["vision"] = dataclasses.replace(parts["vision"], settings=found, folder=folder)
        select = settings.get("mm_vision_select_layer", -2)
        configs["vision"] = vision.vision_config(found, str(folder or where), select)
        configs |= _normalisation(settings, folder, configs["vision"].kind)
    if "autoencoder" in parts:
        found, folder = resolve_settings(
            settings.get("mm_pixel_decoder"),
            source.folder,
            known.AUTOENCODERS,
            autoencoder_folder,
            "mm_pixel_decoder",
            "--autoencoder",
        )
        parts["autoencoder"] = dataclasses.replace(parts["autoencoder"], settings=found, folder=folder)
        configs["autoencoder"] = autoencoder.autoencoder_config(found, str(folder or where))
    if "projector" in parts:
        configs["projector"] = _read_projector(parts["projector"], settings, where)
    if "denoiser" in parts:
        kind = settings.get("mm_inv_projector_type")
        configs["denoiser"] = denoiser.read_denoiser_config(parts["denoiser"].shapes(), kind, num_heads)
    if "vision" in configs:
        _check_picture_settings(settings, configs["vision"].grid, where)
    return list(parts.values()), configs


def _split(source: Source, files: TensorFiles) -> Iterator[Part]:
    """The components of a full checkpoint or an adapter file, by the scope of their keys."""
    left = list(files)
    for component, scope in SCOPES.items():
        keys = tuple(key.removeprefix(scope) for key in left if key.startswith(scope))
        left = [key for key in left if not key.startswith(scope)]
        if not keys:
            continue
        prefix = ""
        if component == "vision":
            prefix = next((p for p in vision.PREFIXES if p + vision.ANCHOR in keys), vision.PREFIXES[0])
        yield Part(component, source, files, scope, keys, prefix, source.settings, source.folder)


def _read_tower(source: Source) -> tuple[list[Part], dict[str, Any]]:
    """A SigLIP/CLIP checkpoint, whole or vision only."""
    files = source.files[0]
    config = vision.vision_config(source.settings, str(source.folder / "config.json"))
    prefix = next((p for p in vision.PREFIXES if p + vision.ANCHOR in files), vision.PREFIXES[0])
    part = Part("vision", source, files, "", tuple(files), prefix, source.settings, source.folder)
    return [part], {"vision": config, **_normalisation({}, source.folder, config.kind)}


def _normalisation(settings: Mapping[str, Any], folder: Path | None, kind: str) -> dict[str, Any]:
    """Mean and std of the pictures: of the checkpoint, else of the tower's processor, else as published."""
    if "image_mean" not in settings and folder is not None and (folder / "preprocessor_config.json").is_file():
        settings = read_json(folder / "preprocessor_config.json")
    mean, std = vision.NORMALISATION[kind]
    return {
        "image_mean": tuple(settings.get("image_mean") or mean),
        "image_std": tuple(settings.get("image_std") or std),
    }


def _read_projector(part: Part, settings: Mapping[str, Any], where: str):
    found = projector.read_projector_config(part.shapes())
    if "mm_projector_type" not in settings:
        return found
    kind, width = settings["mm_projector_type"], settings.get("hidden_size", found.out_size)
    return projector.projector_config(kind, settings.get("mm_hidden_size", found.in_size), width, where)


def _refuse_unsupported(settings: Mapping[str, Any], where: str) -> None:
    problems = [
        f"{name} {settings[name]!r} is not supported; {[v for v in values if v is not None]} is"
        for name, values in _REFUSED.items()
        if settings.get(name) not in values
    ]
    if problems:
        raise ConfigError(f"{where}: {'; '.join(problems)}")


def _check_picture_settings(settings: Mapping[str, Any], grid: int, where: str) -> None:
    """The picture sizes that a Ross config repeats must be those that its tower implies."""
    implied = {"image_embed_len": grid**2, "decode_image_size": grid * 16}
    problems = [
        f"{name} is {settings[name]}, but the vision tower implies {value}"
        for name, value in implied.items()
        if settings.get(name) not in (None, value)
    ]
    if problems:
        raise ConfigError(f"{where}: {'; '.join(problems)}")


def _match_parts(config: RossConfig, sources: list[Source], parts: dict[str, Part]) -> Plan:
    plan = Plan(config, sources, parts, {}, {}, [], [])
    trees = abstract_params(config)
    for component, part in parts.items():
        shapes = {path: leaf.shape for path, leaf in flatten(trees.get(component, {})).items()}
        table = TABLES[component](getattr(config, component))
        result = match(table, shapes, part.shapes())
        outside = [key for key in part.keys if not key.startswith(part.prefix)]
        kept = {key for key in outside if component == "vision" and vision.is_outside(key)}
        plan.problems += [f"{part.source.origin}: {part.scope}{part.prefix}: {problem}" for problem in result.problems]
        plan.problems += [f"{part.source.origin}: unmapped: {part.scope}{key}" for key in outside if key not in kept]
        plan.unused[component] = [part.prefix + key for key in result.unused] + sorted(kept)
        full = part.scope + part.prefix
        plan.copies += [(component, full + key, full + of) for key, of in result.copies]
        leaves: dict[str, list[tuple[Piece, str]]] = {}
        for piece, key in result.pieces:
            info = part.files[full + key]
            if info.tag not in _FLOATS:
                plan.problems.append(f"{info.file}: {full + key} has dtype {info.tag}; {', '.join(_FLOATS)} are read")
            leaves.setdefault(piece.path, []).append((piece, full + key))
        plan.leaves[component] = leaves
    return plan


def is_finite(values: np.ndarray) -> bool:
    """Whether every number is; in pieces, so that hardly any memory is used."""
    flat = values.reshape(-1)
    return all(bool(np.isfinite(flat[i : i + 2**22]).all()) for i in range(0, flat.size, 2**22))


def _streamed(plan: Plan, component: str, path: str) -> StreamedLeaf:
    """One leaf; its tensors are read, checked and re-laid when asked for."""
    files, pieces = plan.parts[component].files, plan.leaves[component][path]
    tags = {files[key].tag for _, key in pieces}
    # Layers of different dtypes share a leaf in float32, which holds each exactly.
    dtype = files[pieces[0][1]].dtype if len(tags) == 1 else np.dtype(np.float32)
    inner = pieces[0][0].transform.to_ours(np.broadcast_to(np.int8(0), pieces[0][0].shape)).shape
    stacked = pieces[0][0].layer is not None
    shape = (len(pieces), *inner) if stacked else inner

    def parts() -> Iterator[tuple[int | None, np.ndarray]]:
        for piece, key in pieces:
            values = files.read(key)
            if not is_finite(values):
                plan.problems.append(f"{files[key].file}: {key} holds values that are not finite")
            yield piece.layer, np.ascontiguousarray(piece.transform.to_ours(values)).astype(dtype, copy=False)

    return StreamedLeaf(shape, dtype, parts)


def _check_copies(plan: Plan) -> None:
    for component, key, of in plan.copies:
        files = plan.parts[component].files
        if not np.array_equal(files.read_raw(key), files.read_raw(of)):
            plan.problems.append(f"{key} differs from {of}, although tie_word_embeddings is true")


def _raise_problems(plan: Plan) -> None:
    """Stops an import whose headers do not fit; reads it all first, so that one error names everything."""
    if not plan.problems:
        return
    for component, leaves in plan.leaves.items():
        for path in leaves:
            for _ in _streamed(plan, component, path).parts():
                pass
    raise ConversionError(_origins(plan), plan.problems)


def _origins(plan: Plan) -> str:
    return " + ".join(source.origin for source in plan.sources)


def load(plan: Plan) -> dict[str, Any]:
    """The parameter tree in memory, as NumPy arrays in the dtypes of the files.

    Raises:
      ConversionError: everything that does not fit.
    """
    _check_copies(plan)
    _raise_problems(plan)
    tree: dict[str, Any] = {}
    for component, leaves in plan.leaves.items():
        flat = {}
        for path in leaves:
            leaf = _streamed(plan, component, path)
            flat[path] = np.empty(leaf.shape, leaf.dtype)
            for layer, values in leaf.parts():
                flat[path][... if layer is None else layer] = values
        tree[component] = unflatten(flat)
    if plan.problems:
        raise ConversionError(_origins(plan), plan.problems)
    return tree


def write(plan: Plan, output: Path, progress: Progress = lambda _: None) -> None:
    """Writes a model directory; complete, or not at all.

    Raises:
      ConversionError: everything that does not fit.
      CheckpointError: the output exists or cannot be written.
    """
    with checkpoints.complete_directory(output) as folder:
        _check_copies(plan)
        _raise_problems(plan)
        leaves = {c: {path: _streamed(plan, c, path) for path in paths} for c, paths in plan.leaves.items()}
        total = sum(leaf.nbytes for flat in leaves.values() for leaf in flat.values())
        _Reporter(total, progress).watch(leaves)
        tree = {component: unflatten(flat) for component, flat in leaves.items() if flat}
        checkpoints.save_streamed(folder / "params", tree)
        if plan.problems:
            raise ConversionError(_origins(plan), plan.problems)
        _write_unused(plan, folder / "unused")
        _write_files(plan, folder / "files")
        checkpoints.write_manifest(folder, {"config": thaw(plan.config), "foreign": _foreign(plan)})


class _Reporter:
    """Says how far a conversion is, leaf by leaf."""

    def __init__(self, total: int, progress: Progress):
        self.total, self.done, self.progress = total, 0, progress

    def watch(self, leaves: dict[str, dict[str, StreamedLeaf]]) -> None:
        """Replaces each leaf by one that reports when it is done."""
        for component, flat in leaves.items():
            for path, leaf in flat.items():
                flat[path] = dataclasses.replace(leaf, parts=self._reporting(leaf, f"{component}/{path}"))

    def _reporting(self, leaf: StreamedLeaf, name: str):
        def parts():
            yield from leaf.parts()
            self.done += leaf.nbytes
            self.progress(f"{self.done / 1e9:8.2f} of {self.total / 1e9:.2f} GB  {name}")

        return parts


def _write_unused(plan: Plan, folder: Path) -> None:
    for component, keys in plan.unused.items():
        part = plan.parts[component]
        if not keys:
            continue
        infos = {key: (part.files[part.scope + key].tag, part.files[part.scope + key].shape) for key in keys}
        with SafetensorsWriter(folder, component, infos, max_shard_bytes=2**62) as writer:
            for key in keys:
                writer.write_raw(key, part.files.read_raw(part.scope + key))


def _write_files(plan: Plan, folder: Path) -> None:
    """Configs and passengers: of full checkpoints under `ross/`, of components under their names."""
    for source in plan.sources:
        target = folder / ("ross" if source.kind in ("ross", "adapters") else source.kind)
        target.mkdir(parents=True, exist_ok=True)
        for path in source.passengers():
            shutil.copyfile(path, target / path.name)
        if source.settings:
            shutil.copyfile(source.folder / "config.json", target / "config.json")
    for component, part in plan.parts.items():
        own = component in ("vision", "autoencoder") and part.source.kind == "ross"
        if own and part.settings:
            target = folder / component
            target.mkdir(parents=True, exist_ok=True)
            (target / "config.json").write_text(json.dumps(part.settings, indent=2) + "\n")
            processor = part.folder / "preprocessor_config.json" if part.folder else None
            if processor and processor.is_file():
                shutil.copyfile(processor, target / processor.name)


def _foreign(plan: Plan) -> dict[str, Any]:
    """What export needs to write the same tensors again: their names, dtypes and where they came from."""
    foreign = {}
    for component, part in plan.parts.items():
        unused = set(plan.unused[component])
        foreign[component] = {
            "origin": part.source.origin,
            "layout": part.source.kind,
            "prefix": part.prefix,
            "keys": {key: part.files[part.scope + key].tag for key in part.keys if key not in unused},
        }
    return foreign
