"""Is a review positive? MiniLM, fine-tuned on 2,386 labelled sentences, says it of yours.

    npm install --prefix DATA sentiment@5.0.2
    python examples/finetune.py DATA "What a film!" "It broke after a day."

Only the head is trained: the states of the sentences are computed once, and then it takes seconds. "all" as the way to
`fine_tune` trains every parameter in about ten minutes, and is right more often: see docs/tasks.md.
"""

from __future__ import annotations

import sys

from npattn import pipeline
from npattn.models import load
from npattn.training.sentiment import classifier, encoder_folder, fine_tune, held_out_accuracy, read, split


def main(data: str, *texts: str) -> None:
    parts = split(read(data), seed=0)
    model, _ = fine_tune(classifier(load(encoder_folder())), parts.train, "head")
    print("held-out accuracy", held_out_accuracy(model, parts.held_out))
    for text, found in zip(texts, pipeline("sentiment-analysis", model=model)(list(texts)), strict=True):
        print(f"{found['label']} {found['score']:.2f} {text}")


if __name__ == "__main__":
    main(*sys.argv[1:])
