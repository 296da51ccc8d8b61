"""Shows what a model's visual outputs hold: images beside what denoiser or regressor reconstruct from them.

  python launch/reconstruct.py --checkpoint runs/demo/denoise/seed0/finetune --images photos/ --output reconstructions

Writes NAME.picture.png, NAME.reconstruction.png and NAME.autoencoder.png for each image, and grid.png with all.
Prints PSNR, SSIM and the mean squared error of the latents, also of two bounds: the autoencoder's own reconstruction,
and a reconstruction from visual outputs of zero ("nothing"). A model that regresses pixels has no latents.
"""

import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from ross_jax.arguments import SEED, Parser
from ross_jax.config import Range, UserError, required
from ross_jax.console import talk
from ross_jax.data.images import ImageError
from ross_jax.evaluation.images import draw_grid, psnr, ssim, to_uint8
from ross_jax.inference.model import Model, load
from ross_jax.inference.prompts import read_images
from ross_jax.inference.reconstruct import autoencode, encode_latents, reconstruct, target_images
from ross_jax.objectives.objective import Reconstruction, Sampling
from ross_jax.process import leave
from ross_jax.storage import location

MAX_ROWS = 4096
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def find_images(paths: list[Path]) -> list[Path]:
    """The image files that the paths name; for a folder all its images, in order of their names.

    Raises:
      ImageError: a path that does not exist, or a folder without images.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.name[0] != ".")
            if not inside:
                raise ImageError(f"{path}: no image in this folder; looked for {', '.join(sorted(SUFFIXES))}")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise ImageError(f"{path}: no such file or folder")
    return found


@dataclasses.dataclass(frozen=True)
class Column:
    """One kind of reconstruction of all images.

    Attributes:
      images: uint8[images, side, side, 3].
      latent_error: mean squared error of the latents; None for a model without latents.
    """

    images: np.ndarray
    latent_error: float | None


def reconstruct_all(
    model: Model, images: list[np.ndarray], sampling: Sampling, seed: int, rows: int
) -> tuple[np.ndarray, dict[str, Column]]:
    """The images at the size of their reconstructions, uint8, and each kind of reconstruction by its name."""
    config, params = model.config, model.params
    chunks = [np.stack(images[first : first + rows]) for first in range(0, len(images), rows)]

    def compute(function: Callable) -> np.ndarray:
        run = jax.jit(function)
        return np.concatenate([np.asarray(run(params, chunk)) for chunk in chunks])

    outputs = model.visual_outputs(images, rows)
    made = {
        name: reconstruct(config, params, each, sampling, seed, rows)
        for name, each in (("reconstruction", outputs), ("nothing", np.zeros_like(outputs)))
    }
    truth = None
    if config.autoencoder is not None:
        truth = compute(partial(encode_latents, config))
        made["autoencoder"] = Reconstruction(compute(partial(autoencode, config)), truth)
    columns = {}
    for name in ("reconstruction", "autoencoder", "nothing"):
        if name in made:
            pixels, latents = made[name]
            error = None if latents is None or truth is None else float(np.square(latents - truth).mean())
            columns[name] = Column(to_uint8(pixels), error)
    return to_uint8(compute(lambda _, chunk: target_images(config, chunk))), columns


def format_scores(originals: np.ndarray, columns: dict[str, Column]) -> str:
    """Mean scores, a line for each kind of reconstruction."""
    lines = [f"{'':16}{'PSNR, dB':>10}{'SSIM':>8}{'latent MSE':>12}"]
    for name, column in columns.items():
        error = "-" if column.latent_error is None else f"{column.latent_error:.4g}"
        scores = psnr(column.images, originals).mean(), ssim(column.images, originals).mean()
        lines.append(f"{name:16}{scores[0]:>10.2f} {scores[1]:>7.3f} {error:>11}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    talk()
    parser = Parser(description=__doc__)
    parser.add_argument("--checkpoint", type=location, required=True, metavar="DIR", help="directory of a model or run")
    parser.add_argument("--images", type=location, nargs="+", required=True, metavar="PATH", help="files and folders")
    parser.add_argument("--output", type=location, required=True, metavar="DIR", help="gets the PNGs")
    parser.add_argument("--sampler", choices=("ddpm", "ddim", "dpm"), default="ddpm")
    parser.add_argument(
        "--steps",
        type=int,
        within=Range(1, 1000),
        default=50,
        help="steps of the sampler (default 50; dpm needs fewer)",
    )
    parser.add_argument(
        "--cfg",
        type=float,
        within=Range(-100.0, 100.0),
        default=1.0,
        metavar="W",
        help="classifier-free guidance; 1 is none",
    )
    parser.add_argument("--seed", type=int, within=SEED, default=0, help="seed of the noise")
    parser.add_argument("--rows", type=int, default=8, help="images that are computed at once (default 8)")
    try:
        args = parser.parse_args(argv)
        if not 1 <= args.rows <= MAX_ROWS:
            raise UserError(f"--rows {args.rows}: at least 1, at most {MAX_ROWS}")
        paths = find_images(args.images)
        model, sampling = load(args.checkpoint), Sampling(args.sampler, args.steps, guidance=args.cfg)
        model.check_reconstruction(sampling)
        if args.cfg != 1.0 and not model.condition_dropout:
            warning = f"{args.checkpoint} does not say that it was trained with condition dropout"
            print(f"warning: --cfg {args.cfg:g}: {warning}", file=sys.stderr)
        images = read_images(paths, required(model.image_config))
        originals, columns = reconstruct_all(model, images, sampling, args.seed, args.rows)
        print(format_scores(originals, columns))
        write(args.output, paths, {"picture": originals, **{name: each.images for name, each in columns.items()}})
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(args.output / "grid.png")
    return 0


def write(folder: Path, paths: list[Path], columns: dict[str, np.ndarray]) -> None:
    """Writes a PNG for each image and column, numbered where names repeat, and the grid of all columns."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [path.stem for path in paths]
    names = [name if names.count(name) == 1 else f"{name}.{i}" for i, name in enumerate(names)]
    for column in columns.keys() - {"nothing"}:
        for name, pixels in zip(names, columns[column], strict=True):
            with (folder / f"{name}.{column}.png").open("wb") as file:
                Image.fromarray(pixels).save(file, "PNG")
    draw_grid(folder / "grid.png", columns)


if __name__ == "__main__":
    leave(main)
