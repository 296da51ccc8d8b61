"""Import of foreign checkpoints into a model directory or into memory. Tensors stream, one layer at a time."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ross_jax import checkpoints, console
from ross_jax.checkpoints import StreamedLeaf
from ross_jax.config import ConfigError, UserError, to_dict
from ross_jax.convert import autoencoder, denoiser, language, llava_source, projector, vision
from ross_jax.convert.dtypes import DTYPES
from ross_jax.convert.mapping import ConversionError, Piece, Table, collecting, match, raise_all
from ross_jax.convert.parts import SCOPES as SCOPES
from ross_jax.convert.parts import Part, read_configs, split
from ross_jax.convert.safetensors_writer import SafetensorsWriter
from ross_jax.convert.sources import Source, open_source, open_teacher
from ross_jax.convert.tensors import TensorFiles
from ross_jax.directories import complete_directory
from ross_jax.models.denoiser import NUM_HEADS
from ross_jax.models.ross import RossConfig, abstract_params
from ross_jax.storage import copy_file, location
from ross_jax.tree import flatten, unflatten

Progress = Callable[[str], None]

TABLES: dict[str, Callable[[Any], Table]] = {
    "vision": vision.table,
    "projector": projector.table,
    "language": language.table,
    "denoiser": denoiser.table,
    "autoencoder": autoencoder.table,
    "teacher": vision.table,
}
"""Component -> function that makes its table from its config."""
_FLOATS = ("F32", "F16", "BF16")


@dataclasses.dataclass
class Plan:
    """An import for which only headers were read.

    Attributes:
      config: config of the model.
      sources: opened checkpoints.
      parts: component -> where it is.
      leaves: component -> path of a parameter -> [(piece, full key)].
      unused: component -> keys to keep aside, without the scope.
      copies: (component, full key, full key of the tensor that it must equal).
      problems: everything found so far that does not fit.
      notes: what the user should know although it fits. `write` reports it.
    """

    config: RossConfig
    sources: list[Source]
    parts: dict[str, Part]
    leaves: dict[str, dict[str, list[tuple[Piece, str]]]]
    unused: dict[str, list[str]]
    copies: list[tuple[str, str, str]]
    problems: list[str]
    notes: list[str]

    def close(self) -> None:
        """Closes the weights of all sources."""
        for source in self.sources:
            for files in source.files:
                files.close()


def plan_import(
    origins: list[str],
    vision_tower: Path | None = None,
    autoencoder_folder: Path | None = None,
    whole_tower: bool = False,
    num_heads: int = NUM_HEADS,
    teacher: str | None = None,
) -> Plan:
    """Opens foreign checkpoints and compares their keys with the tables.

    Args:
      origins: folders or hub ids. Together they make one model, each component from one of them.
      vision_tower: folder with the config.json of the vision tower, for a full checkpoint that only points to it.
      autoencoder_folder: folder with the config.json of the autoencoder, likewise.
      whole_tower: makes parameters of all layers of the vision tower, even above the selected one.
      num_heads: attention heads of the denoiser, which no file records.
      teacher: folder or hub id of the vision encoder whose features are reconstruction targets.

    Raises:
      UserError: sources that cannot be read, or settings that are not supported.
    """
    where = " + ".join([*origins, *([teacher] if teacher else [])])
    sources: list[Source] = []
    errors: list[UserError] = []
    for origin in origins:
        with collecting(errors):
            sources += llava_source.split(open_source(origin))
    if teacher:
        with collecting(errors):
            sources.append(open_teacher(teacher))
    raise_all(where, errors)
    parts = split(sources, errors)
    folders = {"vision": vision_tower, "autoencoder": autoencoder_folder}
    configs, found, notes = read_configs(sources, parts, folders, num_heads)
    raise_all(where, errors + found)
    if whole_tower and "vision" in configs:
        configs["vision"] = dataclasses.replace(configs["vision"], select_layer=-1)
    try:
        config = RossConfig(**configs)
    except ValueError as error:
        raise ConfigError(f"{where}: components do not fit together: {error}") from error
    return match_parts(config, sources, parts, notes)


def match_parts(config: RossConfig, sources: list[Source], parts: dict[str, Part], notes: Sequence[str] = ()) -> Plan:
    """Compares the keys of all components with the tables of `config`."""
    plan = Plan(config, sources, parts, {}, {}, [], [], list(notes))
    trees = abstract_params(config)
    for component, part in parts.items():
        shapes = {path: leaf.shape for path, leaf in flatten(trees.get(component, {})).items()}
        table = TABLES[component](getattr(config, component))
        result = match(table, shapes, part.shapes())
        outside = [key for key in part.keys if not key.startswith(part.prefix)]
        kept = {key for key in outside if component in ("vision", "teacher") and vision.is_outside(key)}
        plan.problems += [f"{part.source.origin}: {part.scope}{part.prefix}: {problem}" for problem in result.problems]
        plan.problems += [f"{part.source.origin}: unmapped: {part.scope}{key}" for key in outside if key not in kept]
        plan.unused[component] = [part.prefix + key for key in result.unused] + sorted(kept)
        for info, key in ((part.files[part.scope + key], part.scope + key) for key in plan.unused[component]):
            if info.tag not in DTYPES:
                plan.problems.append(f"{info.file}: {key} has dtype {info.tag}; {', '.join(DTYPES)} are kept")
        full = part.scope + part.prefix
        plan.copies += [(component, full + key, full + of) for key, of in result.copies]
        leaves: dict[str, list[tuple[Piece, str]]] = {}
        for piece, key in result.pieces:
            info = part.files[full + key]
            if info.tag not in _FLOATS:
                plan.problems.append(f"{info.file}: {full + key} has dtype {info.tag}; {', '.join(_FLOATS)} are read")
                continue
            leaves.setdefault(piece.path, []).append((piece, full + key))
        plan.leaves[component] = leaves
    return plan


def _check_finite(plan: Plan, files: TensorFiles, key: str, values: np.ndarray) -> None:
    if not is_finite(values):
        plan.problems.append(f"{files[key].file}: {key} holds values that are not finite")


def is_finite(values: np.ndarray) -> bool:
    """Whether all values are finite. Works in pieces, so that it needs little memory."""
    flat = values.reshape(-1)
    return all(bool(np.isfinite(flat[i : i + 2**22]).all()) for i in range(0, flat.size, 2**22))


def _streamed(plan: Plan, component: str, path: str) -> StreamedLeaf:
    """Makes a leaf whose tensors are read, checked and transformed when it is saved."""
    files, pieces = plan.parts[component].files, plan.leaves[component][path]
    tags = {files[key].tag for _, key in pieces}
    # Where the dtypes of layers differ, float32 holds the values of all exactly.
    dtype = files[pieces[0][1]].dtype if len(tags) == 1 else np.dtype(np.float32)
    inner = pieces[0][0].transform.from_hf(np.broadcast_to(np.int8(0), pieces[0][0].shape)).shape
    stacked = pieces[0][0].layer is not None
    shape = (len(pieces), *inner) if stacked else inner

    def parts() -> Iterator[tuple[int | None, np.ndarray]]:
        for piece, key in pieces:
            values = files.read(key)
            _check_finite(plan, files, key, values)
            yield piece.layer, np.ascontiguousarray(piece.transform.from_hf(values)).astype(dtype, copy=False)

    return StreamedLeaf(shape, dtype, parts)


def _check_copies(plan: Plan) -> None:
    for component, key, of in plan.copies:
        files = plan.parts[component].files
        if files[of].tag not in _FLOATS:
            continue  # a problem already
        bits = (files.read(name).reshape(-1).view(np.uint8) for name in (key, of))
        if files[key].tag != files[of].tag or not np.array_equal(*bits):
            plan.problems.append(
                f"{key} differs from {of}, although tie_word_embeddings is true; set it to false in config.json if the "
                "model has a head of its own"
            )


def _raise_problems(plan: Plan) -> None:
    """Stops an import whose headers do not fit. Reads all tensors first, so that one error names everything."""
    if not plan.problems:
        return
    for component, leaves in plan.leaves.items():
        for path in leaves:
            for _ in _streamed(plan, component, path).parts():
                pass
        for _ in _unused(plan, component):
            pass
    raise ConversionError(_origins(plan), plan.problems)


def _run(plan: Plan) -> Plan:
    """Copies the plan, with a list of its own for the problems that reading finds: a plan can be used twice."""
    return dataclasses.replace(plan, problems=list(plan.problems))


def _origins(plan: Plan) -> str:
    return " + ".join(source.origin for source in plan.sources)


def load(plan: Plan) -> dict[str, Any]:
    """Reads the parameter tree into memory, as NumPy arrays in the dtypes of the files.

    Raises:
      ConversionError: names everything that does not fit.
    """
    plan = _run(plan)
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
    """Writes a model directory, completely or not at all.

    Args:
      plan: the import.
      output: the directory. It must not exist.
      progress: called with a line of text for each note.

    Raises:
      ConversionError: names everything that does not fit.
      CheckpointError: the output exists or cannot be written.
    """
    with complete_directory(output) as folder:
        fill(plan, folder, progress)


def fill(plan: Plan, folder: Path, progress: Progress = lambda _: None) -> None:
    """Writes the content of a model directory into an empty one; errors as `write`."""
    plan = _run(plan)
    _check_copies(plan)
    _raise_problems(plan)
    for note in plan.notes:
        progress(f"warning: {note}")
    leaves = {c: {path: _streamed(plan, c, path) for path in paths} for c, paths in plan.leaves.items()}
    total = sum(leaf.nbytes for flat in leaves.values() for leaf in flat.values())
    with console.Progress(f"writing {folder}", total, "bytes") as written:
        leaves = {c: {path: _counted(leaf, written) for path, leaf in flat.items()} for c, flat in leaves.items()}
        tree = {component: unflatten(flat) for component, flat in leaves.items() if flat}
        checkpoints.save_streamed(folder / "params", tree)
    _write_unused(plan, folder / "unused")
    if plan.problems:
        raise ConversionError(_origins(plan), plan.problems)
    _write_files(plan, folder / "files")
    manifest = {"config": to_dict(plan.config), "foreign": _foreign(plan)}
    template = next((source.template for source in plan.sources if source.template), None)
    known = {"image_mode": _image_mode(plan), "template": template}
    checkpoints.write_manifest(folder, manifest | {name: value for name, value in known.items() if value})


def _image_mode(plan: Plan) -> str | None:
    """How the checkpoint's images became square; None if no source says it. The reference's default is `square`."""
    modes = [source.settings.get("image_aspect_ratio") for source in plan.sources]
    found = next((mode for mode in modes if mode), None)
    whole = plan.config.vision is not None and any(source.kind == "ross" for source in plan.sources)
    return found or ("square" if whole else None)


def _counted(leaf: StreamedLeaf, written: console.Progress) -> StreamedLeaf:
    """The leaf, which tells `written` when it is saved."""

    def parts():
        yield from leaf.parts()
        written.update(leaf.nbytes)

    return dataclasses.replace(leaf, parts=parts)


def _unused(plan: Plan, component: str) -> Iterator[tuple[str, np.ndarray]]:
    """Reads every tensor kept aside. Like all others they must be finite: if they are not, the files are damaged."""
    part = plan.parts[component]
    for key in plan.unused[component]:
        full = part.scope + key
        if part.files[full].tag not in DTYPES:
            continue  # a problem already
        values = part.files.read(full)
        if part.files[full].tag in _FLOATS:
            _check_finite(plan, part.files, full, values)
        yield key, values


def _write_unused(plan: Plan, folder: Path) -> None:
    for component, keys in plan.unused.items():
        part = plan.parts[component]
        if not keys:
            continue
        infos = {key: (part.files[part.scope + key].tag, part.files[part.scope + key].shape) for key in keys}
        with SafetensorsWriter(folder, component, infos, max_shard_bytes=2**62) as writer:
            for key, values in _unused(plan, component):
                writer.write(key, values)


def _write_files(plan: Plan, folder: Path) -> None:
    """Writes configs and extra files.

    Each source has a folder named after its kind. A component that a full checkpoint points to has one named after the
    component.
    """
    for source in plan.sources:
        target = folder / source.kind
        target.mkdir(parents=True, exist_ok=True)
        for path in source.extra_files():
            copy = target / path.relative_to(source.folder).as_posix()
            copy.parent.mkdir(exist_ok=True)
            copy_file(path, copy)
        for name, value in source.contents.items():
            (target / name).write_text(json.dumps(value, indent=2) + "\n")
        if source.settings and not source.contents:
            copy_file(source.folder / "config.json", target / "config.json")
    for component, part in plan.parts.items():
        if part.source.kind != "ross" or part.settings is None:
            continue
        target = folder / component
        target.mkdir(parents=True, exist_ok=True)
        if part.folder is None:  # a published model, known by its hub id
            (target / "config.json").write_text(json.dumps(part.settings, indent=2) + "\n")
        for name in ("config.json", "preprocessor_config.json") if part.folder else ():
            if (part.folder / name).is_file():
                copy_file(part.folder / name, target / name)


def _foreign(plan: Plan) -> dict[str, Any]:
    """Record of the origin, layout, keys and dtypes of all components, with which export writes the same tensors."""
    foreign = {}
    for component, part in plan.parts.items():
        unused, origin = set(plan.unused[component]), location(part.source.origin)
        foreign[component] = {
            "origin": str(origin.resolve()) if origin.exists() else part.source.origin,
            "layout": part.source.kind,
            "prefix": part.prefix,
            "keys": {key: part.files[part.scope + key].tag for key in part.keys if key not in unused},
        } | ({"within": part.source.within} if part.source.within else {})
    return foreign
