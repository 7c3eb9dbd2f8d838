"""``python -m benchmarks tasks``: what is learned in how many minutes, beside what needs no training.

A row is a score of held-out data after a time, from `npattn train`'s own functions with their presets. Other tasks are one
function more in TASKS.
"""

from __future__ import annotations

import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import harness

MINUTES = {"full": 15.0, "quick": 2.0, "tiny": None}


def lm(size: str, wanted: Callable[[str], bool]) -> Iterator[dict[str, Any]]:
    """Bits per byte of the held-out prose of Python: equal parameters, equal time."""
    from npattn.training import lm as task
    from npattn.training.texts import Texts, of_python

    texts = of_python()
    if size == "tiny":
        texts = Texts(texts.name, texts.train[:20], texts.held_out[:3])
    print(texts.described())
    if wanted("lm counts"):
        for name, bits in task.baselines(texts).items():
            yield {"name": f"lm counts, {name}", "score": bits, "unit": "bits per byte"}
    for arch in ("transformer", "lstm", "gru", "rnn"):
        for bpe in (None, 1024):
            name = f"lm {arch}, {'bytes' if bpe is None else f'{bpe} subwords'}"
            if wanted(name):
                with tempfile.TemporaryDirectory() as folder:
                    given = Namespace(
                        out=Path(folder), text=None, arch=arch, preset="tiny" if size == "tiny" else "small", bpe=bpe, seed=0,
                        steps=2 if size == "tiny" else None, minutes=MINUTES[size], resume=False, check_gradients=False,
                    )  # fmt: skip
                    started = time.monotonic()
                    trained = task.pretrain(given, print, texts)
                    yield {"name": name, "score": trained.bits_per_byte, "unit": "bits per byte",
                           "minutes": (time.monotonic() - started) / 60, "steps": len(trained.log)}  # fmt: skip


def question_answering(size: str, wanted: Callable[[str], bool]) -> Iterator[dict[str, Any]]:
    """Right answers about stories that are held out."""
    from npattn.training import question_answering as task

    if not wanted("question answering"):
        return
    started, most = time.monotonic(), MINUTES[size]
    minutes = None if most is None else most / 3
    model, trained = task.learn(task.reader(), steps=2 if size == "tiny" else None, minutes=minutes)
    took = {"minutes": (time.monotonic() - started) / 60, "steps": len(trained.log)}
    for facts in task.SENTENCES:
        stories, name = task.held_out(facts, 20 if size == "tiny" else task.TESTED, 0), f"question answering, facts: {facts}"
        yield {"name": name, "score": task.exact(task.answers(model, stories), stories).score, "unit": "accuracy", **took}
        yield {"name": f"{name}, place named last", "score": task.last_place(stories).score, "unit": "accuracy"}


def translation(size: str, wanted: Callable[[str], bool]) -> Iterator[dict[str, Any]]:
    """chrF and exact names of the held-out pairs of pycountry, English to French: what copying gives."""
    from npattn.training import translation as task

    pairs = task.catalogues()
    kinds: dict[str, Any] = {"copying decoder": {}, "plain decoder": {"copying": False}}
    for name, options in kinds.items():
        if wanted(f"translation {name}"):
            some, held_out = (pairs[:200], 10) if size == "tiny" else (pairs, task.HELD_OUT)
            made = task.Task(some, held_out=held_out, **options)
            params, spent = _trained(made, size)
            for title, found, more in (("copying the source", made.baseline(), {}),
                                       (name, made.scores(made.translations(params)), spent)):  # fmt: skip
                for score, unit in (("chrf", "chrF"), ("exact", "% exact")):
                    yield {"name": f"translation {title}", "score": found[score], "unit": unit, **more}


def summarization(size: str, wanted: Callable[[str], bool]) -> Iterator[dict[str, Any]]:
    """ROUGE of the held-out docstrings: what pre-training and copying give."""
    from npattn.training import summarization as task

    pairs, bert = task.docstrings(() if size == "tiny" else task.LIBRARIES), task.minilm()
    pairs = pairs[:200] if size == "tiny" else pairs
    shown = False
    kinds: dict[str, Any] = {
        "MiniLM, copying": {}, "MiniLM, plain": {"copying": False}, "from scratch, copying": {"pretrained": False},
        "from scratch, plain": {"pretrained": False, "copying": False},
    }  # fmt: skip
    for name, options in kinds.items():
        if wanted(f"summarization {name}"):
            made = task.Task(pairs, bert, held_out=10 if size == "tiny" else task.HELD_OUT, **options)
            params, spent = _trained(made, size)
            rows = {} if shown else made.baselines()
            shown = True
            for title, found in {**rows, name: made.scores(made.summaries(params))}.items():
                for score in task.NAMES:
                    yield {"name": f"summarization {title}", "score": found[score], "unit": score,
                           **(spent if title == name else {})}  # fmt: skip


def _trained(task: Any, size: str) -> tuple[Any, dict[str, Any]]:
    """The parameters of a task after its time, and what that took."""
    from npattn.training.loop import steps_in, train

    minutes = MINUTES[size]
    steps = 2 if minutes is None else steps_in(
        60 * minutes, task.model.params, task.loss_and_grads, task.batches, task.training(10))  # fmt: skip
    started = time.monotonic()
    trained = train(task.model.params, task.loss_and_grads, task.batches, task.training(steps), frozen=task.frozen)
    return trained.params, {"minutes": (time.monotonic() - started) / 60, "steps": steps}



TASKS: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {
    "lm": lm, "question answering": question_answering, "translation": translation, "summarization": summarization,
}  # fmt: skip
"""By name what yields the rows of a task: (size, wanted), with size full, quick or tiny, and which names are wanted."""


def run(size: str, plan: harness.Plan, text: str, done: Callable[[dict[str, Any]], None]) -> None:
    def wanted(name: str) -> bool:
        return harness.matches(text, name)

    for rows in TASKS.values():
        for row in rows(size, wanted):
            after = f" after {row['minutes']:.1f} minutes, {row['steps']} steps" if "minutes" in row else ""
            print(f"{row['name']:40} {row['score']:8.4f} {row['unit']}{after}", flush=True)
            done({"verb": "tasks", **row})
