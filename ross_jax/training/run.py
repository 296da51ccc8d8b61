"""A training run from its config: data, parameters, compiled step, checkpoints, loop. The same command continues it."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from ross_jax import checkpoints
from ross_jax.config import ConfigError, UserError, from_dict, to_dict
from ross_jax.data.encoders import build_training_encoder
from ross_jax.data.images import decode, decode_official
from ross_jax.data.pipeline import Pipeline, Preprocessing, open_pipeline
from ross_jax.data.tokenizer import load_tokenizer
from ross_jax.models.ross import RossConfig
from ross_jax.sharding import batch_sharding, make_mesh, process_share, use_mesh
from ross_jax.training import agreement
from ross_jax.training.build import build_step
from ross_jax.training.cached import check_parameters, check_settings, needs_pixels, open_cached, spared_components
from ross_jax.training.loop import Draw, Evaluate, Hook, Stop, global_batches, run_loop
from ross_jax.training.metrics import LossRangeMonitor, Meter, Writer, matrix_sizes
from ross_jax.training.optimizer import warmup_steps
from ross_jax.training.recipe import RunConfig
from ross_jax.training.state import TrainState, Tree, init_components, split
from ross_jax.training.step import make_state
from ross_jax.tree import merge


def open_data(config: RunConfig, mesh: Mesh, rows_per_step: int | None = None, timeout: int = 300) -> Pipeline:
    """The run's batches. Of several processes the first measures and plans, the others read what it cached.

    Raises:
      UserError: data, tokenizer or `config.data.precomputed` that cannot be used; on all processes, if their data or
        tokenizers differ or one did not open its data within `timeout` seconds.
    """
    model, text = config.model, config.text
    tokenizer = load_tokenizer(text.tokenizer)
    if len(tokenizer) > model.language.vocab_size:
        raise ConfigError(
            f"config.text.tokenizer: {len(tokenizer)} ids, but the language model embeds {model.language.vocab_size}"
        )
    encode = build_training_encoder(text.template, tokenizer, text.compat, text_loss=bool(text.weight))
    replicas = mesh.shape["data"] * mesh.shape["fsdp"]
    key = json.dumps([to_dict(text), len(tokenizer)])
    cached = open_cached(config)

    plan = agreement.Turn()

    def opened(fingerprint: str) -> None:
        vocabulary = hashlib.sha256(repr(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
        agreement.agree({"data": fingerprint[:12], "tokenizer": vocabulary[:12]}, timeout)
        plan.wait()

    preprocessing = Preprocessing(
        encode,
        config.images,
        model.vision.num_tokens,
        encode_key=key,
        decode=decode_official if text.compat == "official" else decode,
        precomputed=cached,
        pixels=needs_pixels(config, cached.parts if cached else ()),
    )
    pipeline = open_pipeline(
        config.data,
        preprocessing,
        multiple=replicas * config.step.accumulate,
        rows_per_step=rows_per_step,
        writer=jax.process_index() == 0,
        opened=opened,
    )
    plan.done()
    if cached is not None:
        check_settings(config, cached, pipeline)
    return pipeline


def initial_parameters(config: RunConfig, tree: Tree) -> tuple[Tree, dict[str, Path]]:
    """The parameters before the first step, and the model directory that each component came from.

    Raises:
      UserError: a model directory that cannot be read, or whose component has another config.
    """
    wanted = {name: getattr(config.model, name) for name in tree}
    origins: dict[str, Path] = {}
    for folder in map(Path, config.init):
        manifest = checkpoints.read_manifest(folder)
        theirs = from_dict(RossConfig, manifest["config"], f"{folder}: config")
        for name, ours in wanted.items():
            found = getattr(theirs, name)
            if found is None:
                continue
            if found != ours:
                there, here = to_dict(found), to_dict(ours)
                differences = [
                    f"{field}: {there.get(field)} there, {value} in config.model"
                    for field, value in here.items()
                    if there.get(field) != value
                ]
                raise ConfigError(f"config.init: {folder}: its {name} differs: {'; '.join(differences)}")
            origins[name] = folder
    key = jax.random.fold_in(jax.random.key(config.seed), 0)
    made = init_components(config.model, tree, [name for name in tree if name not in origins], key)
    for folder in dict.fromkeys(origins.values()):
        names = [name for name, origin in origins.items() if origin == folder and tree[name]]
        made |= checkpoints.restore_model(folder, {name: tree[name] for name in names})
    return {name: made.get(name, {}) for name in tree}, origins


class Run:
    """A run's directory and everything that its loop needs.

    Args:
      timeout: seconds that its processes wait for one another while it starts.

    Attributes:
      step: steps done.
      steps: of the whole run.
    """

    def __init__(self, config: RunConfig, folder: Path, timeout: int = 300):
        self.config, self.folder = config, folder
        self.mesh = make_mesh(config.mesh)
        self._check_directory()
        self._checkpoints = checkpoints.RunCheckpoints(folder, config.loop.keep)
        self.step = self._checkpoints.latest() or 0
        recorded = self._read_recorded()
        self.data = open_data(self._with_cache(), self.mesh, recorded.get("rows_per_step"), timeout)
        if recorded.get("data", self.data.hash) != self.data.hash:
            raise UserError(
                f"{folder}: was trained on other data or another packing plan; a run continues only with its own. "
                "Restore the data, or start a new run in another directory"
            )
        self.steps = self.data.steps
        built = build_step(config, self.mesh, self.steps)
        self._optimizer, self.train_step = built.optimizer, built.train_step
        self.shardings = jax.tree.map(lambda leaf: leaf.sharding, built.state)
        if self.step:
            self.state = self._checkpoints.restore(self.step, built.state)
            check_parameters(config, self.data.precomputed, self.state.frozen)
        else:
            self.state = self._first_state(built.tree)

    def _with_cache(self) -> RunConfig:
        """Several processes share the packing plan: if no cache is set, in the run's directory."""
        if jax.process_count() == 1 or self.config.data.cache is not None:
            return self.config
        data = dataclasses.replace(self.config.data, cache=str(self.folder / "cache"))
        return dataclasses.replace(self.config, data=data)

    def _first_state(self, tree: Tree) -> TrainState:
        made, origins = initial_parameters(self.config, tree)
        check_parameters(self.config, self.data.precomputed, made)
        params, frozen = split(made, self.config.freeze)
        make = jax.jit(lambda p, f: make_state(p, f, self._optimizer), out_shardings=self.shardings)
        with use_mesh(self.mesh, self.config.mesh):
            state = make(params, frozen)
        if jax.process_index() == 0:
            with checkpoints.writing(self.folder, self.folder):
                self._write_description(origins)
        self._checkpoints.save_frozen(frozen)
        return state

    def _record(self) -> dict[str, Any]:
        return json.loads(json.dumps(to_dict(self.config)))

    def _check_directory(self) -> None:
        """A directory that holds another run is refused, with what differs."""
        path = self.folder / "run.json"
        if not path.is_file():
            return
        # Frozen, so that a field younger than the run has its default.
        recorded = from_dict(RunConfig, json.loads(path.read_text())["config"], f"{path}: config")
        theirs, ours = flatten_config(to_dict(recorded)), flatten_config(to_dict(self.config))
        free = ("loop.", "evaluation.", "mesh.", "data.workers", "data.threads", "data.prefetch", "data.cache")
        free += ("data.precomputed",)
        differ = [
            f"{name}: {theirs.get(name)!r} there, {ours.get(name)!r} now"
            for name in sorted(theirs.keys() | ours.keys())
            if theirs.get(name) != ours.get(name) and not name.startswith(free)
        ]
        if differ:
            lines = "\n  ".join(differ)
            raise ConfigError(f"{self.folder}: holds a run with another config:\n  {lines}\nUse another directory")

    def _read_recorded(self) -> dict[str, Any]:
        path = self.folder / "run.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    def _write_description(self, origins: dict[str, Path]) -> None:
        """Manifest, config, tokenizer and the files that came with the components: what makes the run a model."""
        foreign: dict[str, Any] = {}
        for name, origin in origins.items():
            manifest = checkpoints.read_manifest(origin)
            foreign[name] = manifest.get("foreign", {}).get(name, {})
            unused = origin / "unused" / f"{name}.safetensors"
            if unused.is_file():
                (self.folder / "unused").mkdir(exist_ok=True)
                shutil.copyfile(unused, self.folder / "unused" / unused.name)
        for origin in dict.fromkeys(origins.values()):
            if (origin / "files").is_dir():
                shutil.copytree(origin / "files", self.folder / "files", dirs_exist_ok=True)
        tokenizer = load_tokenizer(self.config.text.tokenizer)
        tokenizer.save_pretrained(self.folder / "files" / "language")
        settings = {
            "template": self.config.text.template,
            "image_mode": self.config.image_mode,
            "reconstruction": to_dict(self.config.reconstruction),
        }
        checkpoints.write_manifest(self.folder, {"config": to_dict(self.config.model), "foreign": foreign, **settings})
        record = {"config": self._record(), "rows_per_step": self.data.rows_per_step, "data": self.data.hash}
        partial = self.folder / "run.json.partial"
        partial.write_text(json.dumps(record, indent=1) + "\n")
        partial.replace(self.folder / "run.json")

    def train(
        self,
        hooks: tuple[Hook, ...] = (),
        draw: Draw | None = None,
        stop_at: Callable[[int], bool] | None = None,
        evaluate: Evaluate | None = None,
    ) -> int:
        """Runs, or continues, until the end or a signal; returns the number of steps done."""
        config = self.config
        sizes = matrix_sizes(merge(self.state.params, self.state.frozen), logits=bool(config.text.weight))
        spared = spared_components(config, self.data.precomputed.parts if self.data.precomputed else ())
        sizes = {path: size for path, size in sizes.items() if path.partition("/")[0] not in spared}
        kind = config.reconstruction.kind
        draws = config.reconstruction.draws if kind == "denoise" else 0
        meter = Meter(config.model, sizes, set(self.state.params), draws)
        expected, warmup = config.loop.expected_reconstruction, warmup_steps(self.steps, config.optimizer.warmup_ratio)
        watch = LossRangeMonitor(expected, warmup) if expected and kind != "none" else None
        writer = Writer(self.folder, self.step) if jax.process_index() == 0 else None
        share, shares = process_share(self.mesh)
        batches = self.data.batches(self.step, share, shares)
        # Of several processes, JAX's own handler counts: it makes all of them agree on a step.
        stop = Stop() if jax.process_count() == 1 else Stop(())
        try:
            with use_mesh(self.mesh, self.config.mesh):
                self.state, self.step = run_loop(
                    self.train_step,
                    self.state,
                    global_batches(batches, batch_sharding(self.mesh), shares, meter),
                    self.step,
                    self.steps,
                    config.loop,
                    self._checkpoints,
                    meter,
                    writer,
                    watch,
                    hooks,
                    draw,
                    stop_at or self._checkpoints.stop_at(lambda: stop.requested),
                    evaluate,
                )
        finally:
            stop.restore()
            self._checkpoints.wait()
            if writer is not None:
                writer.close()
        return self.step


def flatten_config(config: dict[str, Any]) -> dict[str, Any]:
    """Leaves of a nested config by dotted name; lists count as values."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{inner}": leaf for inner, leaf in flatten_config(value).items()}
        else:
            flat[name] = value
    return flat
