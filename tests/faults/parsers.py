"""What is fuzzed: each parser with a sound input, and the damage that its files can take.

A parser's input is a folder. `make` writes a sound one; `parse` reads it as the product does.
"""

import dataclasses
import gzip
import io
import json
import lzma
import random
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

GOLDEN = Path(__file__).parents[1] / "golden" / "siglip_qwen2"

Make = Callable[[Path], None]
Parse = Callable[[Path, random.Random], None]


@dataclasses.dataclass(frozen=True)
class Parser:
    """One parser of user input.

    Attributes:
      make: writes a sound input into a folder.
      parse: reads it. May raise UserError alone.
      kinds: pattern of the files that are damaged -> kind of damage, see `mutations`. The last that fits counts.
      weight: share of the inputs of its group.
    """

    make: Make
    parse: Parse
    kinds: dict[str, str]
    weight: float = 1.0


RECORDS = [
    {
        "id": f"r{i}",
        "image": f"{i}.png",
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A thing."}],
    }
    for i in range(3)
]


def _picture(size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))


def _encoded(kind: str, mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    _picture().convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def _make_records(folder: Path) -> None:
    (folder / "data.json").write_text(json.dumps(RECORDS, indent=1))
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    for i in range(3):
        _picture().save(folder / f"{i}.png")


def _parse_records(folder: Path, rng: random.Random) -> None:
    from ross_jax.config import UserError
    from ross_jax.data.encoders import build_encoder
    from ross_jax.data.sources import SourceConfig, open_source, report_fields
    from tokenizer_fixtures import byte_level_tokenizer

    template = rng.choice(("plain", "v1", "qwen_2", "llama3", "chatml"))
    encode = build_encoder(template, byte_level_tokenizer(), rng.choice(("default", "official")))
    for name in ("data.json", "data.jsonl"):
        source = open_source(SourceConfig(str(folder / name), images=(str(folder),)))
        for i in range(min(len(source), 20)):
            try:
                sample = source[i]
                encode(sample.record)
                for image in sample.images:
                    image.read()
            except UserError:
                continue
        report_fields(source, 1.0)


def _make_archives(folder: Path) -> None:
    members = {f"{i}/{i}.png": _encoded("PNG") for i in range(3)}
    for number, method in enumerate((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)):
        with zipfile.ZipFile(folder / f"{number}.zip", "w", method) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
    for number, form in enumerate((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        with tarfile.open(folder / f"{number}.tar", "w", format=form) as archive:
            for name, content in members.items():
                member = tarfile.TarInfo("a" * 120 + name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
            link = tarfile.TarInfo("link.png")
            link.type, link.linkname = tarfile.SYMTYPE, "0/0.png"
            archive.addfile(link)
    plain = (folder / "0.tar").read_bytes()
    (folder / "0.tar.gz").write_bytes(gzip.compress(plain))
    (folder / "0.tar.xz").write_bytes(lzma.compress(plain))


def _parse_archives(folder: Path, rng: random.Random) -> None:
    from ross_jax.config import UserError
    from ross_jax.data.archives import open_store

    for path in folder.iterdir():
        try:
            store = open_store(path)
        except UserError:
            continue
        for name in [*store.names(), "link.png", "a" * 300, "\0", "\ud800", "é/0.png"]:
            if name in store:
                try:
                    store.read(name)
                except UserError:
                    continue


def _make_images(folder: Path) -> None:
    for name, kind, mode, options in (
        ("a.jpg", "JPEG", "RGB", {"exif": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\1\3\0\1\0\0\0\6\0\0\0\0\0\0\0"}),
        ("b.jpg", "JPEG", "CMYK", {"progressive": True}),
        ("a.png", "PNG", "RGBA", {}),
        ("b.png", "PNG", "P", {}),
        ("a.webp", "WEBP", "RGBA", {}),
        ("a.gif", "GIF", "P", {}),
        ("a.tif", "TIFF", "RGB", {}),
        ("b.tif", "TIFF", "L", {"compression": "tiff_lzw"}),
        ("a.bmp", "BMP", "RGB", {}),
        ("a.ppm", "PPM", "RGB", {}),
        ("a.jp2", "JPEG2000", "RGB", {}),
        ("a.ico", "ICO", "RGBA", {}),
        ("a.tga", "TGA", "RGB", {"compression": "tga_rle"}),
        ("a.dds", "DDS", "RGBA", {}),
    ):
        (folder / name).write_bytes(_encoded(kind, mode, **options))
    Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40)).save(folder / "c.png")


def _parse_images(folder: Path, rng: random.Random) -> None:
    from ross_jax.data.images import ImageConfig, decode, decode_official, preprocess

    decoder, mode = rng.choice((decode, decode, decode_official)), rng.choice(("pad", "square", "crop"))
    for path in folder.iterdir():
        image = decoder(path.read_bytes(), path.name)
        preprocess(image, ImageConfig(28, mode=mode, shortest_edge=rng.choice((None, 28))), path.name)


def _make_tokenizer(folder: Path) -> None:
    from tokenizer_fixtures import byte_level_tokenizer

    byte_level_tokenizer().save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {}, "chat_template": None}))
    special = {"eos_token": "</s>", "unk_token": {"content": "<unk>"}}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "added_tokens.json").write_text(json.dumps({"<extra>": 400}))


def _make_sentencepiece(folder: Path) -> None:
    import sentencepiece

    model = io.BytesIO()
    sentences = iter(["the cat sat on the mat", "a cat and a dog", "naïve café"] * 20)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences,
        model_writer=model,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": False}))


def _make_vocabulary(folder: Path) -> None:
    from tokenizer_fixtures import byte_level_tokenizer

    model = json.loads(byte_level_tokenizer().backend_tokenizer.to_str())["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}))


def _parse_tokenizer(folder: Path, rng: random.Random) -> None:
    from ross_jax.data.tokenizer import TextEncoder, fingerprint, load_tokenizer

    tokenizer = load_tokenizer(folder)
    fingerprint(tokenizer)
    encoder = TextEncoder(tokenizer)
    np.array(encoder.encode("a cat <image> </s> 中", continues=rng.random() < 0.5), np.int32)


def _parse_template(folder: Path, rng: random.Random) -> None:
    from ross_jax.data.encoders import build_encoder
    from ross_jax.data.tokenizer import load_tokenizer

    build_encoder("chatml", load_tokenizer(folder))(RECORDS[0])


def _make_checkpoint(folder: Path) -> None:
    for name in ("llm", "vision_tower", "vae", "checkpoint"):
        shutil.copytree(GOLDEN / name, folder / name)
    (folder / "llm" / "adapter_note.json").write_text("{}")


def _parse_checkpoint(folder: Path, rng: random.Random) -> None:
    from ross_jax.config import UserError
    from ross_jax.convert.generation import end_ids
    from ross_jax.convert.importing import plan_import

    towers = {"vision_tower": folder / "vision_tower", "autoencoder_folder": folder / "vae"}
    for names, options in ((["llm", "vision_tower"], {}), (["vae"], {}), (["checkpoint"], towers)):
        try:
            for name in names:
                end_ids(folder / name)
            plan_import([str(folder / name) for name in names], **options).close()
        except UserError:
            continue


def _make_tensors(folder: Path) -> None:
    import ml_dtypes
    from safetensors.numpy import save_file

    from convert.torch_zip import save

    rng = np.random.default_rng(0)
    arrays = {f"layers.{i}.weight": rng.normal(size=(3, 4)).astype(ml_dtypes.bfloat16) for i in range(3)}
    arrays["norm"] = np.ones(5, np.float32)
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    save(folder / "pytorch_model.bin", arrays)
    save_file({"norm": arrays["norm"]}, folder / "part.safetensors")
    index = {"weight_map": {"norm": "part.safetensors"}}
    (folder / "x.safetensors.index.json").write_text(json.dumps(index))


def _parse_tensors(folder: Path, rng: random.Random) -> None:
    from ross_jax.config import UserError
    from ross_jax.convert.tensors import open_tensors

    for path in folder.iterdir():
        try:
            with open_tensors(path) as files:
                for key in files:
                    files.read(key)
        except UserError:
            continue


def _make_pickle(folder: Path) -> None:
    """The pickle of a state dict alone, so that damage reaches it: `_parse_pickle` packs it as torch does."""
    _make_tensors(folder)
    with zipfile.ZipFile(folder / "pytorch_model.bin") as archive:
        content = archive.read("archive/data.pkl")
    for path in folder.iterdir():
        path.unlink()
    (folder / "data.pkl").write_bytes(content)


def _parse_pickle(folder: Path, rng: random.Random) -> None:
    from ross_jax.convert.tensors import open_tensors

    packed = folder.parent / "packed.bin"
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("archive/data.pkl", (folder / "data.pkl").read_bytes())
        for number in range(4):
            archive.writestr(f"archive/data/{number}", bytes(24))
    with open_tensors(packed) as files:
        for key in files:
            files.read(key)


def _make_model(folder: Path) -> None:
    from tiny_model import write_model

    write_model(folder)


def _parse_model(folder: Path, rng: random.Random) -> None:
    from ross_jax.inference.model import load

    load(folder, components=("language",))


FLAGS = (
    "model.language.num_layers=3",
    "freeze.trainable=('language/.*',)",
    "data.sources=({'path': 'x.json', 'kind': 'llava'},)",
    "optimizer.groups=(('language/.*', 1e-3),)",
    "mesh.rules=(('vocab', ()),)",
    "optimizer.learning_rate=1e-3",
    "reconstruction.kind=denoise",
    "data.cache=None",
    "seed=1",
)


def _make_run(folder: Path) -> None:
    from launcher import write_recipe
    from ross_jax.command_line import load_recipe
    from ross_jax.config import to_dict

    config = load_recipe(str(write_recipe(folder)))
    (folder / "run.json").write_text(json.dumps({"config": to_dict(config), "rows_per_step": 4}))
    (folder / "flags.txt").write_text("\n".join(f"--config.{flag}" for flag in FLAGS))


def _parse_recipe(folder: Path, rng: random.Random) -> None:
    from ross_jax.command_line import load_recipe

    flags = (folder / "flags.txt").read_bytes().decode("utf-8", "surrogateescape")
    longest = 2**17 - 1  # characters of an argument that Linux passes on to a program
    load_recipe(str(folder / "recipe.py"), [flag[:longest] for flag in flags.splitlines()])


def _parse_run(folder: Path, rng: random.Random) -> None:
    from ross_jax.config import UserError, from_dict
    from ross_jax.json_text import load_json
    from ross_jax.training.recipe import RunConfig
    from ross_jax.upgrade import upgrade

    try:
        record = load_json(folder / "run.json")
    except ValueError as error:
        raise UserError(str(error)) from error
    if isinstance(record, dict):
        from_dict(RunConfig, upgrade("run.json", record).get("config"), "run.json: config")


GROUPS: dict[str, dict[str, Parser]] = {
    "data": {
        "records": Parser(_make_records, _parse_records, {"*.json*": "json"}, 1.0),
        "archives": Parser(_make_archives, _parse_archives, {"*": "bytes", "*.tar": "tar"}, 2.0),
        "images": Parser(_make_images, _parse_images, {"*": "bytes", "*.png": "png"}, 2.0),
    },
    "tokenizers": {
        "tokenizer": Parser(_make_tokenizer, _parse_tokenizer, {"*.json": "json"}, 2.0),
        "sentencepiece": Parser(_make_sentencepiece, _parse_tokenizer, {"*.model": "bytes", "*.json": "json"}),
        "vocabulary": Parser(_make_vocabulary, _parse_tokenizer, {"*.json": "json", "*.txt": "bytes"}),
        "template": Parser(_make_tokenizer, _parse_template, {"*.jinja": "jinja"}),
    },
    "checkpoints": {
        "config": Parser(_make_checkpoint, _parse_checkpoint, {"*/*.json": "json"}),
        "tensors": Parser(_make_tensors, _parse_tensors, {"*": "bytes", "*.safetensors": "safetensors"}, 2.0),
        "pickle": Parser(_make_pickle, _parse_pickle, {"*.pkl": "pickle"}, 4.0),
        "model": Parser(_make_model, _parse_model, {"ross_jax.json": "json"}, 0.1),
    },
    "recipes": {
        "recipe": Parser(_make_run, _parse_recipe, {"recipe.py": "bytes", "flags.txt": "bytes"}),
        "run": Parser(_make_run, _parse_run, {"run.json": "json"}),
    },
}
"""Group -> name -> parser. The parsers of a group share a process, because importing what they need takes seconds."""
