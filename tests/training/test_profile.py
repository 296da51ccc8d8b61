"""Traces of a run hold the steps that were asked for."""

import jax
import jax.numpy as jnp
import pytest

from ross_jax.config import ConfigError
from ross_jax.training.profile import Tracer, parse_steps
from ross_jax.training.state import TrainState


def traced_steps(folder, first, count, done, last, steps=30):
    """Steps in the trace of a loop that runs from `done` to `last`. None if there is no trace."""
    work = jax.jit(lambda x: x + 1)
    with Tracer(folder, first, count, done, steps) as tracer:
        state = TrainState(jnp.int32(done), {}, (), {})
        for step in range(done + 1, last + 1):
            with jax.profiler.TraceAnnotation(f"step_{step}"):
                state = state._replace(step=work(state.step))
            tracer.on_step(step, state, {})
    files = list(folder.rglob("*.xplane.pb"))
    if not files:
        return None
    (file,) = files
    planes = jax.profiler.ProfileData.from_file(str(file)).planes
    events = (event for plane in planes for line in plane.lines for event in line.events)
    return sorted({int(event.name.removeprefix("step_")) for event in events if event.name.startswith("step_")})


@pytest.mark.parametrize(
    ("first", "count", "done", "last", "expected"),
    [
        (4, 2, 0, 9, [4, 5]),
        (1, 3, 0, 9, [1, 2, 3]),
        (6, 2, 5, 9, [6, 7]),
        (8, 5, 0, 9, [8, 9]),
        (4, 2, 4, 9, None),
    ],
    ids=["inside", "first step", "first step of a continued run", "cut by the end", "behind it"],
)
def test_a_trace_holds_the_steps_asked_for(tmp_path, first, count, done, last, expected):
    assert traced_steps(tmp_path / "profile", first, count, done, last) == expected


def test_a_start_behind_the_end_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="--profile=31:2: the run has 30 steps"):
        Tracer(tmp_path, 31, 2, 0, 30)


@pytest.mark.parametrize("text", ["", "5", "5:", ":5", "0:5", "5:0", "-1:5", "a:b", "1:2:3", "1.5:2"])
def test_bad_values(text):
    with pytest.raises(ConfigError, match="expected START:COUNT, such as 20:5"):
        parse_steps(text)


def test_good_value():
    assert parse_steps("20:5") == (20, 5)
