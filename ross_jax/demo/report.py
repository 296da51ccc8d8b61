"""The demo's report: scores of every model, loss curves and grids of pictures."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ross_jax.config import to_dict
from ross_jax.demo.evaluate import Reconstructions, answer_heldout, reconstruct_heldout
from ross_jax.demo.figures import plot_losses
from ross_jax.demo.scoring import Accuracy, format_accuracies
from ross_jax.evaluation.images import draw_grid
from ross_jax.inference.model import load
from ross_jax.objectives.reconstruction import find_objective, reconstructor

STAGES = ("pretrain", "finetune")
DENOISER = "denoiser"
"""Optional stage after `STAGES`, which trains the denoiser alone."""
LORA = "lora"
"""Stage in place of the last one, with low-rank updates. A model of it is called `KIND+lora`."""
SHOWN = 8
"""Number of pictures in a grid."""
_FILES = {STAGES[-1]: ("scores.json", "pictures.png"), LORA: (f"{LORA}.json", f"{LORA}.png")}
"""Last stage of a model -> its files of scores and of pictures."""


def kind_title(name: str) -> str:
    """Name in tables of a model, `KIND` or `KIND+lora`."""
    kind, _, lora = name.partition("+")
    objective = find_objective(kind)
    return (objective.title if objective else "LLaVA") + (", LoRA" if lora else "")


def run_folder(root: Path, kind: str, seed: int, stage: str) -> Path:
    """Directory of a run."""
    return root / kind / f"seed{seed}" / stage


def score_run(root: Path, name: str, seed: int) -> dict[str, Any]:
    """Scores a finished model and draws its reconstructions; a second call reads the stored scores.

    Args:
      name: `KIND` or `KIND+lora`.

    Returns:
      `answers`: the fields of an `Accuracy` for each question type. `reconstruction`: `Reconstructions.scores()`, or
      None for a model that makes no pictures.
    """
    kind, _, stage = name.partition("+")
    folder = run_folder(root, kind, seed, stage or STAGES[-1])
    path, pictures = (folder.with_name(file) for file in _FILES[folder.name])
    if path.is_file():
        return json.loads(path.read_text())
    model = load(folder)
    scores: dict[str, Any] = {"answers": [to_dict(each) for each in answer_heldout(model, root / "data")]}
    scores["reconstruction"] = None
    if reconstructor(model.config) is not None:
        images = reconstruct_heldout(model, root / "data")
        scores["reconstruction"] = images.scores()
        draw_images(pictures, images)
    path.write_text(json.dumps(scores, indent=1) + "\n")
    return scores


def score_denoiser(root: Path, seed: int) -> dict[str, float]:
    """`Reconstructions.scores()` after stage `DENOISER`, and a grid; a second call reads the stored scores."""
    path = root / "denoise" / f"seed{seed}" / f"{DENOISER}.json"
    if path.is_file():
        return json.loads(path.read_text())
    images = reconstruct_heldout(load(run_folder(root, "denoise", seed, DENOISER)), root / "data")
    columns = ("picture", "from visual outputs", "autoencoder")
    shown = (images.originals, images.own, images.autoencoder)
    draw_grid(path.with_suffix(".png"), {name: each[:SHOWN] for name, each in zip(columns, shown, strict=True)})
    scores = images.scores()
    path.write_text(json.dumps(scores, indent=1) + "\n")
    return scores


def draw_images(path: Path, images: Reconstructions) -> None:
    """Writes a grid with one held-out picture per row."""
    columns = {
        "picture": images.originals,
        "from visual outputs": images.own,
        "from another's": images.other,
        "autoencoder": images.autoencoder,
    }
    draw_grid(path, {name: shown[:SHOWN] for name, shown in columns.items() if shown is not None})


def read_losses(run: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Losses that a run has logged: name -> (steps, values)."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    return {name: (steps, [line[name] for line in lines]) for name in ("text_loss", "reconstruction_loss")}


def draw_losses(path: Path, root: Path, kinds: Sequence[str], seed: int) -> None:
    """Draws the loss curves of both stages."""
    curves: dict[str, dict[str, Any]] = {}
    for number, stage in enumerate(STAGES, start=1):
        for kind in kinds:
            losses = read_losses(run_folder(root, kind, seed, stage))
            curves.setdefault(f"stage {number}: text", {})[kind_title(kind)] = losses["text_loss"]
            if find_objective(kind) is not None:
                panel = curves.setdefault(f"stage {number}: reconstruction", {})
                panel[kind_title(kind)] = losses["reconstruction_loss"]
    plot_losses(path, curves)


def summarise(root: Path, names: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """Scores of every model: its name -> seed -> result of `score_run`."""
    return {name: {str(seed): score_run(root, name, seed) for seed in seeds} for name in names}


def format_report(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """The report as text: accuracy by question type for each seed, means over seeds, and reconstruction scores."""
    parts = []
    for seed in next(iter(scores.values())):
        answers = {
            kind_title(kind): [Accuracy(**row) for row in runs[seed]["answers"]] for kind, runs in scores.items()
        }
        parts.append(f"Held-out questions, seed {seed} (accuracy ± standard error; z above the most frequent answer)")
        parts.append(format_accuracies(answers))
    for kind, runs in scores.items():
        means = [np.mean([row["accuracy"] for row in run["answers"]]) for run in runs.values()]
        spread = f" ± {np.std(means, ddof=1):.3f} over {len(means)} seeds" if len(means) > 1 else ""
        parts.append(f"{kind_title(kind)}: mean accuracy {np.mean(means):.3f}{spread}")
    for kind, runs in scores.items():
        for seed, run in runs.items():
            if run["reconstruction"]:
                parts.append(_reconstruction_line(f"{kind_title(kind)}, seed {seed}", run["reconstruction"]))
    return "\n".join(parts)


def format_denoisers(scores: Mapping[str, Mapping[str, float]]) -> list[str]:
    """One line per seed; `scores` is seed -> result of `score_denoiser`."""
    name = kind_title("denoise")
    return [_reconstruction_line(f"{name}, seed {seed}, denoiser alone", values) for seed, values in scores.items()]


def _reconstruction_line(name: str, values: Mapping[str, float]) -> str:
    ceiling = f", autoencoder {values['psnr_autoencoder']:.1f} dB" if "psnr_autoencoder" in values else ""
    return (
        f"{name}: held-out pictures from visual outputs {values['psnr_own']:.1f} dB PSNR, from another picture's "
        f"{values['psnr_other']:.1f} dB{ceiling}; nearest to its own picture {values['nearest']:.0%}"
    )
