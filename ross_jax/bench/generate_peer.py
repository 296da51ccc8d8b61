"""transformers' `generate` on a language model of ross_jax, with greedy decoding and a static cache. Needs `parity`."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import torch
from transformers import GenerationConfig

from ross_jax.bench.peer import copy_parameters, language_model
from ross_jax.convert.importing import TABLES
from ross_jax.inference.engine import Prompt
from ross_jax.models.language import LanguageConfig


class Peer:
    """A language model in PyTorch, with the JAX model's weights."""

    def __init__(self, config: LanguageConfig, params: Mapping[str, Any], dtype: str):
        self.threads = torch.get_num_threads()
        self.device = torch.device("cuda" if jax.default_backend() == "gpu" else "cpu")
        self._model: Any = language_model(config).to(self.device).eval()
        for _ in copy_parameters(self._model, TABLES["language"](config), params):
            pass
        self._model.to(getattr(torch, dtype))

    def answer(self, prompts: Sequence[Prompt], rows: int) -> list[list[int]]:
        """New tokens of each prompt; `rows` prompts at once, those with the longest answers first."""
        order = sorted(range(len(prompts)), key=lambda i: -prompts[i].limit)
        made: dict[int, list[int]] = {}
        for start in range(0, len(order), rows):
            numbers = order[start : start + rows]
            made |= zip(numbers, self._answer([prompts[number] for number in numbers]), strict=True)
        return [made[number] for number in range(len(prompts))]

    def _answer(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        length, new = max(len(prompt.tokens) for prompt in prompts), max(prompt.limit for prompt in prompts)
        ids = torch.zeros(len(prompts), length, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, prompt in enumerate(prompts):  # padded on the left, as generate wants it
            ids[i, length - len(prompt.tokens) :] = torch.from_numpy(prompt.tokens.copy())
            mask[i, length - len(prompt.tokens) :] = 1
        settings = GenerationConfig(
            max_new_tokens=new, do_sample=False, cache_implementation="static", eos_token_id=None, pad_token_id=0
        )
        with torch.inference_mode():
            out = self._model.generate(
                ids.to(self.device), attention_mask=mask.to(self.device), generation_config=settings
            )
        return [row[length : length + prompt.limit].tolist() for row, prompt in zip(out, prompts, strict=True)]
