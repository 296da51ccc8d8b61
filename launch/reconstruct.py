"""Shows what a model's visual outputs hold: pictures, and what the denoiser makes of their visual outputs.

  python launch/reconstruct.py --checkpoint runs/demo/denoise/seed0/finetune --images photos/ --output reconstructions

Writes NAME.picture.png, NAME.reconstruction.png and NAME.autoencoder.png for each picture, and grid.png with all.
Prints PSNR, SSIM and the mean squared error of the latents, between two bounds: the autoencoder's own reconstruction,
and one from no visual outputs at all.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from ross_jax.config import UserError
from ross_jax.data.images import ImageError, decode, preprocess
from ross_jax.evaluation.pictures import draw_grid, psnr, ssim, to_uint8
from ross_jax.inference.model import RECONSTRUCTION_COMPONENTS, TEXT_COMPONENTS, Model, load_model
from ross_jax.inference.reconstruct import (
    Sampling,
    decode_latents,
    encode_latents,
    outputs_of_pictures,
    sample_latents,
    target_pictures,
)

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def find_pictures(paths: list[Path]) -> list[Path]:
    """Files as they are, folders as the pictures in them, in order of their names.

    Raises:
      ImageError: nothing there.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
            if not inside:
                raise ImageError(f"{path}: no picture in this folder; looked for {', '.join(sorted(SUFFIXES))}")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise ImageError(f"{path}: no such file or folder")
    return found


def reconstruct(model: Model, pictures: list[np.ndarray], sampling: Sampling, seed: int, rows: int):
    """Pictures at the autoencoder's size, and for each kind of reconstruction its pictures and its latents' error."""
    outputs = outputs_of_pictures(model, pictures, rows)
    sample = jax.jit(partial(sample_latents, model.config, sampling=sampling))
    encode, decoded = (jax.jit(partial(f, model.config)) for f in (encode_latents, decode_latents))
    originals, made = [], {name: ([], []) for name in ("reconstruction", "autoencoder", "nothing")}
    for first in range(0, len(pictures), rows):
        chunk = np.stack(pictures[first : first + rows])
        given, key = outputs[first : first + rows], jax.random.fold_in(jax.random.key(seed), first)
        truth = encode(model.params, chunk)
        latents = {
            "reconstruction": sample(model.params, given, key),
            "autoencoder": truth,
            "nothing": sample(model.params, np.zeros_like(given), key),
        }
        originals.append(to_uint8(target_pictures(model.config, chunk)))
        for name, values in latents.items():
            made[name][0].append(to_uint8(decoded(model.params, values)))
            made[name][1].append(np.square(np.asarray(values) - np.asarray(truth)).mean(axis=(1, 2, 3)))
    joined = {name: tuple(np.concatenate(part) for part in parts) for name, parts in made.items()}
    return np.concatenate(originals), joined


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="a model or a run's directory")
    parser.add_argument("--images", type=Path, nargs="+", required=True, metavar="PATH", help="files and folders")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="gets the PNGs")
    parser.add_argument("--sampler", choices=("ddpm", "ddim", "dpm"), default="ddpm")
    parser.add_argument("--steps", type=int, default=50, help="of the sampler (default 50; dpm needs fewer)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--rows", type=int, default=8, help="pictures that are computed at once (default 8)")
    args = parser.parse_args(argv)
    try:
        if args.rows < 1:
            raise UserError(f"--rows {args.rows}: at least 1")
        paths = find_pictures(args.images)
        model = load_model(args.checkpoint, TEXT_COMPONENTS + RECONSTRUCTION_COMPONENTS)
        pictures = [preprocess(decode(path.read_bytes(), str(path)), model.images, str(path)) for path in paths]
        originals, made = reconstruct(model, pictures, Sampling(args.sampler, args.steps), args.seed, args.rows)
        print(f"{'':16}{'PSNR, dB':>10}{'SSIM':>8}{'latent MSE':>12}")
        for name, (shown, errors) in made.items():
            values = f"{psnr(shown, originals).mean():>10.2f} {ssim(shown, originals).mean():>7.3f}"
            print(f"{name:16}{values} {errors.mean():>11.4g}")
        write(args.output, paths, {"picture": originals, **{name: shown for name, (shown, _) in made.items()}})
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(args.output / "grid.png")
    return 0


def write(folder: Path, paths: list[Path], columns: dict[str, np.ndarray]) -> None:
    """One PNG per picture and column, numbered where names repeat, and the grid."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [path.stem for path in paths]
    names = [name if names.count(name) == 1 else f"{name}.{i}" for i, name in enumerate(names)]
    for column in ("picture", "reconstruction", "autoencoder"):
        for name, pixels in zip(names, columns[column], strict=True):
            Image.fromarray(pixels).save(folder / f"{name}.{column}.png")
    draw_grid(folder / "grid.png", columns)


if __name__ == "__main__":
    sys.exit(main())
