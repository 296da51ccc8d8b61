"""Downloads from the Hugging Face hub, or from a mirror that HF_ENDPOINT names: resumed, and compared with digests."""

import contextlib
import dataclasses
import gzip
import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ross_jax.config import UserError
from ross_jax.console import Progress, say
from ross_jax.prepare.public import Item
from ross_jax.storage import copy_file, is_remote, naming

_PIECE = 16 * 2**20
_TOLD = 10**7
"""Bytes from which a download is told."""
_SUFFIX = ".digest"
"""What a file's digest, as the hub states it, is kept under, once the file was found to have it."""


@dataclasses.dataclass(frozen=True)
class HubFile:
    """A file of a repository.

    Attributes:
      path: inside the repository.
      digest: `sha256:...` of a large file; `git:...`, git's SHA-1 of a blob, of others.
    """

    path: str
    size: int
    digest: str


def list_files(item: Item) -> list[HubFile]:
    """The files of a repository that an item needs.

    Raises:
      UserError: the hub does not answer, refuses, or has none of them.
    """
    from huggingface_hub import HfApi

    with _explained(item):
        listed = HfApi().list_repo_tree(item.repo, item.subfolder or None, recursive=True, repo_type=item.kind)
        files = [each for each in listed if hasattr(each, "blob_id") and item.wants(each.path)]
    if any(each.path.endswith(".safetensors") for each in files):
        files = [each for each in files if not each.path.endswith(".bin")]
    if not files:
        raise UserError(f"{item.repo}: the hub has none of {', '.join(item.patterns)} there")
    return [_describe(each) for each in files]


def _describe(entry: Any) -> HubFile:
    digest = f"sha256:{entry.lfs.sha256}" if entry.lfs else f"git:{entry.blob_id}"
    return HubFile(entry.path, entry.lfs.size if entry.lfs else entry.size, digest)


def fetch(item: Item, file: HubFile, root: Path) -> None:
    """Downloads a file that is not there, goes on with one that was cut off, and compares its digest.

    Where the root lies in a bucket, the file comes to a temporary folder of this machine first, and from its beginning.

    Raises:
      UserError: the hub does not answer or refuses, the disk is full, or what came is damaged.
    """
    target = item.place(root, file.path)
    mark = target.with_name(f".{target.name}{_SUFFIX}")
    if kept(target).is_file() and mark.is_file() and mark.read_text() == file.digest:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_file():
        if digest_of(target, file.digest.partition(":")[0]) != file.digest:
            raise UserError(f"{target}: is not the file that {item.repo} has; remove it to have it downloaded again")
    elif is_remote(root):
        with tempfile.TemporaryDirectory(prefix="ross_jax_") as folder:
            near = item.place(Path(folder), file.path)
            with naming(root, Path(folder)):
                fetch(item, file, Path(folder))
            copy_file(kept(near), kept(target))
    else:
        shutil.move(_download(item, file, root), target)
    if target.name.endswith(".tar.gz") and not is_remote(root):
        _unpack(target)
    mark.write_text(file.digest)


def _download(item: Item, file: HubFile, root: Path) -> Path:
    """A file as the hub has it. The hub's client keeps what came of a file that was cut off, and goes on with it."""
    from huggingface_hub import hf_hub_download

    if file.size >= _TOLD:
        say(f"{item.repo}/{file.path}: {file.size / 1e9:.2f} GB")
    staging = root / ".downloads" / item.repo.replace("/", "--")
    with _explained(item):
        found = Path(hf_hub_download(item.repo, file.path, repo_type=item.kind, local_dir=staging))
    if digest_of(found, file.digest.partition(":")[0]) != file.digest:
        found.unlink()
        raise UserError(f"{item.repo}/{file.path}: what came is damaged, and was removed; start the same command again")
    return found


def kept(path: Path) -> Path:
    """What a downloaded file becomes: a .tar.gz is kept as the .tar in it."""
    return path.with_suffix("") if path.name.endswith(".tar.gz") else path


def digest_of(path: Path, kind: str) -> str:
    """The digest of a file, of a kind that `HubFile` names."""
    size = path.stat().st_size
    digest = hashlib.sha256() if kind == "sha256" else hashlib.sha1(f"blob {size}\0".encode())
    with path.open("rb") as file, Progress(f"comparing {path.name}", size, "bytes") as progress:
        while piece := file.read(_PIECE):
            digest.update(piece)
            progress.update(len(piece))
    return f"{kind}:{digest.hexdigest()}"


def _unpack(archive: Path) -> None:
    """Replaces a .tar.gz by the .tar in it, from which single images can be read."""
    target, size, before = kept(archive), archive.stat().st_size, 0
    partial = target.with_name(f".{target.name}.partial")
    with (
        Progress(f"decompressing {archive.name}", size, "bytes") as progress,
        archive.open("rb") as packed,
        gzip.open(packed) as source,
        partial.open("wb") as out,
    ):
        while piece := source.read(_PIECE):
            out.write(piece)
            progress.update(packed.tell() - before)
            before = packed.tell()
    partial.replace(target)
    archive.unlink()


@contextlib.contextmanager
def _explained(item: Item) -> Iterator[None]:
    """Turns what the hub's client raises into one line that says what to do."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        yield
    except (GatedRepoError, RepositoryNotFoundError) as error:
        raise UserError(
            f"{item.repo}: the hub refuses it. Accept its terms at https://huggingface.co/{item.repo}, and log in with "
            "`hf auth login` or HF_TOKEN"
        ) from error
    except Exception as error:  # the hub's HTTP library raises errors of many kinds
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0][:300]
        raise UserError(f"{item.repo}: cannot be downloaded ({reason}); the same command goes on") from error
