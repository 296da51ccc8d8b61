"""Answers questions about images with a model directory or a run's directory.

python launch/generate.py --checkpoint runs/demo/denoise/seed0/finetune --image photo.png --prompt "Where is red?"
python launch/generate.py --checkpoint runs/demo/denoise/seed0/finetune --interactive
python launch/generate.py --checkpoint runs/demo/denoise/seed0/finetune --input questions.jsonl --output answers.jsonl
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ross_jax import checkpoints
from ross_jax.arguments import Parser
from ross_jax.config import Range, UserError
from ross_jax.console import talk
from ross_jax.data.conversation import IMAGE_MARKER
from ross_jax.inference.model import TEXT_COMPONENTS, Model, load
from ross_jax.inference.prompts import MAX_NEW_TOKENS, Request, read_images
from ross_jax.inference.queue import answer_file
from ross_jax.process import leave
from ross_jax.sharding import parse_mesh
from ross_jax.storage import location, working_copy

SAMPLING = {
    "max_new_tokens": (int, 256, f"length of the longest answer (default 256, at most {MAX_NEW_TOKENS})"),
    "temperature": (float, 0.0, "0 (default) takes the most likely token; more draws more freely"),
    "top_k": (int, 0, "draws from the K most likely tokens; 0 (default): from all"),
    "top_p": (float, 1.0, "draws from the most likely tokens that together have this probability (default 1)"),
    "min_p": (float, 0.0, "draws from tokens with at least this share of the highest probability (default 0)"),
    "repetition_penalty": (float, 1.0, "more than 1 makes tokens less likely that the text already has (default 1)"),
    "seed": (int, 0, "seed of the draws (default 0)"),
}
"""Field of a request: type, default, help."""
COMMANDS = (
    "/image FILE adds an image to the next question, /reset forgets, /save FILE writes the conversation, /quit ends"
)


def main(argv: list[str] | None = None) -> int:
    talk()
    parser = Parser(description=__doc__)
    parser.add_argument("--checkpoint", type=location, required=True, metavar="DIR", help="directory of a model or run")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="repeat for several")
    parser.add_argument("--prompt", help=f"images stand before it unless it has {IMAGE_MARKER} marks")
    parser.add_argument("--interactive", action="store_true", help=f"a conversation: {COMMANDS}")
    parser.add_argument("--input", type=location, metavar="FILE", help="JSONL file of questions")
    parser.add_argument("--output", type=location, metavar="FILE", help="JSONL file of their answers")
    parser.add_argument("--template", help="conversation template; default: the one that the model was trained with")
    for name, (kind, default, explanation) in SAMPLING.items():
        parser.add_argument("--" + name.replace("_", "-"), type=kind, default=default, help=explanation)
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends an answer; may be repeated")
    parser.add_argument("--rows", type=int, within=Range(1, 4096), default=8, help="questions of --input at once")
    parser.add_argument("--mesh", metavar="AXES", help="splits the model over all devices: data=2,fsdp=1,tensor=4")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--quantize", choices=("int8", "fp8"), help="the language model's matrices in 8 bits")
    try:
        return run(parser.parse_args(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def run(args: argparse.Namespace) -> int:
    if sum([args.prompt is not None, args.interactive, args.input is not None]) != 1:
        raise UserError("pass one of --prompt, --interactive and --input")
    if (args.input is None) != (args.output is None):
        raise UserError("--input and --output go together")
    if args.input and args.input == args.output:
        raise UserError(f"{args.output}: holds the requests; name another file for the answers")
    if args.input and args.image:
        raise UserError("--image: images of --input are named in its records")
    settings = {name: getattr(args, name) for name in SAMPLING} | {"stop": args.stop}
    request = Request(args.image, args.prompt or "", **settings, on_text=show)
    sees = bool(args.image) if args.prompt is not None else has_vision(args.checkpoint)
    components = TEXT_COMPONENTS if sees else ("language",)
    mesh = args.mesh and parse_mesh(args.mesh)
    model = load(args.checkpoint, components, args.template, args.dtype, mesh, args.quantize)
    if args.interactive:
        converse(model, args.image, settings)
    elif args.input:
        with working_copy(args.output) as output:
            outcome = answer_file(model, args.input, output, settings, args.rows)
        print(f"{outcome.answered} answered, {outcome.skipped} answered before, {outcome.broken} broken")
        return 1 if outcome.broken else 0
    else:
        model.ask_many([request])
        print()
    return 0


def show(text: str) -> None:
    print(text, end="", flush=True)


def has_vision(folder: Path) -> bool:
    config = checkpoints.read_manifest(folder)["config"]
    return all(config.get(name) for name in TEXT_COMPONENTS)


def converse(model: Model, images: list[str], settings: dict[str, Any]) -> None:
    """Reads questions and commands from stdin until its end or /quit. Mistakes are one line, and it goes on."""
    chat, waiting = model.chat(), list(images)
    print(COMMANDS, file=sys.stderr)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        command, _, value = line.partition(" ")
        try:
            if line == "/quit":
                return
            if line == "/reset":
                chat.reset()
                waiting = []
            elif command == "/image" and value:
                if model.image_config is None or "vision" not in model.params:
                    raise UserError(f"{model.folder}: this model has no vision encoder, so it cannot see images")
                read_images(value, model.image_config)
                waiting.append(value)
            elif command == "/save" and value:
                save(location(value), [str(image) for image in chat.images], chat.history)
            elif command.startswith("/"):
                raise UserError(f"{line}: no such command; {COMMANDS}")
            elif line:
                chat.ask(line, waiting, **settings, on_text=show)
                print()
                waiting = []
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print("\nstopped; the conversation is as it was before this question", file=sys.stderr)


def save(path: Path, images: list[str], history: list[tuple[str, str]]) -> None:
    """Writes a conversation with the fields of a record of --input."""
    record = {"image": [str(location(image).resolve()) for image in images], "history": history}
    try:
        path.write_text(json.dumps(record, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error


if __name__ == "__main__":
    leave(main)
