"""Converts checkpoints: from Hugging Face, diffusers and the reference to a ross_jax model directory, and back.

python launch/convert.py import --from DIR_OR_ID [--from ...] [--teacher DIR_OR_ID] --output DIR
python launch/convert.py export --from DIR --format LAYOUT [--without NAME ...] --output DIR
"""

import argparse
import os
import sys
from typing import get_args

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # conversion is host work; accelerators stay free

from ross_jax import checkpoints
from ross_jax.api import LAYOUTS, export_model, import_model
from ross_jax.arguments import Parser
from ross_jax.config import UserError
from ross_jax.console import talk
from ross_jax.convert.export_weights import DTYPE_NAMES
from ross_jax.convert.exporting import COMPONENTS
from ross_jax.convert.peft import EXPORTED
from ross_jax.data.conversation import Template
from ross_jax.process import end, leave
from ross_jax.storage import location


def say(text: str) -> None:
    """Progress goes to stderr, so that stdout stays a result."""
    print(text, file=sys.stderr, flush=True)


def import_command(args: argparse.Namespace) -> None:
    import_model(
        args.origins,
        args.output,
        teacher=args.teacher,
        vision_tower=args.vision_tower,
        autoencoder=args.autoencoder,
        progress=say,
    )
    found, foreign = checkpoints.model_abstract(args.output), checkpoints.read_manifest(args.output)["foreign"]
    print(f"{args.output}: {', '.join(name for name in dict.fromkeys([*foreign, *found]) if name in found)}")


def export_command(args: argparse.Namespace) -> None:
    settings = {"layout": args.format, "dtype": args.dtype, "without": args.without}
    settings |= {"template": args.template, "base": args.base}
    print(export_model(args.model, args.output, **settings, progress=say))


def main(argv: list[str] | None = None) -> int:
    talk()
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    importer = commands.add_parser("import", help="foreign checkpoint(s) to a model directory")
    importer.add_argument(
        "--from",
        dest="origins",
        action="append",
        default=[],
        metavar="DIR_OR_ID",
        help="a full Ross/LLaVA checkpoint, stage-1 adapters, or a SigLIP, CLIP, DINOv2, Qwen, Llama, AutoencoderKL or "
        "AutoencoderTiny folder or hub id; repeat to compose a model of several. Or an adapter of peft, and its base, "
        "which may be a model directory",
    )
    importer.add_argument(
        "--teacher",
        metavar="DIR_OR_ID",
        help="a SigLIP, CLIP or DINOv2 folder or hub id, whose last features visual outputs can be trained to regress",
    )
    importer.add_argument("--output", type=location, required=True, metavar="DIR", help="the model directory to make")
    for flag in ("--vision-tower", "--autoencoder"):
        importer.add_argument(flag, type=location, metavar="DIR", help="folder with that component's config.json")
    importer.set_defaults(run=import_command)
    exporter = commands.add_parser("export", help="model directory to a foreign layout")
    exporter.add_argument("--from", dest="model", type=location, required=True, metavar="DIR", help="a model directory")
    exporter.add_argument("--format", choices=LAYOUTS, required=True)
    exporter.add_argument("--output", type=location, required=True, metavar="DIR")
    exporter.add_argument(
        "--without",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"components to leave out, of {', '.join(COMPONENTS)}",
    )
    exporter.add_argument(
        "--template",
        choices=get_args(Template),
        help="conversation template of the chat template in llava and original-llava; default: the one of the training",
    )
    exporter.add_argument(
        "--base",
        choices=EXPORTED,
        default=EXPORTED[0],
        help="with --format peft: what the adapter extends (default llava); language is the language model alone",
    )
    exporter.add_argument("--dtype", choices=sorted(DTYPE_NAMES), help="default: as imported")
    exporter.set_defaults(run=export_command)
    try:
        args = parser.parse_args(argv)
        if args.command == "import" and not (args.origins or args.teacher):
            importer.error("the following arguments are required: --from or --teacher")
        args.run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # threads that still write are not waited for; the next run clears what they leave
        end(130, "error: interrupted; nothing was converted")
    return 0


if __name__ == "__main__":
    leave(main)
