"""What a folder or file is that import cannot read as it is, and what to do with it."""

from collections.abc import Iterable
from pathlib import Path

from ross_jax.json_text import load_json

LFS_POINTER = b"version https://git-lfs"
"""Beginning of the small text file that stands for a large one in a git repository."""
FETCH = "run `git lfs pull` in its repository"
_DELTAS = ("adapter_model*.safetensors", "adapter_model*.bin", "adapter_config.json", "non_lora_trainables.bin")
_OTHERS = {
    ("zero_to_fp32.py", "global_step*", "*_optim_states.pt"): (
        "holds DeepSpeed's shards, not whole weights; run its zero_to_fp32.py, which writes pytorch_model.bin"
    ),
    ("*.distcp", "pytorch_model_fsdp*"): (
        "holds shards of torch.distributed, not whole weights; merge them with `accelerate merge-weights`"
    ),
    ("mp_rank_*", "iter_*", "latest_checkpointed_iteration.txt"): (
        "is a Megatron checkpoint; convert it to Hugging Face's layout first"
    ),
    ("consolidated.*.pth", "params.json"): (
        "is in Meta's own layout; convert it with transformers' convert_llama_weights_to_hf.py"
    ),
    ("*.gguf", "ggml-*"): "holds quantised weights of llama.cpp; take the repository that they were made of",
    ("*.msgpack", "*.h5", "*.onnx", "*.npz", "*.tflite"): (
        "holds weights for other programs ({found}); take safetensors or PyTorch .bin files of this model"
    ),
    ("*.incomplete", "*.part", "*.crdownload", "*.aria2", "*.tmp"): (
        "holds an unfinished download ({found}); download it again"
    ),
}
"""Names of files -> what a folder with one of them, but without weights that import reads, is."""
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".xz", ".zst", ".7z", ".rar", ".bz2")


def deltas(folder: Path) -> str | None:
    """What is wrong with a folder that holds LoRA deltas or another adapter of peft; None if it holds none."""
    found = _matching(folder, _DELTAS)
    if not found:
        return None
    try:
        settings = load_json(folder / "adapter_config.json")
    except (OSError, ValueError):
        settings = {}
    settings = settings if isinstance(settings, dict) else {}
    kind, base = settings.get("peft_type") or "LoRA", settings.get("base_model_name_or_path")
    kind = "LoRA" if kind == "LORA" else kind
    into = f"their base model {base}" if base else "their base model"
    return (
        f"holds {kind} deltas ({', '.join(found)}), not a whole model; merge them into {into} first "
        "(LLaVA's scripts/merge_lora_weights.py, or merge_and_unload of peft), and import the result. If they are "
        "merged already, remove these files"
    )


def pointers(paths: Iterable[Path]) -> list[str]:
    """Names of the files that are git-lfs pointers."""
    found = []
    for path in paths:
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                found.append(path.name)
    return found


def something_else(folder: Path) -> str | None:
    """What a folder without weights that import reads is; None if that is not known."""
    for patterns, what in _OTHERS.items():
        found = _matching(folder, patterns)
        if found:
            return what.format(found=", ".join(found[:4]))
    inside = sorted(path for path in folder.iterdir() if path.is_dir())
    if (folder / "snapshots").is_dir():  # the hub's cache: models--OWNER--NAME/snapshots/COMMIT
        inside = sorted(path for path in (folder / "snapshots").iterdir() if path.is_dir())
    holding = [str(path) for path in inside if (path / "config.json").is_file()]
    if holding and not (folder / "config.json").is_file():
        several = "one of its subfolders" if len(holding) > 1 else "its subfolder"
        return f"is no checkpoint itself; name {several}: {', '.join(holding[-4:])}"
    return None


def of_file(path: Path) -> str:
    """What to do with a file that was named in place of a folder."""
    if path.suffix.lower() in _ARCHIVES:
        return "is an archive; unpack it, and name the folder that holds config.json"
    return "is a file; name the folder that holds it and its config.json"


def _matching(folder: Path, patterns: Iterable[str]) -> list[str]:
    return sorted({path.name for pattern in patterns for path in folder.glob(pattern)})
