"""Answers a question about pictures, greedily, with a model directory or a run's directory.

python launch/generate.py --checkpoint runs/demo/denoise/seed0/finetune --image photo.png --prompt "Where is red?"
"""

import argparse
import sys
from pathlib import Path

from ross_jax.config import UserError
from ross_jax.data.conversation import IMAGE_MARKER
from ross_jax.data.images import ImageError, decode, preprocess
from ross_jax.inference.answer import answer
from ross_jax.inference.model import load_model


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ImageError(f"{path}: cannot be read ({error.strerror or error})") from error


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="a model or a run's directory")
    parser.add_argument("--image", type=Path, action="append", default=[], metavar="FILE", help="repeat for several")
    parser.add_argument("--prompt", required=True, help=f"pictures go in front unless it has {IMAGE_MARKER} marks")
    parser.add_argument("--template", help="of the conversation; default: the one that the model was trained with")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    args = parser.parse_args(argv)
    text = args.prompt if IMAGE_MARKER in args.prompt else f"{IMAGE_MARKER}\n" * len(args.image) + args.prompt
    record = {
        "id": "prompt",
        **({"image": list(map(str, args.image))} if args.image else {}),
        "conversations": [{"from": "human", "value": text}],
    }
    try:
        model = load_model(args.checkpoint, dtype=args.dtype)
        images = [preprocess(decode(read(path), str(path)), model.images, str(path)) for path in args.image]
        (reply,) = answer(model, [record], [images], args.max_new_tokens, 1, args.template, args.dtype)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(reply)
    return 0


if __name__ == "__main__":
    sys.exit(main())
