"""Export as transformers' `LlavaForConditionalGeneration`: weights, configs, tokenizer and processor."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ross_jax.config import UserError
from ross_jax.convert import chat_templates, llava, vision
from ross_jax.convert.export_configs import Described, component_settings, copy_files, write_config
from ross_jax.convert.export_weights import Component, Progress, write_weights
from ross_jax.convert.generation import end_ids
from ross_jax.convert.mapping import Piece
from ross_jax.convert.sources import read_json
from ross_jax.data.encoders import stop_ids
from ross_jax.data.tokenizer import find_tokenizer, load_tokenizer, tokenizer_files
from ross_jax.models.ross import RossConfig
from ross_jax.storage import local_folder


@dataclasses.dataclass(frozen=True, eq=False)
class Texts:
    """How an export turns text into ids.

    Attributes:
      tokenizer: the model's tokenizer with a special token `<image>`.
      image_id: id of `<image>`.
      rows: size of the vocabulary. It grows where it has no free row for `<image>`.
    """

    tokenizer: Any
    image_id: int
    rows: int


def read_texts(described: Described) -> Texts:
    """Reads the tokenizer of a model.

    Raises:
      UserError: it has none, or one that does not fit its conversation template.
    """
    tokenizer = _load(described.files)
    if described.template is not None:
        stop_ids(described.template, tokenizer)
    image_id = llava.add_image_token(tokenizer)
    return Texts(tokenizer, image_id, max(described.config.language.vocab_size, image_id + 1))


def _load(files: Path) -> Any:
    found = find_tokenizer(files)
    if found is None:
        raise UserError(
            f"{files.parent}: has no tokenizer, and this layout needs one; import the model with its tokenizer, or "
            f"copy the tokenizer's files into {files / 'language'}"
        )
    return load_tokenizer(found)


def write_texts(folder: Path, described: Described, texts: Texts, progress: Progress) -> None:
    """Writes tokenizer, chat template and generation settings, in place of what is there."""
    for path in tokenizer_files(folder).values():
        path.unlink()
    template, files, tokenizer = described.template, described.files, texts.tokenizer
    original = _load(files)
    ends = [] if template is None else list(stop_ids(template, original))
    ends += [each for name in ("language", "ross") for each in end_ids(files / name) if each not in ends]
    if template is not None:
        tokenizer.chat_template = chat_templates.chat_template(template, original)
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # the second has it saved
    with local_folder(folder) as place:
        tokenizer.save_pretrained(place)
        for line in chat_templates.differences(template, original, place, texts.image_id) if template else ():
            progress(f"warning: the chat template does not repeat training: {line}")
    copy_files([files / "language", files / "ross"], folder, ["generation_config.json"])
    path = folder / "generation_config.json"
    kept = read_json(path) if path.is_file() else {}
    pad = {} if tokenizer.pad_token_id is None else {"pad_token_id": tokenizer.pad_token_id}
    path.write_text(json.dumps({**kept, **pad, "eos_token_id": ends or None}, indent=2) + "\n")
    if template is None:
        progress(
            "warning: the model does not say its conversation template, so the tokenizer's chat template stays as it "
            "is; name the template with --template"
        )


def write_llava(
    folder: Path,
    model: Path,
    described: Described,
    opened: Mapping[str, Component],
    dtype: str | None,
    progress: Progress,
) -> None:
    """Writes the whole folder.

    Raises:
      UserError: the model has no tokenizer, or one that does not fit its conversation template.
    """
    config, texts = described.config, read_texts(described)
    components = {scope: _component(name, opened[name], config, texts.rows) for name, scope in llava.SCOPES.items()}
    write_weights(model, folder, "model", components, dtype)
    text, tower = component_settings(described, "language"), component_settings(described, "vision")
    tower = {**(tower.get("vision_config") or tower), "model_type": f"{config.vision.kind}_vision_model"}
    if dtype:
        text, tower = ({**each, "dtype": dtype, "torch_dtype": dtype} for each in (text, tower))
    write_config(folder, llava.settings(config, text, tower, texts.image_id, texts.rows), dtype)
    llava.write_processor(config, described.image_mode, folder)
    write_texts(folder, described, texts, progress)


def grown(component: Component, rows: int) -> Component:
    """The language model with so many rows for tokens."""

    def grow(piece: Piece) -> Piece:
        return dataclasses.replace(piece, shape=(rows, piece.shape[1]))

    tables = {
        path: [(grow(piece), key, tag) for piece, key, tag in component.pieces[path]]
        for path in ("embedding", "head")
        if path in component.pieces
    }
    return dataclasses.replace(component, pieces={**component.pieces, **tables})


def _component(name: str, component: Component, config: RossConfig, rows: int) -> Component:
    """The component under transformers' names, without tensors that LLaVA has no use for.

    The tower keeps the layers above the selected one. SigLIP's head and the text model stay behind.
    """
    if name == "language":
        return dataclasses.replace(grown(component, rows), unused={})
    prefix = vision.PREFIXES[0]
    rename = _projector_key if name == "projector" else lambda key: prefix + key.removeprefix(prefix)
    pieces = {
        path: [(piece, rename(key), tag) for piece, key, tag in entries] for path, entries in component.pieces.items()
    }
    if name == "projector":
        return dataclasses.replace(component, pieces=pieces)
    unused = {rename(key): old for key, old in component.unused.items()}
    unused = {key: old for key, old in unused.items() if key.startswith((f"{prefix}encoder.", f"{prefix}post_layer"))}
    absent = {prefix + key: values for key, values in vision.absent_tensors(config.vision).items()}
    absent = {key: values for key, values in absent.items() if key not in unused}
    return dataclasses.replace(component, pieces=pieces, unused=unused, absent=absent)


def _projector_key(key: str) -> str:
    return llava.PROJECTOR_KEYS[key[:2]] + key[2:]
