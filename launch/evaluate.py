"""Scores a model on benchmarks, continuing where it was interrupted.

python launch/evaluate.py --checkpoint runs/ross-7b --benchmark pope mmbench_en --data benchmarks --output scores
python launch/evaluate.py --rescore --output scores --scorer vlmeval
"""

import sys

import jax

from ross_jax import checkpoints
from ross_jax.arguments import SIZE, Parser
from ross_jax.config import Range, UserError
from ross_jax.console import talk
from ross_jax.evaluation import vlmevalkit
from ross_jax.evaluation.answering import Asking, answer_benchmark
from ross_jax.evaluation.benchmarks import BENCHMARKS, find_benchmark, find_files, load_questions
from ross_jax.evaluation.predictions import Share
from ross_jax.evaluation.questions import Questions
from ross_jax.evaluation.report import score_folder, write_reports
from ross_jax.inference.model import TEXT_COMPONENTS, load
from ross_jax.inference.prompts import MAX_NEW_TOKENS
from ross_jax.process import leave
from ross_jax.sharding import parse_mesh
from ross_jax.storage import location, working_copy

_PROCESSES = Range(1, 2**16)


def make_parser() -> Parser:
    parser = Parser(description=__doc__)
    parser.add_argument("--checkpoint", type=location, metavar="DIR", help="a model or a run's directory")
    known = f"{', '.join(BENCHMARKS)}; NAME=PATH names its file"
    parser.add_argument("--benchmark", nargs="+", default=[], metavar="NAME", help=known)
    parser.add_argument("--data", type=location, metavar="DIR", help="folder of the benchmarks' files")
    parser.add_argument("--images", type=location, nargs="+", default=[], metavar="DIR", help="folders of their images")
    parser.add_argument("--output", type=location, required=True, metavar="DIR", help="gets predictions and scores")
    parser.add_argument("--rescore", action="store_true", help="score the predictions of --output; nothing is asked")
    parser.add_argument("--scorer", default="ross_jax", choices=("ross_jax", "vlmeval"), help="vlmeval: its code, too")
    parser.add_argument("--prompts", default="reference", choices=("reference", "question"), help="question: it alone")
    parser.add_argument("--max-new-tokens", type=int, within=Range(1, MAX_NEW_TOKENS), help="default: the benchmark's")
    parser.add_argument("--limit", type=int, within=SIZE, help="asks only the first so many questions")
    parser.add_argument("--rows", type=int, default=8, within=Range(1, 4096), help="questions at once (default 8)")
    parser.add_argument("--template", help="conversation template; default: the one that the model was trained with")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--quantize", choices=("int8", "fp8"), help="the language model's matrices in 8 bits")
    mesh = "devices of this process that share the work: data=4,tensor=2; default: all, each with the whole model"
    parser.add_argument("--mesh", metavar="AXES", help=mesh)
    parser.add_argument("--processes", type=int, default=1, within=_PROCESSES, help="processes that share the work")
    parser.add_argument("--process", type=int, default=0, within=Range(0, 2**16), help="number of this one, from 0")
    return parser


def read_all(args) -> dict[str, Questions]:
    """Questions of each benchmark that the command line names."""
    found = {}
    for text in args.benchmark:
        name, _, path = text.partition("=")
        find_benchmark(name)
        if not path and args.data is None:
            raise UserError(f"--benchmark {name}: name its file, {name}=FILE, or the folder of the files: --data DIR")
        paths = [location(path)] if path else find_files(name, args.data)
        found[name.lower()] = load_questions(name, paths, args.images)
    return found


def answer(args) -> None:
    """Asks the questions of all benchmarks."""
    if args.checkpoint is None or not args.benchmark:
        raise UserError("--checkpoint and --benchmark are needed, unless --rescore scores what --output holds")
    if args.process >= args.processes:
        raise UserError(f"--process {args.process}: must be less than --processes {args.processes}")
    benchmarks = read_all(args)
    devices = jax.local_devices()
    mesh = parse_mesh(args.mesh or "data=-1,fsdp=1,tensor=1") if args.mesh or len(devices) > 1 else None
    model = load(args.checkpoint, TEXT_COMPONENTS, args.template, args.dtype, mesh, args.quantize, devices)
    share = Share(args.process, args.processes)
    asking = Asking(args.prompts, args.max_new_tokens, args.rows, args.limit, share)
    step = checkpoints.latest_step(args.checkpoint)
    facts = {"checkpoint": str(args.checkpoint), "step": step, "template": model.template, "dtype": args.dtype}
    facts |= {"quantize": args.quantize} if args.quantize else {}
    for name, questions in benchmarks.items():
        if questions.broken:
            count, first = len(questions.broken), questions.broken[0]
            print(f"warning: {name}: {count} broken records, first {first.place}: {first.reason}", file=sys.stderr)
        answer_benchmark(model, name, questions, args.output, asking, facts)


def evaluate(args) -> None:
    """Scores what the folder of predictions holds."""
    names = [text.partition("=")[0].lower() for text in args.benchmark]
    scored = score_folder(args.output, names if args.rescore else ())
    if args.processes > 1 and any(each.predictions.missing for each in scored if each.name in names):
        print(f"process {args.process} is done; the last one writes the scores", file=sys.stderr)
        return
    if args.scorer == "vlmeval":
        scored = vlmevalkit.add_scores(scored, args.output / "vlmeval")
    print(write_reports(args.output, scored), end="")


def main(argv: list[str] | None = None) -> int:
    talk()
    try:
        args = make_parser().parse_args(argv)
        place = args.output
        for work in (evaluate,) if args.rescore else (answer, evaluate):
            with working_copy(place) as args.output:  # in a bucket, the second one has what others wrote meanwhile
                work(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    leave(main)
