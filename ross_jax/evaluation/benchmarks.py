"""The benchmarks of the paper, each a row of a table: files, prompt, scorer, and what the paper reports.

A new benchmark is one row here and, if no rule fits, one function in `scores`.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ross_jax.config import UserError, nearest
from ross_jax.evaluation import prompts, scores
from ross_jax.evaluation.questions import SUFFIXES, Broken, Questions, read_questions

MODELS = ("Ross-7B", "LLaVA-1.5-7B", "Ross-13B", "LLaVA-1.5-13B")
"""Models whose scores the paper reports, in the order of `Benchmark.paper`."""


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A benchmark.

    Attributes:
      title: its name in tables.
      files: names without suffix, case ignored, of its files or folders.
      prompt: makes the text of a question.
      scorer: makes scores of answers.
      metric: the score that the paper reports.
      rule: whose rule `metric` follows.
      max_new_tokens: length of the longest answer.
      paper: scores that the paper reports of `MODELS`.
      vlmeval: class and data set of VLMEvalKit: ("image_mcq.ImageMCQDataset", "AI2D_TEST").
      group: (index, fields) -> questions that are scored together. None: each is scored alone.
      pairs: whether each two questions, in the order of their indices, are scored together.
    """

    title: str
    files: tuple[str, ...]
    prompt: prompts.Prompt
    scorer: scores.Scorer
    metric: str = "accuracy"
    rule: str = "VLMEvalKit"
    max_new_tokens: int = 512
    paper: tuple[float, ...] = ()
    vlmeval: tuple[str, str] | None = None
    group: Callable[[str, Mapping[str, Any]], Hashable] | None = None
    pairs: bool = False


def _pair(index: str, fields: Mapping[str, Any]) -> Hashable:
    return fields.get("pair")


def _figure(index: str, fields: Mapping[str, Any]) -> Hashable:
    return scores.hallusion_group(index, fields, "figure")


_MCQ, _VQA, _YES_NO = "image_mcq.ImageMCQDataset", "image_vqa.ImageVQADataset", "image_yorn.ImageYORNDataset"
_FORK = "VLMEvalKit of the paper"

BENCHMARKS: dict[str, Benchmark] = {
    "pope": Benchmark(
        "POPE", ("POPE", "coco_pope_random", "coco_pope_popular", "coco_pope_adversarial"), prompts.bare,
        scores.yes_no, "f1", "VLMEvalKit", 512, (88.3, 86.2, 88.7, 82.5), (_YES_NO, "POPE"),
    ),
    "hallusionbench": Benchmark(
        "HallusionBench", ("HallusionBench",), prompts.one_word_or_phrase,
        scores.hallusion, "aAcc", "VLMEvalKit", 512, (57.1, 47.5, 56.4, 44.9), (_YES_NO, "HallusionBench"), _figure,
    ),
    "mmbench_en": Benchmark(
        "MMBench EN", ("MMBench_EN", "MMBench_DEV_EN"), prompts.choice, scores.circular, "accuracy", _FORK, 512,
        (79.1, 65.5, 73.6, 68.8), (_MCQ, "MMBench_DEV_EN"), scores.circular_group,
    ),
    "mmbench_cn": Benchmark(
        "MMBench CN", ("MMBench_CN", "MMBench_DEV_CN"), prompts.choice, scores.circular, "accuracy", _FORK, 512,
        (77.1, 58.5, 67.4, 63.6), (_MCQ, "MMBench_DEV_CN"), scores.circular_group,
    ),
    "seed": Benchmark(
        "SEED-I", ("SEED", "SEEDBench_IMG"), prompts.choice, scores.choice, "accuracy", _FORK, 512,
        (73.6, 66.0, 71.1, 68.2), (_MCQ, "SEEDBench_IMG"),
    ),
    "mmmu": Benchmark(
        "MMMU val", ("MMMU", "MMMU_DEV_VAL"), prompts.choice, scores.mmmu, "split/validation/accuracy", _FORK, 512,
        (46.6, 34.4, 41.3, 36.6), ("image_mcq.MMMUDataset", "MMMU_DEV_VAL"),
    ),
    "mmvp": Benchmark(
        "MMVP", ("MMVP", "Questions"), prompts.mmvp, scores.mmvp, "pairs", "the paper's script", 16,
        (56.7, 20.0, 44.7, 31.9), (_MCQ, "MMVP"), _pair, True,
    ),
    "gqa": Benchmark(
        "GQA", ("GQA", "GQA_TestDev_Balanced", "testdev_balanced_questions"), prompts.one_word_or_phrase,
        scores.gqa, "accuracy", "lmms-eval", 16, (65.5, 62.0, 65.2, 63.3), (_VQA, "GQA_TestDev_Balanced"),
    ),
    "ai2d": Benchmark(
        "AI2D", ("AI2D", "AI2D_TEST"), prompts.choice, scores.choice, "accuracy", _FORK, 512,
        (79.3, 55.4, 73.8, 60.8), (_MCQ, "AI2D_TEST"),
    ),
    "chartqa": Benchmark(
        "ChartQA", ("ChartQA", "ChartQA_TEST"), prompts.one_word, scores.chart, "accuracy", "lmms-eval", 16,
        (), (_VQA, "ChartQA_TEST"),
    ),
    "ocrbench": Benchmark(
        "OCRBench", ("OCRBench",), prompts.bare, scores.ocr, "score", "VLMEvalKit", 512,
        (), ("image_vqa.OCRBench", "OCRBench"),
    ),
    "realworldqa": Benchmark(
        "RealWorldQA", ("RealWorldQA",), prompts.choice, scores.choice, "accuracy", _FORK, 512,
        (), (_MCQ, "RealWorldQA"),
    ),
    "textvqa": Benchmark(
        "TextVQA", ("TextVQA", "TextVQA_VAL", "TextVQA_0.5.1_val"), prompts.with_ocr, scores.text, "accuracy",
        "lmms-eval", 512, (), (_VQA, "TextVQA_VAL"),
    ),
    "docvqa": Benchmark(
        "DocVQA", ("DocVQA", "DocVQA_VAL"), prompts.one_word_or_phrase, scores.document, "anls", "lmms-eval", 32,
        (), (_VQA, "DocVQA_VAL"),
    ),
    "infovqa": Benchmark(
        "InfoVQA", ("InfoVQA", "InfoVQA_VAL"), prompts.one_word_or_phrase, scores.document, "anls", "lmms-eval", 32,
        (), (_VQA, "InfoVQA_VAL"),
    ),
    "exact": Benchmark("exact match", ("exact",), prompts.bare, scores.exact, "accuracy", "ross_jax", 64),
}  # fmt: skip
"""Name -> benchmark. `exact` is for own questions, whose answers must be met word for word."""


def find_benchmark(name: str) -> Benchmark:
    """The benchmark of a name, case ignored. Raises UserError, with the nearest name, if there is none."""
    found = BENCHMARKS.get(name.lower())
    if found is None:
        raise UserError(
            f"benchmark {name!r}: unknown{nearest(name.lower(), BENCHMARKS)}; there are {', '.join(BENCHMARKS)}"
        )
    return found


def find_files(name: str, folder: Path) -> list[Path]:
    """Files of a benchmark in a folder: those named as `Benchmark.files`, or a folder of that name.

    Raises:
      UserError: there is none.
    """
    names = {each.lower() for each in (*find_benchmark(name).files, name)}
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; --data is the folder of the benchmarks' files")
    entries = sorted(folder.iterdir())
    found = [each for each in entries if each.stem.lower() in names and each.suffix.lower() in SUFFIXES]
    found = found or [each for each in entries if each.is_dir() and each.name.lower() in names]
    if not found:
        expected = ", ".join(f"{each}.tsv" for each in find_benchmark(name).files)
        raise UserError(f"{folder}: no file of {name}; expected {expected}, or one with {', '.join(SUFFIXES[1:])}")
    return found


def load_questions(name: str, paths: Sequence[Path], images: Sequence[Path] = ()) -> Questions:
    """The questions of a benchmark, with the field `pair` where it scores pairs.

    Args:
      paths, images: as for `read_questions`, whose errors are raised.
    """
    benchmark, found = find_benchmark(name), read_questions(paths, tuple(images))
    if benchmark.pairs:
        order = sorted(found.questions, key=lambda q: (len(q.index), q.index) if q.index.isdigit() else (0, ""))
        return dataclasses.replace(found, questions=[_paired(each, place) for place, each in enumerate(order)])
    kept, broken = [], list(found.broken)
    for each in found.questions:
        try:
            if benchmark.group is not None:
                benchmark.group(each.index, each.fields)
            kept.append(each)
        except ValueError:
            broken.append(Broken(f"question {each.index}", f"{benchmark.title} needs indices that are numbers"))
    if not kept:
        raise UserError(f"{broken[0].place}: {broken[0].reason}")
    return dataclasses.replace(found, questions=kept, broken=broken)


def _paired(each: Any, place: int) -> Any:
    """A question or an answer with the field `pair`: the number that it has, or that of its place."""
    return dataclasses.replace(each, fields={"pair": place // 2, **each.fields})


@dataclasses.dataclass(frozen=True)
class Result:
    """Scores of a benchmark.

    Attributes:
      scores: by name; see `scores`.
      kept: answers that were scored.
      broken: records that were not.
      left_out: answers that were not scored, because another question of their group is broken.
      skipped: rows of the file without an image.
    """

    scores: scores.Scores
    kept: Sequence[scores.Answered]
    broken: Sequence[Broken] = ()
    left_out: int = 0
    skipped: int = 0


def score(
    benchmark: Benchmark, answers: Sequence[scores.Answered], broken: Sequence[Broken] = (), skipped: int = 0
) -> Result:
    """Scores answers.

    Where questions are scored together, those of a broken record's group are left out, and so are half pairs.

    Raises:
      UserError: an index or a field that the scorer cannot use.
    """
    kept = [_paired(each, place) if benchmark.pairs else each for place, each in enumerate(answers)]
    try:
        if benchmark.group is not None:
            bad = {benchmark.group(each.index, each.fields) for each in broken if each.index is not None}
            groups = [benchmark.group(each.index, each.fields) for each in kept]
            bad |= {group for group, count in Counter(groups).items() if benchmark.pairs and count == 1}
            kept = [each for each, group in zip(kept, groups, strict=True) if group not in bad]
        found = benchmark.scorer(kept) if kept else {}
    except (ValueError, KeyError, IndexError) as error:
        raise UserError(f"{benchmark.title}: answers that cannot be scored: {error}") from error
    return Result(found, kept, broken, len(answers) - len(kept), skipped)
