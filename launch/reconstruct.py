"""Shows what a model's visual outputs hold: pictures, and what its denoiser or regressor makes of their visual outputs.

  python launch/reconstruct.py --checkpoint runs/demo/denoise/seed0/finetune --images photos/ --output reconstructions

Writes NAME.picture.png, NAME.reconstruction.png and NAME.autoencoder.png for each picture, and grid.png with all.
Prints PSNR, SSIM and the mean squared error of the latents, between two bounds: the autoencoder's own reconstruction,
and one from no visual outputs at all. A model that regresses pixels has no latents, and needs no autoencoder.
"""

import argparse
import dataclasses
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from ross_jax.config import UserError
from ross_jax.data.images import ImageError, decode, preprocess
from ross_jax.evaluation.images import draw_grid, psnr, ssim, to_uint8
from ross_jax.inference.model import RECONSTRUCTION_COMPONENTS, TEXT_COMPONENTS, Model, load_model
from ross_jax.inference.reconstruct import autoencode, encode_latents, outputs_of_images, target_images
from ross_jax.objectives.objective import Sampling
from ross_jax.objectives.reconstruction import reconstructor

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def find_images(paths: list[Path]) -> list[Path]:
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


def load(folder: Path, guidance: float) -> Model:
    """The model, if it can make pictures; warns of guidance that it was not trained for.

    Raises:
      UserError: it cannot.
    """
    model = load_model(folder, TEXT_COMPONENTS, RECONSTRUCTION_COMPONENTS)
    if reconstructor(model.config) is None:
        raise UserError(
            f"{folder}: this model makes no pictures; that takes a denoiser with its autoencoder, or a regressor of "
            "pixels or latents"
        )
    if guidance != 1.0 and model.config.denoiser is None:
        raise UserError(f"--cfg {guidance:g}: only a denoiser can be guided, and {folder} has none")
    if guidance != 1.0 and not model.condition_dropout:
        print(
            f"warning: --cfg {guidance:g}: {folder} does not say that it was trained with condition dropout",
            file=sys.stderr,
        )
    return model


@dataclasses.dataclass
class Made:
    """One kind of reconstruction: uint8 pictures, and the mean squared error of each one's latents if it has any."""

    images: list[np.ndarray] = dataclasses.field(default_factory=list)
    errors: list[np.ndarray] = dataclasses.field(default_factory=list)

    def add(self, pixels: np.ndarray, latents: np.ndarray | None, truth: np.ndarray | None) -> None:
        """Appends a chunk."""
        self.images.append(to_uint8(pixels))
        if latents is not None and truth is not None:
            self.errors.append(np.square(np.asarray(latents) - np.asarray(truth)).mean(axis=(1, 2, 3)))


def reconstruct(model: Model, images: list[np.ndarray], sampling: Sampling, seed: int, rows: int):
    """Pictures at 16 pixels per token, and each kind of reconstruction by its name."""
    outputs = outputs_of_images(model, images, rows)
    objective, config, params = reconstructor(model.config), model.config, model.params
    make = jax.jit(lambda outputs, keys: objective.reconstruct(params, params, outputs, keys, sampling))
    encode, ceiling = (jax.jit(partial(f, config)) for f in (encode_latents, autoencode))
    has_autoencoder = config.autoencoder is not None
    names = ("reconstruction", "autoencoder", "nothing") if has_autoencoder else ("reconstruction", "nothing")
    originals, made = [], {name: Made() for name in names}
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(np.arange(len(images)))
    for first in range(0, len(images), rows):
        part = slice(first, first + rows)
        chunk = np.stack(images[part])
        truth = encode(params, chunk) if has_autoencoder else None
        originals.append(to_uint8(target_images(config, chunk)))
        made["reconstruction"].add(*make(outputs[part], keys[part]), truth)
        made["nothing"].add(*make(np.zeros_like(outputs[part]), keys[part]), truth)
        if has_autoencoder:
            made["autoencoder"].add(ceiling(params, chunk), truth, truth)
    return np.concatenate(originals), made


def format_scores(originals: np.ndarray, made: dict[str, Made]) -> str:
    """Mean scores, a line for each kind of reconstruction."""
    lines = [f"{'':16}{'PSNR, dB':>10}{'SSIM':>8}{'latent MSE':>12}"]
    for name, each in made.items():
        shown = np.concatenate(each.images)
        error = f"{np.concatenate(each.errors).mean():.4g}" if each.errors else "-"
        lines.append(
            f"{name:16}{psnr(shown, originals).mean():>10.2f} {ssim(shown, originals).mean():>7.3f} {error:>11}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="a model or a run's directory")
    parser.add_argument("--images", type=Path, nargs="+", required=True, metavar="PATH", help="files and folders")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="gets the PNGs")
    parser.add_argument("--sampler", choices=("ddpm", "ddim", "dpm"), default="ddpm")
    parser.add_argument("--steps", type=int, default=50, help="of the sampler (default 50; dpm needs fewer)")
    parser.add_argument("--cfg", type=float, default=1.0, metavar="W", help="classifier-free guidance; 1 is none")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--rows", type=int, default=8, help="pictures that are computed at once (default 8)")
    args = parser.parse_args(argv)
    try:
        if args.rows < 1:
            raise UserError(f"--rows {args.rows}: at least 1")
        paths = find_images(args.images)
        model = load(args.checkpoint, args.cfg)
        images = [preprocess(decode(path.read_bytes(), str(path)), model.images, str(path)) for path in paths]
        sampling = Sampling(args.sampler, args.steps, guidance=args.cfg)
        originals, made = reconstruct(model, images, sampling, args.seed, args.rows)
        print(format_scores(originals, made))
        write(
            args.output, paths, {"picture": originals, **{name: np.concatenate(x.images) for name, x in made.items()}}
        )
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
    for column in columns.keys() - {"nothing"}:
        for name, pixels in zip(names, columns[column], strict=True):
            Image.fromarray(pixels).save(folder / f"{name}.{column}.png")
    draw_grid(folder / "grid.png", columns)


if __name__ == "__main__":
    sys.exit(main())
