"""Answers a question about images, greedily, with a model directory or a run's directory.

python launch/generate.py --checkpoint runs/demo/denoise/seed0/finetune --image photo.png --prompt "Where is red?"
"""

import sys
from pathlib import Path

from ross_jax.arguments import Parser
from ross_jax.config import UserError
from ross_jax.data.conversation import IMAGE_MARKER
from ross_jax.inference.model import TEXT_COMPONENTS, load
from ross_jax.inference.prompts import MAX_NEW_TOKENS, Request


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    length = f"length of the longest answer (default 256, at most {MAX_NEW_TOKENS})"
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="a model or a run's directory")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="repeat for several")
    parser.add_argument("--prompt", required=True, help=f"images stand before it unless it has {IMAGE_MARKER} marks")
    parser.add_argument("--template", help="conversation template; default: the one that the model was trained with")
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=256,
        help=length,
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    try:
        args = parser.parse_args(argv)
        request = Request(args.image, args.prompt, max_new_tokens=args.max_new_tokens)
        components = TEXT_COMPONENTS if args.image else ("language",)
        model = load(args.checkpoint, components, args.template, args.dtype)
        print(model.ask_many([request])[0])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
