"""The loop: steps against loops written out, resuming to the last bit, what stops it, and what its checkpoints refuse."""

from __future__ import annotations

import builtins
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from npattn import Dropout, LinearParams, linear_backward, linear_forward
from npattn.gradients import GradcheckError
from npattn.models.trees import named_leaves, tree_map
from npattn.tolerances import MODEL_GRADIENT
from npattn.training import checkpoints, loop
from npattn.training.loop import NotFiniteError, Training, check_gradients, draw, steps_in, train
from npattn.training.optimizers import AdamW, clip_factor, global_norm

pytest.importorskip("safetensors", reason="needs the models extra: pip install npattn[models]")
START = (LinearParams(np.zeros((3, 2), np.float32), np.zeros(2, np.float32)), np.ones(2, np.float32))
SETTINGS = Training(steps=12, accumulate=2, lr=0.05, warmup=3, clip=0.5, keep_every=5, evaluate_every=4)


def batches(n):
    rng = np.random.default_rng((7, n))
    x = rng.standard_normal((4 + n % 3, 3))
    return x, x @ np.array([[1.0, -2], [0.5, 3], [2, 1]])


def loss_and_grads(params, batch, n):
    """With dropout, so that it depends on n, and with parts of a step that have different numbers of tokens."""
    of_linear, scale = params
    x, y = (z.astype(of_linear.w.dtype) for z in batch)
    drop = Dropout(0.2, seed=1, step=n).mask(x.shape, np.float64).astype(of_linear.w.dtype)
    out, cache = linear_forward(x * drop, of_linear)
    error = out * scale - y
    dout = 2 * error / y.size
    grads = (linear_backward(dout * scale, cache).params, (dout * out).sum(0))
    return (error**2).mean(), grads, len(x)


def evaluate(params):
    return {"size": float(np.square(params[0].w).sum())}


def train_here(folder=None, settings=SETTINGS, **options):
    return train(START, loss_and_grads, batches, settings, folder=folder, evaluate=evaluate, **options)


def losses(trained):
    return [line["loss"] for line in trained.log]


def same(a, b):
    return all(x.tobytes() == y.tobytes() for x, y in zip(named_leaves(a).values(), named_leaves(b).values(), strict=True))


def test_steps_are_those_of_the_equations():
    trained, optimizer = train_here(), AdamW(START, betas=SETTINGS.betas, weight_decay=SETTINGS.weight_decay)
    for step in range(SETTINGS.steps):
        parts = [loss_and_grads(optimizer.params, batches(n), n) for n in (2 * step, 2 * step + 1)]
        tokens = sum(count for *_, count in parts)
        a, b = (tree_map(lambda g, count=count: g * count, grads) for _, grads, count in parts)
        grads = tree_map(lambda x, y, tokens=tokens: (x + y) / tokens, a, b)
        assert trained.log[step]["loss"] == sum(float(loss) * count for loss, _, count in parts) / tokens
        optimizer.step(grads, SETTINGS.schedule()(step), clip_factor(global_norm(grads), SETTINGS.clip))
    assert same(trained.params, optimizer.params)
    assert not trained.interrupted
    assert [line["step"] for line in trained.log if "size" in line] == [4, 8, 12]


def test_parts_of_a_step_are_one_large_batch():
    """Tokens weigh the same in whichever part they are: up to rounding the gradient is that of all of them together."""

    def plain(params, batch, n):
        x, y = batch
        out, cache = linear_forward(x, params)
        return ((out - y) ** 2).mean(), linear_backward(2 * (out - y) / y.size, cache).params, len(x)

    def together(n):
        return tuple(np.concatenate(x) for x in zip(batches(2 * n), batches(2 * n + 1), strict=True))

    start = LinearParams(np.zeros((3, 2)), np.zeros(2))
    one = train(start, plain, together, Training(steps=3))
    two = train(start, plain, batches, Training(steps=3, accumulate=2))
    assert np.allclose(one.params.w, two.params.w, rtol=MODEL_GRADIENT)
    assert np.allclose(losses(one), losses(two), rtol=MODEL_GRADIENT)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at", [1, 5, 7, 11])
def test_interrupted_and_resumed_losses_are_equal_to_the_last_bit(tmp_path, at, number):
    whole = train_here(tmp_path / "whole")

    def interrupting(params, batch, n):
        if n == 2 * at - 1:  # within a step, which then is made to its end
            os.kill(os.getpid(), number)
        return loss_and_grads(params, batch, n)

    handler = signal.getsignal(number)
    first = train(START, interrupting, batches, SETTINGS, folder=tmp_path / "parts", evaluate=evaluate)
    assert (first.interrupted, len(first.log)) == (True, at)
    assert signal.getsignal(number) == handler
    lines = []
    rest = train_here(tmp_path / "parts", resume=True, show=lines.append)
    assert lines[0] == f"goes on from {tmp_path / 'parts' / f'step-{at:06}'}"
    assert losses(rest) == losses(whole)
    assert same(rest.params, whole.params)
    logged = [json.loads(line) for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in logged] == losses(whole)


def test_a_second_signal_ends_at_once(tmp_path):
    def interrupting(params, batch, n):
        if n == 6:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return loss_and_grads(params, batch, n)

    with pytest.raises(KeyboardInterrupt):
        train(START, interrupting, batches, SETTINGS, folder=tmp_path)
    assert checkpoints.found(tmp_path) is None
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


CHILD = """
import sys, time
sys.path[:0] = sys.argv[2:]
import test_loop
def slow(params, batch, n):
    time.sleep(0.01)
    return test_loop.loss_and_grads(params, batch, n)
test_loop.train(test_loop.START, slow, test_loop.batches, test_loop.Training(**{**vars(test_loop.SETTINGS), "keep_every": 1}),
                folder=sys.argv[1], evaluate=test_loop.evaluate, resume=True)
"""


def test_kill_9_leaves_a_checkpoint_to_go_on_from(tmp_path):
    """Killed again and again, each time somewhere else, until it is through."""
    settings = Training(**{**vars(SETTINGS), "keep_every": 1})
    whole = train_here(settings=settings)
    folder, killed = tmp_path / "killed", 0
    while True:
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(folder), str(Path(__file__).parent), *sys.path])
        steps = len(list(folder.glob("log.jsonl")) and (folder / "log.jsonl").read_text().splitlines())
        while child.poll() is None and killed < 2:
            log = folder / "log.jsonl"
            if log.exists() and len(log.read_text().splitlines()) >= steps + 3:
                child.send_signal(signal.SIGKILL)
                killed += 1
                break
            time.sleep(0.001)
        if child.wait() != -signal.SIGKILL:
            break
    assert killed == 2
    assert child.returncode == 0
    assert losses(train_here(folder, settings, resume=True)) == losses(whole)
    assert not list(folder.glob(".*")), "nothing half written is left"


def test_what_stops_between_two_renames_is_no_checkpoint(tmp_path, monkeypatch):
    """Ended at each of the calls that write a checkpoint, the last complete one is there, and it goes on."""
    whole = train_here()
    for name in ("rename", "replace", "fsync"):
        folder = tmp_path / name
        real, calls = getattr(os, name), []

        def ended(*args, calls=calls, real=real):
            calls.append(args)
            if len(calls) > 6 or (len(calls) > 1 and real is os.rename):
                raise KeyboardInterrupt
            return real(*args)

        with monkeypatch.context() as m:
            m.setattr(os, name, ended)
            with pytest.raises(KeyboardInterrupt):
                train_here(folder, Training(**{**vars(SETTINGS), "keep_every": 1}))
        assert losses(train_here(folder, Training(**{**vars(SETTINGS), "keep_every": 1}), resume=True)) == losses(whole)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    whole, write = train_here(), Path.write_bytes

    def full(path, data):
        if path.name == checkpoints.TENSORS and "step-000005" in os.listdir(tmp_path):
            write(path, data[: len(data) // 2])
            raise OSError(28, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"of step 10 could not be written; that of step 5 is left: .*No space left"):
        train_here(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["latest", "log.jsonl", "step-000005"]
    monkeypatch.undo()
    assert losses(train_here(tmp_path, resume=True)) == losses(whole)


def test_the_last_two_checkpoints_are_kept(tmp_path):
    train_here(tmp_path, Training(**{**vars(SETTINGS), "keep_every": 3}))
    assert sorted(os.listdir(tmp_path)) == ["latest", "log.jsonl", "step-000009", "step-000012"]
    with pytest.raises(ValueError, match=r"has a checkpoint, step-000012: go on from it with resume, or give another folder"):
        train_here(tmp_path)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flipped(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "cut": (lambda p: cut(p / "training.safetensors"), r"whose hash is not that in training.json: damaged, or cut short"),
    "flipped": (lambda p: flipped(p / "training.safetensors"), r"damaged, or cut short"),
    "no tensors": (lambda p: (p / "training.safetensors").unlink(), r"training.safetensors: No such file"),
    "no state": (lambda p: (p / "training.json").unlink(), r"training.json: no such file"),
    "half a state": (lambda p: cut(p / "training.json") or cut(p / "training.json"), r"training.json: Expecting"),
    "foreign": (lambda p: (p / "training.json").write_text('{"format": "other"}'), r"the format is 'other', expected 'npattn"),
    "another place": (lambda p: (p.parent / "latest").write_text("../other"), r"holds '../other', expected the name"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints_are_refused(tmp_path, damage):
    train_here(tmp_path)
    spoil, message = DAMAGES[damage]
    spoil(tmp_path / "step-000012")
    with pytest.raises(ValueError, match=message):
        train_here(tmp_path, resume=True)


def test_checkpoints_of_another_training_are_refused(tmp_path):
    train_here(tmp_path, about={"seed": 1})
    for options, message in (
        ({"about": {"seed": 2}}, r"is of another training: it has about.seed 1, expected 2"),
        ({"settings": Training(steps=12), "about": {"seed": 1}}, r"it has settings.accumulate 2, expected 1"),
        ({"frozen": lambda name: name == "1", "about": {"seed": 1}}, r"the parameters that are frozen differ"),
    ):
        with pytest.raises(ValueError, match=message):
            train_here(tmp_path, resume=True, **options)
    wider = (LinearParams(np.zeros((4, 2), np.float32), np.zeros(2, np.float32)), np.ones(2, np.float32))
    with pytest.raises(ValueError, match=r"params.0.w is float32 \(3, 2\), expected float32 \(4, 2\)"):
        train(wider, loss_and_grads, batches, SETTINGS, folder=tmp_path, about={"seed": 1}, resume=True)
    less = (LinearParams(np.zeros((3, 2), np.float32)), np.ones(2, np.float32))
    with pytest.raises(ValueError, match=r"0.b is not a tensor of this training"):
        train(less, loss_and_grads, batches, SETTINGS, folder=tmp_path, about={"seed": 1}, resume=True)


def test_frozen_parameters_stay_and_do_not_count_in_the_norm(tmp_path):
    trained = train_here(tmp_path, frozen=lambda name: name == "0.w")
    assert same(trained.params[0].w, START[0].w)
    first = loss_and_grads(START, batches(0), 0)[1], loss_and_grads(START, batches(1), 1)[1]
    moving = [np.concatenate([g[0].b, g[1]]).astype(float) for g in first]
    counts = [loss_and_grads(START, batches(n), n)[2] for n in (0, 1)]
    expected = np.linalg.norm((moving[0] * counts[0] + moving[1] * counts[1]) / sum(counts))
    assert math.isclose(trained.log[0]["norm"], expected, rel_tol=8 * np.finfo(np.float32).eps)
    assert losses(train_here(tmp_path, frozen=lambda name: name == "0.w", resume=True)) == losses(trained)


@pytest.mark.parametrize("where", ["loss", "0.b"])
def test_nan_stops_with_the_step_and_the_tensor(tmp_path, where):
    def spoiled(params, batch, n):
        loss, (linear, scale), tokens = loss_and_grads(params, batch, n)
        if n // 2 == 6:
            loss, linear = (np.nan, linear) if where == "loss" else (loss, linear._replace(b=linear.b * np.inf))
        return loss, (linear, scale), tokens

    message = "step 7: the loss is nan" if where == "loss" else r"step 7: the first gradient with it is 0.b: -?inf, 2 elements"
    with pytest.raises(NotFiniteError, match=message):
        train(START, spoiled, batches, SETTINGS, folder=tmp_path)
    assert checkpoints.found(tmp_path) == "step-000005"


def test_parameters_that_overflow_are_not_saved(tmp_path):
    """Gradients are finite here, and a rate of 1e38 is not what any schedule should have."""
    with pytest.raises(NotFiniteError, match=r"step 5: the first parameter with NaN or inf is 0\.w"):
        train(START, lambda params, batch, n: (0.0, tree_map(np.ones_like, START), 1), batches,
              Training(steps=12, lr=3e38, weight_decay=0.0, keep_every=5), folder=tmp_path)  # fmt: skip
    assert checkpoints.found(tmp_path) is None


def test_gradients_are_checked_against_a_complex_step():
    check_gradients(START, loss_and_grads, batches(0))

    def wrong(params, batch, n):
        loss, (linear, scale), tokens = loss_and_grads(params, batch, n)
        return loss, (linear._replace(b=linear.b * (1 + 1e-9)), scale), tokens

    with pytest.raises(GradcheckError, match=r"the gradient of 0.b is wrong: along a random direction the backward gives"):
        check_gradients(START, wrong, batches(0))

    def real(params, batch, n):
        loss, *rest = loss_and_grads(params, batch, n)
        return loss.real, *rest

    with pytest.raises(TypeError, match="the loss is real for complex parameters"):
        check_gradients(START, real, batches(0))


def test_lines_for_a_reader():
    lines = []
    train_here(show=lines.append)
    assert [line.split(",")[0] for line in lines] == ["step 4 of 12", "step 8 of 12", "step 12 of 12"]
    assert "tokens/s" in lines[0]
    assert "size" in lines[0]
    assert steps_in(0.1, START, loss_and_grads, batches, SETTINGS) >= 1


def test_the_loss_is_drawn(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="needs the plots extra: pip install npattn[plots]")
    draw(train_here().log, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")

    def without(name, *args, real=builtins.__import__):
        if name.startswith("matplotlib"):
            raise ImportError
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'npattn\[plots\]'"):
        draw([], tmp_path / "loss.png")


def test_bad_settings():
    for options, message in (({"steps": 0}, "steps"), ({"warmup": 5}, "warmup"), ({"clip": -1.0}, "clip")):
        with pytest.raises(ValueError, match=message):
            Training(**{"steps": 5, **options})
    with pytest.raises(TypeError, match="train: settings"):
        train(START, loss_and_grads, batches, None)
    assert loop.Training(**json.loads(json.dumps(vars(SETTINGS)))) == SETTINGS
