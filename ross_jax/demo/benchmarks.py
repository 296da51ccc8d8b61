"""Benchmark files made from the demo's held-out questions, one in each format that `ross_jax.evaluation` reads.

python -m ross_jax.demo.benchmarks runs/demo/data runs/demo/benchmarks

    exact.jsonl             own questions: every held-out question
    AI2D_TEST.tsv           VLMEvalKit, multiple choice: questions of four or six possible answers
    MMBench_DEV_EN.tsv      VLMEvalKit, circular: questions of two possible answers, with both orders of them
    HallusionBench.tsv      VLMEvalKit, yes or no: whether both marks have the same colour
    coco_pope_random.json   POPE: the same questions
    Questions.csv           MMVP: pairs of pictures with one question and different answers; MMVP Images/1.jpg ...
    pope.parquet            lmms-eval: POPE's questions with embedded pictures
"""

import base64
import csv
import json
import sys
from pathlib import Path
from typing import Any

from ross_jax.arguments import Parser
from ross_jax.demo.evaluate import read_heldout
from ross_jax.demo.questions import ANSWERS

_LETTERS = "ABCDEF"


def write_benchmarks(data: Path, folder: Path) -> None:
    """Writes all files.

    Args:
      data: folder of the demo's data set.
      folder: folder of the files, which is made.
    """
    records = read_heldout(data)
    folder.mkdir(parents=True, exist_ok=True)
    images = data / "images"
    _write_exact(folder / "exact.jsonl", records, images)
    _write_choices(folder / "AI2D_TEST.tsv", [r for r in records if len(ANSWERS[r["type"]]) > 2], images)
    two = [r for r in records if len(ANSWERS[r["type"]]) == 2 and r["type"] != "same_colour"]
    _write_circular(folder / "MMBench_DEV_EN.tsv", two, images)
    yes_no = [r for r in records if r["type"] == "same_colour"]
    _write_hallusion(folder / "HallusionBench.tsv", yes_no, images)
    _write_pope(folder / "coco_pope_random.json", yes_no, images)
    _write_parquet(folder / "pope.parquet", yes_no, images)
    _write_mmvp(folder, [r for r in records if r["type"] == "brighter_side"], images)


def _text(record: dict[str, Any]) -> str:
    return record["conversations"][0]["value"].removeprefix("<image>\n")


def _base64(record: dict[str, Any], images: Path) -> str:
    return base64.b64encode((images / record["image"]).read_bytes()).decode()


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)


def _write_exact(path: Path, records: list[dict[str, Any]], images: Path) -> None:
    rows = [
        {"id": r["id"], "image": str(r["image"]), "question": _text(r), "answer": r["answer"], "type": r["type"]}
        for r in records
    ]
    _write_lines(path, rows)
    link = path.parent / "images"
    link.unlink(missing_ok=True)
    link.symlink_to(images.resolve())


def _write_choices(path: Path, records: list[dict[str, Any]], images: Path) -> None:
    rows = []
    for number, record in enumerate(records):
        options = ANSWERS[record["type"]]
        letters = dict(zip(_LETTERS, options, strict=False))
        answer = _LETTERS[options.index(record["answer"])]
        row = {"index": number, "question": _text(record), **letters, "answer": answer, "category": record["type"]}
        rows.append(row | {"image": _base64(record, images)})
    _write_table(path, rows)


def _write_circular(path: Path, records: list[dict[str, Any]], images: Path) -> None:
    rows = []
    for turn in range(2):
        for number, record in enumerate(records):
            options = ANSWERS[record["type"]] if turn == 0 else ANSWERS[record["type"]][::-1]
            answer = _LETTERS[options.index(record["answer"])]
            row = {"index": number + turn * 10**6, "question": _text(record), "A": options[0], "B": options[1]}
            row |= {"answer": answer, "category": record["type"], "split": "dev"}
            rows.append(row | {"image": _base64(record, images) if turn == 0 else number})
    _write_table(path, rows)


def _write_hallusion(path: Path, records: list[dict[str, Any]], images: Path) -> None:
    """Three questions make a set, one to a figure."""
    rows = [
        {
            "index": f"VD_same_colour_{number // 3}_{number % 3}_0",
            "question": _text(record),
            "answer": record["answer"].title(),
            "category": "VD",
            "l2-category": "colour",
            "image": _base64(record, images),
        }
        for number, record in enumerate(records)
    ]
    _write_table(path, rows)


def _write_pope(path: Path, records: list[dict[str, Any]], images: Path) -> None:
    rows = [
        {"question_id": number, "image": record["image"], "text": _text(record), "label": record["answer"]}
        for number, record in enumerate(records)
    ]
    _write_lines(path, rows)


def _write_parquet(path: Path, records: list[dict[str, Any]], images: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    image = [{"bytes": (images / record["image"]).read_bytes(), "path": record["image"]} for record in records]
    columns = {
        "question_id": [str(number) for number in range(len(records))],
        "question": [_text(record) for record in records],
        "answer": [record["answer"] for record in records],
        "category": ["random"] * len(records),
        "image": image,
    }
    features = {name: {"dtype": "string", "_type": "Value"} for name in columns} | {"image": {"_type": "Image"}}
    table = pyarrow.table(columns)
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}  # `datasets` decodes the pictures
    parquet.write_table(table.replace_schema_metadata(metadata), path)


def _write_mmvp(folder: Path, records: list[dict[str, Any]], images: Path) -> None:
    lefts, rights = ([r for r in records if r["answer"] == side] for side in ("left", "right"))
    rows = []
    (folder / "MMVP Images").mkdir(exist_ok=True)
    for pair in zip(lefts, rights, strict=False):
        for record in pair:
            number = len(rows) + 1
            letter = "(a)" if record["answer"] == "left" else "(b)"
            row = {"Index": number, "Question": _text(record), "Options": "(a) left (b) right"}
            rows.append(row | {"Correct Answer": letter})
            (folder / "MMVP Images" / f"{number}.jpg").write_bytes((images / record["image"]).read_bytes())
    _write_table(folder / "Questions.csv", rows)


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit status."""
    parser = Parser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder of the demo's data set")
    parser.add_argument("output", type=Path, help="folder of the files")
    args = parser.parse_args(argv)
    try:
        write_benchmarks(args.data, args.output)
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
