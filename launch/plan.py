"""Plans a run on hardware that is not here: does it fit, how fast is it, and which mesh is best.

  python launch/plan.py --config=configs/ross.py:encoder=siglip,llm=qwen2_7b,stage=finetune --topology=v5e:8x8
  python launch/plan.py --config=configs/llava.py --topology=h100:1x1x8 --json=plan.json --png=plan.png
  python launch/plan.py --config=configs/ross.py --topology=v5p:4x4x4 --search
  python launch/plan.py --config=configs/ross.py --topology=v5e:8x8 --cached=targets

XLA compiles the config's own jitted step for the topology, on this machine's CPU. Nothing runs and no array is made.
TPU slices (v4, v5e, v5p, v6e, v7x: chips along each axis) need the extra `tpu`, GPUs (rtx4090, a100, h100, h200, b200:
slices x hosts x GPUs of a host) the extra `cuda`. Times are estimates; the output says how they are made. A 7B model
takes up to 7 GB of memory and some minutes.

Exit status: 0 it fits, 1 it does not, or an error. With --search: 0 if anything fits.
"""

import dataclasses
import json
import logging
import sys

import jax
from absl import flags
from ml_collections import config_flags

from ross_jax import command_line
from ross_jax.config import UserError, from_dict
from ross_jax.plan import search
from ross_jax.plan.figure import draw
from ross_jax.plan.planner import plan
from ross_jax.plan.targets import open_target
from ross_jax.plan.text import text
from ross_jax.plan.workload import Options
from ross_jax.storage import location
from ross_jax.training.recipe import RunConfig

_CONFIG = command_line.define_recipe()
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "v5e:8x8, v5p:4x4x4, 2xv5e:8x8 (slices), h100:1x1x8, ...", required=True
)
_OBJECTIVE = flags.DEFINE_enum("objective", "train", ["train", "generate"], "Plan a training step, or generation.")
_SEARCH = flags.DEFINE_bool("search", False, "Compare meshes, remat policies and batch sizes, and rank them.")
_ROWS = flags.DEFINE_integer("rows", None, "Rows of a global batch; default: as many as the packing plan would have.")
_TOKENS = flags.DEFINE_float("tokens", None, "Mean tokens of a conversation, images included.")
_IMAGES = flags.DEFINE_float("images", None, "Mean images of a conversation.")
_EPOCH = flags.DEFINE_integer("epoch", None, "Conversations of an epoch.")
_CACHED = flags.DEFINE_list("cached", [], "Parts that the run reads from a cache: targets, features.")
_PROMPT = flags.DEFINE_integer("prompt", 1024, "Tokens of a prompt, its image included, with --objective=generate.")
_NEW_TOKENS = flags.DEFINE_integer("new_tokens", 256, "Tokens to generate, with --objective=generate.")
_JSON = flags.DEFINE_string("json", None, "Write all figures there.")
_PNG = flags.DEFINE_string("png", None, "Draw memory and time there.")
_DUMP = flags.DEFINE_string("dump-hlo", None, "Keep the optimised HLO in this folder.")


def main() -> int:
    jax.config.update("jax_platforms", "cpu")  # a TPU or GPU of this machine has no part in it
    logging.getLogger("ross_jax.sharding").setLevel(logging.WARNING)  # the report lists what stays on every device
    try:
        config = from_dict(RunConfig, _CONFIG.value.to_dict())
        written, drawn, dump = (location(flag.value) if flag.value else None for flag in (_JSON, _PNG, _DUMP))
        target = open_target(_TOPOLOGY.value)
        given = {
            "recipe": config_flags.get_config_filename(flags.FLAGS["config"]),
            "objective": _OBJECTIVE.value,
            "rows": _ROWS.value,
            "tokens": _TOKENS.value,
            "images": _IMAGES.value,
            "epoch": _EPOCH.value,
            "cached": _CACHED.value,
            "prompt": _PROMPT.value,
            "new_tokens": _NEW_TOKENS.value,
            "dump": dump,
        }
        options = from_dict(Options, given, "flags")
        if _SEARCH.value:
            reports = search.search(config, target, options, lambda line: print(line, file=sys.stderr, flush=True))
            print(search.table(reports))
            figures = [dataclasses.asdict(report) for report in reports]
            best = reports[0]
        else:
            best = plan(config, target, options)
            print(text(best))
            figures = dataclasses.asdict(best)
        if written:
            written.write_text(json.dumps(figures, indent=1) + "\n")
        if drawn:
            draw(best, drawn)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except OSError as error:
        print(f"error: {error.filename}: cannot be written ({error.strerror})", file=sys.stderr, flush=True)
        return 1
    return 0 if best.fits else 1


if __name__ == "__main__":
    command_line.run(main)
