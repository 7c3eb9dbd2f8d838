"""Summaries: a decoder that can copy, on top of a pretrained encoder that stays as it is.

    python examples/summarize.py DIR

The texts are docstrings of the installed libraries, and what is to be written is their first line. The model is in DIR then:
`npattn run summarization --model DIR` opens it. If it is interrupted, the same command goes on where it was.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from npattn import pipeline
from npattn.models import Model, save
from npattn.training.loop import train
from npattn.training.summarization import Task, docstrings, minilm
from npattn.training.text_to_text import Pair


def learn(folder: Path, pairs: Sequence[Pair], bert: Model, steps: int, **options) -> None:
    """Trains, and saves the model."""
    task = Task(pairs, bert, **options)
    trained = train(task.model.params, task.loss_and_grads, task.batches, task.training(steps), frozen=task.frozen,
                    folder=folder, resume=True, about={"texts": task.batches.sha256}, show=print)  # fmt: skip
    save(folder, replace(task.model, params=trained.params))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    place = Path(sys.argv[1])
    learn(place, docstrings(), minilm(), steps=2000)
    text = "The elements are sorted in place with a stable algorithm, and the sorted list is also returned to the caller."
    print(pipeline("summarization", model=place)(text)[0]["summary_text"])
