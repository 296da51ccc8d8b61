"""Computes, once, what frozen components compute for a recipe's images. Its runs read that instead.

  python launch/cache.py --config=configs/ross.py:encoder=siglip,llm=qwen2_7b,stage=pretrain --output=cache/pretrain \
      --config.init="('models/start',)" --what=targets
  python launch/train.py --config=... --workdir=... --config.data.precomputed=cache/pretrain

--what=targets: the autoencoder's posteriors or the teacher's features. --what=features: the vision encoder's features.
--what=targets,features: both. The same command continues where it was interrupted. Several hosts share the work if each
starts it with --processes=N, another --process=I, and the same folder.
"""

import sys

import jax
from absl import flags

from ross_jax import command_line
from ross_jax.config import UserError, from_dict
from ross_jax.storage import location
from ross_jax.training.precompute import CacheConfig, precompute, sizes
from ross_jax.training.recipe import RunConfig

_CONFIG = command_line.define_recipe()
_OUTPUT = flags.DEFINE_string("output", None, "The cache's folder.", required=True)
_WHAT = flags.DEFINE_list("what", ["targets"], "What is computed: targets, features, or both, joined by a comma.")
_ROWS = flags.DEFINE_integer("rows", 64, "Pictures that are computed at once.")
_DTYPE = flags.DEFINE_string("dtype", "float32", "Type of stored targets; bfloat16 halves their size.")
_PROCESSES = flags.DEFINE_integer("processes", 1, "Processes that make the cache together.")
_PROCESS = flags.DEFINE_integer("process", 0, "Number of this process, from 0.")


def main() -> int:
    # On virtual CPU devices, overlapping steps may wait for each other's threads for ever.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        folder = location(_OUTPUT.value)
        config = from_dict(RunConfig, _CONFIG.value.to_dict())
        given = {"what": _WHAT, "rows": _ROWS, "dtype": _DTYPE, "processes": _PROCESSES, "process": _PROCESS}
        settings = from_dict(CacheConfig, {name: flag.value for name, flag in given.items()}, "flags")
        result = precompute(config, folder, settings, report, progress)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    rate = f", {result.images / result.seconds:.1f} images/s" if result.images else ""
    broken = f", {result.broken} samples broken" if result.broken else ""
    report(f"{result.images} images in {result.seconds:.0f} s{rate}{broken}")
    if result.missing:
        report(f"{folder}: {result.missing} shards are left to the other processes")
    else:
        report(
            f"{folder}: complete, " + ", ".join(f"{part} {size / 1e9:.3g} GB" for part, size in sizes(folder).items())
        )
    return 0


def report(text: str) -> None:
    print(text, flush=True)


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    command_line.run(main)
