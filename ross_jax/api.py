"""Functions of the public API that join several parts of the package."""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import get_args

from ross_jax import checkpoints
from ross_jax.config import UserError
from ross_jax.convert.export_weights import DTYPE_NAMES
from ross_jax.convert.exporting import LAYOUTS as WHOLE_LAYOUTS
from ross_jax.convert.exporting import export
from ross_jax.convert.importing import plan_import, write
from ross_jax.convert.peft import EXPORTED, export_adapter, import_adapter, is_adapter
from ross_jax.data.conversation import Template
from ross_jax.evaluation.reconstruction import make_callbacks
from ross_jax.storage import location
from ross_jax.training.recipe import RunConfig
from ross_jax.training.run import Run, only_writer

LAYOUTS = (*WHOLE_LAYOUTS, "peft")


def train(config: RunConfig, workdir: str | Path, *, accept_changed_data: bool = False) -> Run:
    """Trains a run to its end, or continues it; SIGTERM, SIGINT and SIGHUP save a checkpoint and end it early.

    Example:
      config = load_recipe("configs/demo.py:stage=pretrain", ["--config.data.epochs=1"])
      run = train(config, "runs/demo")
      model = load("runs/demo")

    Args:
      config: everything that the run depends on.
      workdir: the run's directory, which is also a model directory.
      accept_changed_data: whether a run continues although its data has changed.

    Returns:
      The run. `run.step` is the number of steps done, of `run.steps`.

    Raises:
      UserError: a config, data or directory that cannot be used.
    """
    folder = location(workdir)
    with only_writer(folder):
        run = Run(config, folder, accept_changed_data=accept_changed_data)
        run.train(make_callbacks(config, run.mesh, folder))
    return run


def import_model(
    sources: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    teacher: str | Path | None = None,
    vision_tower: str | Path | None = None,
    autoencoder: str | Path | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Path:
    """Writes a model directory from foreign checkpoints, completely or not at all.

    Args:
      sources: folders or hub ids. Together they make one model, each component from one of them. A folder with an
        adapter of peft updates the model; its base may be a model directory.
      output: the model directory. It must not exist.
      teacher: folder or hub id of a vision encoder whose features are reconstruction targets.
      vision_tower: folder with the config.json of the vision tower, for a checkpoint that only names it.
      autoencoder: folder with the config.json of the autoencoder, for a checkpoint that only names it.
      progress: receives each note as a line of text.

    Returns:
      The model directory.

    Raises:
      UserError: sources that cannot be read or do not fit together. Names everything that does not fit.
    """
    origins = [str(each) for each in ([sources] if isinstance(sources, str | Path) else sources)]
    if not origins and teacher is None:
        raise UserError("import_model: neither sources nor a teacher")
    adapters = [origin for origin in origins if is_adapter(origin)]
    origins = [origin for origin in origins if origin not in adapters]
    if len(adapters) > 1 or (adapters and not origins):
        raise UserError(
            f"{adapters[-1]}: is a LoRA adapter of peft; import it with its base, one adapter at a time: "
            "--from BASE --from ADAPTER. Or merge it into its base with peft"
        )
    if adapters and len(origins) == 1 and (location(origins[0]) / checkpoints.MANIFEST).is_file():
        import_adapter(location(adapters[0]), location(origins[0]), location(output), progress)
        return location(output)
    tower, decoder = (location(each) if each else None for each in (vision_tower, autoencoder))
    plan = plan_import(origins, tower, decoder, teacher=str(teacher) if teacher else None)
    try:
        if adapters:
            import_adapter(location(adapters[0]), plan, location(output), progress)
        else:
            write(plan, location(output), progress)
    finally:
        plan.close()
    return location(output)


def export_model(
    model: str | Path,
    output: str | Path,
    *,
    layout: str = "ross",
    dtype: str | None = None,
    without: Collection[str] = (),
    template: str | None = None,
    base: str = EXPORTED[0],
    progress: Callable[[str], None] = lambda line: None,
) -> Path:
    """Writes a model directory in a foreign layout, completely or not at all.

    Args:
      model: a model directory, or the directory of a run.
      output: the folder to write. It must not exist.
      layout: `ross`, a checkpoint that the reference loads; `components`, a folder for each component; `llava`,
        transformers' LlavaForConditionalGeneration; `original-llava`, a checkpoint of the first LLaVA code; `adapters`
        and `adapters-bin`, projector and denoiser alone; or `peft`, the low-rank updates as an adapter.
      dtype: `float32`, `bfloat16` or `float16`. None: the dtypes of the import.
      without: names of components to leave out.
      template: conversation template of the chat template. None: the one of the training.
      base: with `peft`: what the adapter extends: `llava`, `language` (the language model alone) or `original-llava`.
      progress: receives each note as a line of text.

    Returns:
      The folder.

    Raises:
      UserError: nothing to export, or an output that cannot be written.
    """
    fields = {"layout": (layout, LAYOUTS), "dtype": (dtype, (*DTYPE_NAMES, None)), "base": (base, EXPORTED)}
    fields["template"] = (template, (*get_args(Template), None))
    for name, (value, choices) in fields.items():
        if value not in choices:
            raise UserError(f"{name} {value!r}: one of {list(choices)}")
    if layout == "peft":
        for name, value in {"dtype": dtype, "without": without, "template": template}.items():
            if value:
                raise UserError(
                    f"{name} {value!r}: is of whole models; an adapter is float32, and has what was updated"
                )
        export_adapter(location(model), location(output), base, progress)
    else:
        export(location(model), location(output), layout, dtype, progress, without, template)
    return location(output)
