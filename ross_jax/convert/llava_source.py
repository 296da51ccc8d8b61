"""Import of transformers' `LlavaForConditionalGeneration`: one checkpoint becomes three sources.

    language_model.model.*           model.language_model.*           -> language    model.*
    language_model.lm_head.*         lm_head.*                        -> language    lm_head.*
    vision_tower.[vision_model.]*    model.vision_tower.*             -> vision      as named
    multi_modal_projector.linear_1.* model.multi_modal_projector...   -> adapters    model.mm_projector.0.*

The left column is what lies on disk, with or without `vision_model.`; the middle one is what transformers 5 saves with
`save_original_format=False`. config.json may omit sizes; transformers' defaults fill them in.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ross_jax.convert import chat_templates, fields, language, vision
from ross_jax.convert.llava import PROJECTOR_KEYS, STRATEGIES
from ross_jax.convert.mapping import raise_all
from ross_jax.convert.settings import Settings
from ross_jax.convert.sources import Source, SourceError, read_json
from ross_jax.data.tokenizer import load_tokenizer
from ross_jax.models.vision import VisionConfig

_RENAMES = (
    (r"language_model\.(model\..*|lm_head\..*)", "language", r"\1"),
    (r"model\.language_model\.(.*)", "language", r"model.\1"),
    (r"(lm_head\..*)", "language", r"\1"),
    (r"(?:model\.)?vision_tower\.(.*)", "vision", r"\1"),
    *(
        (rf"(?:model\.)?multi_modal_projector\.{re.escape(theirs)}(.*)", "adapters", rf"model.mm_projector.{ours}\1")
        for ours, theirs in PROJECTOR_KEYS.items()
    ),
)
"""(pattern of a key, kind of the source that gets the tensor, its key there)."""
_IMAGES = ("preprocessor_config.json", "processor_config.json")
_CLIP_L = {
    **{"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "patch_size": 14},
    **{"image_size": 336, "num_hidden_layers": 24, "num_attention_heads": 16},
}
"""The vision encoder of a config.json that describes none."""
_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
    *("num_key_value_heads", "image_size", "patch_size", "max_position_embeddings"),
)


def split(source: Source) -> list[Source]:
    """Makes sources of kind vision, adapters and language of a checkpoint of kind llava. Others stay as they are.

    Raises:
      UserError: names every setting that is not supported, and every tensor of no component.
    """
    if source.kind != "llava":
        return [source]
    read = Settings(source.settings, str(source.folder / "config.json"))
    inner = {"vision": _tower(read), "language": _text(read)}
    fields.LLAVA.check(read)
    read.check()
    tower = vision.vision_config(inner["vision"], f"{read.where}: vision_config")
    processor, mode = _processor(source, tower)
    adapters = {
        "mm_projector_type": "mlp2x_gelu",
        "vision_feature_layer": _layer(read, tower),
        **({"image_aspect_ratio": mode} if mode else {}),
    }
    read.only("vision_feature_select_strategy", STRATEGIES[tower.kind])
    read.check()
    names = _names(source)
    image_files = {"preprocessor_config.json": processor} if processor else {}
    contents = {
        "vision": {"config.json": inner["vision"], **image_files},
        "adapters": {"config.json": adapters},
        "language": {"config.json": inner["language"]},
    }
    texts = [path for path in source.extra_files() if path.name not in _IMAGES]
    return [
        dataclasses.replace(
            source,
            kind=kind,
            settings=contents[kind]["config.json"],
            files=[source.files[0].renamed(names[kind])],
            within="llava",
            contents=contents[kind],
            copied=texts if kind == "language" else [],
            template=_template(source.folder) if kind == "language" else None,
        )
        for kind in contents
    ]


def _names(source: Source) -> dict[str, dict[str, str]]:
    """Kind of source -> key there -> key in the checkpoint."""
    names: dict[str, dict[str, str]] = {"vision": {}, "adapters": {}, "language": {}}
    unknown = []
    for key in source.files[0]:
        found = ((kind, re.sub(pattern, to, key)) for pattern, kind, to in _RENAMES if re.fullmatch(pattern, key))
        kind, name = next(found, (None, ""))
        if kind is None:
            unknown.append(SourceError(f"{source.files[0][key].file}: {key} belongs to no component of LLaVA"))
        elif name in names[kind]:
            unknown.append(SourceError(f"{source.origin}: {key} and {names[kind][name]} are the same tensor"))
        else:
            names[kind][name] = key
    raise_all(source.origin, unknown)
    return names


def _text(read: Settings) -> dict[str, Any]:
    """config.json of the language model."""
    text = {"model_type": "llama"} | read.inner("text_config").values
    if text["model_type"] not in language.FAMILIES:
        read.refuse("text_config", f"a model_type of {', '.join(language.FAMILIES)}")
        return text
    tied = text.get("tie_word_embeddings") or read.flag("tie_word_embeddings")
    architecture = {"architectures": [language.ARCHITECTURES[text["model_type"]]]}
    return language.for_both(_complete(text) | architecture | {"tie_word_embeddings": tied} | _dtype(text, read))


def _tower(read: Settings) -> dict[str, Any]:
    """config.json of the vision encoder."""
    tower = read.inner("vision_config").values
    tower = {"model_type": "clip_vision_model"} | tower if tower else _CLIP_L
    kinds = [f"{kind}_vision_model" for kind in STRATEGIES]
    if tower["model_type"] not in kinds:
        read.refuse("vision_config", f"a model_type of {', '.join(kinds)}")
        return tower
    return _complete(tower) | _dtype(tower, read)


def _dtype(inner: Mapping[str, Any], read: Settings) -> dict[str, Any]:
    found = inner.get("dtype") or inner.get("torch_dtype") or read.values.get("dtype") or read.values.get("torch_dtype")
    return {"dtype": found, "torch_dtype": found} if found else {}


def _complete(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with the sizes that they omit, as transformers fills them in."""
    import transformers

    given = {name: settings[name] for name in _SIZES if type(settings.get(name)) is int and settings[name] > 0}
    try:
        found = transformers.AutoConfig.for_model(settings["model_type"], **given).to_dict()
    except Exception:  # sizes that do not fit together, of which the reader of the component says more
        found = {}
    return {name: found[name] for name in _SIZES if found.get(name) is not None} | {
        name: value for name, value in settings.items() if value is not None
    }


def _layer(read: Settings, tower: VisionConfig) -> int:
    """The selected layer, counted from the end."""
    found = read.values.get("vision_feature_layer", -2)
    found = found[0] if isinstance(found, list) and len(found) == 1 else found
    if type(found) is not int or not -tower.num_layers <= found <= tower.num_layers:
        read.refuse("vision_feature_layer", f"one layer of {tower.num_layers}")
        return -2
    return found if found < 0 else found - tower.num_layers - 1


def _processor(source: Source, tower: VisionConfig) -> tuple[dict[str, Any], str | None]:
    """Settings of the encoder's own image processor, and how images become square; ({}, None) without a file.

    Raises:
      UserError: a processor that makes other images.
    """
    whole, own = (source.folder / name for name in reversed(_IMAGES))
    nested = read_json(whole).get("image_processor") if whole.is_file() else None
    if not isinstance(nested, dict) and not own.is_file():
        return {}, None
    where = str(own) if not isinstance(nested, dict) else f"{whole}: image_processor"
    values = nested if isinstance(nested, dict) else read_json(own)
    read = Settings({name: value for name, value in values.items() if name != "do_pad"}, where)
    fields.PROCESSOR.check(read)
    side = {"height": tower.image_size, "width": tower.image_size}
    padded = Settings(values, where, problems=read.problems).flag("do_pad")
    cropped = read.flag("do_center_crop")
    sizes = [tower.image_size, {"shortest_edge": tower.image_size}] if cropped else [side]
    read.only("size", *sizes, *([side] if padded else []))
    if cropped:
        read.only("crop_size", tower.image_size, side)
    elif tower.kind == "clip" and not padded:
        read.refuse("do_center_crop", "true with a CLIP tower")
    mean, std = vision.NORMALISATION[tower.kind]
    mean, std = read.numbers("image_mean", mean), read.numbers("image_std", std)
    settings = vision.processor_settings(tower, mean, std, read.integer("resample", 3))
    read.check()
    mode = "pad" if padded else "crop" if cropped and tower.kind != "clip" else "square"
    return settings, mode


def _template(folder: Path) -> str | None:
    """The conversation template of a chat template that export wrote."""
    path = folder / "chat_template.jinja"
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8", errors="replace")
    return chat_templates.recognise(text, lambda: load_tokenizer(folder))
