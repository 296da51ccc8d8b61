"""Adapters of peft: low-rank updates, under the names of the model that they extend.

adapter_config.json          rank, alpha and what else peft needs to make the adapter's modules
adapter_model.safetensors    base_model.model.MODULE.lora_A.weight [rank, inputs], ...lora_B.weight [outputs, rank]

A projector that trained in full travels with the adapter, as one of peft's `modules_to_save`.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save

from ross_jax import checkpoints
from ross_jax.checkpoints import StreamedLeaf
from ross_jax.config import UserError
from ross_jax.convert import language, projector
from ross_jax.convert.exporting import read_config
from ross_jax.convert.importing import Plan, fill, is_finite
from ross_jax.convert.mapping import ConversionError
from ross_jax.convert.settings import Settings
from ross_jax.convert.sources import read_json
from ross_jax.convert.tensors import TensorFiles
from ross_jax.directories import complete_directory, write_sums
from ross_jax.lora import factors_of, is_factor, updated_kernels
from ross_jax.models.ross import RossConfig
from ross_jax.storage import copy_file, copy_tree, location
from ross_jax.tree import flatten, unflatten

Progress = Callable[[str], None]

SETTINGS = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_BESIDE = "non_lora_trainables.bin"
"""File of the first LLaVA code with what trained in full beside an adapter."""
_ROOT = "base_model.model."


@dataclasses.dataclass(frozen=True)
class Base:
    """Names of modules in a class of models that adapters extend.

    Attributes:
      language: what stands before `layers.0.self_attn.q_proj`.
      projector: name of the projector; None if there is none.
      linear: (number of a linear layer, their count) -> its name behind that of the projector.
      task: peft's name of the task.
    """

    language: str
    projector: str | None = None
    linear: Callable[[int, int], str] = lambda i, count: f".linear_{i + 1}"
    task: str | None = None


def _original(i: int, count: int) -> str:
    return f".{2 * i}" if count > 1 else ""


BASES = {
    "language": Base("model.", task="CAUSAL_LM"),
    "llava": Base("model.language_model.", "model.multi_modal_projector"),
    "original-llava": Base("model.", "model.mm_projector", _original, "CAUSAL_LM"),
    "llava-4": Base("language_model.model.", "multi_modal_projector"),
}
"""Name -> base: a language model alone, LLaVA of transformers 5, of the first LLaVA code, of transformers 4."""
EXPORTED = ("llava", "language", "original-llava")

_REQUIRED = {"peft_type": ("LORA",), "fan_in_fan_out": (False,), "bias": ("none",)}
_REQUIRED |= {"init_lora_weights": (True, False, "gaussian", "eva", "orthogonal")}
"""Field -> values that are supported. Other initial values change the base's own weights."""
_READ = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "modules_to_save"}
_SILENT = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("target_modules", "exclude_modules", "lora_dropout", "layers_to_transform", "layers_pattern", "eva_config"),
    *("megatron_config", "megatron_core", "qalora_group_size", "ensure_weight_tying", "runtime_config"),
}
"""Fields that say nothing about what is computed, or what the tensors say, too."""
_PATTERN = re.compile(r"[\w.\\^$-]*(?:(?:\.\*|\\d\+)[\w.\\^$-]*){0,3}")
"""Patterns of names that are followed. Others could take forever to match."""


def is_adapter(origin: str | Path) -> bool:
    """Whether a folder holds an adapter of peft and no whole model."""
    folder = location(origin)
    with contextlib.suppress(OSError):
        whole = [*folder.glob("model*.safetensors"), *folder.glob("pytorch_model*.bin")]
        return (folder / SETTINGS).is_file() and any((folder / name).is_file() for name in _WEIGHTS) and not whole
    return False


def _modules(config: RossConfig, base: Base) -> dict[str, tuple[str, int | None]]:
    """Module of the base -> path of our kernel, and its layer where layers are stacked."""
    found: dict[str, tuple[str, int | None]] = {}
    for row in language.table(config.language).rows if config.language else ():
        if row.path.endswith("/kernel"):
            name = base.language + row.hf_key.removeprefix("model.").removesuffix(".weight")
            layers = range(config.language.num_layers)
            found |= {name.format(layer): (f"language/{row.path}", layer) for layer in layers}
    return found | {module: (f"projector/linear_{i}/kernel", None) for i, module in enumerate(_linears(config, base))}


def _linears(config: RossConfig, base: Base) -> list[str]:
    """The projector's linear layers."""
    if base.projector is None or config.projector is None or config.projector.kind != "mlp":
        return []
    return [base.projector + base.linear(i, config.projector.depth) for i in range(config.projector.depth)]


def _projector_tensors(config: RossConfig, base: Base) -> dict[str, tuple[str, Any]]:
    """Key of each tensor of the projector -> path of our parameter, and the transform between them."""
    found = {}
    for i, module in enumerate(_linears(config, base)):
        for row in projector.table(config.projector).rows:
            if row.path.startswith(f"linear_{i}/"):
                found[f"{module}.{row.hf_key.rpartition('.')[2]}"] = (f"projector/{row.path}", row.transform)
    return found


# Export.


def export_adapter(model: Path, output: Path, base: str = "llava", progress: Progress = lambda line: None) -> None:
    """Writes the low-rank updates of a model directory as an adapter of peft, completely or not at all.

    Args:
      base: name of the `BASES` that the adapter extends.

    Raises:
      UserError: there are no updates, or the base has no place for one of them.
    """
    config, names = read_config(model), BASES[base]
    stored = flatten(checkpoints.model_abstract(model, factors=True))
    kernels = updated_kernels(stored)
    if not kernels:
        raise UserError(f"{model}: has no low-rank updates, so there is no adapter to export; export the whole model")
    modules: dict[str, dict[str, Any]] = {}
    by_kernel = collections.defaultdict(list)
    for module, (kernel, layer) in _modules(config, names).items():
        by_kernel[kernel].append((module, layer))
    homeless = [kernel for kernel in kernels if kernel not in by_kernel]
    if homeless:
        raise UserError(f"{model}: the base {base!r} has no {', '.join(homeless)}; choose another --base")
    last = flatten(checkpoints.abstract(checkpoints.parameter_folders(model)[-1]))
    whole = [path for path in last if path.startswith("projector/") and not is_factor(path)]
    saved = _projector_tensors(config, names) if whole and "projector/linear_0/kernel" not in kernels else {}
    if whole and not saved:
        progress(f"warning: the projector trained, too, and has no place in the base {base!r}")
    asked = [*(path for path in stored if is_factor(path)), *(path for path, _ in saved.values())]
    leaves = {path: jax.ShapeDtypeStruct(stored[path].shape, np.float32) for path in asked}
    leaves = flatten(checkpoints.restore_model(model, unflatten(leaves)))
    tensors = {}
    for kernel in kernels:
        a, b, scale = (leaves[path] for path in factors_of(kernel))
        for module, layer in by_kernel[kernel]:
            one = (a, b, scale) if layer is None else (a[layer], b[layer], scale[layer])
            if not one[2]:
                continue
            rank = _used_rank(*one[:2])
            tensors[f"{_ROOT}{module}.lora_A.weight"] = np.ascontiguousarray(one[0][:, :rank].T)
            tensors[f"{_ROOT}{module}.lora_B.weight"] = np.ascontiguousarray(one[1][:rank].T)
            modules[module] = {"rank": rank, "alpha": float(f"{one[2] * rank:.6g}")}
    for key, (path, transform) in saved.items():
        tensors[_ROOT + key] = np.ascontiguousarray(transform.to_hf(leaves[path]))
    settings = _settings(modules, names, [names.projector.rpartition(".")[2]] if saved and names.projector else None)
    if base == "language":
        manifest = checkpoints.read_manifest(model)
        settings["base_model_name_or_path"] = manifest.get("foreign", {}).get("language", {}).get("origin")
    with complete_directory(output) as folder:
        (folder / _WEIGHTS[0]).write_bytes(save(tensors, {"format": "pt"}))
        (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")
        write_sums(folder, folder.iterdir())


def _used_rank(a: np.ndarray, b: np.ndarray) -> int:
    """Rank without the zeros that fill factors up to the largest rank of a stack."""
    used = np.flatnonzero(a.any(0) | b.any(1))
    return int(used[-1]) + 1 if used.size else 1


def _settings(modules: Mapping[str, Mapping[str, Any]], base: Base, whole: list[str] | None) -> dict[str, Any]:
    """adapter_config.json. Modules that differ from most have entries of their own in its patterns."""
    rank, alpha = (_most_common(each[name] for each in modules.values()) for name in ("rank", "alpha"))
    names = "|".join(sorted({re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(module)) for module in modules}))
    return {
        "peft_type": "LORA",
        "task_type": base.task,
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": f"({names})",
        "rank_pattern": {name: each["rank"] for name, each in modules.items() if each["rank"] != rank},
        "alpha_pattern": {name: each["alpha"] for name, each in modules.items() if each["alpha"] != alpha},
        "modules_to_save": whole,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _most_common(values: Iterable[Any]) -> Any:
    return collections.Counter(values).most_common(1)[0][0]


# Import.


def import_adapter(adapter: Path, base: Path | Plan, output: Path, progress: Progress = lambda line: None) -> None:
    """Writes a model directory of a base and an adapter of peft, completely or not at all.

    Args:
      base: a model directory, or a run's; or what `plan_import` has planned.

    Raises:
      UserError: an adapter that is not supported or does not fit the base; lists everything that does not fit.
    """
    with complete_directory(output) as folder:
        if isinstance(base, Path):
            _copy_model(base, folder)
        else:
            fill(base, folder, progress)
        leaves = _read_adapter(adapter, base, folder)
        streamed = {path: StreamedLeaf(x.shape, x.dtype, functools.partial(_whole, x)) for path, x in leaves.items()}
        checkpoints.save_streamed(folder / checkpoints.UPDATES, unflatten(streamed))


def _whole(values: np.ndarray):
    return iter([(None, values)])


def _copy_model(model: Path, folder: Path) -> None:
    """Copies a model directory; of a run, the parameters of its latest step."""
    checkpoints.read_manifest(model, unused=True)
    for path in checkpoints.parameter_folders(model):
        copy_tree(path, folder / path.relative_to(model).as_posix())
    for name in ("files", "unused"):
        if (model / name).is_dir():
            copy_tree(model / name, folder / name)
    for name in (checkpoints.MANIFEST, "SHA256SUMS"):
        if (model / name).is_file():
            copy_file(model / name, folder / name)


def _read_adapter(adapter: Path, base: Any, model: Path) -> dict[str, np.ndarray]:
    """Factors, and a projector that trained in full: path -> values."""
    config = read_config(base) if isinstance(base, Path) else base.config
    stored = flatten(checkpoints.model_abstract(model, factors=True))
    if updated_kernels(stored):
        raise UserError(
            f"{base}: has low-rank updates already; merge them first: launch/convert.py export, then import"
        )
    read = Settings(read_json(adapter / SETTINGS), str(adapter / SETTINGS))
    rank_of, scale_of = _read_settings(read)
    paths = [next(adapter / name for name in _WEIGHTS if (adapter / name).is_file())]
    paths += [adapter / _BESIDE] if (adapter / _BESIDE).is_file() else []
    with TensorFiles(paths) as files:
        names = _find_base(config, files)
        modules, saved = _modules(config, names), _projector_tensors(config, names)
        problems, factors, leaves = [], collections.defaultdict(dict), {}
        for key in files:
            found = re.fullmatch(r"(.+)\.lora_([AB])(?:\.default)?\.weight", key.removeprefix(_ROOT))
            plain = re.sub(r"\.modules_to_save(\.default)?(?=\.)", "", key.removeprefix(_ROOT))
            if found and found[1] in modules:
                factors[found[1]][found[2]] = _read_tensor(files, key, problems)
            elif plain in saved:
                path, transform = saved[plain]
                leaves[path] = np.ascontiguousarray(transform.from_hf(_read_tensor(files, key, problems)))
                _compare(key, leaves[path].shape, stored[path].shape, problems)
            else:
                problems.append(f"unmapped: {key}, shape {list(files[key].shape)}")
    stacks: dict[str, dict[int | None, tuple[np.ndarray, np.ndarray, float]]] = collections.defaultdict(dict)
    for module, pair in factors.items():
        kernel, layer = modules[module]
        if len(pair) < 2:
            problems.append(f"{module}: has lora_{next(iter(pair))} alone")
            continue
        inputs, outputs = stored[kernel].shape[-2:]
        rank = rank_of(module)
        before = len(problems)
        _compare(f"{module}.lora_A", pair["A"].shape, (rank, inputs), problems)
        _compare(f"{module}.lora_B", pair["B"].shape, (outputs, rank), problems)
        if len(problems) == before:
            stacks[kernel][layer] = (pair["A"].T, pair["B"].T, scale_of(module))
    read.check()
    if not factors:
        problems.append("it has no low-rank update of a module of the base")
    if problems:
        raise ConversionError(f"{adapter}: does not fit {model.name.strip('.').removesuffix('.incomplete')}", problems)
    for kernel, found in stacks.items():
        leaves |= _stack(kernel, stored[kernel].shape, found)
    return leaves


def _stack(kernel: str, shape: tuple[int, ...], found: Mapping[int | None, Any]) -> dict[str, np.ndarray]:
    """A kernel's factors. Zeros fill lower ranks, and layers without an update, whose scale is 0, too."""
    *layers, inputs, outputs = shape
    rank = max(a.shape[1] for a, _, _ in found.values())
    a, b = np.zeros((*layers, inputs, rank), np.float32), np.zeros((*layers, rank, outputs), np.float32)
    scale = np.zeros(layers, np.float32)
    for layer, (one, other, factor) in found.items():
        at = () if layer is None else (layer,)
        a[(*at, slice(None), slice(one.shape[1]))] = one
        b[(*at, slice(other.shape[0]))] = other
        scale[at] = factor
    return dict(zip(factors_of(kernel), (a, b, scale), strict=True))


def _find_base(config: RossConfig, keys: Iterable[str]) -> Base:
    """The base whose names most of the keys have."""
    modules = {key.removeprefix(_ROOT).partition(".lora_")[0] for key in keys}
    return max(BASES.values(), key=lambda base: len(modules & set(_modules(config, base))))


def _read_settings(read: Settings) -> tuple[Callable[[str], int], Callable[[str], float]]:
    """Functions: module -> rank, and module -> factor of the update. Problems are noted in `read`."""
    for name, accepted in _REQUIRED.items():
        read.only(name, *accepted)
    for name, value in read.values.items():
        if name not in _READ | _SILENT | set(_REQUIRED) and value:
            read.refuse(name, "null or false")
    if read.values.get("modules_to_save"):
        names = {base.projector.rpartition(".")[2] for base in BASES.values() if base.projector}
        if set(read.texts("modules_to_save", (), 100)) - names:
            read.refuse("modules_to_save", f"the projector, {' or '.join(sorted(names))}")
    rank, alpha, rooted = read.size("r"), read.number("lora_alpha"), read.flag("use_rslora")
    ranks, alphas = read.inner("rank_pattern"), read.inner("alpha_pattern")
    ranks = _patterns(ranks, {name: ranks.size(name) for name in ranks.values})
    alphas = _patterns(alphas, {name: alphas.number(name) for name in alphas.values})

    def rank_of(module: str) -> int:
        return _lookup(ranks, module, rank)

    def scale_of(module: str) -> float:
        return _lookup(alphas, module, alpha) / (math.sqrt(rank_of(module)) if rooted else rank_of(module))

    return rank_of, scale_of


def _patterns(read: Settings, values: dict[str, Any]) -> dict[str, Any]:
    """The entries whose names are patterns that import can follow. Every other name is noted as a problem."""
    for name in list(values):
        problem = not _PATTERN.fullmatch(name)
        with contextlib.suppress(re.error):
            re.compile(name)
            if not problem:
                continue
        read.refuse(name, "a module's name, or a pattern with .* and \\d+ alone")
        del values[name]
    return values


def _lookup(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that ends the module's name, as in peft."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _read_tensor(files: TensorFiles, key: str, problems: list[str]) -> np.ndarray:
    values = files.read(key)
    if not is_finite(values):
        problems.append(f"{key}: has values that are not finite")
    return values.astype(np.float32)


def _compare(name: str, found: tuple[int, ...], expected: tuple[int, ...], problems: list[str]) -> None:
    if tuple(found) != tuple(expected):
        problems.append(f"wrong shape: {name}, expected {list(expected)}, found {list(found)}")
