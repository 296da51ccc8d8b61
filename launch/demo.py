"""The demo: makes its data, trains both stages, and shows what was learned.

`bash launch/demo.sh` sets everything up first.

  python launch/demo.py [--kind latent] [--baseline] [--denoiser] [--seeds 0 1 2] [--quick] [--root runs/demo]

Interrupted, the same command continues where it was.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from ross_jax.command_line import import_recipe, load_recipe
from ross_jax.config import UserError
from ross_jax.demo.autoencoder import FitConfig
from ross_jax.demo.dataset import DatasetConfig
from ross_jax.demo.prepare import prepare
from ross_jax.demo.report import (
    DENOISER,
    STAGES,
    draw_losses,
    format_denoisers,
    format_report,
    run_folder,
    score_denoiser,
    summarise,
)
from ross_jax.demo.running import Interrupted, say, train
from ross_jax.process import peak_memory

RECIPE = Path(__file__).parents[1] / "configs" / "demo.py"


def train_stage(root: Path, kind: str, seed: int, stage: str) -> None:
    """Trains one stage of one model, or continues it."""
    config = load_recipe(f"{RECIPE}:stage={stage},kind={kind},seed={seed},root={root}")
    train(config, run_folder(root, kind, seed, stage))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kind = {"choices": import_recipe(RECIPE).CHOICES["kind"], "default": ["denoise"], "metavar": "KIND"}
    parser.add_argument("--kind", nargs="+", help=f"of reconstruction: {', '.join(kind['choices'])}", **kind)
    parser.add_argument("--baseline", action="store_true", help="also train without reconstruction, and compare")
    parser.add_argument("--denoiser", action="store_true", help="then tune Ross's denoiser alone, on pictures alone")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="SEED", help="of the runs (default 0)")
    parser.add_argument("--quick", action="store_true", help="little data: to see that all runs; nothing is learned")
    parser.add_argument("--root", type=Path, metavar="DIR", help="of all that is written (default runs/demo)")
    args = parser.parse_args(argv)
    root = args.root or Path("runs/demo-quick" if args.quick else "runs/demo")
    kinds = list(dict.fromkeys([*args.kind, *(["none"] if args.baseline else [])]))
    if args.denoiser and "denoise" not in kinds:
        parser.error(f"--denoiser: of --kind {' '.join(kinds)} none has a denoiser")
    started = time.perf_counter()
    try:
        dataset = DatasetConfig(pretrain=64, finetune=64, heldout_per_type=12) if args.quick else DatasetConfig()
        fit = FitConfig(images=64, steps=20) if args.quick else FitConfig()
        prepare(root, dataset, fit, say)
        for seed in args.seeds:
            for kind in kinds:
                for stage in STAGES:
                    train_stage(root, kind, seed, stage)
        scores = summarise(root, kinds, args.seeds)
        draw_losses(root / "losses.png", root, kinds, args.seeds[0])
        denoisers = {}
        for seed in args.seeds if args.denoiser else ():
            train_stage(root, "denoise", seed, DENOISER)
            denoisers[str(seed)] = score_denoiser(root, seed)
    except UserError as error:
        say(f"error: {error}")
        return 1
    except Interrupted:
        say("interrupted; the same command continues")
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
    if denoisers:
        images.append(f"denoise/seed{args.seeds[0]}/{DENOISER}.png")
    for name in ("summary.json", "losses.png", *images):
        print(root / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
