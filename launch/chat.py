"""Opens a page to chat with a model about images, beside what it reconstructs of each image from its visual outputs.

    bash launch/setup.sh --env web
    .venv-web/bin/python launch/chat.py --checkpoint runs/demo/denoise/seed0/finetune

The page is only reachable from this machine unless --host says otherwise, and sends nothing anywhere.
"""

import dataclasses
import importlib.util
import os
import queue
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ross_jax.arguments import Parser
from ross_jax.config import Range, UserError, required
from ross_jax.console import talk
from ross_jax.data.conversation import IMAGE_MARKER
from ross_jax.inference.model import Model, load
from ross_jax.inference.prompts import read_images
from ross_jax.objectives.objective import Sampling
from ross_jax.process import leave
from ross_jax.sharding import parse_mesh
from ross_jax.storage import location

KEPT_SECONDS = 24 * 3600
"""How long uploaded files are kept."""
MOST_IMAGES = 16
"""Images of a conversation."""
SETTINGS = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
"""Arguments of `Model.ask` that have a control, in the order of the controls."""


class Stopped(Exception):
    """Ends an answer that nobody reads any more."""


@dataclasses.dataclass
class Conversation:
    """What a visitor and the model have said.

    Attributes:
      turns: (question, answer). A question has a mark for each of its images.
      images: images of all questions, as the vision encoder takes them.
      shown: messages in Gradio's format.
      pairs: (image, caption) of the reconstruction pane.
    """

    turns: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    images: list[np.ndarray] = dataclasses.field(default_factory=list)
    shown: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    pairs: list[tuple[Any, str]] = dataclasses.field(default_factory=list)


def read_files(model: Model, paths: list[str]) -> list[np.ndarray]:
    """Uploaded files as the vision encoder takes them. Errors name a file as its visitor does, without its folder."""
    if paths and model.image_config is None:
        raise UserError("this model has no vision encoder, so it cannot see images")
    images = []
    for path in paths:
        try:
            images += read_images(path, required(model.image_config))
        except UserError as error:
            raise UserError(str(error).replace(path, Path(path).name)) from error
    return images


def stream(model: Model, images: list[np.ndarray], prompt: str, **settings: Any) -> Iterator[str]:
    """Yields the answer so far whenever it has grown, and at last the whole answer. Closing it ends the answer."""
    pieces: queue.Queue[tuple[str, Any]] = queue.Queue()
    stopped = threading.Event()

    def on_text(piece: str) -> None:
        if stopped.is_set():
            raise Stopped
        pieces.put(("piece", piece))

    def answer() -> None:
        try:
            pieces.put(("answer", model.ask(images, prompt, on_text=on_text, **settings)))
        except Exception as error:  # raised again where the answer is read
            pieces.put(("error", error))

    threading.Thread(target=answer, daemon=True).start()
    text = ""
    try:
        while True:
            kind, value = pieces.get()
            if kind == "error":
                raise value
            text = value if kind == "answer" else text + value
            yield text
            if kind == "answer":
                return
    finally:
        stopped.set()


def converse(model: Model, said: Conversation, text: str, paths: list[str], settings: Any) -> Iterator[Conversation]:
    """Yields the conversation as the answer to a question grows. A refused question leaves `said` as it was."""
    images = [*said.images, *read_files(model, paths)]
    if len(images) > MOST_IMAGES:
        raise UserError(f"{len(images)} images: a conversation has at most {MOST_IMAGES}; reset to begin another")
    if not text.strip():
        raise UserError("the question is empty; write something about the images")
    question = text if IMAGE_MARKER in text else f"{IMAGE_MARKER}\n" * len(paths) + text
    asked = [{"role": "user", "content": {"path": path}} for path in paths] + [{"role": "user", "content": text}]
    for answer in stream(model, images, question, history=said.turns, **settings):
        shown = [*said.shown, *asked, {"role": "assistant", "content": answer}]
        yield Conversation([*said.turns, (question, answer)], images, shown, said.pairs)


def reconstructs(model: Model) -> bool:
    """Whether the model can show what its visual outputs hold."""
    try:
        model.check_reconstruction()
    except UserError:
        return False
    return True


def controls(gr: Any) -> list[Any]:
    """A control for each of `SETTINGS`."""
    return [
        gr.Slider(1, 2048, 256, step=1, label="Longest answer, tokens"),
        gr.Slider(0, 2, 0, step=0.05, label="Temperature", info="0: the most likely token"),
        gr.Slider(0, 200, 0, step=1, label="Top k", info="0: all tokens"),
        gr.Slider(0.05, 1, 1, step=0.05, label="Top p"),
        gr.Slider(0, 1, 0, step=0.01, label="Min p"),
        gr.Slider(1, 2, 1, step=0.05, label="Repetition penalty"),
        gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31 - 1),
    ]


def build(model: Model, sampling: Sampling) -> Any:
    """The page, as Gradio's Blocks. Its functions `ask` and `reset` are its API, too."""
    import gradio as gr  # pyright: ignore[reportMissingImports]

    sees, draws = model.image_config is not None, reconstructs(model)

    def ask(message: dict[str, Any], said: Conversation, *values: Any) -> Iterator[tuple[Any, ...]]:
        paths = [file if isinstance(file, str) else file["path"] for file in message.get("files") or []]
        settings = {name: value for name, value in zip(SETTINGS, values[:-1], strict=True) if value is not None}
        settings["stop"] = [line for line in (values[-1] or "").splitlines() if line]
        try:
            new = said
            for new in converse(model, said, message.get("text") or "", paths, settings):
                yield None, new, new.shown, *([said.pairs] if draws else [])
            if draws and (added := new.images[len(said.images) :]):
                for made in zip(added, model.reconstruct(added, sampling), strict=True):
                    number = len(new.pairs) // 2 + 1
                    captions = f"image {number}", f"reconstruction {number}"
                    new.pairs = [*new.pairs, *zip(made, captions, strict=True)]
                yield None, new, new.shown, new.pairs
        except UserError as error:
            raise gr.Error(str(error), duration=None, print_exception=False) from error

    with gr.Blocks(title="Ross", analytics_enabled=False, delete_cache=(3600, KEPT_SECONDS)) as page:
        said = gr.State(Conversation())
        with gr.Row():
            with gr.Column(scale=3):
                # An answer's Markdown could name an image elsewhere, which the browser would fetch.
                chat = gr.Chatbot(label=model.folder.name, height=420, render_markdown=False, buttons=["copy"])
                message = gr.MultimodalTextbox(
                    show_label=False,
                    placeholder="Ask about images" if sees else "Ask",
                    file_types=["image"],
                    file_count="multiple",
                    sources=["upload"] if sees else [],
                )
                with gr.Row():
                    stop, reset = gr.Button("Stop"), gr.Button("Reset")
            with gr.Column(scale=2):
                pane = []
                if draws:
                    label = "Images and reconstructions"
                    pane.append(gr.Gallery(label=label, columns=2, height=420, format="png", interactive=False))
                with gr.Accordion("How answers are drawn", open=not draws):
                    settings = [*controls(gr), gr.Textbox(label="Texts that end an answer, one a line", lines=2)]
        outputs = [message, said, chat, *pane]
        asking = message.submit(ask, [message, said, *settings], outputs, api_name="ask")
        stop.click(None, cancels=[asking], api_visibility="private")
        empty = (None, [], [])[: len(outputs) - 1]
        reset.click(
            lambda: (None, Conversation(), *empty[1:]), None, outputs, cancels=[asking], api_name="reset", queue=False
        )
    return page.queue(max_size=64, default_concurrency_limit=1)


def serve(page: Any, host: str, port: int, upload_mb: int) -> None:
    """Serves the page until it is interrupted, and prints its address."""
    import gradio as gr  # pyright: ignore[reportMissingImports]

    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    bounds = {"max_file_size": upload_mb * 10**6, "share": False, "ssr_mode": False}
    shown = {"theme": theme, "quiet": True, "footer_links": [], "prevent_thread_lock": True, "show_error": True}
    _, address, _ = page.launch(server_name=host, server_port=port, **bounds, **shown)
    print(address, flush=True)
    try:
        threading.Event().wait()
    finally:
        page.close(verbose=False)


def main(argv: list[str] | None = None) -> int:
    talk()
    parser = Parser(description=__doc__)
    parser.add_argument("--checkpoint", type=location, required=True, metavar="DIR", help="directory of a model or run")
    parser.add_argument("--template", help="conversation template; default: the one that the model was trained with")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--quantize", choices=("int8", "fp8"), help="the language model's matrices in 8 bits")
    parser.add_argument("--mesh", metavar="AXES", help="splits the model over all devices: tensor=4")
    parser.add_argument("--host", default="127.0.0.1", help="address to bind to; default: this machine alone")
    parser.add_argument("--port", type=int, within=Range(1, 65535), default=7860, help="default 7860")
    parser.add_argument(
        "--upload-mb", type=int, within=Range(1, 1000), default=20, help="largest file in MB (default 20)"
    )
    parser.add_argument("--sampler", choices=("ddpm", "ddim", "dpm"), default="ddpm", help="of reconstructions")
    parser.add_argument("--steps", type=int, within=Range(1, 1000), default=50, help="of reconstructions (default 50)")
    try:
        args = parser.parse_args(argv)
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        if importlib.util.find_spec("gradio") is None:
            raise UserError(
                "gradio is not installed here; `bash launch/setup.sh --env web` makes .venv-web, and "
                "`.venv-web/bin/python launch/chat.py ...` starts the page"
            )
        mesh = args.mesh and parse_mesh(args.mesh)
        model = load(args.checkpoint, None, args.template, args.dtype, mesh, args.quantize)
        model.tokenizer  # noqa: B018  (a model that cannot answer is refused before there is a page)
        serve(build(model, Sampling(args.sampler, args.steps)), args.host, args.port, args.upload_mb)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    leave(main)
