"""Runs a checkpoint of the reference, and compares the results with numbers that the reference's own code recorded.

  python launch/verify.py --checkpoint DIR --golden FILE [--rtol 1e-4]

Prints a row for each recorded tensor. Exit status 1: a tensor differs or is not covered.
"""

import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the goldens were recorded in float32; accelerators round more

from ross_jax.arguments import Parser
from ross_jax.config import Range, UserError
from ross_jax.parity.golden import read_golden
from ross_jax.parity.verify import Verifier, format_table, load_reference
from ross_jax.process import leave
from ross_jax.storage import location


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--checkpoint", type=location, required=True, metavar="DIR", help="folder of a Ross checkpoint")
    parser.add_argument(
        "--golden", type=location, required=True, metavar="FILE", help="safetensors file of recorded numbers"
    )
    tolerance = "tolerance, relative to the largest value of each tensor (default 1e-4)"
    parser.add_argument("--rtol", type=float, within=Range(0.0, 1.0), default=1e-4, help=tolerance)
    parser.add_argument("--vision-tower", type=location, metavar="DIR", help="as in convert.py import")
    parser.add_argument("--autoencoder", type=location, metavar="DIR", help="as in convert.py import")
    try:
        args = parser.parse_args(argv)
        golden = read_golden(args.golden)
        flags = {"vision_tower": args.vision_tower, "autoencoder_folder": args.autoencoder}
        reference, params = load_reference(args.checkpoint, golden.facts, **flags)
        rows = Verifier(reference, golden).rows(params, args.rtol)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(format_table(rows))
    return 0 if rows and all(row.verdict == "ok" for row in rows) else 1


if __name__ == "__main__":
    leave(main)
