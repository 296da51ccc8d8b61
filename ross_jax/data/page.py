"""A web page that shows samples as a model will see them. It is one file, and loads nothing.

table of sources ─ histograms of lengths ─ for each source: samples, then samples with problems
a sample: its images as the encoder gets them, its text with what is supervised in colour, lengths and sizes
"""

import base64
import contextlib
import html
import io
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from PIL import Image

from ross_jax.config import UserError
from ross_jax.data.check import PROBLEMS, Checked, Findings, check_sample, table
from ross_jax.data.conversation import IGNORE, IMAGE_ID, EncodedConversation
from ross_jax.data.images import preprocess
from ross_jax.data.packing import PackingConfig
from ross_jax.data.reading import Preprocessing
from ross_jax.data.samples import Source

_SHOWN = 6  # samples of each source
_BARS = 24
_LONGEST = 20_000  # characters of a text
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; color: #222; }
table { border-collapse: collapse; } td, th { padding: .2em .8em; border-bottom: 1px solid #ddd; text-align: right; }
td:first-child, th:first-child { text-align: left; } td.problem { color: #b00020; font-weight: bold; }
article { border: 1px solid #ddd; border-radius: 6px; padding: 1em; margin: 1em 0; }
article.broken, article.dropped { border-color: #b00020; } article.cut, article.unsupervised { border-color: #c77700; }
h3 { font-size: 1em; margin: 0; overflow-wrap: anywhere; } p.sizes { color: #666; margin: 0 0 .6em; }
figure { display: inline-block; margin: 0 1em .6em 0; } figcaption { color: #666; font-size: .85em; }
figure img { width: 224px; height: 224px; display: block; border: 1px solid #ddd; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font: 13px/1.5 ui-monospace, monospace; }
mark { background: #c8f0cf; } .image { background: #d6e4ff; border-radius: 3px; padding: 0 .3em; }
.bars { display: flex; align-items: flex-end; height: 90px; gap: 2px; } .bars div { flex: 1; background: #5b8def; }
.ends { display: flex; justify-content: space-between; color: #666; font-size: .85em; }
"""


def pieces(encoded: EncodedConversation, tokenizer: Any) -> Iterator[tuple[str, list[int], str]]:
    """Pieces of a conversation: `image`, `supervised` or `text`; ids; the decoded text, which is empty for an image."""
    kinds = zip((encoded.input_ids == IMAGE_ID).tolist(), (encoded.labels != IGNORE).tolist(), strict=True)
    position = 0
    for (is_image, is_supervised), group in groupby(kinds):
        ids = encoded.input_ids[position : (position := position + len(list(group)))].tolist()
        if is_image:
            yield from (("image", [index], "") for index in ids)
            continue
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        yield "supervised" if is_supervised else "text", ids, text


def make_page(
    title: str,
    findings: Sequence[Findings],
    source: Source,
    preprocessing: Preprocessing,
    packing: PackingConfig,
    tokenizer: Any,
) -> str:
    """The page.

    Args:
      findings: of all samples of `source`; samples of each of its parts are shown, in the same order.
    """
    header, *rows = table(findings)
    problems = {header.index(name) for name in PROBLEMS}
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{_text(title)}</title><style>{_STYLE}</style>",
        f"<h1>{_text(title)}</h1><table><tr>{''.join(f'<th>{_text(name)}' for name in header)}",
        *("<tr>" + "".join(_cell(cell, i in problems) for i, cell in enumerate(row)) for row in rows),
        f"</table><p>A row has {packing.length} tokens and {packing.images} images; an image has "
        f"{preprocessing.image_tokens} tokens. <mark>Green</mark> text is supervised.",
    ]
    first, random = 0, np.random.RandomState(0)
    for found in findings:
        chosen = first + np.sort(random.permutation(found.samples)[:_SHOWN])
        shown = [check_sample(source, int(index), preprocessing, packing) for index in chosen]
        examples = [checked for name in PROBLEMS for checked in found.examples[name]]
        parts += [f"<h2>{_text(found.name)}</h2>", _histogram(found.tokens)]
        parts += [_article(checked, source, preprocessing, tokenizer) for checked in shown]
        if examples:
            parts += ["<h2>" + _text(f"{found.name}: problems") + "</h2>"]
            parts += [_article(checked, source, preprocessing, tokenizer) for checked in examples]
        first += found.samples
    return "\n".join(parts) + "\n"


def _text(text: str) -> str:
    printable = "".join(c if c in "\n\t" or c.isprintable() else ascii(c)[1:-1] for c in text)
    return html.escape(printable if len(printable) <= _LONGEST else f"{printable[:_LONGEST]} ...")


def _cell(text: str, is_problem: bool) -> str:
    return f"<td{' class=problem' if is_problem and text != '0' else ''}>{_text(text)}"


def _histogram(tokens: Sequence[int]) -> str:
    if not len(tokens):
        return "<p>No sample can be used."
    counts, edges = np.histogram(tokens, bins=min(_BARS, max(tokens) - min(tokens) + 1))
    bars = "".join(
        f'<div style="height:{100 * count / counts.max():.1f}%" title="{low:.0f} to {high:.0f} tokens: {count}"></div>'
        for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True)
    )
    return (
        f"<div class=bars>{bars}</div><div class=ends><span>{min(tokens)} tokens</span><span>{max(tokens)}</span></div>"
    )


def _article(checked: Checked, source: Source, preprocessing: Preprocessing, tokenizer: Any) -> str:
    """A sample, as far as it can be read."""
    parts = [f"<article class={checked.status}>"]
    if checked.status != "ok":
        parts.append(f"<p><b>{checked.status}</b>: {_text(checked.reason)}")
    with contextlib.suppress(UserError):  # the reason says what is broken
        sample = source[checked.index]
        sizes = f"{checked.tokens} tokens, {checked.images} images, {checked.supervised} supervised"
        parts.append(f"<h3>{_text(sample.id)}</h3><p class=sizes>{_text(sample.place)}<br>{sizes}")
        for image in sample.images:
            with contextlib.suppress(UserError):
                parts.append(_figure(image, preprocessing))
        tags = {"supervised": "<mark>{}</mark>", "text": "{}", "image": "<span class=image>image</span>"}
        shown = (
            tags[kind].format(_text(text)) for kind, _, text in pieces(preprocessing.encode(sample.record), tokenizer)
        )
        parts.append(f"<pre>{''.join(shown)}</pre>")
    return "\n".join(parts) + "</article>"


def _figure(image: Any, preprocessing: Preprocessing) -> str:
    decoded = preprocessing.decode(image.read(), image.name)
    pixels = preprocess(decoded, preprocessing.images, image.name)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    data = base64.b64encode(buffer.getvalue()).decode()
    size = f"{decoded.width} x {decoded.height}, read as {pixels.shape[1]} x {pixels.shape[0]}"
    caption = f"<figcaption>{_text(image.name)}<br>{size}</figcaption>"
    return f'<figure><img alt="{_text(image.name)}" src="data:image/jpeg;base64,{data}">{caption}</figure>'
