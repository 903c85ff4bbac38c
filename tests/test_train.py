"""The training loop on real Ray and DeepSpeed processes, with a task that takes no time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_task import CONFIG, Line

from cluster import training_config
from cluster.train import TrainingConfig, train
from patchrank.errors import UserError

HERE = Path(__file__).parent


@pytest.fixture(scope="module", autouse=True)
def workers_find_the_task():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), str(HERE.parent)]))
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # a lost worker is noticed sooner
        yield


def line(out, task=None, **changes):
    return train(task or Line(), TrainingConfig(str(out), **{**CONFIG, **changes}))


def curve(out, name="loss"):
    """A figure by step, as TensorBoard shows it."""
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    return {event.step: event.value for event in events.Scalars(name)}


def weights(out):
    return load_file(out / "line.safetensors")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of a training by one worker that nothing disturbed."""
    out = tmp_path_factory.mktemp("undisturbed") / "line"
    done = line(out, workers=1)
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


def test_two_workers_one_of_them_killed_learn_the_same(undisturbed, tmp_path):
    victims = []

    def kill() -> None:
        while not victims:
            time.sleep(0.02)
            if list((tmp_path / "checkpoints").glob("step-*/state/zero_pp_rank_1*")):
                found = workers(psutil.Process())
                victims.append(found[0].pid)
                found[0].kill()

    threading.Thread(target=kill, daemon=True).start()
    done = line(tmp_path, Line(pause=0.05), workers=2, batch=4)
    assert victims and done.resumed == 0
    assert_close(curve(tmp_path), curve(undisturbed))
    for name, value in weights(undisturbed).items():
        torch.testing.assert_close(weights(tmp_path)[name], value, rtol=1e-4, atol=1e-5)


def assert_close(curve, other):
    assert curve.keys() == other.keys()
    assert all(value == pytest.approx(other[step], rel=1e-3, abs=1e-5) for step, value in curve.items())


def workers(process):
    """The training workers of a process."""
    return [child for child in process.children(recursive=True) if "RayTrainWorker" in " ".join(child.cmdline())]


def test_a_stopped_training_goes_on_where_it_was_and_ends_the_same(undisturbed, tmp_path):
    command = [sys.executable, str(HERE / "tiny_task.py"), str(tmp_path), "0.1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        end = time.monotonic() + 120
        while not list((tmp_path / "checkpoints").glob("step-*/latest")):
            assert process.poll() is None and time.monotonic() < end, process.communicate()
            time.sleep(0.05)
        time.sleep(0.5)  # some steps further
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert not (tmp_path / "figures.json").exists()
    done = line(tmp_path, workers=1)
    assert 0 < done.resumed < 60
    assert curve(tmp_path) == curve(undisturbed)  # to the bit
    assert curve(tmp_path, "error") == curve(undisturbed, "error")
    assert all(value.equal(weights(undisturbed)[name]) for name, value in weights(tmp_path).items())


def test_a_finished_training_has_nothing_to_do(undisturbed):
    before = (undisturbed / "line.safetensors").stat().st_mtime_ns
    done = line(undisturbed, workers=1)
    assert done.resumed == done.steps == 60 and done.after["error"] < 0.05
    assert (undisturbed / "line.safetensors").stat().st_mtime_ns == before


def test_another_training_is_kept_out_of_the_folder(undisturbed):
    words = r"holds another training \(task.poison: null there, 5 now, learning_rate: 0.1 there, 0.2 now\)"
    with pytest.raises(UserError, match=words):
        line(undisturbed, Line(poison=5), workers=1, learning_rate=0.2)


def test_a_loss_that_is_no_number_stops_the_training_with_step_and_learning_rate(tmp_path):
    with pytest.raises(UserError, match=r"the loss of step 15 is nan, at learning rate 0\.09\d+;"):
        line(tmp_path, Line(poison=15), workers=1)
    assert not (tmp_path / "line.safetensors").exists()


def test_an_edited_deepspeed_configuration_counts(undisturbed, tmp_path):
    """bfloat16, SGD and no schedule, and two batches a step."""
    config = json.loads(training_config.DEFAULT.read_text())
    config |= {"bf16": {"enabled": True}, "optimizer": {"type": "SGD", "params": {"lr": "auto"}}}
    config |= {"zero_allow_untested_optimizer": True}
    del config["scheduler"]
    (tmp_path / "deepspeed.json").write_text(json.dumps(config))
    done = line(tmp_path / "out", workers=1, batch=4, accumulate=2, deepspeed=str(tmp_path / "deepspeed.json"))
    assert done.steps == 60
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
        training_config.fill(training_config.read(str(path)), {"lr": 0.1})


@pytest.mark.parametrize(
    "changes, words",
    [({"batch": 0}, "--batch 0"), ({"epochs": 0}, "--epochs 0"), ({"learning_rate": float("nan")}, "--learning-rate")],
)
def test_flags_that_make_no_sense_are_refused(tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        line(tmp_path, **changes)
