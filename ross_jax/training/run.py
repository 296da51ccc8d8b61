"""A training run from its config: data, parameters, compiled step, checkpoints, loop. The same command continues it."""

import contextlib
import dataclasses
import functools
import logging
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ross_jax import checkpoints
from ross_jax.config import ConfigError, UserError, from_dict, to_dict
from ross_jax.console import working
from ross_jax.data.pipeline import Pipeline, open_pipeline
from ross_jax.data.records import Version
from ross_jax.data.sources import source_names
from ross_jax.data.tokenizer import check_fingerprint, fingerprint, load_tokenizer, save_tokenizer
from ross_jax.directories import lock
from ross_jax.lora import is_factor
from ross_jax.models.ross import RossConfig
from ross_jax.objectives.reconstruction import make_objective
from ross_jax.run_checkpoints import RunCheckpoints
from ross_jax.sharding import batch_sharding, make_mesh, process_share, use_mesh
from ross_jax.storage import copy_file, copy_tree, location
from ross_jax.training import agreement, banner
from ross_jax.training.build import StepProgram, build_step
from ross_jax.training.cached import check_parameters, check_settings, open_cached, spared_components
from ross_jax.training.callback import Callback
from ross_jax.training.goodput import Clock, Log
from ross_jax.training.loop import LoopSettings, global_batches, run_loop, stop_signals
from ross_jax.training.metrics import LossRangeMonitor, Meter, Reporter, Writer, matrix_sizes
from ross_jax.training.optimizer import warmup_steps
from ross_jax.training.origin import Origin, at_step, recorded_origin, refuse_random
from ross_jax.training.preprocessing import make_preprocessing
from ross_jax.training.recipe import RunConfig
from ross_jax.training.record import RECORD, read_record, recorded_config, write_record
from ross_jax.training.state import TrainState, Tree, init_components, init_factors, split
from ross_jax.training.step import make_state
from ross_jax.training.wandb import WandbRun
from ross_jax.tree import flatten, merge, unflatten

logger = logging.getLogger(__name__)

_GO_ON = "continue on it as it is now with --accept_changed_data, or start a new run in another directory"


@dataclasses.dataclass(frozen=True)
class Known:
    """What a run that continues knows of its data. The defaults are those of a new run.

    Attributes:
      rows_per_step: rows of a step, of all processes.
      sources: the sources as they were; empty for runs that did not record them.
      tokenizer: the tokenizer's `fingerprint`; None for runs that did not record it.
      accept_changed: whether the sources may have changed since.
    """

    rows_per_step: int | None = None
    sources: tuple[Version, ...] = ()
    tokenizer: Mapping[str, str] | None = None
    accept_changed: bool = False


def open_data(config: RunConfig, mesh: Mesh, known: Known = Known(), timeout: int = 300) -> Pipeline:
    """The run's batches. Of several processes, process 0 measures and plans, and the others read what it cached.

    Args:
      known: what the run that continues knows of its data.
      timeout: seconds within which all processes must have opened their data.

    Raises:
      UserError: data, tokenizer or `config.data.precomputed` cannot be used, or the data has changed. On all processes:
        their data or tokenizers differ, or one of them was late.
    """
    tokenizer = load_tokenizer(config.text.tokenizer)
    check_fingerprint(tokenizer, known.tokenizer, f"config.text.tokenizer {config.text.tokenizer}")
    replicas = mesh.shape["data"] * mesh.shape["fsdp"]
    cached = open_cached(config)
    preprocessing = make_preprocessing(config, tokenizer, cached)

    def opened(data: str, versions: Sequence[Version]) -> None:
        hashes = fingerprint(tokenizer)
        agreement.agree({"data": data[:12], "tokenizer": hashes["vocabulary"][:6] + hashes["probe"][:6]}, timeout)
        _check_unchanged(known, versions)
        if jax.process_index() > 0:
            agreement.barrier()  # process 0 arrives when lengths and plans are in the cache

    pipeline = open_pipeline(
        config.data,
        preprocessing,
        multiple=replicas * config.step.accumulate,
        rows_per_step=known.rows_per_step,
        writer=jax.process_index() == 0,
        known=known.sources,
        opened=opened,
    )
    if jax.process_index() == 0:
        agreement.barrier()
    if cached is not None:
        check_settings(config, cached, pipeline)
    return pipeline


def _check_unchanged(known: Known, versions: Sequence[Version]) -> None:
    """Raises UserError, with what changed, if sources are not as the run knows them; warns if that is accepted."""
    changes = [change for before, now in zip(known.sources, versions, strict=False) if (change := before.changes(now))]
    if changes:
        listed = "the data has changed since the run began:\n  " + "\n  ".join(changes)
        if not known.accept_changed:
            raise UserError(f"{listed}\nRestore it, {_GO_ON}")
        logger.warning(listed)


def find_origins(config: RunConfig, tree: Tree, begin: Origin | None = None) -> dict[str, Path]:
    """The model directory of each component that comes from one. Arguments and errors as `initial_parameters`."""
    origins: dict[str, Path] = {}
    for folder in [*map(location, config.init), *([begin.folder] if begin else [])]:
        manifest = checkpoints.read_manifest(folder)
        model = from_dict(RossConfig, manifest["config"], f"{folder}: config")
        for name in tree:
            if getattr(model, name) is not None:
                _check_component(folder, name, getattr(model, name), getattr(config.model, name))
                _check_component(
                    folder, name, *({f: getattr(m, f) for f in _IMAGES.get(name, ())} for m in (model, config.model))
                )
                origins[name] = folder
    return origins


def initial_parameters(config: RunConfig, tree: Tree, begin: Origin | None = None) -> tuple[Tree, dict[str, Path]]:
    """The parameters before the first step, and the model directory of each component that comes from one.

    Args:
      tree: shapes, dtypes and shardings of the parameters by component; from `abstract_tree`.
      begin: a step of another run, whose parameters come before those of `config.init`.

    Raises:
      UserError: a model directory cannot be read, or a component in it has another config.
    """
    origins = find_origins(config, tree, begin)
    key = jax.random.fold_in(jax.random.key(config.seed), 0)
    params = init_components(config.model, tree, [name for name in tree if name not in origins], key)
    factors = init_factors(tree, config.lora, key)
    for folder in dict.fromkeys(origins.values()):
        asked = {name: tree[name] for name, origin in origins.items() if origin == folder and tree[name]}
        stored = _stored_as(asked, checkpoints.model_abstract(folder, factors=True))
        step = begin.step if begin and folder == begin.folder else None
        with working(f"reading {', '.join(asked)} from {folder}"):
            params |= checkpoints.restore_model(folder, stored, step)
    return {name: merge(factors.get(name, {}), params.get(name, {})) for name in tree}, origins


def _stored_as(tree: Tree, stored: Tree) -> Tree:
    """The leaves of a tree that are restored: all, or of components with other low-rank updates all but factors.

    Without its factors, a kernel is restored with the stored update merged into it.
    """
    kept = {}
    for name, component in tree.items():
        flat, there = flatten(component), flatten(stored.get(name, {}))
        wanted, found = ({(p, leaf.shape) for p, leaf in each.items() if is_factor(p)} for each in (flat, there))
        kept[name] = component if wanted == found else {p: leaf for p, leaf in flat.items() if not is_factor(p)}
    return {name: unflatten(flatten(component)) for name, component in kept.items()}


_IMAGES = {"vision": ("image_mean", "image_std", "image_resample"), "teacher": ("teacher_mean", "teacher_std")}
"""Component -> fields of the model's config that say how its images are made."""


def _check_component(folder: Path, name: str, stored: Any, expected: Any) -> None:
    """Raises ConfigError, with what differs, if a component of a model directory has another config than the run."""
    there, here = to_dict(stored), to_dict(expected)
    differing = [
        f"{field}: {there.get(field)} there, {value} in config.model"
        for field, value in here.items()
        if there.get(field) != value
    ]
    if differing:
        raise ConfigError(f"config.init: {folder}: its {name} differs: {'; '.join(differing)}")


class Run:
    """A run's directory, and everything that its loop needs.

    Args:
      folder: the directory, which is made if it is absent.
      timeout: seconds that processes wait for one another while the run starts.
      accept_changed_data: whether the run continues on data that has changed. The position in it stays the step number.
      adopt: whether steps without a record are continued as a run of this config, which the record then says.
      begin: the step of another run that a new run begins with.

    Attributes:
      step: number of steps done.
      steps: number of steps of the whole run.
      state: after `step` steps.
      ended: why the run ended, such as "stopped by SIGTERM"; set by `train`.
      data: the batches.
      clock: measures the activities of this process.

    Raises:
      UserError: a config, data or directory that cannot be used; the directory holds a run of another config or data,
        or is damaged.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        timeout: int = 300,
        accept_changed_data: bool = False,
        adopt: bool = False,
        begin: Origin | None = None,
    ):
        self.config, self.folder, self.clock, self.ended = config, folder, Clock(), ""
        self.mesh = make_mesh(config.mesh)
        record = read_record(folder, config, adopt)
        origin = recorded_origin(record, begin, folder)
        self._checkpoints = RunCheckpoints(folder, config.loop.keep)
        self._checkpoints.probe()
        latest = self._checkpoints.latest()
        self.origin = None if latest else origin
        self.step = latest or (self.origin.first_step if self.origin else 0)
        if latest:
            checkpoints.read_manifest(folder)  # compares digests
        else:
            tree = config.abstract_tree(self.mesh)
            refuse_random(config, tree, set(tree) - set(find_origins(config, tree, self.origin)))
        self.data = open_data(self._with_cache(), self.mesh, self._known(record, accept_changed_data), timeout)
        self.steps = self.data.steps
        before = recorded_config(record, folder / RECORD) if record else config
        self._check_data(record, before.data.epochs, accept_changed_data)
        built = build_step(config, self.mesh, self.steps)
        self._optimizer, self.train_step = built.optimizer, built.train_step
        self.shardings = jax.tree.map(lambda leaf: leaf.sharding, built.state)
        banner.say_start(config, folder, self.mesh, built.tree)
        if latest:
            agree = functools.partial(agreement.first_error, timeout=timeout)
            with self.clock.during("restore"), working(f"restoring step {latest}"):
                self.step, self.state = self._checkpoints.restore(built.state, agree)
            check_parameters(config, self.data.precomputed, self.state.frozen)
            if jax.process_index() == 0:
                self._write_record(record)
            origins = dict.fromkeys(built.tree, f"step {self.step}")
        else:
            self.state, origins = self._first_state(built)
        banner.say_components(built.tree, config.freezing, origins)
        banner.say_data(self.data)
        if latest:
            banner.say_continued(folder, self.step, self.steps)
            banner.say_changes(before, config, self.step, self.data)
        elif self.origin:
            banner.say_origin(self.origin, config, self.step, self.steps)

    def _check_data(self, record: Mapping[str, Any], epochs: int, accept_changed: bool) -> None:
        """Raises UserError if the data is another than the record says, or too short for the step to begin with."""
        found = self.data.hash_of(epochs)
        if record.get("data", found) != found and not accept_changed:
            raise UserError(
                f"{self.folder}: was trained on other data or another packing plan; a run continues only with its own. "
                f"Restore the data, {_GO_ON}"
            )
        if self.step > self.steps or (self.origin and self.step == self.steps):
            raise UserError(
                f"step {self.step} is where this run would begin, and its data makes {self.steps} steps; raise "
                "config.data.epochs or, with --from, add --reset=step to begin at the first one"
            )

    def _known(self, record: Mapping[str, Any], accept_changed: bool) -> Known:
        """What record and manifest say of the data: the run's own, or those of the run that it begins with."""
        folder = self.folder
        if not record and self.origin and self.origin.same_rows(self.config):
            folder, record, accept_changed = self.origin.folder, self.origin.record, True
        if not record:
            return Known()
        where = f"{folder / RECORD}: sources"
        sources = tuple(from_dict(Version, each, where) for each in record.get("sources", ()))
        tokenizer = checkpoints.read_manifest(folder).get("tokenizer")
        return Known(record.get("rows_per_step"), sources, tokenizer, accept_changed)

    def _with_cache(self) -> RunConfig:
        """The config with the folder of lengths and plans, which all processes share: by default, in the directory."""
        cache = self.config.data.cache or str(self.folder / "cache")
        return dataclasses.replace(self.config, data=dataclasses.replace(self.config.data, cache=cache))

    def _first_state(self, built: StepProgram) -> tuple[TrainState, dict[str, str]]:
        """The state that the run begins with, and where each component comes from.

        Writes what makes the directory a model, and the frozen parameters.
        """
        initial, origins = initial_parameters(self.config, built.tree, self.origin)
        check_parameters(self.config, self.data.precomputed, initial)
        params, frozen = split(initial, self.config.freezing)
        make = jax.jit(lambda p, f: make_state(p, f, self._optimizer), out_shardings=self.shardings)
        with use_mesh(self.mesh, self.config.mesh):
            state = make(params, frozen)
        if self.origin:
            opt_state = state.opt_state
            if "optimizer" not in self.origin.reset:
                opt_state = self.origin.optimizer_state(self.config, built.state)
            step = jax.device_put(jnp.asarray(self.step, state.step.dtype), state.step.sharding)
            state = state._replace(step=step, opt_state=at_step(opt_state, self.step))
        if jax.process_index() == 0:
            with checkpoints.writing(self.folder, self.folder):
                self._write_description(origins)
        with working("writing the parameters that do not train"):
            self._checkpoints.save_frozen(frozen)
        return state, {name: str(origin) for name, origin in origins.items()}

    def _write_description(self, origins: dict[str, Path]) -> None:
        """Writes manifest, record, tokenizer, and the files that came with the components.

        Args:
          origins: model directory of each component that comes from one.
        """
        foreign: dict[str, Any] = {}
        for name, origin in origins.items():
            manifest = checkpoints.read_manifest(origin)
            foreign[name] = manifest.get("foreign", {}).get(name, {})
            unused = origin / "unused" / f"{name}.safetensors"
            if unused.is_file():
                (self.folder / "unused").mkdir(exist_ok=True)
                copy_file(unused, self.folder / "unused" / unused.name)
        for origin in dict.fromkeys(origins.values()):
            if (origin / "files").is_dir():
                copy_tree(origin / "files", self.folder / "files")
        language = self.folder / "files" / "language"
        save_tokenizer(self.config.text.tokenizer, language)
        settings = {
            "tokenizer": fingerprint(load_tokenizer(language)),
            "template": self.config.text.template,
            "image_mode": self.config.image_mode,
            "reconstruction": to_dict(self.config.reconstruction),
        }
        checkpoints.write_manifest(self.folder, {"config": to_dict(self.config.model), "foreign": foreign, **settings})
        self._write_record({})

    def _write_record(self, record: Mapping[str, Any]) -> None:
        """Writes the record, with config and data as they are now, unless the directory has it already."""
        now = {"config": to_dict(self.config), "rows_per_step": self.data.rows_per_step, "data": self.data.hash}
        now["sources"] = [to_dict(version) for version in self.data.versions]
        ancestors = {"from": self.origin.describe()} if self.origin else {}
        write_record(self.folder, record, now | ancestors)

    def _make_reporter(self) -> Reporter:
        config = self.config
        sizes = matrix_sizes(merge(self.state.params, self.state.frozen), logits=bool(config.text.weight))
        spared = spared_components(config, self.data.precomputed.parts if self.data.precomputed else ())
        sizes = {path: size for path, size in sizes.items() if path.partition("/")[0] not in spared}
        objective = make_objective(config.model, config.reconstruction)
        draws = objective.noise_levels if objective else 0
        meter = Meter(config.model, sizes, set(self.state.params), draws, clock=self.clock)
        if jax.process_index() > 0:
            return Reporter(meter)
        expected, warmup = config.loop.expected_reconstruction, warmup_steps(self.steps, config.optimizer.warmup_ratio)
        monitor = LossRangeMonitor(expected, warmup) if expected and objective else None
        project, log = config.loop.wandb, Log(self.folder, self.clock)
        wandb = WandbRun(self.folder, project, flatten_config(config)) if project else None
        writer = Writer(self.folder, self.step, wandb=wandb)
        if log.note:
            writer.warn(log.note)
        return Reporter(meter, writer, monitor, log, source_names(config.data.sources))

    def train(self, callbacks: Sequence[Callback] = (), stop_at: Callable[[int], bool] | None = None) -> int:
        """Trains to the end, or until SIGTERM, SIGINT or SIGHUP comes, which saves a checkpoint.

        SIGHUP is left alone where it is ignored, as under nohup.

        Args:
          stop_at: asked after every step, in place of the signals: whether to save and end here.

        Returns:
          The number of steps done.
        """
        self.clock.step = self.step
        reporter = self._make_reporter()
        share, shares = process_share(self.mesh)
        batches = self.data.batches(self.step, share, shares)
        batches = global_batches(batches, batch_sharding(self.mesh), shares, reporter.meter)
        # With several processes, JAX's own handler makes all end after the same step.
        hangup = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else []
        numbers = [signal.SIGTERM, signal.SIGINT, *hangup] if jax.process_count() == 1 else hangup
        with stop_signals(*numbers) as requested:
            stop_at = stop_at or self._checkpoints.stop_at(lambda: bool(requested()))
            settings = LoopSettings(self.step, self.steps, self.config.loop, stop_at)
            try:
                with use_mesh(self.mesh, self.config.mesh):
                    self.state, self.step = run_loop(
                        self.train_step, self.state, batches, settings, self._checkpoints, reporter, callbacks
                    )
            finally:
                with self.clock.during("save"):
                    self._checkpoints.wait()
                with contextlib.suppress(UserError):  # a full disk was reported before
                    reporter.saved()
                if reporter.writer is not None:
                    reporter.writer.close()
            self.ended = self._why_ended(requested())
        return self.step

    def _why_ended(self, number: str) -> str:
        after = self.config.loop.stop_after
        if self.step == self.steps:
            return "finished"
        if after and self.step >= after:
            return f"stopped after step {self.step} (config.loop.stop_after); without it, the same command continues"
        return f"stopped by {number or 'SIGTERM'}; the same command continues"


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Held while a run is opened and trained, so that no second run of the same directory begins.

    Raises:
      CheckpointError: another process trains in this directory.
    """
    folder = folder.resolve()
    if jax.process_index():  # process 0 holds it for all
        yield
        return
    with contextlib.ExitStack() as stack:
        with checkpoints.writing(folder, folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock(folder))
        yield


def flatten_config(config: RunConfig) -> dict[str, Any]:
    """Values of a config by dotted name, such as `optimizer.learning_rate`. Lists count as values."""
    return {path.replace("/", "."): value for path, value in flatten(to_dict(config)).items()}
