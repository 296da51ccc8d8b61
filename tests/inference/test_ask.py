"""`Model.ask` and `ask_many`: answers equal full forward passes of one prompt at a time; kinds of images; errors."""

import dataclasses
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
from ross_jax.inference.model import load
from ross_jax.inference.prompts import Request
from ross_jax.models.ross import Ross, normalise

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


def test_programs_are_shared(model, model_folder):
    """Questions and answers of similar length, asked one after another, compile once; so does the same model again."""
    compiled = []

    def count(event: str, _: float, **__) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    model.ask(make_image(0), "What?", max_new_tokens=NEW)
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        jax.jit(lambda x: x - 17)(1.5)
        assert len(compiled) == 1  # the counter counts
        model.ask(make_image(1), "Whatever?", max_new_tokens=NEW - 3)
        load(model_folder).ask(make_image(2), "Who?", max_new_tokens=NEW + 1)
        assert len(compiled) == 1
    finally:
        jax.monitoring.unregister_event_duration_listener(count)


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
        ({"temperature": 0.7}, r"^temperature 0\.7: not supported yet; answers are greedy, with temperature 0\.0$"),
        ({"top_k": 5}, "^top_k 5: not supported yet"),
        ({"top_p": 0.9}, r"^top_p 0\.9: not supported yet"),
        ({"min_p": 0.1}, r"^min_p 0\.1: not supported yet"),
        ({"repetition_penalty": 1.1}, r"^repetition_penalty 1\.1: not supported yet"),
        ({"stop": ["."]}, r"^stop \['\.'\]: not supported yet"),
        ({"on_text": print}, "^on_text <built-in function print>: not supported yet"),
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


def test_defaults_are_supported():
    Request((), "What?", temperature=0.0, top_p=1.0, stop=[], seed=3)


def test_a_model_without_template(model):
    with pytest.raises(UserError, match="does not say its conversation template"):
        dataclasses.replace(model, template=None).ask((), "What?")
