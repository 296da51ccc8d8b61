"""Compares the kinds of objective where labels are scarce and pictures plentiful: the paper's table in miniature.

  python launch/compare.py [--kinds none denoise] [--seeds 0 1 2 3 4] [--quick] [--root runs/comparison]

configs/comparison.py has the recipe. Writes table.md, table.png and scores.json. After an interruption the same command
continues.
"""

import dataclasses
import json
import sys
from pathlib import Path

from ross_jax.arguments import SEED, Parser
from ross_jax.command_line import import_recipe, load_recipe
from ross_jax.config import UserError
from ross_jax.console import say, talk
from ross_jax.demo.autoencoder import FitConfig
from ross_jax.demo.comparison import draw, markdown, rows
from ross_jax.demo.prepare import prepare
from ross_jax.demo.report import run_folder, summarise
from ross_jax.demo.running import Interrupted, train
from ross_jax.process import leave
from ross_jax.storage import location

RECIPE = Path(__file__).parents[1] / "configs" / "comparison.py"


def train_arm(root: Path, stage: str, kind: str, seed: int) -> None:
    """Trains or continues a seed's base or one arm."""
    folder = run_folder(root, "base", seed, "pretrain") if stage == "base" else run_folder(root, kind, seed, "finetune")
    train(load_recipe(f"{RECIPE}:stage={stage},kind={kind},seed={seed},root={root}"), folder)


def main(argv: list[str] | None = None) -> int:
    recipe = import_recipe(RECIPE)
    parser = Parser(description=__doc__)
    parser.add_argument("--kinds", nargs="+", choices=recipe.KINDS, default=recipe.KINDS, metavar="KIND")
    parser.add_argument("--seeds", type=int, within=SEED, nargs="+", default=recipe.SEEDS, metavar="SEED")
    parser.add_argument("--quick", action="store_true", help="very little data, to check that everything runs")
    parser.add_argument("--root", type=location, metavar="DIR", help="folder to write to (default runs/comparison)")
    talk()
    try:
        args = parser.parse_args(argv)
        root = args.root or location("runs/comparison-quick" if args.quick else "runs/comparison")
        dataset, fit = recipe.DATASET, FitConfig()
        if args.quick:
            little = {"pretrain": 64, "heldout_per_type": 12, "labels_per_type": 1, "unlabelled": 64}
            dataset, fit = dataclasses.replace(dataset, **little), FitConfig(images=64, steps=20)
        prepare(root, dataset, fit, say)
        for seed in args.seeds:
            train_arm(root, "base", "none", seed)
            for kind in args.kinds:
                train_arm(root, "arm", kind, seed)
        scores = summarise(root, args.kinds, args.seeds)
        table = rows(scores)
        (root / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
        (root / "table.md").write_text(markdown(table) + "\n")
        labels = f"{dataset.labels_per_type} labels per type of question, {dataset.unlabelled} pictures"
        draw(root / "table.png", table, f"{labels}, {len(args.seeds)} seeds")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Interrupted:
        say("interrupted; run the same command to continue")
        return 130
    print(markdown(table))
    for name in ("table.md", "table.png", "scores.json"):
        print(root / name)
    return 0


if __name__ == "__main__":
    leave(main)
