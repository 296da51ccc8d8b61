"""Measures how fast a language model reads prompts and extends them, alone or beside transformers' `generate`."""

import dataclasses
import importlib.util
import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ross_jax.bench.step import Figures, interleave
from ross_jax.config import UserError
from ross_jax.console import say
from ross_jax.inference.engine import Engine, Prompt, make_engine
from ross_jax.inference.generate import Decoding
from ross_jax.models.language import LanguageConfig, LanguageModel
from ross_jax.models.quantization import Kind, check_quantization, is_quantised, quantize
from ross_jax.models.ross import RossConfig
from ross_jax.tree import flatten, unflatten

LANGUAGE = LanguageConfig(32000, 768, 2048, 12, 12, 12, 64, 1e6, 1e-6, qkv_bias=True, tied_head=True)
"""A Qwen2 of 110 million parameters."""
ROWS = 8
"""Rows that answer the ragged queue."""
LENGTHS, ANSWERS = (16, 128), (4, 128)
"""Shortest and longest prompt of the queue, and answer, in tokens."""
PROBE_BYTES = 2**29


@dataclasses.dataclass(frozen=True)
class Generating:
    """What to measure.

    Attributes:
      dtype: dtype of the weights that are given to both.
      quantize: as in `load`, for our side.
      batches: numbers of prompts that are answered at once.
      prompt: tokens of each prompt.
      new: tokens of each answer.
      repeats: runs of each; their median counts.
      queue: prompts of the ragged queue. 0: it is not measured.
      core_seconds: whether seconds are those of all cores of this process, not those of a clock.
      compare: whether to run transformers beside it.
    """

    dtype: str = "float32"
    quantize: Kind | None = None
    batches: tuple[int, ...] = (1, 8, 32)
    prompt: int = 128
    new: int = 64
    repeats: int = 3
    queue: int = 64
    core_seconds: bool = False
    compare: bool = False

    @property
    def clock(self) -> Callable[[], float]:
        return time.process_time if self.core_seconds else time.perf_counter


def measure(asked: Generating) -> Figures:
    """Tokens per second of prompts and answers at each number of rows, and the time of a ragged queue.

    Raises:
      UserError: in float32 transformers chooses other tokens; weights cannot be quantised.
    """
    check_quantization(asked.quantize)
    language = LANGUAGE
    config = RossConfig(language=language)
    params = random_parameters(language, asked.dtype)
    engine = make_engine(Decoding(config, asked.dtype), _quantised({"language": params}, asked.quantize))
    figures: Figures = {
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "cores": os.cpu_count() or 0,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
    }
    peer = None
    if asked.compare:
        if importlib.util.find_spec("torch") is None or importlib.util.find_spec("diffusers") is None:
            figures["transformers"] = "no torch; `bash launch/setup.sh parity` installs it. JAX alone:"
        else:
            from ross_jax.bench.generate_peer import Peer

            peer = Peer(language, params, asked.dtype)
            figures |= {"torch_device": str(peer.device), "torch_threads": peer.threads}
    bound = read_bytes(engine.params["language"], language) / bandwidth()
    figures |= {"weight_gb": read_bytes(engine.params["language"], language) / 1e9, "bound_step_s": bound}
    rng = np.random.default_rng(0)
    for rows in asked.batches:
        prompts = [_prompt(rng, language, asked.prompt, asked.new) for _ in range(rows)]
        figures |= _told(_at(asked, engine, peer, prompts, bound))
    if not asked.queue:
        return figures
    lengths, answers = (rng.integers(*bounds, asked.queue, endpoint=True) for bounds in (LENGTHS, ANSWERS))
    queue = [_prompt(rng, language, *sizes) for sizes in zip(lengths.tolist(), answers.tolist(), strict=True)]
    runs: dict[str, Callable[[], list[list[int]]]] = {"jax": partial(answer, engine, queue, ROWS)}
    if peer:
        runs["torch"] = partial(peer.answer, queue, ROWS)
    return figures | _told(_compared("queue", asked, runs, sum(prompt.limit for prompt in queue)))


def _told(figures: dict[str, float]) -> dict[str, float]:
    """Tells the user figures, because others take minutes more."""
    say(", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    return figures


def _at(asked: Generating, engine: Engine, peer: Any, prompts: Sequence[Prompt], bound: float) -> dict[str, float]:
    """Figures of prompts of one length that are answered at once."""
    rows, name = len(prompts), f"batch_{len(prompts)}"
    short = [dataclasses.replace(prompt, limit=1) for prompt in prompts]
    runs = {"jax": partial(answer, engine, prompts, rows), "jax_prefill": partial(answer, engine, short, rows)}
    if peer:
        runs |= {"torch": partial(peer.answer, prompts, rows), "torch_prefill": partial(peer.answer, short, rows)}
    equal = _equal_share(runs, asked, name)
    seconds = {each: statistics.median(times) for each, times in interleave(runs, asked.repeats, asked.clock).items()}
    figures: dict[str, float] = {}
    for side in ("jax", "torch") if peer else ("jax",):
        label = name if side == "jax" else f"{name}_torch"
        decode = rows * (asked.new - 1) / max(seconds[side] - seconds[f"{side}_prefill"], 1e-9)
        figures[f"{label}_prefill_tokens_per_s"] = rows * asked.prompt / seconds[f"{side}_prefill"]
        figures[f"{label}_decode_tokens_per_s"] = decode
    own = float(figures[f"{name}_decode_tokens_per_s"])
    figures[f"{name}_of_bound"] = own * bound / rows
    if peer:
        theirs = figures[f"{name}_torch_decode_tokens_per_s"]
        figures |= {f"{name}_over_torch": own / float(theirs), f"{name}_equal_tokens": equal}
    return figures


def _compared(name: str, asked: Generating, runs: dict[str, Callable[[], Any]], tokens: int) -> dict[str, float]:
    equal = _equal_share(runs, asked, name)
    seconds = {each: statistics.median(times) for each, times in interleave(runs, asked.repeats, asked.clock).items()}
    figures: dict[str, float] = {f"{name}_s": seconds["jax"], f"{name}_tokens_per_s": tokens / seconds["jax"]}
    if "torch" in runs:
        figures |= {f"{name}_torch_s": seconds["torch"], f"{name}_over_torch": seconds["torch"] / seconds["jax"]}
        figures[f"{name}_equal_tokens"] = equal
    return figures


def _equal_share(runs: dict[str, Callable[[], list[list[int]]]], asked: Generating, name: str) -> float:
    """Share of answers that are equal on both sides. Runs everything once, which also compiles."""
    made = {each: run() for each, run in runs.items()}
    if "torch" not in made:
        return 1.0
    equal = statistics.fmean(own == theirs for own, theirs in zip(made["jax"], made["torch"], strict=True))
    if asked.dtype == "float32" and not asked.quantize and equal < 1:
        raise UserError(
            f"{name}: {equal:.0%} of the answers are equal to transformers'; they do not compute the same, so their "
            "times say nothing"
        )
    return equal


def answer(engine: Engine, prompts: Sequence[Prompt], rows: int) -> list[list[int]]:
    """New tokens of each prompt."""
    made: dict[int, list[int]] = {}

    def receive(number: int, tokens: list[int], ended: bool) -> bool:
        made[number] = tokens
        return False

    engine.run(prompts, rows, receive)
    return [made[number] for number in range(len(prompts))]


def random_parameters(config: LanguageConfig, dtype: str, seed: int = 0) -> Any:
    """A language model's first parameters."""
    module = LanguageModel(config)

    def make() -> Any:
        inputs = (jnp.zeros(spec.shape, spec.dtype) for spec in module.input_spec())
        params = module.init(jax.random.key(seed), *inputs)["params"]
        return jax.tree.map(lambda leaf: leaf.astype(dtype), params)

    return jax.jit(make)()


def _quantised(params: dict[str, Any], kind: Kind | None) -> dict[str, Any]:
    if kind is None:
        return params
    flat = flatten(params)
    return unflatten({p: quantize(jnp.array(leaf), kind) if is_quantised(p) else leaf for p, leaf in flat.items()})


def read_bytes(params: Any, config: LanguageConfig) -> int:
    """Bytes of weights that extending rows by one token reads: all but an embedding that is no head as well."""
    read = params if config.tied_head else {name: tree for name, tree in params.items() if name != "embedding"}
    return sum(leaf.nbytes for leaf in jax.tree.leaves(read))


def bandwidth() -> float:
    """Bytes per second at which the default device reads its memory: the fastest of several sums of a large array."""
    probe = jnp.ones((PROBE_BYTES // 4 // 1024, 1024), jnp.float32)
    total = jax.jit(lambda array: array @ jnp.ones(1024, jnp.float32))
    total(probe).block_until_ready()
    times = []
    for _ in range(10):
        start = time.perf_counter()
        total(probe).block_until_ready()
        times.append(time.perf_counter() - start)
    return PROBE_BYTES / min(times)


def _prompt(rng: np.random.Generator, language: LanguageConfig, length: int, new: int) -> Prompt:
    return Prompt(rng.integers(0, language.vocab_size, length).astype(np.int32), [], [], new)
