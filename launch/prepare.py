"""Gets everything ready for a stage of Ross: says what is missing, downloads it, and writes a recipe.

  python launch/prepare.py --stage pretrain --root /data/ross                  what is there, and what is missing
  python launch/prepare.py --stage pretrain --root /data/ross --download       fetches what is missing from the hub
  python launch/prepare.py --stage finetune --root /data/ross --data mine.json --images pictures.zip

Downloads go on where they were cut off, and are compared with the digests that the hub states. HF_ENDPOINT names a
mirror. Exit status 1: something is missing.
"""

import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "" if sys.stderr.isatty() else "1")

from ross_jax.arguments import Parser
from ross_jax.config import UserError
from ross_jax.console import say, talk
from ross_jax.prepare import hub, layout, public
from ross_jax.process import leave
from ross_jax.storage import location


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--stage", required=True, help="pretrain or finetune")
    parser.add_argument("--root", type=location, required=True, metavar="DIR", help="folder of weights, data and runs")
    parser.add_argument("--encoder", default="siglip", help="vision encoder, as in configs/ross.py (default siglip)")
    parser.add_argument("--llm", default="qwen2_7b", help="language model, as in configs/ross.py (default qwen2_7b)")
    parser.add_argument("--data", type=location, metavar="FILE", help="your conversations, instead of the paper's")
    parser.add_argument("--images", type=location, nargs="*", default=[], metavar="PATH", help="their pictures")
    parser.add_argument("--download", action="store_true", help="download what is missing")
    talk()
    try:
        return prepare(parser.parse_args(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def prepare(args) -> int:
    root = args.root.resolve()
    items = public.items(args.stage, args.encoder, args.llm)
    if args.data:
        items = [item for item in items if item.kind == "model"]
    if args.download:
        for item in items:
            for file in hub.list_files(item):
                hub.fetch(item, file, root)
    absent = {item.repo + item.name: layout.missing_files(item, root) for item in items}
    for item in items:
        missing = absent[item.repo + item.name]
        size = "size unknown" if item.gigabytes is None else f"about {item.gigabytes:g} GB"
        state = f"missing {', '.join(missing)}" if missing else "there"
        terms = f"{item.licence}{'; accept its terms on its page' if item.gated else ''}"
        public_name = "/".join(filter(None, (item.repo, item.subfolder)))
        print(f"{item.name:<18} {public_name:<40} {size:<13} {root / item.folder}: {state}  ({terms})")
    if any(absent.values()):
        total = sum(item.gigabytes or 0 for item in items if absent[item.repo + item.name])
        number = sum(map(bool, absent.values()))
        raise UserError(
            f"{number} of {len(items)} are missing, about {total:.0f} GB or more; put them there, or add --download"
        )
    if args.data:
        source = layout.make_source(args.data.resolve(), [path.resolve() for path in args.images])
    else:
        places = [root / item.folder / item.patterns[0] for item in items if item.kind == "dataset"]
        source = layout.make_source(places[0], [hub.kept(place) for place in places[1:]])
    count, problems = layout.absent_images(source)
    if problems:
        say(f"warning: {len(problems)} of {count} conversations that were tried have a problem, such as {problems[0]}")
    recipe = layout.write_recipe(root, args.stage, args.encoder, args.llm, source)
    following = layout.commands(root, args.stage, args.encoder, args.llm, args.download)
    print("\n".join([f"wrote {recipe}. Next:", *following]))
    return 0


if __name__ == "__main__":
    leave(main)
