"""The training loop on real Ray and DeepSpeed processes, with a task that takes no time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from here import ROOT
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_search import wait_for
from tiny_task import CONFIG, Line

from cluster.train import train
from cluster.training_job import TrainingConfig, Workers
from patchrank.errors import UserError
from patchrank.training import configuration

pytest_plugins = ["shared_ray"]


@pytest.fixture(scope="module")
def line(address):
    """A function that learns the line on the shared Ray, by one worker or as many as it is told."""

    def learn(out, task=None, **changes):
        machines = Workers(address, changes.pop("workers", 1), 1, changes.pop("gpus_per_worker", None))
        return train(task or Line(), TrainingConfig(str(out), **{**CONFIG, "machines": machines, **changes}))

    return learn


def curve(out, name="loss"):
    """A figure by step, as TensorBoard shows it."""
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    return {event.step: event.value for event in events.Scalars(name)}


def weights(out):
    return load_file(out / "line.safetensors")


@pytest.fixture(scope="module")
def undisturbed(line, tmp_path_factory):
    """The folder of a training by one worker that nothing disturbed."""
    out = tmp_path_factory.mktemp("undisturbed") / "line"
    done = line(out)
    assert (done.steps, done.resumed) == (60, 0)
    assert done.before["error"] > 1 and done.after["error"] < 0.05
    return out


def test_every_step_and_every_figure_is_logged(undisturbed):
    assert list(curve(undisturbed)) == list(range(1, 61))
    assert list(curve(undisturbed, "error")) == [0, 12, 24, 36, 48, 60]  # at the five checkpoints
    rates = list(curve(undisturbed, "learning rate").values())
    assert max(rates) == pytest.approx(0.1, rel=0.01) and rates.index(max(rates)) == pytest.approx(6, abs=2)
    assert rates[-1] < 0.001
    assert len(list((undisturbed / "checkpoints").glob("step-*"))) == 2


@pytest.fixture
def held(tmp_path):
    """A file that holds workers in the middle of a training; see `Line`."""
    path = tmp_path / "held"
    path.touch()
    yield path
    path.unlink(missing_ok=True)


def waiting(held, count):
    """The processes of so many workers, once all of them have come to where they are held."""
    end = time.monotonic() + 300
    while len(found := list(held.parent.glob("held.*"))) < count:
        assert time.monotonic() < end, "the workers have not come so far"
        time.sleep(0.02)
    return [int(path.suffix[1:]) for path in found]


@pytest.mark.long
def test_two_workers_one_of_them_killed_learn_the_same(line, undisturbed, held, tmp_path):
    def kill() -> None:
        try:
            os.kill(waiting(held, 2)[0], signal.SIGKILL)
        finally:
            held.unlink()

    out = tmp_path / "out"
    with ThreadPoolExecutor(1) as pool:
        killed = pool.submit(kill)
        done = line(out, Line(held=str(held)), workers=2, batch=4)
        killed.result()
    assert done.resumed == 0
    assert_close(curve(out), curve(undisturbed))
    for name, value in weights(undisturbed).items():
        torch.testing.assert_close(weights(out)[name], value, rtol=1e-4, atol=1e-5)


def assert_close(curve, other):
    assert curve.keys() == other.keys()
    assert all(value == pytest.approx(other[step], rel=1e-3, abs=1e-5) for step, value in curve.items())


def test_a_stopped_training_goes_on_where_it_was_and_ends_the_same(line, undisturbed, held, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "tests" / "tiny_task.py"), str(out), str(held)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            waiting(held, 1)
            # Ray Train's controller hears of a checkpoint some time after the worker has written it.
            known = out / "checkpoints" / "checkpoint_manager_snapshot.json"
            wait_for(lambda: known.exists() and "step-00000012" in known.read_text())
        finally:
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, stderr = process.communicate(timeout=300)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert not (out / "figures.json").exists()
    done = line(out)
    assert done.resumed == 12  # at the checkpoint
    assert curve(out) == curve(undisturbed)  # to the bit
    assert curve(out, "error") == curve(undisturbed, "error")
    assert all(value.equal(weights(undisturbed)[name]) for name, value in weights(out).items())


def test_a_finished_training_has_nothing_to_do(line, undisturbed):
    before = (undisturbed / "line.safetensors").stat().st_mtime_ns
    done = line(undisturbed, workers=None)  # as many as it had, though there is room for more
    assert done.resumed == done.steps == 60 and done.after["error"] < 0.05
    assert (undisturbed / "line.safetensors").stat().st_mtime_ns == before


def test_another_training_is_kept_out_of_the_folder(line, undisturbed):
    words = r"holds another training \(task.poison: null there, 5 now, learning_rate: 0.1 there, 0.2 now\)"
    with pytest.raises(UserError, match=words):
        line(undisturbed, Line(poison=5), learning_rate=0.2)


@pytest.mark.long
def test_a_loss_that_is_no_number_stops_the_training_with_step_and_learning_rate(line, tmp_path):
    with pytest.raises(UserError, match=r"the loss of step 15 is nan, at learning rate 0\.09\d+;"):
        line(tmp_path, Line(poison=15))
    assert not (tmp_path / "line.safetensors").exists()


@pytest.mark.long
def test_what_workers_cannot_write_is_one_line_that_names_it(line, tmp_path):
    (tmp_path / "tensorboard").touch()  # where they make a folder
    words = f"^{tmp_path}/tensorboard: a worker cannot go on .File exists.; .*the same command goes on"
    with pytest.raises(UserError, match=words) as error:
        line(tmp_path, max_failures=0)
    assert "\n" not in str(error.value)


def test_figures_that_cannot_be_read_are_one_line(line, tmp_path):
    (tmp_path / "figures.json").mkdir()
    with pytest.raises(UserError, match=r"figures\.json: cannot be read \([^\n]*\); put that right"):
        line(tmp_path)


@pytest.mark.long
def test_an_edited_deepspeed_configuration_counts(line, undisturbed, tmp_path):
    """bfloat16, SGD and no schedule, and two batches a step; measured at the ends alone."""
    config = json.loads(configuration.DEFAULT.read_text())
    config |= {"bf16": {"enabled": True}, "optimizer": {"type": "SGD", "params": {"lr": "auto"}}}
    config |= {"zero_allow_untested_optimizer": True}
    del config["scheduler"]
    (tmp_path / "deepspeed.json").write_text(json.dumps(config))
    edited = str(tmp_path / "deepspeed.json")
    done = line(tmp_path / "out", batch=4, accumulate=2, deepspeed=edited, curve=False)
    assert done.steps == 60
    assert list(curve(tmp_path / "out", "error")) == [0, 60]
    assert done.after["error"] < 0.05
    assert list(curve(tmp_path / "out", "learning rate").values()) == pytest.approx([0.1] * 60)
    first = curve(undisturbed)[1]
    assert curve(tmp_path / "out")[1] == pytest.approx(first, rel=0.05)  # the same points, but in bfloat16
    assert curve(tmp_path / "out")[1] != first


@pytest.mark.parametrize(
    "text, words",
    [
        (None, "No such file"),
        ("{", "not JSON"),
        ("[]", "JSON object"),
        ('{"bf16": {}}', '"optimizer"'),
        ('{"optimizer": {"type": "auto"}}', '"type" cannot be "auto"'),
    ],
)
def test_bad_deepspeed_configurations_are_refused(tmp_path, text, words):
    path = tmp_path / "deepspeed.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=words):
        configuration.fill(configuration.read(str(path)), {"lr": 0.1})


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"batch": 0}, "--batch 0"),
        ({"epochs": 0}, "--epochs 0"),
        ({"learning_rate": float("nan")}, "--learning-rate"),
        ({"gpus_per_worker": 0.5}, "--gpus-per-worker 0.5: must be 0 or 1"),
    ],
)
def test_flags_that_make_no_sense_are_refused(line, tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        line(tmp_path, **changes)
