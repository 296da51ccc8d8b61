"""Recognises files that are something else than their place suggests, and says what to do with them."""

_BEGINNINGS: tuple[tuple[tuple[bytes, ...], str], ...] = (
    (
        (b"version https://git-lfs.github.com/spec", b"version https://hawser.github.com/spec"),
        "a git-lfs pointer, not the file itself; fetch it with `git lfs pull`",
    ),
    ((b"\x1f\x8b",), "compressed with gzip; decompress it with `gunzip`"),
    ((b"BZh",), "compressed with bzip2; decompress it with `bunzip2`"),
    ((b"\xfd7zXZ\0",), "compressed with xz; decompress it with `unxz`"),
    ((b"\x28\xb5\x2f\xfd",), "compressed with zstd; decompress it with `unzstd`"),
    ((b"\x04\x22\x4d\x18",), "compressed with lz4; decompress it with `unlz4`"),
    ((b"PK\x03\x04",), "a zip archive; unpack it"),
    ((b"7z\xbc\xaf\x27\x1c",), "a 7z archive; unpack it"),
    ((b"Rar!",), "a rar archive; unpack it"),
    ((b"PAR1",), "a Parquet file; convert it (pandas: read_parquet, then to_json with orient='records', lines=True)"),
    ((b"ARROW1", b"\xff\xff\xff\xff"), "an Arrow file; convert it (datasets: Dataset.from_file, then to_json)"),
    ((b"Obj\x01",), "an Avro file; convert it"),
    ((b"ORC",), "an ORC file; convert it"),
    ((b"SQLite format 3\0",), "an SQLite database; export it"),
    ((b"\x89HDF\r\n",), "an HDF5 file; convert it"),
    ((b"\x93NUMPY",), "a NumPy array; convert it"),
    ((b"\xff\xfe", b"\xfe\xff"), "UTF-16 text; convert it to UTF-8 with `iconv`"),
    ((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"), "a Python pickle; convert it"),
)
_TAR_MARK, _TAR_PLACE = b"ustar", 257


def foreign_format(head: bytes) -> str | None:
    """What a file is, from its first bytes (512 are enough), and what to do: `is a Parquet file; convert it (...)`.

    None: text, or a format that is not known here.
    """
    for beginnings, what in _BEGINNINGS:
        if head.startswith(beginnings):
            return f"is {what}"
    if head[_TAR_PLACE : _TAR_PLACE + len(_TAR_MARK)] == _TAR_MARK:
        return "is a tar archive; unpack it"
    if head.lstrip()[:15].lower().startswith((b"<!doctype html", b"<html")):
        return "is a web page, perhaps a server's error; download the file again"
    return None
