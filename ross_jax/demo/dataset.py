"""The demo's data set in LLaVA's format, made from photographs. The same settings always give the same bytes.

images/*.png    scenes of 64 x 64 pixels
pretrain.json   one caption per picture, for stage 1
finetune.json   several questions per picture, for stage 2
heldout.json    one question per record, with its `type` and `answer`, about photographs that training never sees
labels.json     one question per record, likewise, about training photographs; `configs/comparison.py` trains on it
unlabelled/     pictures without text; `configs/comparison.py` trains on them
"""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ross_jax.config import to_dict
from ross_jax.demo import questions, scenes
from ross_jax.demo.once import file_hash, make_once
from ross_jax.demo.photographs import PHOTOGRAPHS, Split, load_photographs
from ross_jax.demo.questions import ANSWERS, Question, caption, possible_questions
from ross_jax.demo.scenes import Scene, random_scene
from ross_jax.storage import location

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """Size of the data set.

    Attributes:
      seed: seed of photographs, crops, marks and questions.
      pretrain: number of pictures for stage 1.
      finetune: number of pictures for stage 2.
      questions_per_image: upper limit on questions about one picture. In `finetune.json` they form one conversation; in
        `heldout.json` and `labels.json` each is a record.
      heldout_per_type: number of held-out questions per type, spread evenly over the type's answers.
      labels_per_type: number of questions per type in `labels.json`, spread likewise.
      unlabelled: number of pictures in `unlabelled/`.
    """

    seed: int = 0
    pretrain: int = 4000
    finetune: int = 8000
    questions_per_image: int = 4
    heldout_per_type: int = 360
    labels_per_type: int = 0
    unlabelled: int = 0

    def __post_init__(self):
        for name in ("pretrain", "finetune", "questions_per_image", "heldout_per_type"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("labels_per_type", "unlabelled"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it cannot be negative")


def write_dataset(folder: str | Path, config: DatasetConfig | None = None) -> bool:
    """Writes the data set to `folder`, unless it exists there already.

    Returns:
      Whether the data set was written.

    Raises:
      UserError: the `demo` extra is not installed; `folder` holds something else or cannot be written.
    """
    config = config or DatasetConfig()
    photographs = [photo.path for photo in PHOTOGRAPHS.values()]
    code = [module.__file__ for module in (scenes, questions)]
    settings = {**to_dict(config), "content": file_hash(*photographs, *code, __file__)}
    return make_once(location(folder), settings, lambda target: _write(target, config))


def _write(folder: Path, config: DatasetConfig) -> None:
    (folder / "images").mkdir()
    (folder / "unlabelled").mkdir()
    streams = np.random.default_rng(config.seed).spawn(5)
    train, heldout = _open("train"), _open("heldout")
    parts = {
        "pretrain": _pretrain(folder, config, train, streams[0]),
        "finetune": _finetune(folder, config, train, streams[1]),
        "heldout": _balanced(folder, "heldout", config.heldout_per_type, config, heldout, streams[2]),
        "labels": _balanced(folder, "labels", config.labels_per_type, config, train, streams[3]),
    }
    for i in range(config.unlabelled):
        scene = random_scene(train, streams[4])
        Image.fromarray(scene.pixels).save(folder / "unlabelled" / f"{i:05d}.png", compress_level=1)
    for name, records in parts.items():
        (folder / f"{name}.json").write_text(json.dumps(records, indent=1) + "\n")


def _open(split: Split) -> dict[str, Image.Image]:
    return {name: Image.fromarray(pixels) for name, pixels in load_photographs(split).items()}


def _pretrain(folder: Path, config: DatasetConfig, photographs, rng: np.random.Generator) -> list[Record]:
    records = []
    for i in range(config.pretrain):
        scene = random_scene(photographs, rng, min_marks=0)
        turns = _turns([("Describe the picture.", caption(scene, rng))])
        records.append(_record(f"pretrain_{i:05d}", _save(folder, f"pretrain_{i:05d}", scene), scene, turns))
    return records


def _finetune(folder: Path, config: DatasetConfig, photographs, rng: np.random.Generator) -> list[Record]:
    asked: Counter[tuple[str, str]] = Counter()
    records = []
    for i in range(config.finetune):
        scene = random_scene(photographs, rng)
        chosen = _rarest(possible_questions(scene, rng), asked, config.questions_per_image)
        asked.update((question.type, question.answer) for question in chosen)
        chosen = [chosen[k] for k in rng.permutation(len(chosen))]
        turns = _turns([(question.text, question.answer) for question in chosen])
        records.append(_record(f"finetune_{i:05d}", _save(folder, f"finetune_{i:05d}", scene), scene, turns))
    return records


def _balanced(
    folder: Path, name: str, per_type: int, config: DatasetConfig, photographs, rng: np.random.Generator
) -> list[Record]:
    """Records of one question each: `per_type` of every type, spread evenly over the type's answers."""
    quotas = {
        (kind, answer): -(-(per_type - i) // len(answers))
        for kind, answers in ANSWERS.items()
        for i, answer in enumerate(answers)
    }
    asked: Counter[tuple[str, str]] = Counter()
    records: list[Record] = []
    images = 0
    while len(records) < sum(quotas.values()):
        scene = random_scene(photographs, rng)
        missing = [q for q in possible_questions(scene, rng) if asked[q.type, q.answer] < quotas[q.type, q.answer]]
        if not missing:
            continue
        image = _save(folder, f"{name}_{images:05d}", scene)
        images += 1
        for question in _rarest(missing, asked, config.questions_per_image):
            asked[question.type, question.answer] += 1
            turns = _turns([(question.text, question.answer)])
            record = _record(f"{name}_{len(records):05d}", image, scene, turns)
            records.append({**record, "type": question.type, "answer": question.answer})
    return records


def _rarest(candidates: list[Question], asked: Counter[tuple[str, str]], count: int) -> list[Question]:
    """The `count` candidates whose answers have come up least so far, relative to an even spread over their type."""
    return sorted(candidates, key=lambda q: asked[q.type, q.answer] * len(ANSWERS[q.type]))[:count]


def _save(folder: Path, name: str, scene: Scene) -> str:
    Image.fromarray(scene.pixels).save(folder / "images" / f"{name}.png", compress_level=1)
    return f"{name}.png"


def _turns(pairs: list[tuple[str, str]]) -> list[dict[str, str]]:
    turns = []
    for i, (question, answer) in enumerate(pairs):
        turns.append({"from": "human", "value": question if i else f"<image>\n{question}"})
        turns.append({"from": "gpt", "value": answer})
    return turns


def _record(name: str, image: str, scene: Scene, turns: list[dict[str, str]]) -> Record:
    return {"id": name, "image": image, "source": scene.photo, "conversations": turns}
