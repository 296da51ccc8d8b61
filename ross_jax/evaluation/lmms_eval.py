"""An adapter with which stock lmms-eval evaluates a model directory or a run's directory, in batches.

    lmms-eval --model ross_jax --model_args pretrained=runs/ross-7b --tasks pope --batch_size 8

An entry point of this package names `manifest`. The module is only imported where lmms-eval is installed.
"""

from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.utils import Collator
from tqdm import tqdm

from ross_jax.config import UserError
from ross_jax.data.conversation import IMAGE_MARKER
from ross_jax.inference.model import TEXT_COMPONENTS, load
from ross_jax.inference.prompts import MAX_NEW_TOKENS, Request

_SAMPLING = ("temperature", "top_k", "top_p")
_DEFAULT_TOKENS = 1024  # as in lmms-eval's own adapters, where a task does not say


def manifest() -> ModelManifest:
    """Says to lmms-eval which class `--model ross_jax` means."""
    return ModelManifest("ross_jax", simple_class_path="ross_jax.evaluation.lmms_eval.RossJax")


class RossJax(lmms):
    """A model that answers requests of lmms-eval.

    Args:
      pretrained: a model or a run's directory.
      batch_size: requests that are answered at once.
      template: conversation template; None: the one that the model was trained with.
      dtype: of parameters and activations, `float32` or `bfloat16`.
      max_new_tokens: length of the longest answer; None: the task's.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 8,
        template: str | None = None,
        dtype: str = "float32",
        max_new_tokens: int | None = None,
        **unused: Any,
    ):
        super().__init__()
        unknown = set(unused) - {"device", "max_batch_size"}
        if unknown:
            raise UserError(f"--model_args: ross_jax has no {', '.join(sorted(unknown))}")
        self._rows, self._longest = int(batch_size), max_new_tokens and int(max_new_tokens)
        self._ross = load(pretrained, TEXT_COMPONENTS, template, dtype)  # pyright: ignore[reportArgumentType]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers to requests, in their order."""
        batches = Collator([request.args for request in requests], lambda args: (-len(args[0]), args[0]), grouping=True)
        answers: list[str] = []
        with tqdm(total=len(requests), desc="ross_jax", unit="question") as bar:
            for batch in batches.get_batched(n=self._rows, batch_fn=None):
                found = self._ross.ask_many([self._request(*args) for args in batch], self._rows)
                answers += [_until(text, args[1]) for text, args in zip(found, batch, strict=True)]
                bar.update(len(batch))
        return batches.get_original(answers)

    def _request(
        self, context: str, settings: dict[str, Any], visual: Any, number: int, task: str, split: str
    ) -> Request:
        images = [] if visual is None else visual(self.task_dict[task][split][number]) or []
        text = context if images else context.replace(IMAGE_MARKER, "")
        tokens = self._longest or min(settings.get("max_new_tokens", _DEFAULT_TOKENS), MAX_NEW_TOKENS)
        drawn = {name: settings[name] for name in _SAMPLING if settings.get("do_sample") and settings.get(name)}
        return Request(list(images), text, max_new_tokens=tokens, **drawn)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not supported: none of the paper's tasks asks for likelihoods."""
        raise UserError("ross_jax computes no likelihoods; choose a task of output_type generate_until")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not supported: none of the paper's tasks has several rounds."""
        raise UserError("ross_jax answers one round; choose a task of output_type generate_until")


def _until(text: str, settings: dict[str, Any]) -> str:
    """An answer up to the first of the task's stop texts."""
    stops = settings.get("until") or []
    for stop in [stops] if isinstance(stops, str) else stops:
        text = text.split(stop)[0] if stop else text
    return text
