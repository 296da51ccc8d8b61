"""Holds a reference checkpoint, run by this project, against recorded numbers of the reference.

  python launch/verify.py --checkpoint DIR --golden FILE [--rtol 1e-4]

Prints a row per recorded tensor; exits 1 if any differs or is not covered.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # float32 as the goldens were recorded

from ross_jax.config import UserError
from ross_jax.parity.golden import read_golden
from ross_jax.parity.verify import Verifier, format_table, load_reference


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="a full Ross checkpoint folder")
    parser.add_argument(
        "--golden", type=Path, required=True, metavar="FILE", help="safetensors file of recorded numbers"
    )
    parser.add_argument("--rtol", type=float, default=1e-4, help="relative to each tensor's largest value")
    parser.add_argument("--vision-tower", type=Path, metavar="DIR", help="as for convert.py import")
    parser.add_argument("--autoencoder", type=Path, metavar="DIR", help="as for convert.py import")
    args = parser.parse_args(argv)
    try:
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
    sys.exit(main())
