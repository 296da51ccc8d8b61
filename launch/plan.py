"""Plans a run on hardware that is not at hand: does it fit, how fast will it be, which mesh is best.

  python launch/plan.py --config=configs/ross.py:encoder=siglip,llm=qwen2_7b,stage=finetune --topology=v5e:8x8
  python launch/plan.py --config=configs/llava.py --topology=h100:1x1x8 --json=plan.json --png=plan.png
  python launch/plan.py --config=configs/ross.py --topology=v5p:4x4x4 --search
  python launch/plan.py --config=configs/ross.py --topology=v5e:8x8 --cached=targets

The config's own jitted step is compiled ahead of time for the topology, by XLA, on this machine's CPU: nothing runs and
no array is made. TPU slices (v4, v5e, v5p, v6e, v7x: chips along each axis) need the extra `tpu`, GPUs (a100, h100,
h200, b200: slices x hosts x GPUs of a host) the extra `cuda`. Times are estimates; the output says how they come about.

Exit status: 0 it fits, 1 it does not, or an error; of --search, 0 if anything fits.
"""

import dataclasses
import gc
import json
import logging
import sys
from pathlib import Path

from ross_jax.plan.environment import one_heap, prepare, without_gpus

prepare()

from absl import flags  # noqa: E402
from ml_collections import config_flags  # noqa: E402

from ross_jax import command_line  # noqa: E402
from ross_jax.config import UserError, from_dict  # noqa: E402
from ross_jax.plan import search  # noqa: E402
from ross_jax.plan.figure import draw  # noqa: E402
from ross_jax.plan.planner import Options, plan  # noqa: E402
from ross_jax.plan.report import text  # noqa: E402
from ross_jax.plan.targets import open_target  # noqa: E402
from ross_jax.training.recipe import RunConfig  # noqa: E402

_CONFIG = command_line.define_recipe()
_TOPOLOGY = flags.DEFINE_string("topology", None, "v5e:8x8, v5p:4x4x4, 2xv5e:8x8 (slices), h100:1x1x8, ...")
_OBJECTIVE = flags.DEFINE_enum("objective", "train", ["train", "generate"], "The step, or prefill and decoding.")
_SEARCH = flags.DEFINE_bool("search", False, "Compare meshes, remat policies and batch sizes, and rank them.")
_ROWS = flags.DEFINE_integer("rows", None, "Rows of a global batch; default: what the packing plan would make.")
_TOKENS = flags.DEFINE_float("tokens", None, "Mean tokens of a conversation, pictures included.")
_IMAGES = flags.DEFINE_float("images", None, "Mean pictures of a conversation.")
_EPOCH = flags.DEFINE_integer("epoch", None, "Conversations of an epoch.")
_CACHED = flags.DEFINE_list("cached", [], "What the run reads from a cache of launch/cache.py: targets, features.")
_PROMPT = flags.DEFINE_integer("prompt", 1024, "Tokens of a prompt, its picture included, with --objective=generate.")
_NEW_TOKENS = flags.DEFINE_integer("new_tokens", 256, "Tokens to generate, with --objective=generate.")
_JSON = flags.DEFINE_string("json", None, "Write all figures there.")
_PNG = flags.DEFINE_string("png", None, "Draw memory and time there.")
_DUMP = flags.DEFINE_string("dump-hlo", None, "Keep the optimised HLO in this folder.")


def main() -> int:
    logging.getLogger("ross_jax.sharding").setLevel(logging.WARNING)  # the report says it, once
    gc.freeze()  # what is imported need not be looked through for garbage
    try:
        config = from_dict(RunConfig, _CONFIG.value.to_dict())
        if "v4:" in _TOPOLOGY.value.lower():
            one_heap()
        target = open_target(_TOPOLOGY.value)
        if target.is_tpu:
            without_gpus()
        options = Options(
            recipe=config_flags.get_config_filename(flags.FLAGS["config"]),
            objective=_OBJECTIVE.value,
            rows=_ROWS.value,
            tokens=_TOKENS.value,
            images=_IMAGES.value,
            epoch=_EPOCH.value,
            cached=tuple(_CACHED.value),
            prompt=_PROMPT.value,
            new_tokens=_NEW_TOKENS.value,
            dump=Path(_DUMP.value) if _DUMP.value else None,
        )
        if _SEARCH.value:
            reports = search.search(config, target, options, lambda line: print(line, file=sys.stderr, flush=True))
            print(search.table(reports))
            figures = [dataclasses.asdict(report) for report in reports]
            best = reports[0]
        else:
            best = plan(config, target, options)
            print(text(best))
            figures = dataclasses.asdict(best)
        if _JSON.value:
            Path(_JSON.value).write_text(json.dumps(figures, indent=1) + "\n")
        if _PNG.value:
            draw(best, _PNG.value)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except OSError as error:
        print(f"error: {error.filename}: cannot be written ({error.strerror})", file=sys.stderr, flush=True)
        return 1
    return 0 if best.fits else 1


if __name__ == "__main__":
    command_line.run(main, ["config", "topology"])
