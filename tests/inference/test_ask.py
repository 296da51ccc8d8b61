"""`Model.ask` and `ask_many`: answers equal full forward passes of one prompt at a time; kinds of images; errors."""

import contextlib
import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ross_jax import checkpoints
from ross_jax.config import UserError
from ross_jax.data.conversation import IMAGE_ID
from ross_jax.data.encoders import build_prompt_encoder, stop_id
from ross_jax.inference.engine import Engine
from ross_jax.inference.model import load
from ross_jax.inference.prompts import Request
from ross_jax.models.ross import Ross, normalise
from ross_jax.sharding import MeshConfig

NEW = 5


def make_image(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (28, 28, 3), dtype=np.uint8)


REQUESTS = [
    Request(make_image(4), "What?", max_new_tokens=NEW),
    Request(make_image(0), "Which of the two is it, and why?", max_new_tokens=NEW),
    Request([make_image(3), make_image(4)], "Left or right?", max_new_tokens=NEW),
    Request(make_image(4), "How many are there?", [("What?", "A dog.")], max_new_tokens=NEW),
    Request([make_image(7), make_image(8)], "<image>\nNow?", [("<image>\nWhat?", "b")], max_new_tokens=3),
    Request((), "No image.", max_new_tokens=NEW),
]


@pytest.fixture(scope="module")
def model(model_folder):
    return load(model_folder)


def one_by_one(model, conversations, images, new) -> str:
    """Greedy decoding without cache and padding: a forward pass of the whole sequence for each token."""
    record = {"id": "x", "image": [str(i) for i in range(len(images))], "conversations": conversations}
    tokenizer = model.tokenizer
    ids = build_prompt_encoder("qwen_2", tokenizer)(record)
    count = model.config.vision.num_tokens
    tokens, starts = [], []
    for i in ids:
        if i == IMAGE_ID:
            starts.append(len(tokens))
        tokens += [0] * count if i == IMAGE_ID else [int(i)]
    side = model.config.vision.image_size
    images = normalise(model.config, jnp.asarray(images, jnp.uint8).reshape(1, -1, side, side, 3))
    ross, made = Ross(model.config), []
    forward = jax.jit(lambda *arguments: ross.apply({"params": model.params}, *arguments).hidden[0, -1])
    for _ in range(new):
        row = jnp.asarray([tokens + made], jnp.int32)
        hidden = forward(row, jnp.arange(row.size)[None], jnp.ones_like(row), images, jnp.asarray([starts], jnp.int32))
        made.append(int(jnp.argmax(ross.apply({"params": model.params}, hidden, method="logits"))))
        if made[-1] == stop_id("qwen_2", tokenizer):
            made.pop()
            break
    return tokenizer.decode(made).strip()


def human(text: str) -> dict:
    return {"from": "human", "value": text}


CONVERSATIONS = [
    [human("<image>\nWhat?")],
    [human("<image>\nWhich of the two is it, and why?")],
    [human("<image>\n<image>\nLeft or right?")],
    [human("<image>\nWhat?"), {"from": "gpt", "value": "A dog."}, human("How many are there?")],
    [human("<image>\nWhat?"), {"from": "gpt", "value": "b"}, human("<image>\nNow?")],
    [human("No image.")],
]


@pytest.mark.slow
def test_batches_answer_as_single_prompts_do(model):
    found = model.ask_many(REQUESTS, rows=2)
    assert len(set(found)) == 6
    expected = [
        one_by_one(model, turns, images if isinstance(images, (list, tuple)) else [images], request.max_new_tokens)
        for turns, request in zip(CONVERSATIONS, REQUESTS, strict=True)
        for images in [request.images]
    ]
    assert found == expected
    assert model.ask_many(REQUESTS, rows=8) == found


@pytest.mark.slow
def test_many_as_one_by_one(model):
    def ask(request: Request) -> str:
        history, new = request.history, request.max_new_tokens
        return model.ask(request.images, request.prompt, history=history, max_new_tokens=new)

    chosen = [REQUESTS[i] for i in (0, 3)]
    found = model.ask_many(chosen)
    assert found == [ask(request) for request in chosen] and len(set(found)) == 2
    assert model.ask_many([]) == []


def test_kinds_of_images(model, tmp_path):
    """Path, PIL image and array with the same content get the same answer; other content gets another answer."""
    pixels = make_image(4)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    kinds = [tmp_path / "a.png", str(tmp_path / "a.png"), Image.open(tmp_path / "a.png"), pixels, [pixels]]
    requests = [Request(image, "Whatever?", max_new_tokens=NEW) for image in [*kinds, make_image(5)]]
    answers = model.ask_many(requests, rows=2)
    assert len(set(answers[:-1])) == 1 and answers[-1] != answers[0]


@contextlib.contextmanager
def compiled_programs():
    """A list that gets the compilations of the block."""
    compiled: list[str] = []

    def count(event: str, _: float, **__) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(count)


def test_programs_are_shared(model):
    """Questions and answers of similar length, asked one after another, compile nothing after the first."""
    model.ask(make_image(0), "What?", max_new_tokens=NEW)
    with compiled_programs() as compiled:
        jax.jit(lambda x: x - 17)(1.5)
        assert len(compiled) == 1  # the counter counts
        model.ask(make_image(1), "Whatever?", max_new_tokens=NEW - 3)
        model.ask(make_image(2), "Who?", max_new_tokens=NEW + 1)
        assert len(compiled) == 1


@pytest.mark.slow
def test_a_long_queue_compiles_a_handful(model_folder):
    rng = np.random.default_rng(0)
    requests = [
        Request((), "x" * int(rng.integers(1, 200)), max_new_tokens=int(rng.integers(1, 20))) for _ in range(40)
    ]
    model = load(model_folder)
    assert model.engine
    with compiled_programs() as compiled:
        model.ask_many(requests, rows=4)
    # rows, extension, and for each bucket (96 to 256 tokens) prompts for all rows or for one
    assert len(compiled) <= 2 + 2 * 5


def test_a_model_without_vision_encoder(model, model_folder, tmp_path):
    """It answers as the whole model does to a question without images, and says that it cannot see."""
    shutil.copytree(model_folder, tmp_path / "text")
    manifest = checkpoints.read_manifest(model_folder)
    only = dict.fromkeys(("vision", "projector", "denoiser", "autoencoder"))
    checkpoints.write_manifest(tmp_path / "text", {**manifest, "config": manifest["config"] | only})
    text = load(tmp_path / "text")
    assert text.image_config is None and set(text.params) == {"language"}
    assert text.ask((), "What?", max_new_tokens=NEW) == model.ask([], "What?", max_new_tokens=NEW) != ""
    for see in (lambda: text.ask(make_image(0), "What?"), lambda: text.visual_outputs(make_image(0))):
        with pytest.raises(UserError, match="no vision, projector in the loaded model, so it cannot see images"):
            see()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -0.1}, r"^temperature -0\.1: must be at least 0\.0$"),
        ({"temperature": float("nan")}, "^temperature nan: must be a number"),
        ({"top_k": -1}, "^top_k -1: must be at least 0$"),
        ({"top_p": 0.0}, r"^top_p 0\.0: must be at least 1e-06$"),
        ({"min_p": 1.5}, r"^min_p 1\.5: must be at most 1\.0$"),
        ({"repetition_penalty": 0.0}, r"^repetition_penalty 0\.0: must be at least 0\.001$"),
        ({"seed": -1}, "^seed -1: must be at least 0$"),
        ({"stop": "."}, r"^stop '\.': expected a list of texts, none of them empty$"),
        ({"stop": [""]}, r"^stop \[''\]: expected a list of texts"),
        ({"max_new_tokens": 0}, "^max_new_tokens 0: must be at least 1$"),
        ({"max_new_tokens": 10**9}, "^max_new_tokens 1000000000: must be at most 32768$"),
        ({"history": [("What?",)]}, r"^history\[0\]: expected \(question, answer\), found \('What\?',\)$"),
        ({"images": "absent.png"}, r"^absent\.png: cannot be read \(No such file or directory\)$"),
        ({"images": [np.zeros((2, 2, 3))]}, r"^images\[0\]: float64\[2, 2, 3\]; expected uint8\[height, width, 3\]$"),
        ({"prompt": "<image> or <image>?"}, r"^sample '<image> or <image>\?': the record names 1 image"),
    ],
)
def test_mistakes_are_named(model, arguments, message):
    with pytest.raises(UserError, match=message):
        model.ask(**{"images": make_image(0), "prompt": "What?"} | arguments)


TEXTS = [
    "What?",
    "Which of the two is it, and why do you think so, my dear?",
    "No.",
    "How many?",
    "A B C",
    "Who was it?",
]
LIMITS = [3, 40, 5, 12, 1, 9]
"""The fifth answer is no whole character."""


@pytest.fixture(scope="module")
def queue() -> list[Request]:
    """Requests whose prompts and answers differ in length; some have one image, some two, some none."""
    images = [make_image(0), (), [make_image(1), make_image(2)], make_image(3), (), make_image(4)]
    return [
        Request(image, text, max_new_tokens=limit) for image, text, limit in zip(images, TEXTS, LIMITS, strict=True)
    ]


@pytest.fixture(scope="module")
def alone(model, queue) -> list[str]:
    return [model.ask_many([request])[0] for request in queue]


@pytest.mark.slow
@pytest.mark.parametrize("rows", [2, 3, 8])
def test_a_queue_is_answered_as_each_request_alone(model, queue, alone, rows):
    reported: dict[int, str] = {}
    found = model.ask_many(queue, rows=rows, on_answer=reported.__setitem__)
    assert found == alone and len(set(found)) >= len(queue) - 1
    assert [reported[i] for i in range(len(queue))] == found
    assert list(reported) != sorted(reported)  # as they end, not in order


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [MeshConfig(8, 1, 1), MeshConfig(2, 2, 2), MeshConfig(1, 1, 8)])
def test_meshes_answer_alike(model_folder, queue, alone, mesh):
    model = load(model_folder, mesh=mesh)
    query = model.params["language"]["layers"]["query"]["kernel"]
    assert len(query.sharding.device_set) == 8
    assert model.ask_many(queue, rows=4) == alone


@pytest.mark.slow
def test_drawn_answers_depend_on_the_seed_alone(model):
    def ask(rows: int, seeds: range) -> list[str]:
        settings = {"max_new_tokens": 8, "temperature": 0.9, "top_k": 50, "top_p": 0.95}
        return model.ask_many([Request((), "What?", seed=seed, **settings) for seed in seeds], rows=rows)

    found = ask(4, range(6))
    assert len(set(found)) == 6
    assert ask(3, range(5, -1, -1)) == found[::-1]
    penalised = model.ask((), "What?", max_new_tokens=24, repetition_penalty=1e3)
    assert penalised != model.ask((), "What?", max_new_tokens=24)


def test_pieces_are_the_answer(model):
    """Streamed pieces add up to the answer; a stop text ends it, and is not part of it, even across tokens."""
    pieces: list[str] = []
    settings = {"max_new_tokens": 40, "temperature": 1.5}
    answer = model.ask((), "What?", on_text=pieces.append, **settings)
    assert "".join(pieces) == answer == model.ask((), "What?", **settings) and len(pieces) > 3
    assert answer.isascii() is False and all("\ufffd" not in piece or piece in answer for piece in pieces)
    stop = answer[len(answer) // 2 :][:2]
    cut: list[str] = []
    stopped = model.ask((), "What?", stop=[stop, "never"], on_text=cut.append, **settings)
    assert stopped == answer[: answer.index(stop)].rstrip() == "".join(cut)


@pytest.mark.slow
def test_a_chat_answers_as_questions_with_history(model):
    """Turns read only what is new, whatever the cache holds."""
    chat, history, images = model.chat(), [], []
    turns = [("What?", [make_image(0)]), ("And now?", []), ("<image> or that?", [make_image(1)]), ("Why?", [])]
    for prompt, new in turns:
        images += new
        answer = chat.ask(prompt, new, max_new_tokens=20)
        asked = f"<image>\n{prompt}" if new and "<image>" not in prompt else prompt
        assert answer == model.ask(images, asked, history=history, max_new_tokens=20)
        history.append((asked, answer))
    assert chat.history == history
    with pytest.raises(UserError, match="max_new_tokens"):
        chat.ask("What?", max_new_tokens=0)
    assert chat.history == history
    chat.reset()
    assert chat.ask("What?", max_new_tokens=5) == model.ask((), "What?", max_new_tokens=5)


@pytest.mark.slow
def test_a_chat_reads_only_what_is_new(model, monkeypatch):
    """A turn keeps the prompt and the answer, but for the answer's last token, which was never read."""
    kept: list[int] = []
    run = Engine.continue_row

    def spy(engine, state, prompt, count, receive):
        kept.append(count)
        return run(engine, state, prompt, count, receive)

    monkeypatch.setattr(Engine, "continue_row", spy)
    for seed in range(40):  # until an answer's text has the tokens that were drawn
        chat = model.chat()
        settings = {"max_new_tokens": 3, "temperature": 1.0, "seed": seed}
        answer = chat.ask("What?", make_image(0), **settings)
        if len(answer) == 3 and answer.isprintable() and answer.isascii():
            break
    held = model.prepare(Request(make_image(0), "What?"))[0].tokens.size + 3 - 1
    second = chat.ask("Why?", max_new_tokens=20)
    assert kept[-2:] == [0, held]
    assert second == model.ask(make_image(0), "Why?", history=[("<image>\nWhat?", answer)], max_new_tokens=20)


@pytest.mark.slow
def test_rows_that_a_stop_text_ended_take_other_requests(model, alone, queue):
    stop = alone[1][2:4]
    requests = [dataclasses.replace(queue[1], stop=[stop]) for _ in range(3)] + queue
    found = model.ask_many(requests, rows=2)
    assert found == [alone[1][: alone[1].index(stop)].rstrip()] * 3 + alone


def test_image_positions_are_no_text_of_repetition_penalties(model):
    """Token 0, which fills image positions, is not penalised for standing there."""
    head = np.array(model.params["language"]["head"])
    prompt, _ = model.prepare(Request(make_image(0), "What?", max_new_tokens=1))

    def first(sign: float, penalty: float) -> int:
        changed = head.copy()
        changed[:, 0] = sign * 1e3 * head[:, 1]
        language = {**model.params["language"], "head": jnp.asarray(changed)}
        other = dataclasses.replace(model, params={**model.params, "language": language})
        made: list[int] = []
        drawing = (0.0, 0, 1.0, 0.0, penalty, 0)
        other.engine.run([dataclasses.replace(prompt, drawing=drawing)], 1, lambda _, ids, __: bool(made.extend(ids)))
        return made[0]

    sign = next(sign for sign in (1.0, -1.0) if first(sign, 1.0) == 0)
    assert first(sign, 1e3) == 0


def test_a_prompt_beyond_the_context_is_refused(model_folder, tmp_path):
    """`max_position_embeddings` of the language model's files bounds prompts, and prompts with their answers."""
    shutil.copytree(model_folder, tmp_path / "model")
    length = len(load(model_folder).prepare(Request((), "What?"))[0].tokens)
    path = tmp_path / "model" / "files" / "language" / "config.json"
    path.write_text(json.dumps({"max_position_embeddings": length + 3}))
    checkpoints.write_manifest(tmp_path / "model", checkpoints.read_manifest(model_folder))
    model = load(tmp_path / "model")
    assert model.prepare(Request((), "What?", max_new_tokens=40))[0].limit == 3
    with pytest.raises(UserError, match=rf"the prompt has {length + 20} tokens, 0 of .* at most {length + 3};"):
        model.ask((), "What?" + 20 * "!")


def test_a_model_without_template(model):
    with pytest.raises(UserError, match="does not say its conversation template"):
        dataclasses.replace(model, template=None).ask((), "What?")
