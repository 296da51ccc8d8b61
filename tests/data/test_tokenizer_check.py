"""Tokenizer folders that would run code, crash, loop or fill the memory are refused in one line."""

import json
import logging
import shutil

import pytest

from ross_jax.config import UserError
from ross_jax.data.encoders import build_encoder
from ross_jax.data.tokenizer import load_tokenizer
from tokenizer_fixtures import byte_level_tokenizer


@pytest.fixture(scope="module")
def sound_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    byte_level_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(sound_folder, tmp_path):
    """A copy of a sound tokenizer."""
    return shutil.copytree(sound_folder, tmp_path / "tokenizer")


def edit(path, **fields):
    """Sets fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def refusal(folder) -> str:
    with pytest.raises(UserError) as raised:
        load_tokenizer(folder)
    assert "\n" not in str(raised.value)
    assert f"tokenizer {folder}: " in str(raised.value)
    return str(raised.value)


def test_a_folders_own_code_is_not_run(folder, tmp_path, monkeypatch):
    """`auto_map` names a class in the folder; nothing is asked, and nothing is imported."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asks on stdin"))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\nclass Mine: pass\n")
    settings = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    edit(folder / "tokenizer_config.json", **settings)
    assert "mine.Mine" in refusal(folder)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "4300 digits"),
        (b"[1]", "not an object"),
        (b"[" + b"[]," * 3_000_000 + b"[]]", "lists and objects"),
    ],
)
def test_files_that_are_no_json_object(folder, name, content, reason):
    (folder / name).write_bytes(content)
    said = refusal(folder)
    assert name in said
    assert reason in said


def test_large_files_are_not_read(folder):
    with (folder / "tokenizer.json").open("ab") as file:
        file.truncate(2**40)
    assert "more than" in refusal(folder)


VOCABULARIES = {
    "panic": {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "abc"}},
    "abort": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "//////8="}},
    "memory": {
        "padding": {
            "strategy": {"Fixed": 2**40},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "x",
        }
    },
}


@pytest.mark.parametrize("fields", VOCABULARIES.values(), ids=VOCABULARIES)
def test_vocabularies_that_crash_their_reader(folder, fields):
    edit(folder / "tokenizer.json", **fields)
    said = refusal(folder)
    assert "tokenizer.json" in said
    assert "read" in said


def test_a_sentencepiece_model_that_is_none(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"\x0a\xff\xff\xff\xff\x0f" + bytes(200))
    refusal(folder)


def test_ids_that_no_array_holds(folder):
    vocabulary = json.loads((folder / "tokenizer.json").read_text())
    vocabulary["model"]["vocab"]["zz"] = 2**32 - 1
    edit(folder / "tokenizer.json", model=vocabulary["model"])
    assert "'zz' has the id 4294967295" in refusal(folder)


TEMPLATES = {
    "{% for i in range(99999) %}{% for i in range(99999) %}{% endfor %}{% endfor %}": "takes more than 2 s",
    "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}": "memory",
    "{{ 'a' * 99999999999 }}": "memory",
    "{{ raise_exception('no') }}{{ '%999999999d' % 1 }}": "memory",  # computed when the template is compiled
    "{% for i in range(99999) %}{{ 'a' * 999 }}{% endfor %}": "prints more than 1048576",
    "{% for x %}": "TemplateSyntaxError",
    "{{ 1 // 0 }}": "ZeroDivisionError",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "RecursionError",
}


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_chat_templates_that_are_broken(folder, template, place, monkeypatch):
    monkeypatch.setattr("ross_jax.data.tokenizer_check._SECONDS", 2)
    (folder / "chat_template.jinja").unlink()
    if place == "chat_template.jinja":
        (folder / place).write_text(template)
    else:
        edit(folder / place, chat_template=[{"name": "default", "template": template}])
    said = refusal(folder)
    assert "chat template" in said
    assert TEMPLATES[template] in said


def test_a_template_that_declines_is_refused_where_it_is_used(folder):
    """Other templates work with the tokenizer."""
    (folder / "chat_template.jinja").write_text("{{ raise_exception('only with tools') }}")
    tokenizer = load_tokenizer(folder)
    build_encoder("qwen_2", tokenizer)
    with pytest.raises(UserError, match=rf"chat template of tokenizer {folder}: .*only with tools"):
        build_encoder("chatml", tokenizer)


SOUND = (
    "{% generation %}{{ bos_token + messages[0].content | tojson(indent=2) }}{% endgeneration %}"
    "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{% endfor %}"
)


def test_what_transformers_adds_to_templates_is_known(folder, caplog):
    """A warning would say that the check itself failed."""
    (folder / "chat_template.jinja").write_text(SOUND)
    with caplog.at_level(logging.WARNING, "ross_jax"):
        load_tokenizer(folder)
    assert not caplog.records


def test_known_files_are_not_checked_again(folder, monkeypatch):
    load_tokenizer(folder)
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("starts a process"))
    load_tokenizer(folder)
