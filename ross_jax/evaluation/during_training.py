"""Benchmarks during training: the model under training answers questions, and its scores become metrics."""

import math
from pathlib import Path
from typing import Any

import jax

from ross_jax.config import ConfigError, UserError
from ross_jax.evaluation.answering import Asking, collect
from ross_jax.evaluation.benchmarks import find_benchmark, load_questions, score
from ross_jax.inference.model import Model
from ross_jax.storage import location
from ross_jax.training.callback import Callback
from ross_jax.training.recipe import RunConfig
from ross_jax.tree import merge


class BenchmarkEvaluator(Callback):
    """Answers and scores the questions of `config.evaluation.benchmarks`.

    Args:
      folder: the run's directory, whose tokenizer is used.

    Raises:
      UserError: a benchmark that is not known, or a file that cannot be read.
      ConfigError: several processes train together; each holds only a part of the parameters.
    """

    def __init__(self, config: RunConfig, folder: Path):
        if jax.process_count() > 1:
            raise ConfigError("config.loop.benchmark: works on one process; score checkpoints with launch/evaluate.py")
        settings = config.evaluation
        images = list(map(Path, settings.benchmark_images))
        self._config, self._folder = config, folder
        self._asking = Asking(rows=settings.rows, limit=settings.benchmark_limit)
        self._questions = {}
        for name, path in settings.benchmarks:
            self._questions[name.lower()] = load_questions(name, [location(path)], images)

    def benchmark(self, state: Any) -> dict[str, float]:
        """Scores such as `pope/f1`, and the number of questions that could not be asked as `pope/broken`."""
        config = self._config
        model = Model(
            folder=self._folder,
            config=config.model,
            params=merge(state.params, state.frozen),
            image_config=config.images,
            template=config.text.template,
            dtype=config.step.dtype,
        )
        values: dict[str, float] = {}
        for name, found in self._questions.items():
            answers = collect(model, name, found, self._asking)
            try:
                scores = score(find_benchmark(name), answers, found.broken).scores
            except UserError as error:
                raise UserError(f"config.evaluation.benchmarks: {error}") from error
            asked = len(found.questions[: self._asking.limit])
            values[f"{name}/broken"] = float(len(found.broken) + asked - len(answers))
            values |= {f"{name}/{metric}": value for metric, value in scores.items() if math.isfinite(value)}
        return values
