"""launch/inspect_data.py: its output, files and errors."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest

from launcher import load_script
from ross_jax.data.conversation import EncodedConversation
from tokenizer_fixtures import ROOT, byte_level_tokenizer, tokenizer_folder  # noqa: F401

SCRIPT = ROOT / "launch" / "inspect_data.py"
GOLDEN = ROOT / "tests" / "golden" / "tokenization"


@pytest.fixture(scope="module")
def inspect_data():
    return load_script("inspect_data")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    byte_level_tokenizer().save_pretrained(folder)
    return str(folder)


def conversation(question, answer, **fields):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, **fields}


@pytest.fixture
def run(inspect_data, tiny, tmp_path, capsys):
    """Function: (records or text of a file, arguments) -> (status, stdout, stderr, JSON)."""

    def call(records, *arguments, template="llama3", tokenizer=tiny):
        data, out = tmp_path / "data.json", tmp_path / "out.json"
        data.write_text(records if isinstance(records, str) else json.dumps(records))
        arguments = ("--template", template, "--tokenizer", str(tokenizer), "--data", str(data), *arguments)
        status = inspect_data.main([*arguments, "--json", str(out)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err, json.loads(out.read_text()) if out.is_file() else None

    return call


def test_shows_and_writes_every_conversation(run):
    records = [conversation("<image>\nWhat?", "A dog.", id="one", image="a.jpg"), conversation("Hi", "Yo\x1b[2J", id=2)]
    status, out, err, written = run(records, "--image-tokens", "9")
    assert (status, err) == (0, "")
    assert "\n\n[image: 9 tokens]\nWhat?<|eot_id|>" in out
    assert "⟦A dog.<|eot_id|>⟧" in out
    assert "⟦Yo\\x1b[2J<|eot_id|>⟧" in out  # control characters of the data are escaped
    assert "== one: " in out and "== 2: " in out
    assert [item["id"] for item in written] == ["one", 2]
    first = written[0]
    assert set(first) == {"id", "input_ids", "labels"}
    assert first["input_ids"].count(-200) == 1 and len(first["input_ids"]) == len(first["labels"])
    assert any(label != -100 for label in first["labels"])
    longest = len(first["input_ids"]) + 8
    assert f"== one: {longest} tokens, 1 images, " in out
    assert f"longest {longest};" in out


@pytest.mark.parametrize(("template", "name"), [("v1", "llama2"), ("qwen_2", "qwen2"), ("llama3", "llama3")])
def test_official_json_equals_the_reference(run, tokenizer_folder, template, name):  # noqa: F811
    cases = json.loads((GOLDEN / f"{template}.json").read_text())["cases"]
    records = [
        {"id": case["id"], "conversations": case["conversations"], **({"image": "x.png"} if case["has_image"] else {})}
        for case in cases
    ]
    status, _, _, written = run(records, "--compat", "official", template=template, tokenizer=tokenizer_folder(name))
    assert status == 0
    assert written == [{key: case[key] for key in ("id", "input_ids", "labels")} for case in cases]


def test_limit_and_missing_ids(run):
    status, out, _, written = run([conversation("Hi", "Yo")] * 5, "--limit", "3")
    assert status == 0
    assert [item["id"] for item in written] == [0, 1, 2]
    assert "3 conversations, 0 images" in out


def test_jsonl(run, inspect_data, tiny, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps(conversation("Hi", "Yo", id=i)) for i in range(4)) + "\n")
    assert inspect_data.main(["--template", "v1", "--tokenizer", tiny, "--data", str(data)]) == 0
    assert "4 conversations" in capsys.readouterr().out


def test_packing_efficiency(run):
    # A row holds two of the 4 equally long conversations and one spare token.
    records = [conversation("Hi", "Yo")] * 4
    length = len(run(records)[3][0]["input_ids"])
    _, out, _, _ = run(records, "--length", str(2 * length + 1))
    assert (
        f"rows of {2 * length + 1} tokens and 2 images: 2 rows, efficiency {2 * length / (2 * length + 1):.1%}" in out
    )
    status, out, _, _ = run(records, "--length", str(length - 1))
    assert status == 0
    assert "none of 4 samples fits a row" in out
    images = [conversation("<image>", "Yo", image="x")] * 4
    assert "1 images: 4 rows" in run(images, "--image-tokens", "4", "--image-slots", "1")[1]


def test_what_is_not_used_is_said(run):
    """Fields, marks without images, and conversations that exceed a row; the conversations are still shown."""
    records = [conversation("<image>\nWhat?", "Yo", photo="a.png"), conversation("Hi", "Yo", system="Be terse.")]
    status, out, err, written = run(
        [*records, conversation("<image><image>", "Yo", img=["a", "b"])], "--image-slots", "1"
    )
    assert status == 0 and len(written) == 3
    assert "warning: " in err and "1 of 3 records have a mark in a question and no image (1 with <image>)" in err
    assert "the field 'img' of 1 records is read as 'image'" in err
    assert "fields that are not read: 'photo' (1 records)" in err
    assert "1 of 3 conversations do not fit a row and are left out: 1 exceed packing.images = 1" in out
    assert "Be terse." in out


def test_histogram(inspect_data):
    lines = inspect_data.histogram([10, 10, 10, 130]).splitlines()
    assert 1 < len(lines) <= 12
    counts = [int(line.split(":")[1].split()[0]) for line in lines]
    assert counts[0] == 3 and counts[-1] == 1 and sum(counts) == 4
    assert lines[0].count("#") == 50 and lines[-1].count("#") == 17
    assert inspect_data.histogram([7, 7]) == "  7 to 7:       2 " + "#" * 50


def test_broken_samples_are_named_and_left_out(run):
    bad = {"id": "bad", "conversations": [{"from": "hunam", "value": "x"}]}
    status, _, err, written = run([conversation("Hi", "Yo", id="good"), bad])
    assert status == 0
    assert [item["id"] for item in written] == ["good"]
    assert "data.json, record 1: sample 'bad', conversations[0]: 'hunam' is no role (did you mean 'human'?)" in err
    assert "1 conversations are broken" in err
    status, _, err, written = run([bad])
    assert (status, written) == (1, [])
    assert "error: " in err and "none of the 1 conversations can be used" in err


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_colours_on_a_terminal_only(inspect_data, monkeypatch):
    tokenizer = byte_level_tokenizer()
    ids = tokenizer("Hi Yo").input_ids
    labels = [-100] * 2 + ids[2:]
    encoded = EncodedConversation(np.array([-200, *ids], np.int32), np.array([-100, *labels], np.int32))
    monkeypatch.delenv("NO_COLOR", raising=False)
    text, numbers = inspect_data.describe(encoded, tokenizer, inspect_data.Painter(Terminal()), 4)
    assert text == "\033[36m[image: 4 tokens]\033[0mHi\033[32m Yo\033[0m"
    assert numbers.startswith("\033[36m[-200]\033[0m ") and numbers.count("\033[32m") == 1
    plain = ("[image: 4 tokens]Hi⟦ Yo⟧", f"[-200] {ids[0]} {ids[1]} ⟦{' '.join(map(str, ids[2:]))}⟧")
    assert inspect_data.describe(encoded, tokenizer, inspect_data.Painter(io.StringIO()), 4) == plain
    monkeypatch.setenv("NO_COLOR", "1")
    assert inspect_data.describe(encoded, tokenizer, inspect_data.Painter(Terminal()), 4) == plain


@pytest.mark.parametrize(
    ("records", "arguments", "message"),
    [
        ('[{"conversations": [}]', {}, "corrupt JSON at line 1, column 21"),
        ("[]", {}, "is empty"),
        ([conversation("Hi", "Yo")], {"tokenizer": "./absent"}, "tokenizer ./absent: there is no such folder"),
    ],
)
def test_errors(run, records, arguments, message):
    status, _, err, _ = run(records, **arguments)
    assert status == 1
    assert err.startswith("error: ") and message in err
    assert "Traceback" not in err


def test_errors_of_its_own_arguments(run, tmp_path):
    records = [conversation("Hi", "Yo")]
    status, _, err, _ = run(records, "--image-slots", "-1")
    assert status == 1 and "-1 image slots" in err
    status, _, err, _ = run(records, "--compat", "official", template="chatml")
    assert status == 1 and "the reference does not have it" in err
    (tmp_path / "out.json").mkdir()
    status, _, err, _ = run(records)
    assert status == 1 and "out.json: cannot be written: Is a directory" in err
    with pytest.raises(SystemExit):
        run(records, template="vicuna")


def test_as_a_command(tiny, tmp_path):
    data = tmp_path / "data.json"
    data.write_text(json.dumps([conversation("Hi", "Yo")] * 3))
    command = [sys.executable, str(SCRIPT), "--template", "v1", "--tokenizer", tiny, "--data"]
    done = subprocess.run([*command, str(data)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "3 conversations" in done.stdout
    done = subprocess.run([*command, "absent.json"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: absent.json: cannot be read")
