"""`launch/chat.py`: the page, driven through its API by Gradio's own client in .venv-web."""

import dataclasses
import json
import os
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launcher import REPOSITORY, load_script
from ross_jax.inference.model import load
from tiny_model import SIZED, write_model

PYTHON = REPOSITORY / ".venv-web" / "bin" / "python"
SERVER = REPOSITORY / "tests" / "launch" / "chat_server.py"
needs_web = pytest.mark.skipif(not PYTHON.exists(), reason="needs Gradio: bash launch/setup.sh --env web")

CLIENT = """
import json, sys
from gradio_client import Client, handle_file
client = Client(sys.argv[1], verbose=False)
for step in json.loads(sys.argv[2]):
    try:
        if step == "reset":
            result = client.predict(api_name="/reset")
            print(json.dumps({"chat": result[1]}))
            continue
        message = {"text": step["text"], "files": [handle_file(file) for file in step["files"]]}
        job = client.submit(message, *step["settings"], api_name="/ask")
        result = job.result(timeout=300)
        pane = result[2] if len(result) > 2 else None
        print(json.dumps({"chat": result[1], "pane": pane, "grew": len(job.outputs())}))
    except Exception as error:
        print(json.dumps({"error": str(error)}))
"""
SETTINGS = [16, 0.5, 7, 0.9, 0.1, 1.1, 3, "END"]


@pytest.fixture
def drive(tmp_path):
    """Function: model directory, steps of `CLIENT`, and the server's script -> what each step gave."""
    (tmp_path / "client.py").write_text(CLIENT)
    environ = os.environ | {
        "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}",
        "GRADIO_TEMP_DIR": str(tmp_path / "t"),
    }
    started = []

    def run(folder: Path, *steps, script: Path = SERVER) -> list[dict]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        flags = ["--checkpoint", str(folder), "--port", str(port), "--upload-mb", "1", "--steps", "2"]
        with (tmp_path / "log").open("w") as log:
            server = subprocess.Popen([PYTHON, script, *flags], stdout=log, stderr=log, env=environ)
        started.append(server)
        address = f"http://127.0.0.1:{port}"
        for _ in range(600):
            assert server.poll() is None, (tmp_path / "log").read_text()
            if address in (tmp_path / "log").read_text():
                break
            time.sleep(0.5)
        with urllib.request.urlopen(address) as page:
            assert b"fonts.googleapis.com/css" not in page.read()
        client = [PYTHON, tmp_path / "client.py", address, json.dumps(steps)]
        done = subprocess.run(client, capture_output=True, text=True, env=environ, check=False, timeout=600)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]

    yield run
    for server in started:
        server.terminate()
        server.wait()
    assert "launch/chat.py" not in (tmp_path / "log").read_text()  # no traceback of ours


def ask(text: str, *files: Path) -> dict:
    return {"text": text, "files": [str(file) for file in files], "settings": SETTINGS}


def said(result: dict) -> list[str]:
    """Texts of the messages of a conversation."""
    texts = []
    for message in result["chat"]:
        for part in message["content"]:
            texts += [part["text"]] if part["type"] == "text" else []
    return texts


@pytest.fixture
def files(tmp_path):
    """An image, a file of too many bytes, an image of too many pixels, and no image."""
    noise = np.random.default_rng(0).integers(0, 256, (700, 700, 3), dtype=np.uint8)
    Image.fromarray(noise[:30, :40]).save(tmp_path / "small.png")
    Image.fromarray(noise).save(tmp_path / "heavy.png")
    Image.new("1", (20000, 20000)).save(tmp_path / "wide.png")
    (tmp_path / "text.png").write_text("no image")
    return [tmp_path / name for name in ("small.png", "heavy.png", "wide.png", "text.png")]


@needs_web
@pytest.mark.slow
def test_conversations_with_images(drive, files, model_folder):
    """Answers grow; images and turns are kept until reset; what is refused says why and changes nothing."""
    small, heavy, wide, text = files
    steps = [ask("One?", small), ask("Two?", heavy), ask("Three?", wide), ask("Four?", text), ask(" ")]
    first, *refused, second, third, gone, after = drive(
        model_folder, *steps, ask("Five?"), ask("Six?", small, small), "reset", ask("Seven?")
    )
    answer = json.loads(said(first)[-1])
    assert said(first)[0] == "One?" and first["grew"] > 5
    assert answer["prompt"] == "<image>\nOne?" and answer["images"] == 1 and answer["history"] == []
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    assert [answer[name] for name in names] == SETTINGS[:-1] and answer["stop"] == ["END"]
    assert [pair["caption"] for pair in first["pane"]] == ["image 1", "reconstruction 1"]
    messages = [result["error"] for result in refused]
    assert "exceeds the maximum file size of 1000000 bytes" in messages[0]
    for message, expected in zip(messages[1:], ("wide.png: more than", "text.png: ", "the question is"), strict=True):
        assert expected in message and "/" not in message, message
    answer = json.loads(said(second)[-1])
    assert answer["images"] == 1 and [question for question, _ in answer["history"]] == ["<image>\nOne?"]
    answer = json.loads(said(third)[-1])
    assert answer["images"] == 3 and answer["prompt"] == "<image>\n<image>\nSix?"
    assert [pair["caption"] for pair in third["pane"]][4:] == ["image 3", "reconstruction 3"]
    assert gone["chat"] == []
    answer = json.loads(said(after)[-1])
    assert (answer["images"], answer["history"], answer["prompt"]) == (0, [], "Seven?") and after["pane"] == []


@needs_web
@pytest.mark.slow
@pytest.mark.parametrize("gone", [("denoiser", "autoencoder"), ("denoiser", "autoencoder", "vision", "projector")])
def test_models_without_reconstruction(drive, files, tmp_path, gone):
    """The baseline has no reconstruction pane; a model that only reads text refuses images in words."""
    config = dataclasses.replace(SIZED, **dict.fromkeys(gone))
    answered, shown = drive(write_model(tmp_path / "model", config), ask("One?"), ask("Two?", files[0]))
    assert json.loads(said(answered)[-1])["prompt"] == "One?" and answered["pane"] is None
    if "vision" in gone:
        assert "has no vision encoder" in shown["error"]
    else:
        assert json.loads(said(shown)[-1])["images"] == 1 and shown["pane"] is None


@needs_web
@pytest.mark.slow
def test_the_page_answers_as_the_model_does(drive, tmp_path, model_folder):
    """Nothing stands in for the engine; a second question has the first one as its history."""
    pixels = np.random.default_rng(0).integers(
        0, 256, (28, 28, 3), dtype=np.uint8
    )  # Pillow's versions resize otherwise
    Image.fromarray(pixels).save(tmp_path / "small.png")
    greedy = [8, 0, 0, 1, 0, 1, 0, ""]
    steps = [ask("One?", tmp_path / "small.png") | {"settings": greedy}, ask("Two?") | {"settings": greedy}]
    first, second = drive(model_folder, *steps, script=REPOSITORY / "launch" / "chat.py")
    model = load(model_folder)
    one = model.ask(pixels, "<image>\nOne?", max_new_tokens=8)
    two = model.ask(pixels, "Two?", history=[("<image>\nOne?", one)], max_new_tokens=8)
    assert said(first) == ["One?", one] and said(second) == ["One?", one, "Two?", two]
    assert len(first["pane"]) == 2


def test_without_gradio_one_line(model_folder, monkeypatch, capsys):
    chat = load_script("chat")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert chat.main(["--checkpoint", str(model_folder)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "bash launch/setup.sh --env web" in error and error.count("\n") == 1
