"""Exports in the layout of transformers' LLaVA, loaded and run by transformers alone.

`ROSS_DEMO=runs/demo pytest -m slow -s tests/parity/test_llava.py` asks the models of `launch/demo.py --lora`, too.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import ross_jax
from convert.foreign import golden, import_model
from launcher import load_script
from ross_jax import load
from ross_jax.convert.exporting import export
from ross_jax.inference.model import TEXT_COMPONENTS
from ross_jax.inference.prompts import Request
from ross_jax.models.ross import Ross, normalise
from ross_jax.tree import flatten
from tokenizer_fixtures import byte_level_tokenizer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

QUESTIONS = ("What is it?", "How many marks are at the top of this picture?", "Why?")
LENGTH = 12


def our_ids(model, images, questions, rows: int = 8) -> list[list[int]]:
    """Greedy ids of our engine, one list for each question."""
    requests = [Request(image, text, max_new_tokens=LENGTH) for image, text in zip(images, questions, strict=True)]
    prompts = [model.prepare(request)[0] for request in requests]
    found: dict[int, list[int]] = {}

    def receive(number: int, ids, ended: bool) -> bool:
        found[number] = [int(each) for each in ids]
        return ended

    model.engine.run(prompts, min(rows, len(prompts)), receive)
    return [found[i] for i in range(len(prompts))]


def their_ids(model, processor, images, questions) -> list[list[int]]:
    """Greedy ids of transformers for one batch, padded on the left, from the chat template."""
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
            add_generation_prompt=True,
        )
        for question in questions
    ]
    inputs = processor(images=list(images), text=texts, padding=True, return_tensors="pt")
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=LENGTH)[:, inputs["input_ids"].shape[1] :].tolist()
    ends = model.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else ends or []
    return [row[: next((i + 1 for i, each in enumerate(row) if each in ends), LENGTH)] for row in ids]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "template"),
    [("siglip_qwen2", "qwen_2"), ("clip_vicuna", "v1")],
)
def test_transformers_answers_as_we_do(name, template, tmp_path):
    """Greedy ids of a left-padded batch and of single prompts are equal; no tensor is missing, and none left over."""
    checkpoint = golden(name, tmp_path)
    byte_level_tokenizer().save_pretrained(checkpoint)
    model = import_model(tmp_path / "model", checkpoint)
    own, lines = load(model, template=template), []
    export(model, tmp_path / "llava", "llava", template=template, progress=lines.append)
    assert not [line for line in lines if line.startswith("warning")]
    folder = str(tmp_path / "llava")
    processor = transformers.AutoProcessor.from_pretrained(folder, backend="pil")
    theirs, loading = transformers.AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values())
    arrays = np.random.default_rng(0).integers(0, 256, (3, 40, 70, 3), np.uint8)
    images = [Image.fromarray(array) for array in arrays]
    answers = our_ids(own, images, QUESTIONS)
    assert len({tuple(ids) for ids in answers}) == len(answers)
    assert their_ids(theirs, processor, images, QUESTIONS) == answers
    assert their_ids(theirs, processor, images[1:2], QUESTIONS[1:2]) == answers[1:2]


def first_logits(model, images, questions) -> np.ndarray:
    """Our logits of the first token of each answer."""
    config = model.config
    prompts = [model.prepare(Request(image, text))[0] for image, text in zip(images, questions, strict=True)]
    lengths = np.array([len(prompt.tokens) for prompt in prompts])
    places = np.arange(lengths.max())[None].repeat(len(prompts), 0)
    tokens = np.zeros(places.shape, np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt.tokens)] = prompt.tokens
    pixels = normalise(config, jnp.stack([prompt.images[0] for prompt in prompts]))
    starts = jnp.asarray([prompt.image_start for prompt in prompts])
    inputs = (jnp.asarray(each, jnp.int32) for each in (tokens, places, places < lengths[:, None]))
    hidden = (
        Ross(config)
        .apply({"params": model.params}, *inputs, pixels[:, None], starts)
        .hidden[np.arange(len(prompts)), lengths - 1]
    )
    return np.asarray(Ross(config).apply({"params": model.params}, hidden[:, None], method="logits"))[:, 0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["finetune", "lora", "peft"])
def test_the_demo_answers_as_we_do(kind, tmp_path):
    """Held-out questions of the demo, asked by a process without our code: equal ids, one at a time and in batches.

    `lora` has its updates merged; `peft` is the adapter, on the export of the model that its training began with.
    """
    root = Path(os.environ.get("ROSS_DEMO", "absent"))
    seed = root / "denoise" / "seed0"
    run = seed / ("finetune" if kind == "finetune" else "lora")
    if not run.is_dir():
        pytest.skip("set ROSS_DEMO to the folder of a finished `launch/demo.py --lora`, such as runs/demo")
    exports, adapter = {"llava": run}, []
    if kind == "peft":
        pytest.importorskip("peft")
        exports, adapter = {"llava": seed / "pretrain", "peft": run}, [str(tmp_path / "peft")]
    for layout, source in exports.items():
        command = ["export", "--from", str(source), "--format", layout, "--output", str(tmp_path / layout)]
        command += ["--template", "qwen_2"] if layout == "llava" else []
        assert load_script("convert").main(command) == 0
    records = json.loads((root / "data" / "heldout.json").read_text())[::41][:60]
    questions = [each["conversations"][0]["value"].removeprefix("<image>\n") for each in records]
    images = [root / "data" / "images" / each["image"] for each in records]
    model = load(run)
    answers, logits = our_ids(model, images, questions), first_logits(model, images, questions)
    assert len({tuple(ids) for ids in answers}) > 10
    asked = [{"image": str(i), "question": q} for i, q in zip(images, questions, strict=True)]
    (tmp_path / "questions.json").write_text(json.dumps(asked))
    for rows in (1, 7):
        script = Path(__file__).with_name("ask_transformers.py")
        arguments = [str(tmp_path / "llava"), str(tmp_path / "questions.json"), str(rows), *adapter]
        done = subprocess.run([sys.executable, "-I", str(script), *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        assert json.loads(done.stdout.splitlines()[-1]) == answers
        differs = np.abs(np.load(tmp_path / "questions.json.npy")[:, : logits.shape[1]] - logits).max()
        print(f"\n{kind}: {len(answers)} equal answers; logits to {np.abs(logits).max():.4g} differ by {differs:.2g}")
        assert differs < 1e-3
    if adapter:
        again = load(ross_jax.import_model([seed / "pretrain", tmp_path / "peft"], tmp_path / "again"), TEXT_COMPONENTS)
        for path, leaf in flatten(again.params).items():
            np.testing.assert_array_equal(leaf, flatten(model.params)[path], err_msg=path)
