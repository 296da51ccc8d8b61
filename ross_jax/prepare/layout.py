"""What lies below the root of a reproduction, what is missing, and the recipe that reads it.

ROOT/parts/NAME/            weights, a folder per component
ROOT/data/REPOSITORY/       conversations and archives of images
ROOT/models/start           the parts, imported
ROOT/pretrain.py            the recipes that `write_recipe` makes
ROOT/finetune.py
ROOT/runs/pretrain, ROOT/runs/finetune
"""

import json
from collections.abc import Sequence
from pathlib import Path

from ross_jax.config import UserError
from ross_jax.data.archives import open_store
from ross_jax.data.images import ImageError
from ross_jax.data.sources import SampleError, SourceConfig, open_sources
from ross_jax.prepare.hub import kept
from ross_jax.prepare.public import AUTOENCODER, ENCODERS, LLMS, Item

_SAMPLES = 200
"""Number of conversations whose images are looked for."""
_RECIPE = '''"""Stage {stage} of Ross, written by launch/prepare.py. Fields can be changed here and by flags."""

from configs import ross


def get_config(arguments=None):
    parts = {parts!r}
    config = ross.get_config("encoder={encoder},llm={llm},stage={stage}", parts)
    config.init = {init!r}
    config.text.tokenizer = {tokenizer!r}
    config.data.sources = ({{"path": {path!r}, "images": {images!r}}},)
    return config
'''


def missing_files(item: Item, root: Path) -> list[str]:
    """Patterns and names of an item's files that are not there. Of weights in several files, the index names all."""
    folder = root / item.folder
    if item.kind == "dataset":
        return [name for name in item.patterns if not kept(folder / name).is_file()]
    if not (folder / "config.json").is_file():
        return list(item.patterns)
    for suffix in (".safetensors", ".bin"):
        for index in folder.glob(f"*{suffix}.index.json"):
            try:
                names = set(json.loads(index.read_text())["weight_map"].values())
            except (ValueError, KeyError, AttributeError) as error:
                raise UserError(f"{index}: is no index of weights ({type(error).__name__}: {error})") from error
            return sorted(name for name in names if not (folder / name).is_file())
        if any(folder.glob(f"*{suffix}")):
            return []
    return ["*.safetensors"]


def make_source(conversations: Path, archives: Sequence[Path]) -> SourceConfig:
    """The source of conversations whose images are in archives or folders.

    `coco/train2017/1.jpg` is looked for in `coco.tar` under that name or, where the archive has no `coco/`, without it.
    """
    return SourceConfig(str(conversations), images=tuple(_mounted(archive) for archive in archives))


def _mounted(archive: Path) -> str:
    name = archive.name.partition(".")[0]
    if archive.suffix != ".tar":
        return str(archive)
    names = open_store(archive).names()
    return str(archive) if any(each.startswith(f"{name}/") for each in names) else f"{name}={archive}"


def absent_images(source: SourceConfig) -> tuple[int, list[str]]:
    """Looks for the images of some conversations, spread evenly: how many it looked at, and what is wrong with others.

    Raises:
      UserError: the conversations or an archive cannot be read.
    """
    opened, _ = open_sources([source])
    count = min(_SAMPLES, len(opened))
    problems = []
    for number in range(count):
        try:
            for image in opened[number * len(opened) // count].images:
                image.read()
        except (SampleError, ImageError) as error:
            problems.append(str(error))
    return count, problems


def write_recipe(root: Path, stage: str, encoder: str, llm: str, source: SourceConfig) -> Path:
    """Writes the recipe of a stage, with absolute paths. Sizes are those of the parts that lie below the root."""
    start, before = str(root / "models" / "start"), str(root / "runs" / "pretrain")
    named = {"encoder": ENCODERS[encoder], "llm": LLMS[llm], "autoencoder": AUTOENCODER}
    path = root / f"{stage}.py"
    text = _RECIPE.format(
        parts={name: str(root / item.folder) for name, item in named.items()},
        stage=stage,
        encoder=encoder,
        llm=llm,
        init=(start,) if stage == "pretrain" else (start, before),
        tokenizer=str(root / "models" / "start" / "files" / "language"),
        path=source.path,
        images=source.images,
    )
    path.write_text(text)
    return path


def commands(root: Path, stage: str, encoder: str, llm: str, download: bool) -> list[str]:
    """What to do next, as commands in order. `download`: the next stage downloads what is missing, too."""
    parts = [f"--from {root / item.folder}" for item in (ENCODERS[encoder], LLMS[llm], AUTOENCODER)]
    start, run = root / "models" / "start", root / "runs" / stage
    first = [] if start.exists() else [f"python launch/convert.py import {' '.join(parts)} --output {start}"]
    more = " --download" if download else ""
    train = f"python launch/train.py --config={root / stage}.py --workdir={run}"
    last = {
        "pretrain": [f"python launch/prepare.py --stage finetune --root {root} --encoder {encoder} --llm {llm}{more}"],
        "finetune": [
            f"python launch/convert.py export --from {run} --format ross --output {root / 'exported'}",
            f"python launch/generate.py --checkpoint {run} --image PICTURE --prompt QUESTION",
            f"python launch/evaluate.py --checkpoint {run} --data {root / 'benchmarks'} --output {root / 'scores'} "
            "--benchmark pope mmbench_en",
        ],
    }
    return [*first, train, *last[stage]]
