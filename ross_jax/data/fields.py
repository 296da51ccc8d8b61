"""Fields of a record: which are read, and what becomes of the others.

image, images                images of the record; see `IMAGE_FIELDS` for other names
conversations, messages,     turns; `turns` reads their layouts
texts
system                       system prompt
id                           name in errors
KNOWN                        not read, and no run needs them
everything else              not read; `Survey` counts them, and a run names them once
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

Record = Mapping[str, Any]

IMAGE_FIELDS = ("image_path", "image_paths", "image_file", "image_files", "img", "imgs", "img_path", "img_paths")
"""Other names of the field `image`. The first of them that is filled is read if `image` and `images` are not."""
SYSTEM_FIELDS = ("system", "system_prompt")
"""The first of them that is filled is read."""
TURNS = ("conversations", "messages", "texts")
"""Fields that hold turns. The first that a record has is read."""
# fmt: off
KNOWN = frozenset({
    "model", "source", "data_source", "dataset", "height", "width", "size", "metadata", "meta", "type",
    "category", "task", "split", "license", "url", "language", "question_id", "sample_id", "index", "idx", "uid",
    "length", "num_turns", "coco_url", "flickr_url",
})
# fmt: on
"""Fields of published data sets that say where a record comes from, or how large its image is."""
_TURN_FIELDS = {"from", "value", "role", "content", "user", "assistant"}
READ = {"id", *TURNS, "image", "images", *IMAGE_FIELDS, *SYSTEM_FIELDS}
"""Fields that are read."""
_PART_FIELDS = ("image", "image_url", "bytes", "path", "url")
_MARK = re.compile(r"\A\s*(<(?:image|video|audio|img)[ _-]?\d*>)|(<(?:image|video|audio|img)[ _-]?\d*>)\s*\Z")
"""A mark at the beginning of a text, or at its end."""


def image_field(record: Record) -> str | None:
    """The field of `IMAGE_FIELDS` that is read; None if it is `image` or `images`, or if there is no image."""
    if record.get("image") or record.get("images"):
        return None
    return next((field for field in IMAGE_FIELDS if record.get(field)), None)


def turns_field(record: Record) -> str | None:
    """The field of `TURNS` that is read; None if the record has none."""
    return next((field for field in TURNS if record.get(field) is not None), None)


def image_part(part: Mapping[str, Any]) -> bool:
    """Whether a typed part of a message is an image: `{"type": "image", ...}`."""
    kind = part.get("type")
    return kind in ("image", "image_url") or (
        kind is None and part.get("text") is None and _part_value(part) is not None
    )


def _part_value(part: Mapping[str, Any]) -> Any:
    """The image that a part brings along: a name, bytes, base64 or an object; None if the record has it elsewhere."""
    return next((part[field] for field in _PART_FIELDS if part.get(field)), None)


def record_images(record: Record) -> list[Any]:
    """What the record has as its images, in the order of their marks: file names or images, if it is sound.

    Images are in fields of the record, or in typed parts. A part without an image stands for the next one of the
    record's fields, or for the one with the part's `index`.
    """
    images = []
    for field in ("image", "images", image_field(record)):
        value = record.get(field) or []
        images += value if isinstance(value, (list, tuple)) else [value]
    turns = record.get(turns_field(record) or "")
    said = [_content(turn) for turn in turns] if isinstance(turns, (list, tuple)) else []
    return _placed(images, said) if any(isinstance(each, (list, tuple)) for each in said) else images


def _content(turn: Any) -> Any:
    """The text or the parts of a question; None for other turns."""
    if not isinstance(turn, Mapping) or turn.get("role", turn.get("from")) not in ("user", "human"):
        return None
    return turn.get("content", turn.get("value"))


def _placed(images: list[Any], said: list[Any]) -> list[Any]:
    """Images in the order of marks and image parts. Images without one come last."""
    placed, left = [], list(range(len(images)))
    for content in said:
        parts = content if isinstance(content, (list, tuple)) else [content]
        for part in parts:
            if isinstance(part, Mapping) and image_part(part):
                value, index = _part_value(part), part.get("index")
                if value is None and left:
                    number = index if index in left else left[0]
                    left.remove(number)
                    value = images[number]
                placed.append(value)
                continue
            text = part.get("text") if isinstance(part, Mapping) else part
            for _ in range(text.count("<image>") if isinstance(text, str) and left else 0):
                placed += [images[left.pop(0)]] if left else []
    return placed + [images[number] for number in left]


def system_prompt(record: Record) -> Any:
    """The record's own system prompt: a string, if the record is sound. None if it has none."""
    return next((record[field] for field in SYSTEM_FIELDS if record.get(field)), None)


class Survey:
    """Counts, over all records of a file, fields that are not read, and marks of images that are not there.

    A question that begins or ends with `<image>`, in a record without an image, has lost its image, perhaps to a field
    of another name. A mark inside a text may be about HTML.
    """

    def __init__(self):
        self._records = self._images = self._blind = 0
        self._marks: Counter[str] = Counter()
        self._unread: Counter[str] = Counter()
        self._renamed: Counter[str] = Counter()
        self._fields: set[str] = set()

    def add(self, record: Record) -> None:
        """Counts one record, sound or not."""
        self._records += 1
        self._unread.update(name for name in record if name not in READ and name not in KNOWN)
        self._renamed.update(field for field in SYSTEM_FIELDS if record.get(field))
        field = turns_field(record)
        turns = record.get(field or "")
        turns = [turn for turn in turns if isinstance(turn, Mapping)] if isinstance(turns, list) else []
        inner = {name for turn in turns for name in turn if name not in _TURN_FIELDS}
        self._unread.update(f"{field}[].{name}" for name in inner)
        if record_images(record):
            self._images += 1
            if renamed := image_field(record):
                self._renamed[renamed] += 1
            return
        questions = [_content(turn) for turn in turns]
        found = [_MARK.search(text) for text in questions if isinstance(text, str)]
        marks = {match[1] or match[2] for match in found if match}
        if marks:
            self._blind += 1
            self._marks.update(marks)
            self._fields.update(record, (f"{field}[].{name}" for name in inner))

    def is_blind(self, max_share: float) -> bool:
        """Whether no record has an image, and more than this share of the records have a mark in a question."""
        return not self._images and self._blind > max_share * self._records

    def findings(self, path: str) -> Iterator[str]:
        """Sentences about what was found in the file at `path`, the first about marks, if there are any."""
        if self._blind:
            marks = ", ".join(f"{count} with {mark}" for mark, count in self._marks.items())
            yield (
                f"{path}: {self._blind} of {self._records} records have a mark in a question and no image ({marks}), "
                f"so a model would learn to answer without seeing. Their fields are {sorted(self._fields)}; images "
                f"are read from {['image', 'images', *IMAGE_FIELDS]}. Rename the field that names the images, or "
                "remove such records"
            )
        for field, count in self._renamed.items():
            meaning = "'image'" if field in IMAGE_FIELDS else "system prompt (text.compat 'official' leaves it out)"
            yield f"{path}: the field {field!r} of {count} records is read as {meaning}"
        if self._unread:
            listed = ", ".join(f"{name!r} ({count} records)" for name, count in self._unread.most_common(20))
            yield f"{path}: fields that are not read: {listed}"
