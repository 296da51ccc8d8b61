"""README.md of an export: what the model is, what it was trained on, its scores, where it is from, how to load it."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ross_jax import checkpoints
from ross_jax.convert.export_configs import Described
from ross_jax.convert.export_weights import Component
from ross_jax.convert.sources import SourceError, read_json

_SCORES = ("scores.json", "results.json", "scores/results.json", "../scores.json")
"""Places of scores, seen from the model directory."""
_LOSSES = ("loss", "text_loss", "reconstruction_loss")
_USE = {
    "llava": """
```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained("FOLDER", backend="pil")  # the images of the training, bit for bit
model = AutoModelForImageTextToText.from_pretrained("FOLDER")
question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
text = processor.apply_chat_template(question, add_generation_prompt=True)
inputs = processor(images=Image.open("image.jpg").convert("RGB"), text=text, return_tensors="pt")
answer = model.generate(**inputs, do_sample=False, max_new_tokens=256)
print(processor.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

```bash
vllm serve FOLDER     # answers at /v1/chat/completions with the chat template of this folder
```""",
    "original-llava": """
SGLang and the code of LLaVA (`llava_llama`) and LLaVA-NeXT (`llava_qwen`) load this folder. `mm_vision_tower` in
`config.json` must name the vision encoder, as a hub id or a folder; the tuned weights are in the checkpoint.

```bash
python -m sglang.launch_server --model-path FOLDER
```""",
    "ross": """
The code of Ross loads this folder. For transformers and vLLM, export the model with `--format llava`.""",
    "components": """
transformers and diffusers load the folders `vision_tower`, `llm` and `vae`, the code of Ross `adapters`. For
transformers and vLLM as one model, export it with `--format llava`.""",
    "adapters": """
Projector and denoiser alone; they fit the vision encoder and the language model that they were trained with.
For transformers and vLLM, export the whole model with `--format llava`.""",
}
_IMPORT = """

```bash
python launch/convert.py import --from FOLDER --output models/NAME     # ross_jax
```
"""


def write_card(
    folder: Path, model: Path, described: Described, opened: Mapping[str, Component], layout: str, name: str
) -> None:
    """Writes the README.md of an export.

    Args:
      folder: where it goes.
      model: the model directory.
      opened: the components that are exported.
      layout: a layout of `exporting`.
      name: name of the export.
    """
    run = _read(model / "run.json")
    transformers = "library_name: transformers\npipeline_tag: image-text-to-text\n" if layout == "llava" else ""
    use = _USE["adapters" if layout.startswith("adapters") else layout] + ("" if layout == "components" else _IMPORT)
    parts = [
        f"---\n{transformers}tags:\n- ross\n- llava\n---\n\n# {name}\n",
        "## Model\n\n" + _table(("component", "sizes", "parameters"), _components(described, opened)),
        *_training(model, run),
        *_scores(model),
        "## Provenance\n\n" + "\n".join(_provenance(described, opened, run, layout)) + "\n",
        "## Use\n" + use.replace("FOLDER", name),
    ]
    (folder / "README.md").write_text("\n".join(parts))


def _components(described: Described, opened: Mapping[str, Component]) -> Iterator[tuple[str, str, str]]:
    for name, component in opened.items():
        sizes = _sizes(name, getattr(described.config, name))
        count = sum(math.prod(leaf.shape) for leaf in component.shapes.values())
        yield name, sizes, f"{count:,}"


def _sizes(name: str, config: Any) -> str:
    if name in ("vision", "teacher"):
        where = "its last output" if config.final_norm else f"layer {config.select_layer}"
        tower = f"{config.kind}, {config.image_size} px, patches of {config.patch_size}, {config.num_layers} layers of"
        return f"{tower} {config.hidden_size}, read at {where}: {config.num_tokens} tokens"
    if name == "language":
        heads = f"{config.num_heads} heads ({config.num_kv_heads} of keys)"
        return f"{config.num_layers} layers of {config.hidden_size}, {heads}, vocabulary of {config.vocab_size}"
    if name == "projector":
        return f"{config.kind} of {config.depth} layers, {config.in_size} to {config.out_size}"
    if name == "denoiser":
        return f"{config.depth} blocks of {config.width}, predicts {config.prediction}, schedule {config.schedule}"
    return f"{config.kind}, {config.latent_channels} channels" if name == "autoencoder" else str(config.kind)


def _training(model: Path, run: Mapping[str, Any]) -> Iterator[str]:
    config = run.get("config") or {}
    if not config:
        return
    supervision, optimizer = config.get("reconstruction") or {}, config.get("optimizer") or {}
    yield "## Training\n"
    sources = (config.get("data") or {}).get("sources") or []
    found = {each.get("path"): each for each in run.get("sources") or []}
    rows = [
        (
            Path(str(each.get("path"))).name,
            str(each.get("kind")),
            str(found.get(each.get("path"), {}).get("records", "")),
        )
        for each in sources
    ]
    yield _table(("data", "kind", "records"), rows)
    facts = {
        "loss of the reconstruction": f"{supervision.get('kind')}, weight {supervision.get('weight')}",
        "loss of the text": f"cross entropy of answers, weight {(config.get('text') or {}).get('weight')}",
        "conversation template": (config.get("text") or {}).get("template"),
        "trained": ", ".join((config.get("freeze") or {}).get("trainable") or []),
        "optimizer": f"{optimizer.get('algorithm')}, learning rate {optimizer.get('learning_rate')}",
        "batch": (config.get("data") or {}).get("batch"),
        "epochs": (config.get("data") or {}).get("epochs"),
        "images become square": config.get("image_mode"),
    }
    yield _table(("setting", "value"), [(name, f"`{value}`") for name, value in facts.items() if value is not None])
    steps = _metrics(model / "metrics.jsonl")
    if steps:
        columns = ("step", *(name for name in _LOSSES if name in steps[0]))
        ends = [steps[0], steps[-1]] if len(steps) > 1 else steps
        yield _table(columns, [tuple(_number(step.get(name)) for name in columns) for step in ends])


def _metrics(path: Path) -> list[dict[str, Any]]:
    """Lines with losses; none if there is no such file, or it is damaged."""
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError):
        return []
    return [line for line in lines if isinstance(line, dict) and "step" in line and "loss" in line]


def _scores(model: Path) -> Iterator[str]:
    for place in _SCORES:
        rows = list(_rows(_read(model / place)))
        if rows:
            yield "## Scores\n\n" + _table(("benchmark", "score"), rows)
            return


def _rows(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """(name, value) of the scores in a file of `evaluate.py`, `demo.py` or anyone else."""
    if isinstance(value, dict) and "score" in value:
        yield f"{value.get('title', name)} ({value.get('metric', 'score')})", _number(value["score"])
    elif isinstance(value, dict) and "accuracy" in value:
        yield f"{name}{value.get('type', '')} (accuracy)", _number(value["accuracy"])
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from _rows(each, f"{name}{key}: " if isinstance(each, (dict, list)) else f"{name}{key}")
    elif isinstance(value, list):
        for each in value:
            yield from _rows(each, name)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield name, _number(value)


def _provenance(
    described: Described, opened: Mapping[str, Component], run: Mapping[str, Any], layout: str
) -> Iterator[str]:
    from ross_jax import __version__

    yield f"- written by ross_jax {__version__}, layout `{layout}`, model format {checkpoints.FORMAT}"
    for name in opened:
        origin = described.foreign[name].get("origin")
        yield f"- {name}: " + (f"imported from `{_short(origin)}`" if origin else "made by training")
    for first in (run.get("config") or {}).get("init") or ():
        yield f"- the run started from `{_short(first)}`"
    for source in run.get("sources") or ():
        yield f"- data `{_short(source.get('path'))}`: SHA-256 {source.get('fingerprint')}"
    yield "- licences of these models and data hold for this one"


def _short(place: Any) -> str:
    """A hub id as it is, of a path the last two parts."""
    path = Path(str(place))
    return "/".join(path.parts[-2:]) if path.is_absolute() else str(place)


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except SourceError:
        return {}


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(columns: tuple[str, ...], rows: Any) -> str:
    lines = [columns, tuple("---" for _ in columns), *rows]
    return "".join(f"| {' | '.join(str(cell) for cell in line)} |\n" for line in lines)
