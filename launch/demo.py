"""The demo: makes a data set, trains a tiny Ross in both stages, and reports what it learned.

  python launch/demo.py [--kind latent] [--baseline] [--lora] [--denoiser] [--seeds 0 1 2] [--quick] [--root runs/demo]

`bash launch/demo.sh` does the same and installs everything first. After an interruption the same command continues.
"""

import json
import sys
import time
from pathlib import Path

from ross_jax.arguments import SEED, Parser
from ross_jax.command_line import import_recipe, load_recipe
from ross_jax.config import UserError
from ross_jax.console import say, talk
from ross_jax.demo.autoencoder import FitConfig
from ross_jax.demo.dataset import DatasetConfig
from ross_jax.demo.prepare import prepare
from ross_jax.demo.report import (
    DENOISER,
    LORA,
    STAGES,
    draw_losses,
    format_denoisers,
    format_report,
    run_folder,
    score_denoiser,
    summarise,
)
from ross_jax.demo.running import Interrupted, train
from ross_jax.process import leave, peak_memory
from ross_jax.storage import location

RECIPE = Path(__file__).parents[1] / "configs" / "demo.py"


def train_stage(root: Path, kind: str, seed: int, stage: str) -> None:
    """Trains or continues one stage of one model."""
    config = load_recipe(f"{RECIPE}:stage={stage},kind={kind},seed={seed},root={root}")
    train(config, run_folder(root, kind, seed, stage))


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    choices = import_recipe(RECIPE).CHOICES["kind"]
    help_text = f"objectives: {', '.join(choices)} (default denoise)"
    parser.add_argument("--kind", nargs="+", choices=choices, default=["denoise"], metavar="KIND", help=help_text)
    parser.add_argument("--baseline", action="store_true", help="also train without reconstruction, and compare")
    parser.add_argument("--lora", action="store_true", help="also train stage 2 with low-rank updates, and compare")
    parser.add_argument("--denoiser", action="store_true", help="then train the denoiser alone, without text")
    parser.add_argument("--seeds", type=int, within=SEED, nargs="+", default=[0], metavar="SEED", help="default 0")
    parser.add_argument("--quick", action="store_true", help="very little data, to check that everything runs")
    parser.add_argument("--root", type=location, metavar="DIR", help="folder to write to (default runs/demo)")
    talk()
    try:
        args = parser.parse_args(argv)
        root = args.root or location("runs/demo-quick" if args.quick else "runs/demo")
        kinds: list[str] = list(dict.fromkeys([*args.kind, *(["none"] if args.baseline else [])]))
        if args.denoiser and "denoise" not in kinds:
            parser.error(f"--denoiser: --kind {' '.join(kinds)} has no denoiser; add the kind denoise")
        started = time.perf_counter()
        dataset = DatasetConfig(pretrain=64, finetune=64, heldout_per_type=12) if args.quick else DatasetConfig()
        fit = FitConfig(images=64, steps=20) if args.quick else FitConfig()
        prepare(root, dataset, fit, say)
        for seed in args.seeds:
            for kind in kinds:
                for stage in (*STAGES, *([LORA] if args.lora else [])):
                    train_stage(root, kind, seed, stage)
        names = [*kinds, *(f"{kind}+{LORA}" for kind in kinds if args.lora)]
        scores = summarise(root, names, args.seeds)
        draw_losses(root / "losses.png", root, kinds, args.seeds[0])
        denoisers = {}
        for seed in args.seeds if args.denoiser else ():
            train_stage(root, "denoise", seed, DENOISER)
            denoisers[str(seed)] = score_denoiser(root, seed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Interrupted:
        say("interrupted; run the same command to continue")
        return 130
    cost = {
        "seconds": round(time.perf_counter() - started, 1),
        "peak_memory_gb": round(peak_memory() / 1e9, 2),
    }
    summary = {"scores": scores, **({"denoisers": denoisers} if denoisers else {}), **cost}
    (root / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print("\n".join([format_report(scores), *format_denoisers(denoisers)]))
    print(f"{cost['seconds']:.0f} s, at most {cost['peak_memory_gb']} GB of memory")
    images = [f"{kind}/seed{args.seeds[0]}/pictures.png" for kind in kinds if kind != "none"]
    if args.lora:
        images += [f"{kind}/seed{args.seeds[0]}/{LORA}.png" for kind in kinds if kind != "none"]
    if denoisers:
        images.append(f"denoise/seed{args.seeds[0]}/{DENOISER}.png")
    for name in ("summary.json", "losses.png", *images):
        print(root / name)
    return 0


if __name__ == "__main__":
    leave(main)
