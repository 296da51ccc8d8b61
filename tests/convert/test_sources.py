"""Opening sources: kinds of folders, hub ids, and settings that a full checkpoint names."""

import json
import time
import types
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError

from convert.foreign import (
    CLIP,
    DINOV2,
    DINOV2_REGISTERS,
    LLAMA,
    QWEN3,
    ROSS,
    SIGLIP,
    TINY,
    VAE,
    component,
    component_state,
    projector_state,
    save,
)
from ross_jax.convert import known, sources
from ross_jax.convert.autoencoder import autoencoder_config
from ross_jax.convert.language import language_config
from ross_jax.convert.sources import SourceError, download, open_source, read_json, resolve_settings
from ross_jax.convert.vision import vision_config

# Kinds.

WHOLE_CLIP = {"model_type": "clip", "vision_config": CLIP}


@pytest.mark.parametrize(
    "settings, files, kind, stems",
    [
        (LLAMA, ["model.safetensors"], "language", ["model"]),
        (QWEN3, ["model.safetensors"], "language", ["model"]),
        (CLIP, ["model.safetensors"], "vision", ["model"]),
        (WHOLE_CLIP, ["model.safetensors"], "vision", ["model"]),
        (SIGLIP, ["model.safetensors"], "vision", ["model"]),
        (DINOV2, ["model.safetensors"], "vision", ["model"]),
        (DINOV2_REGISTERS, ["model.safetensors"], "vision", ["model"]),
        (VAE, ["diffusion_pytorch_model.safetensors"], "autoencoder", ["diffusion_pytorch_model"]),
        # TAESD's repository holds encoder and decoder in files of their own, too.
        (
            TINY,
            ["diffusion_pytorch_model.safetensors", "taesd_decoder.safetensors", "taesd_encoder.safetensors"],
            "autoencoder",
            ["diffusion_pytorch_model"],
        ),
        (ROSS, ["model.safetensors"], "ross", ["model"]),
        (ROSS | {"model_type": "llava_llama"}, ["model.safetensors"], "ross", ["model"]),
        (ROSS | {"model_type": "llava"}, ["model.safetensors"], "ross", ["model"]),
        (None, ["mm_projector.safetensors"], "adapters", ["mm_projector"]),
        (ROSS, ["mm_projector.safetensors"], "adapters", ["mm_projector"]),
        (
            ROSS,
            ["mm_projector.safetensors", "mm_inv_projector.safetensors", "mm_extra.safetensors"],
            "adapters",
            ["mm_projector", "mm_inv_projector"],
        ),
        (ROSS, ["mm_projector.safetensors", "model.safetensors"], "ross", ["model"]),
    ],
)
def test_kinds(settings, files, kind, stems, tmp_path):
    for name in files:
        save(tmp_path, projector_state([2, 2]), settings, Path(name).stem)
    source = open_source(str(tmp_path))
    assert (source.kind, source.settings, source.folder) == (kind, settings or {}, tmp_path)
    assert [next(iter(opened.values())).file.stem for opened in source.files] == stems


def test_adapters_as_safetensors_come_before_torch_files(tmp_path):
    save(tmp_path, projector_state([2, 2]), None, "mm_projector")
    (tmp_path / "mm_projector.bin").write_bytes(b"no torch file")
    assert [next(iter(opened.values())).file.suffix for opened in open_source(str(tmp_path)).files] == [".safetensors"]


def test_the_autoencoder_of_a_pipeline(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    component(tmp_path / "vae", VAE)
    source = open_source(str(tmp_path))
    assert (source.kind, source.folder) == ("autoencoder", tmp_path / "vae")


# Settings that a full checkpoint points to.

FIELD, FLAG = "mm_vision_tower", "--vision-tower"


def resolve(value, checkpoint, given=None):
    return resolve_settings(value, checkpoint, known.VISION_TOWERS, given, FIELD, FLAG)


def test_hub_ids_are_known_offline(tmp_path):
    for name, settings in known.VISION_TOWERS.items():
        assert resolve(name, tmp_path) == (settings, None)
        config = vision_config(settings, "")
        size = name.rsplit("-", 1)[-1]
        assert not size.isdigit() or int(size) == config.image_size
    for name, settings in known.AUTOENCODERS.items():
        found = resolve_settings(name, tmp_path, known.AUTOENCODERS, None, "mm_pixel_decoder", "--autoencoder")
        assert found == (settings, None) and autoencoder_config(settings, "").downsampling == 8
    for settings in known.LANGUAGE_MODELS.values():
        assert language_config(settings["model_type"], settings, "").head_dim in (64, 128)


@pytest.mark.parametrize("place", ["tower", "pipeline/vae"])
def test_paths(place, tmp_path):
    """A path is absolute or relative to the checkpoint's grandparent. A diffusers pipeline stands for its `vae`."""
    folder, checkpoint = tmp_path / place, tmp_path / "run" / "checkpoint"
    component(folder, CLIP)
    checkpoint.mkdir(parents=True)
    named = place.removesuffix("/vae")
    for value in (named, str(tmp_path / named)):
        assert resolve(value, checkpoint) == (CLIP, folder)
    assert resolve("google/siglip-base-patch16-224", checkpoint, given=tmp_path / named) == (CLIP, folder)


def test_a_folder_hides_the_known_hub_id_of_its_name(tmp_path):
    name = "google/siglip-base-patch16-224"
    component(tmp_path / name, CLIP)
    assert resolve(name, tmp_path / "a" / "b") == (CLIP, tmp_path / name)


@pytest.mark.parametrize(
    "value, message",
    [
        ("/home/alice/models/clip", "is '/home/alice/models/clip', which is neither a folder here nor a known hub id"),
        ("models/clip", "is 'models/clip', which is neither"),
        ("/" + "x" * 5000, "is '/xxx"),
        ("a\0b", "which is neither"),
        ("google/siglip-so400m-patch14-385", "did you mean 'google/siglip-so400m-patch14-384'"),
        (None, "is None"),
        (["google/siglip-base-patch16-224"], "which is neither"),
        ("", "is ''"),
    ],
)
def test_settings_that_are_nowhere(value, message, tmp_path):
    with pytest.raises(SourceError, match="mm_vision_tower is ") as caught:
        resolve(value, tmp_path)
    for text in (message, "pass --vision-tower DIR, a folder with its config.json", str(tmp_path / "config.json")):
        assert text in str(caught.value)


def test_a_flag_must_name_a_folder_with_a_config(tmp_path):
    with pytest.raises(SourceError, match=rf"--vision-tower {tmp_path}: no config\.json there"):
        resolve("google/siglip-base-patch16-224", tmp_path, given=tmp_path)


# JSON.


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", r"not valid JSON \(Expecting value: line 1 column 1"),
        (b'{"a": 1,}', "not valid JSON .*line 1 column"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[1]", "expected a JSON object, found list"),
        (b"null", "expected a JSON object, found NoneType"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not valid JSON"),
    ],
)
def test_json_that_is_none(content, message, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(SourceError, match=rf"^{tmp_path}/config\.json: {message}"):
        read_json(tmp_path / "config.json")


def test_json_that_is_not_there(tmp_path):
    with pytest.raises(SourceError, match=r"x\.json: no such file"):
        read_json(tmp_path / "x.json")
    with pytest.raises(SourceError, match="cannot be read"):
        read_json(tmp_path)


# Downloads, with a stand-in for the hub whose repositories are folders.


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Stand-in for the hub. `folder` holds its repositories, `downloaded` lists the requested files."""

    class Hub:
        folder, downloaded = tmp_path / "hub", None

    def model_info(self, repo, timeout):
        if not (Hub.folder / repo).is_dir():
            response = type("Response", (), {"headers": {}, "request": None, "status_code": 404})()
            raise RepositoryNotFoundError(f"404: {repo}\nmore\nlines", response=response)
        files = [path for path in sorted((Hub.folder / repo).rglob("*")) if path.is_file()]
        siblings = [types.SimpleNamespace(rfilename=str(path.relative_to(Hub.folder / repo))) for path in files]
        return types.SimpleNamespace(siblings=siblings)

    def snapshot_download(repo, allow_patterns):
        Hub.downloaded = sorted(allow_patterns)
        return str(Hub.folder / repo)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return Hub


def fill(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


@pytest.mark.parametrize(
    "files, origin, expected",
    [
        (
            ["config.json", "model.safetensors", "pytorch_model.bin", "tf_model.h5", "README.md", "onnx/model.onnx"],
            "owner/name",
            ["config.json", "model.safetensors"],
        ),
        (
            ["config.json", "pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json", "tokenizer.model"],
            "owner/name",
            ["config.json", "pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json", "tokenizer.model"],
        ),
        (
            ["vae/config.json", "vae/diffusion_pytorch_model.safetensors", "vae/x/y.json", "unet/config.json"],
            "owner/name/vae",
            ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"],
        ),
        (
            ["model_index.json", "flux.safetensors", "vae/config.json", "vae/diffusion_pytorch_model.bin"],
            "owner/name",
            ["vae/config.json", "vae/diffusion_pytorch_model.bin"],
        ),
    ],
)
def test_what_is_downloaded(files, origin, expected, hub):
    fill(hub.folder / "owner/name", *files)
    folder = download(origin)
    assert hub.downloaded == expected
    assert folder == hub.folder / "owner/name" / ("vae" if expected[0].startswith("vae/") else "")


def test_a_hub_id_is_opened(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    component(hub.folder / "owner/clip", CLIP)
    source = open_source("owner/clip")
    assert (source.kind, source.origin) == ("vision", "owner/clip")
    component(tmp_path / "owner/clip", SIGLIP)  # a local folder of the same name comes first
    assert open_source("owner/clip").settings == SIGLIP


@pytest.mark.parametrize(
    "error, reason",
    [
        (None, r"\(404: owner/name\)"),
        (OfflineModeIsEnabled("offline mode is enabled"), "offline mode is enabled"),
        (ConnectionError(), r"\(ConnectionError\)"),
        (RuntimeError("of a library below"), "of a library below"),
    ],
)
def test_downloads_that_fail(error, reason, hub, monkeypatch):
    if error:
        monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: (_ for _ in ()).throw(error))
        fill(hub.folder / "owner/name", "config.json")
    with pytest.raises(SourceError, match=rf"^owner/name: no such folder, and the hub .*{reason}.*Give a local folder"):
        open_source("owner/name")


def test_a_folder_that_the_repository_lacks(hub):
    fill(hub.folder / "owner/name", "config.json")
    with pytest.raises(SourceError, match=r"could not be fetched .it has no folder vae/"):
        open_source("owner/name/vae")


def test_offline_is_said_at_once(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    begin = time.monotonic()
    with pytest.raises(SourceError, match=r"owner/name: no such folder, and the hub .*[Oo]ffline.*or go online"):
        open_source("owner/name")
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize("origin", ["/nowhere/at/all", "./owner/name", "a/b/c/d", "name", "../x", "a b/c", "x" * 5000])
def test_what_is_no_hub_id_is_not_asked_for(origin, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # the parent folder has no `x`
    monkeypatch.setattr(sources, "download", lambda _: pytest.fail("asked the hub"))
    with pytest.raises(SourceError, match=r"no such folder|cannot be read"):
        open_source(origin)


def test_extra_files(tmp_path):
    save(tmp_path, component_state(LLAMA), LLAMA)
    travel = ["generation_config.json", "merges.txt", "tokenizer.json", "tokenizer.model", "vocab.tiktoken"]
    stay = ["pytorch_model.bin.index.json", "model.safetensors.index.fp16.json", "trainer_state.json", "run.py", "a.md"]
    for name in travel + stay:
        (tmp_path / name).write_text(json.dumps({}))
    (tmp_path / "folder.json").mkdir()
    assert [path.name for path in open_source(str(tmp_path)).extra_files()] == sorted(travel)
