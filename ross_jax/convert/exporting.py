"""Export of a model directory to the layouts of the reference, transformers and diffusers."""

import contextlib
import dataclasses
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ross_jax import checkpoints
from ross_jax.config import UserError, from_dict, nearest
from ross_jax.convert import llava, vision
from ross_jax.convert.dtypes import DTYPES
from ross_jax.convert.export_configs import (
    Described,
    adapters_settings,
    component_settings,
    copy_files,
    copy_tokenizer,
    full_settings,
    processor_settings,
    settings_without,
    write_config,
)
from ross_jax.convert.export_llava import grown, read_texts, write_llava, write_texts
from ross_jax.convert.export_weights import (
    Component,
    Progress,
    open_component,
    saved_leaves,
    with_absent,
    write_weights,
)
from ross_jax.convert.importing import SCOPES
from ross_jax.convert.mapping import raise_all
from ross_jax.convert.model_card import write_card
from ross_jax.convert.safetensors_writer import SafetensorsWriter
from ross_jax.convert.settings import Settings
from ross_jax.convert.torch_writer import TorchWriter
from ross_jax.data.tokenizer import find_tokenizer, load_tokenizer
from ross_jax.directories import complete_directory, write_sums
from ross_jax.models.ross import RossConfig

COMPONENTS = (*SCOPES, "regressor", "teacher")
"""Every component that a model can have, in the order of export."""
FOLDERS = {"vision": "vision_tower", "language": "llm", "autoencoder": "vae", "teacher": "teacher"}
"""Component -> its folder in the `components` layout. Projector and denoiser are in `adapters/`."""
_STEMS = {"autoencoder": "diffusion_pytorch_model"}
_ADAPTERS = {"projector": "mm_projector", "denoiser": "mm_inv_projector"}
_ANSWERING = ("vision", "projector", "language")
LAYOUTS: dict[str, Collection[str]] = {
    "ross": COMPONENTS,
    "components": COMPONENTS,
    "llava": _ANSWERING,
    "original-llava": _ANSWERING,
    "adapters": _ADAPTERS,
    "adapters-bin": _ADAPTERS,
}
"""Layout -> the components that it holds or refuses; it leaves out all others. A checkpoint as the reference saves it,
a folder for each component, transformers' `LlavaForConditionalGeneration`, a checkpoint of the first LLaVA code, and
the adapters of stage 1 as safetensors or as the reference saves them.
"""
_FULL = ("ross", "original-llava")
_ADAPTER_LAYOUTS = {"adapters": SafetensorsWriter, "adapters-bin": TorchWriter}


def read_config(model: Path) -> RossConfig:
    """Reads the config of a model directory."""
    return from_dict(
        RossConfig, checkpoints.read_manifest(model).get("config"), f"{model / checkpoints.MANIFEST}: config"
    )


def _read_foreign(model: Path) -> dict[str, Any]:
    """Reads what import recorded: component -> origin, layout, prefix and keys. Empty for one made by training."""
    read = Settings(checkpoints.read_manifest(model, unused=True), str(model / checkpoints.MANIFEST))
    foreign = read.inner("foreign")
    parts = {name: foreign.inner(name) for name in COMPONENTS}
    for part in parts.values():
        for name in ("origin", "layout", "prefix"):
            part.text(name, "")
        keys = part.inner("keys")
        for key, tag in keys.values.items():
            if tag not in list(DTYPES):
                keys.refuse(key, "a dtype of safetensors")
    read.check()
    return {name: part.values for name, part in parts.items()}


def _leave_out(model: Path, config: RossConfig, without: Collection[str]) -> RossConfig:
    """Removes the named components from the config."""
    have = [name for name in COMPONENTS if getattr(config, name) is not None]
    unknown = [name for name in without if name not in have]
    if unknown:
        names = ", ".join(f"{name!r}{nearest(name, have)}" for name in unknown)
        raise UserError(f"--without: {model} has no component {names}; it has {', '.join(have)}")
    if without and set(have) <= set(without):
        raise UserError(f"--without: nothing is left of {model}")
    return dataclasses.replace(config, **dict.fromkeys(without))


def _check_layout(model: Path, config: RossConfig, layout: str) -> None:
    """Refuses components that the layout cannot hold."""
    if layout == "llava":
        raise_all(str(model), [UserError(f"{model}: {problem}") for problem in llava.problems(config)])
        return
    full, problems = layout in _FULL, []
    if config.regressor is not None:
        problems.append("foreign layouts have no place for its regressor; leave it out with --without regressor")
    for name, known in {"prediction": "epsilon", "schedule": "cosine", "block": "adaln"}.items():
        if layout == "adapters" and name != "block":
            continue  # in fields of config.json that import reads
        found = getattr(config.denoiser, name, known)
        if found != known:
            problems.append(
                f"its denoiser has {name} {found!r}, foreign layouts know only {known!r}; leave it out with "
                "--without denoiser"
            )
    if full and config.teacher is not None:
        problems.append(
            "a full checkpoint has no place for its teacher; use --format components, or leave it out with "
            "--without teacher"
        )
    if full and config.vision is not None and (config.vision.kind == "dinov2" or config.vision.final_norm):
        what = config.vision.kind + (" with final norm" if config.vision.final_norm else "")
        problems.append(f"the reference has no vision tower {what}; use --format components")
    if full and config.autoencoder is not None and config.autoencoder.kind != "kl":
        problems.append(
            "its autoencoder is an AutoencoderTiny; the reference loads only diffusers' AutoencoderKL, so use --format "
            "components"
        )
    if full and config.language is None:
        problems.append("has no language model, so it is no full Ross checkpoint; use --format components")
    elif full:
        language = config.language
        if language.rope_scaling and language.qkv_bias and not language.out_bias:
            problems.append("the reference's Qwen2 does not scale rotary frequencies; use --format components")
        if language.head_dim * language.num_heads != language.hidden_size and not language.qk_norm:
            problems.append(
                f"its language model has {language.num_heads} heads of {language.head_dim} in width "
                f"{language.hidden_size}, which the reference cannot have; use --format components"
            )
    siglip = full and config.vision is not None and config.vision.kind == "siglip"
    if siglip and config.vision.layers_used != config.vision.num_layers - 1:
        problems.append(
            f"the reference always takes SigLIP's hidden state -2, this model {config.vision.select_layer}; use "
            "--format components"
        )
    raise_all(str(model), [UserError(f"{model}: {problem}") for problem in problems])


def export(
    model: Path,
    output: Path,
    layout: str,
    dtype: str | None = None,
    progress: Progress = lambda _: None,
    without: Collection[str] = (),
    template: str | None = None,
) -> None:
    """Writes a model directory in a foreign layout, completely or not at all.

    Args:
      model: model directory, made by import or training.
      output: folder to write. It must not exist.
      layout: one of `LAYOUTS`.
      dtype: `float32`, `bfloat16` or `float16` for all floating-point tensors. None keeps the dtypes of the import.
      progress: called with a line of text for each note.
      without: components to leave out, together with what config.json says about them.
      template: conversation template, from which `llava` makes the chat template. None: the one of the training.

    Raises:
      UserError: nothing to export, components that the layout cannot hold, or an output that cannot be written.
    """
    if template is not None and layout not in ("llava", "original-llava"):
        raise UserError(f"--template {template}: only --format llava and original-llava have a chat template")
    foreign, config = _read_foreign(model), _leave_out(model, read_config(model), without)
    tower = config.vision
    if layout in _FULL and tower is not None:
        config = dataclasses.replace(config, vision=vision.with_last_layer_unused(tower))
    names = [name for name in COMPONENTS if getattr(config, name) is not None and name in LAYOUTS[layout]]
    if not names:
        raise UserError(f"{model}: has none of {', '.join(LAYOUTS[layout])}, which --format {layout} would hold")
    held = config if layout in _ADAPTER_LAYOUTS else _only(config, names)
    _check_layout(model, _only(config, names), layout)
    saved = saved_leaves(model, config, [name for name in COMPONENTS if getattr(held, name) is not None])
    standard = layout in _FULL
    opened = {
        name: open_component(model, name, getattr(config, name), saved[name], foreign[name], standard) for name in names
    }
    if config.vision is not None and config.vision != tower:
        opened["vision"] = with_absent(opened["vision"], config.vision)
    with contextlib.ExitStack() as stack:
        for component in opened.values():
            if component.files:
                stack.enter_context(component.files)
        described = _describe(model, held, foreign, saved, template)
        if layout == "llava":
            folder = stack.enter_context(complete_directory(output))
            write_llava(folder, model, described, opened, dtype, progress)
            write_card(folder, model, described, opened, layout, output.name)
            write_sums(folder, (path for path in folder.rglob("*") if path.is_file()))
            return
        folders = _folders_inside(described, output.resolve(), layout)
        pointers = {name: str(path) for name, path in folders.items()}
        parts = [name for name in (folders if layout in _FULL else names) if name not in _ADAPTERS]
        configs: dict[str, Any] = {name: component_settings(described, name) for name in parts}
        if layout in _FULL:
            configs["ross"] = settings_without(full_settings(described, layout, pointers), without)
            texts = read_texts(described) if layout == "original-llava" else None
            if texts is not None:
                configs["ross"] |= {"image_token_index": texts.image_id, "vocab_size": texts.rows}
                opened["language"] = grown(opened["language"], texts.rows)
            if described.image_mode == "crop" and config.vision and config.vision.kind != "clip":
                progress(
                    "warning: images are cropped here (image_mode 'crop'); the reference squashes them to a square"
                )
        else:
            configs["adapters"] = adapters_settings(described, pointers, without)
        folder = stack.enter_context(complete_directory(output))
        writer = _Writer(model, described, opened, configs, dtype)
        if layout in _FULL:
            writer.write_full(folder)
            if texts is not None:
                write_texts(folder, described, texts, progress)
        elif any(name in _ADAPTERS for name in names):
            inside = folder if layout in _ADAPTER_LAYOUTS else folder / "adapters"
            writer.write_adapters(inside, _ADAPTER_LAYOUTS.get(layout, SafetensorsWriter))
        for name in parts:
            writer.write_component(name, folder / (folders[name].name if layout in _FULL else FOLDERS[name]))
        alone = list(folder.iterdir()) if layout == "components" else [folder]
        write_card(folder, model, described, opened, layout, output.name)
        for each in alone:  # folders that are read on their own
            write_sums(each, (path for path in each.rglob("*") if path.is_file()))


def _only(config: RossConfig, names: Collection[str]) -> RossConfig:
    """The config without all components but the named ones."""
    return dataclasses.replace(config, **{name: None for name in COMPONENTS if name not in names})


def _describe(
    model: Path,
    config: RossConfig,
    foreign: Mapping[str, Any],
    saved: Mapping[str, dict[str, Any]],
    template: str | None,
) -> Described:
    files, tokens = model / "files", {}
    tokenizer = find_tokenizer(files)
    if config.language is not None and not foreign["language"] and tokenizer is not None:
        loaded = load_tokenizer(tokenizer)
        tokens = {f"{name}_token_id": getattr(loaded, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    dtypes = {name: str(next(iter(leaves.values())).dtype) for name, leaves in saved.items() if leaves}
    manifest = checkpoints.read_manifest(model)
    trained = "reconstruction" in manifest
    mode, template = manifest.get("image_mode"), template or manifest.get("template")
    return Described(files, config, foreign, dtypes, mode, trained, tokens, template)


def _folders_inside(model: Described, output: Path, layout: str) -> dict[str, Path]:
    """Folders of the export that its config.json points to: component -> path, for what has no other place.

    These are components that were never imported, and towers whose place the reference would not recognise: it takes a
    path with `clip` for CLIP, and else needs `siglip` in it.
    """
    folders, vision_config = {}, model.config.vision
    if vision_config is not None and not model.came_with("vision", "ross"):
        kind, origin = vision_config.kind, str(model.foreign["vision"].get("origin", "")).lower()
        inside = model.foreign["vision"].get("within")
        if inside or kind not in origin or (kind == "siglip" and "clip" in origin):
            folders["vision"] = output / (FOLDERS["vision"] if layout == "components" else f"{kind}_vision_tower")
            if kind == "siglip" and "clip" in str(output).lower():
                folders["vision"] = Path(folders["vision"].name)  # for a reference that runs in the checkpoint's folder
    if model.config.autoencoder is not None and not model.foreign["autoencoder"]:
        folders["autoencoder"] = output / FOLDERS["autoencoder"]
    return folders


@dataclasses.dataclass(frozen=True)
class _Writer:
    """Writes the folders of an export.

    Attributes:
      configs: component, `ross` or `adapters` -> config.json. None for adapters keeps what import found.
    """

    model: Path
    described: Described
    opened: Mapping[str, Component]
    configs: Mapping[str, dict[str, Any] | None]
    dtype: str | None

    def write_full(self, folder: Path) -> None:
        files = self.described.files
        self._write_weights(folder, "model", {SCOPES[name]: component for name, component in self.opened.items()})
        copy_files([files / "ross", files / "language", files / "adapters"], folder)
        copy_tokenizer(files, folder)
        write_config(folder, self.configs["ross"], self.dtype)

    def write_adapters(self, folder: Path, writer: type[SafetensorsWriter | TorchWriter]) -> None:
        folder.mkdir(exist_ok=True)
        for name, stem in _ADAPTERS.items():
            if name in self.opened:
                self._write_weights(folder, stem, {SCOPES[name]: self.opened[name]}, writer)
        copy_files([self.described.files / "adapters", self.described.files / "ross"], folder, ["config.json"])
        if self.configs["adapters"] is not None:
            write_config(folder, self.configs["adapters"], None)

    def write_component(self, name: str, folder: Path) -> None:
        files = self.described.files
        folder.mkdir()
        self._write_weights(folder, _STEMS.get(name, "model"), {"": self.opened[name]})
        copy_files([files / name, *([files / "ross"] if name == "language" else [])], folder)
        if name == "language":
            copy_tokenizer(files, folder)
        processor = processor_settings(self.described, name)
        if processor is not None:
            (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
        write_config(folder, self.configs[name], self.dtype)

    def _write_weights(
        self,
        folder: Path,
        stem: str,
        components: Mapping[str, Component],
        writer: type[SafetensorsWriter | TorchWriter] = SafetensorsWriter,
    ) -> None:
        write_weights(self.model, folder, stem, components, self.dtype, writer)
