"""Loading tokenizers, and text that cannot become special tokens."""

import json
import pickle
import shutil
import subprocess
import sys

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ross_jax.config import UserError
from ross_jax.data import tokenizer as module
from ross_jax.data.tokenizer import TextEncoder, check_fingerprint, fingerprint, load_tokenizer, save_tokenizer
from tokenizer_fixtures import TINY, byte_level_tokenizer, sentencepiece_tokenizer, tokenizer_folder  # noqa: F401

# Ids of the reference's slow tokenizers (transformers 4.43). Texts hold special tokens and words inside a sentence.
REFERENCE_IDS = {
    "llama2": [
        ("Thanks. USER: Who?", [1, 1834, 29889, 3148, 1001, 29901, 11644, 29973]),
        ("Yes.</s>USER: Hi", [1, 3869, 29889, 2, 11889, 29901, 6324]),
        ("\nWhat", [1, 29871, 13, 5618]),
    ],
    "qwen2": [(" ASSISTANT: A dog.<|im_end|>USER:", [35560, 3846, 2821, 25, 362, 5562, 13, 151645, 6448, 25])],
    "llama3": [("<|start_header_id|>user<|end_header_id|>\n\nHello", [128000, 128006, 882, 128007, 271, 9906])],
}


@pytest.mark.parametrize("name", REFERENCE_IDS)
def test_ids_of_the_reference(tokenizer_folder, name):  # noqa: F811
    tokenizer = load_tokenizer(tokenizer_folder(name))
    for text, ids in REFERENCE_IDS[name]:
        assert tokenizer(text).input_ids == ids


@pytest.mark.parametrize(
    ("name", "pad"), [("llama2", "<unk>"), ("qwen2", "<|endoftext|>"), ("llama3", "<|end_of_text|>")]
)
def test_padding_token_of_the_reference(tokenizer_folder, name, pad):  # noqa: F811
    tokenizer = load_tokenizer(tokenizer_folder(name))
    assert tokenizer.pad_token == pad
    assert tokenizer.pad_token_id == tokenizer.convert_tokens_to_ids(pad) is not None


def test_load_a_folder(tmp_path):
    byte_level_tokenizer().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path, max_length=77)
    assert tokenizer("an A</s>").input_ids == byte_level_tokenizer()("an A</s>").input_ids
    assert tokenizer.model_max_length == 77
    assert load_tokenizer(str(tmp_path)).model_max_length > 77


def test_padding_token_falls_back_to_the_stop_token(tmp_path):
    backend = Tokenizer(models.BPE({"a": 0}, []))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).pad_token == "</s>"


def test_folders_that_hold_no_tokenizer(tmp_path):
    saved = tmp_path / "saved"
    byte_level_tokenizer().save_pretrained(saved)
    with pytest.raises(UserError, match="there is no such folder"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(UserError, match="there is no such folder"):
        load_tokenizer("./absent")
    with pytest.raises(UserError, match="this is a file; give the folder"):
        load_tokenizer(saved / "tokenizer.json")
    empty = tmp_path / "empty"  # transformers would load an empty tokenizer
    empty.mkdir()
    (empty / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(UserError, match="holds no vocabulary"):
        load_tokenizer(empty)
    (empty / "tokenizer.json.xz").write_bytes(b"")
    with pytest.raises(UserError, match=r"tokenizer\.json\.xz must be decompressed first"):
        load_tokenizer(empty)
    (saved / "tokenizer.json").write_text('{"truncated": ')
    with pytest.raises(UserError, match=f"tokenizer {saved}: tokenizer.json cannot be read"):
        load_tokenizer(saved)


@pytest.mark.parametrize("name", ["tokenizer", "runs/absent", "./a/b", "a/b/c", "owner/name/", "a b/c", "../name"])
def test_paths_are_not_asked_of_the_hub(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr(module, "hub_answers", lambda _: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match=r"there is no such folder$"):
        load_tokenizer(name)


def test_a_hub_id_is_saved_anew(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(module, "hub_answers", lambda _: True)
    monkeypatch.setattr(module, "_from_hub", lambda name: module.say_asked(name) or byte_level_tokenizer())
    save_tokenizer("someone/some-7b", tmp_path)
    assert fingerprint(load_tokenizer(tmp_path)) == fingerprint(byte_level_tokenizer())
    assert "someone/some-7b: there is no such folder; asking the Hugging Face hub for it" in caplog.messages


def test_a_hub_id_that_cannot_be_had(monkeypatch):
    def refuse(name, **kwargs):
        raise OSError(f"We couldn't connect\nto load {name}")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(
        UserError, match=r"someone/some-7b: there is no such folder, and the hub .*couldn't connect to load"
    ):
        load_tokenizer("someone/some-7b")


def test_a_folder_is_read_without_the_network(tmp_path, monkeypatch):
    byte_level_tokenizer().save_pretrained(tmp_path)
    seen = []
    original = AutoTokenizer.from_pretrained
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *a, **k: seen.append(k) or original(*a, **k))
    load_tokenizer(tmp_path)
    assert [each["local_files_only"] for each in seen] == [True]


@pytest.mark.parametrize("model_type", ["qwen2", "llama", "ross_qwen2", "llava"])
@pytest.mark.parametrize("tiny", TINY)
def test_a_config_beside_it_has_no_say(tiny, model_type, tmp_path):
    """transformers 5 would take the class of the model, which keeps the vocabulary and splits text differently."""
    TINY[tiny]().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for name in (settings["tokenizer_class"], "PreTrainedTokenizerFast", None):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": name}))
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        assert fingerprint(load_tokenizer(tmp_path)) == fingerprint(TINY[tiny]())


def test_a_saved_tokenizer_has_the_given_bytes_and_no_other_files(tmp_path):
    given, folder = tmp_path / "given", tmp_path / "folder"
    (given / "additional_chat_templates").mkdir(parents=True)
    byte_level_tokenizer().save_pretrained(given)
    (given / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    (given / "preprocessor_config.json").write_text("{}")
    expected = {path.relative_to(given): path.read_bytes() for path in given.rglob("*") if path.is_file()}
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        (given / name).write_text("{}")  # belongs to the model
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for name in ("added_tokens.json", "vocab.json", "tokenizer.model"):
        (folder / name).write_text("of another tokenizer")
    for _ in range(2):
        save_tokenizer(given, folder)
        found = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        assert found.pop(folder.joinpath("config.json").relative_to(folder)) == b"{}" and found == expected
        given = folder  # onto itself


def test_another_tokenizer_is_told(tmp_path):
    given = byte_level_tokenizer()
    check_fingerprint(given, None, "it")
    check_fingerprint(given, fingerprint(byte_level_tokenizer()), "it")
    given.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    with pytest.raises(UserError, match=r"^it: this is not the tokenizer .*: the ids of a text.; put its files back"):
        check_fingerprint(given, fingerprint(byte_level_tokenizer()), "it")
    with pytest.raises(UserError, match="differs: its vocabulary, the ids of a text"):
        check_fingerprint(given, fingerprint(sentencepiece_tokenizer()), "it")


def test_no_word_of_pytorch_at_the_start(tmp_path):
    byte_level_tokenizer().save_pretrained(tmp_path)
    code = "import sys; sys.modules['torch'] = None; from ross_jax.data.tokenizer import load_tokenizer"
    command = [sys.executable, "-c", f"{code}; print(len(load_tokenizer(sys.argv[1])))", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (int(done.stdout), done.stderr) == (len(byte_level_tokenizer()), "")


@pytest.mark.parametrize("tiny", TINY)
def test_special_tokens_in_text_are_spelled_out(tiny):
    encoder = TextEncoder(TINY[tiny]())
    for token, index in encoder.special.items():
        for continues in (False, True):
            assert index not in encoder.encode(f"a {token} b{token}", continues)
        assert encoder.split_special(f"a {token}\n") == ["a ", index, "\n"]


def test_a_copy_for_a_worker_process_has_its_mode_set():
    """A pickled copy has the backend's mode set, because setting it while another thread encodes would fail."""
    copied = pickle.loads(pickle.dumps(TextEncoder(byte_level_tokenizer())))
    assert copied.tokenizer.backend_tokenizer.encode_special_tokens


def test_start_and_continuation():
    byte_level = TextEncoder(byte_level_tokenizer())
    assert byte_level.start == ()
    assert byte_level.encode("an A") == byte_level.encode("an A", continues=True)

    tokenizer = sentencepiece_tokenizer()
    pieces = TextEncoder(tokenizer)
    assert pieces.start == (tokenizer.bos_token_id,)
    read = tokenizer.convert_ids_to_tokens
    assert read(pieces.encode("an A")) == ["▁an", "▁A"]
    assert read(pieces.encode("an A", continues=True)) == ["an", "▁A"]
    assert read(pieces.encode(" an A", continues=True)) == ["▁an", "▁A"]
    assert read(pieces.encode("\n\nan", continues=True)) == ["<0x0A>", "<0x0A>", "an"]
    assert pieces.encode("", continues=True) == []


def test_continuation_equals_what_follows_a_special_token(tokenizer_folder):  # noqa: F811
    tokenizer = load_tokenizer(tokenizer_folder("llama2"))
    encoder = TextEncoder(tokenizer)
    for text in ("USER: Hi", " A dog", "   two", "\nline", "0", "dog", "狗", "😀"):
        assert encoder.encode(text, continues=True) == tokenizer("</s>" + text).input_ids[2:]


def test_special_ids():
    encoder = TextEncoder(byte_level_tokenizer())
    assert encoder.special_id("<|im_end|>", "it") == encoder.tokenizer.convert_tokens_to_ids("<|im_end|>")
    with pytest.raises(UserError, match=r"it needs a special token '<\|im_ende\|>' \(did you mean '<\|im_end\|>'\?\)"):
        encoder.special_id("<|im_ende|>", "it")
    with pytest.raises(UserError, match="it needs an end-of-sequence token"):
        encoder.special_id(None, "it")


def test_special_tokens_that_text_could_forge_are_refused():
    backend = Tokenizer(models.WordLevel({"</s>": 0, "dog": 1, "<unk>": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    encoder = TextEncoder(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"))
    with pytest.raises(UserError, match="out of plain text"):
        encoder.special_id("</s>", "it")


def test_llama2_needs_no_setting_beyond_legacy(tokenizer_folder, tmp_path):  # noqa: F811
    """`legacy` may be absent instead of false."""
    folder = shutil.copytree(tokenizer_folder("llama2"), tmp_path / "llama2")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config.pop("legacy") is False
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for text, ids in REFERENCE_IDS["llama2"]:
        assert load_tokenizer(folder)(text).input_ids == ids


def test_a_folder_with_only_tokenizer_model(tokenizer_folder, tmp_path):  # noqa: F811
    """A folder with tokenizer.model alone, like Vicuna's, gives the tokenizer of tokenizer.json."""
    pytest.importorskip("sentencepiece", reason="reading tokenizer.model needs the sentencepiece package")
    folder = shutil.copytree(tokenizer_folder("llama2"), tmp_path / "vicuna")
    complete = load_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    converted = load_tokenizer(folder)
    assert converted("x  a cup").input_ids == [1, 921, 29871, 263, 18002]
    assert json.loads(converted.backend_tokenizer.to_str()) == json.loads(complete.backend_tokenizer.to_str())
    converted.save_pretrained(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again")("x  a cup").input_ids == [1, 921, 29871, 263, 18002]
