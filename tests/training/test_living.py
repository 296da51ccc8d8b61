"""Runs that stop early, get more epochs, or begin with a step of another run."""

import dataclasses
import json
import logging
import re
import shutil

import jax
import numpy as np
import pytest

from ross_jax import checkpoints
from ross_jax.config import ConfigError, UserError
from ross_jax.training.loop import LoopConfig
from ross_jax.training.optimizer import OptimizerConfig
from ross_jax.training.origin import begin_with, find_origin
from ross_jax.training.run import Run
from ross_jax.training.state import FreezeConfig
from training.test_run import data, lines, make_config, parameters, whole  # noqa: F401

STAGE1 = FreezeConfig((r"projector/.*", r"denoiser/.*"), dtype="float32", autoencoder_dtype="float32")


def same(run: Run, expected: dict[str, np.ndarray]) -> None:
    for path, leaf in parameters(run).items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)


def epochs(config, number: int):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, epochs=number))


def moments(run: Run) -> np.ndarray:
    """The projector's first moments, which are 0 in a new optimizer."""
    return np.concatenate([np.ravel(leaf) for leaf in np_leaves(run.state.opt_state, "mu")])


def np_leaves(tree, name: str) -> list[np.ndarray]:
    found = jax.tree_util.tree_leaves_with_path(tree)
    return [np.asarray(leaf) for path, leaf in found if f".{name}" in jax.tree_util.keystr(path) and np.ndim(leaf)]


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, "ross_jax.console")
    return lambda: "\n".join(record.getMessage() for record in caplog.records)


def test_the_first_steps(data, whole, tmp_path, said):  # noqa: F811
    """A run that stops after three steps goes on without the field, to the parameters of one that did not stop."""
    folder, stopped = tmp_path / "run", LoopConfig(log=1, save=2, keep=2, stop_after=3)
    run = Run(make_config(data, loop=stopped), folder)
    assert run.train() == 3 and run.ended.startswith("stopped after step 3 (config.loop.stop_after)")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 5}) + "\n")  # of a start that was killed before it saved
    assert Run(make_config(data, loop=stopped), folder).train() == 3
    run = Run(make_config(data), folder)
    assert run.train() == whole[2] and run.ended == "finished"
    same(run, whole[1])
    text = said()
    for line in (
        r"run: \d+ x cpu, 1 process, mesh data=1 fsdp=2 tensor=4; \d+ of \d+ arrays \(\S+ GB\) replicated",
        r"language +\S+ M  float32   trained  <- random",
        r"vision +\S+ M  float32   frozen   <- random",
        r"data: 24 conversations with 18 images; 0 do not fit, 0 broken",
        rf"{whole[2]} steps \(2 epochs\) of \d+ rows",
        r"step 1 done after \d+ s, compilation included",
        rf"continues from step 3 of {whole[2]}; steps 4 to 5 are done again",
        r"loop.stop_after: 3 there, None now",
        r"language +\S+ M  float32   trained  <- step 3",
    ):
        assert re.search(line, text), (line, text)
    assert sorted(path.name for path in (folder / "cache").iterdir())


def test_more_epochs_are_as_a_run_that_begins_with_this_step(data, whole, tmp_path, said):  # noqa: F811
    """In place or in another directory, interrupted or not, the steps that are left are those of a longer run."""
    folder, longer, steps = tmp_path / "run", epochs(make_config(data), 3), whole[2]
    shutil.copytree(whole[0], folder)
    extended = Run(longer, folder)
    assert extended.steps > steps == extended.step
    assert re.search(rf"{extended.steps} steps in all instead of {steps}; the learning rate falls to 0", said())
    assert re.search(rf"learning_rate/rest of step {steps + 1}: \S+, was 0", said())
    assert extended.train(stop_at=lambda step: step == steps + 1) == steps + 1
    extended = Run(longer, folder)
    assert extended.train() == extended.steps
    forked = Run(longer, tmp_path / "forked", begin=find_origin(str(whole[0])))
    assert forked.train() == extended.steps
    same(forked, parameters(extended))
    assert lines(folder)[: len(lines(whole[0]))] == lines(whole[0])
    rates = [line["learning_rate/rest"] for line in lines(tmp_path / "forked")]
    assert rates == [line["learning_rate/rest"] for line in lines(folder)[-len(rates) :]] and rates[0] > rates[-1] > 0
    with pytest.raises(ConfigError, match=r"data.epochs: 3 there, 2 now"):
        Run(make_config(data), folder)


def test_a_run_that_begins_with_a_step_of_another(data, whole, tmp_path, said):  # noqa: F811
    """Without changes it ends bit for bit as the other one; its record has its ancestry."""
    old, params, steps = whole
    config, begin = make_config(data), find_origin(f"{old}@{steps - 2}")
    run = Run(config, tmp_path / "new", begin=begin)
    assert (run.step, run.steps) == (steps - 2, steps)
    run.train()
    same(run, params)
    assert lines(tmp_path / "new")[0]["step"] == steps - 1
    recorded = json.loads((tmp_path / "new" / "run.json").read_text())["from"]
    assert recorded == {"run": str(old.resolve()), "step": steps - 2, "reset": []}
    assert f"begins with step {steps - 2} of {old} with its optimizer; step {steps - 1} of {steps} is next" in said()
    again = find_origin(str(tmp_path / "new"), ["step"])
    third = Run(dataclasses.replace(config, seed=1), tmp_path / "third", begin=again)
    assert (third.step, third.origin.describe()["from"]) == (0, recorded)
    assert "differs from" in said() and "seed: 0 there, 1 now" in said()
    assert Run(config, tmp_path / "new").step == steps  # it continues by itself
    for text in (f"{old}@{steps - 2}", str(old)):  # the same command, though the other run has gone on
        assert begin_with(text, [], tmp_path / "new") is None
    for text, reset in ((f"{old}@{steps}", []), (str(tmp_path), []), (str(old), ["step"])):
        with pytest.raises(UserError, match=rf"began with step {steps - 2} of .*use another directory"):
            begin_with(text, reset, tmp_path / "new")
    with pytest.raises(UserError, match=rf"began with step {steps - 2} of .*use another directory"):
        Run(config, tmp_path / "new", begin=find_origin(str(old)))


def test_another_learning_rate_from_here_on(data, whole, tmp_path):  # noqa: F811
    """The step stays, and with it the schedule; what is reset begins anew."""
    old, _, steps = whole
    before = {line["step"]: line for line in lines(old)}
    faster = make_config(data, optimizer=OptimizerConfig(2e-3, ((r"denoiser/.*", 1e-4),)))
    for reset in ([], ["optimizer"], ["step"], ["optimizer", "step"]):
        folder = tmp_path / ("-".join(reset) or "none")
        run = Run(faster, folder, begin=find_origin(f"{old}@{steps - 2}", reset))
        assert run.step == (0 if "step" in reset else steps - 2) == int(run.state.step)
        assert np.any(moments(run)) == ("optimizer" not in reset)
        start = parameters(run)
        run.train(stop_at=lambda step: True)
        moved = any(np.any(leaf != start[path]) for path, leaf in parameters(run).items())
        assert moved == ("step" not in reset)  # the first step of a schedule has the rate 0
        found = lines(folder)[0]
        expected = 0.0 if "step" in reset else 2 * before[steps - 1]["learning_rate/rest"]
        assert found["learning_rate/rest"] == pytest.approx(expected)
        if "step" not in reset:  # the same parameters on the same batch
            assert found["loss"] == pytest.approx(before[steps - 1]["loss"], rel=1e-6)
    tree = checkpoints.model_abstract(old)
    np.testing.assert_equal(sorted(tree), sorted(checkpoints.model_abstract(folder)))


def test_all_reset_is_a_run_that_starts_from_the_model(data, whole, tmp_path):  # noqa: F811
    config = make_config(data)
    forked = Run(config, tmp_path / "forked", begin=find_origin(str(whole[0]), ["optimizer", "step"]))
    started = Run(dataclasses.replace(config, init=(str(whole[0]),)), tmp_path / "started")
    for run in (forked, started):
        run.train(stop_at=lambda step: step == 3)
    same(forked, parameters(started))


def test_what_cannot_be_begun_with(data, whole, tmp_path):  # noqa: F811
    old, _, steps = whole
    with pytest.raises(UserError, match=rf"--from=.*@99: no step 99 in .*; there are steps \[{steps - 2}, {steps}\]"):
        find_origin(f"{old}@99")
    with pytest.raises(UserError, match=rf"no run\.json in {tmp_path}"):
        find_origin(str(tmp_path))
    with pytest.raises(UserError, match=r"--reset=optimiser: cannot be reset \(did you mean 'optimizer'\?\)"):
        find_origin(str(old), ["optimiser"])
    with pytest.raises(UserError, match=r"(?s)does not fit this config:\n  freeze.trainable.*Add --reset=optimizer"):
        Run(make_config(data, freeze=STAGE1), tmp_path / "run", begin=find_origin(f"{old}@{steps - 2}"))
    with pytest.raises(UserError, match=rf"step {steps} is where this run would begin, and its data makes {steps} st"):
        Run(make_config(data), tmp_path / "run", begin=find_origin(str(old)))


@pytest.mark.parametrize(
    ("named", "freeze", "missing"),
    [
        ((), FreezeConfig(("language/.*", "projector/.*")), "vision and projector and language and autoencoder"),
        (("vision", "projector", "autoencoder"), FreezeConfig((".*",)), "language"),
        (("language",), STAGE1, "vision and autoencoder"),  # in stage 1 the projector is new
    ],
)
def test_random_components_are_named(named, freeze, missing, data, tmp_path):  # noqa: F811
    """A forgotten stage is refused, before anything is written."""
    with pytest.raises(ConfigError) as caught:
        Run(make_config(data, init_random=named, freeze=freeze), tmp_path / "run")
    found = re.search(r"no model directory has (.*), which would be random", str(caught.value))[1]
    assert set(found.split(" and ")) == set(missing.split(" and "))
    flag = re.search(r'--config.init_random="(.*)"', str(caught.value))[1]
    assert set(flag.strip("(),").replace("'", "").split(", ")) == set(named) | set(missing.split(" and "))
    assert not (tmp_path / "run" / "run.json").exists()
