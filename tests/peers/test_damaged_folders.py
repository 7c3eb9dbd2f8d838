"""Folders that are damaged or hostile are refused, with what is wrong and where; folders are written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

safetensors = pytest.importorskip("safetensors.numpy", reason="needs the peers extra: pip install npattn[peers]")
pytest.importorskip("tokenizers", reason="needs the peers extra: pip install npattn[peers]")

from npattn.models import Model, byte_tokenizer, load, save
from npattn.models.layouts import layout_of
from npattn.models.trees import named_leaves, tree_map

GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 12, "n_head": 3, "n_layer": 2,
        "vocab_size": 257, "n_positions": 9}  # fmt: skip
LLAMA = {"model_type": "llama", "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 6,
         "num_key_value_heads": 2, "vocab_size": 31, "tie_word_embeddings": True,
         "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}  # fmt: skip
T5 = {"model_type": "t5", "d_model": 12, "d_ff": 20, "d_kv": 4, "num_layers": 2, "num_heads": 3, "vocab_size": 31}
BART = {"model_type": "bart", "d_model": 12, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 3,
        "decoder_attention_heads": 3, "encoder_ffn_dim": 20, "decoder_ffn_dim": 16, "vocab_size": 31,
        "max_position_embeddings": 9}  # fmt: skip
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def random_model(settings, seed=0, **options):
    rng, layout = np.random.default_rng(seed), layout_of(settings)

    def parameter(slot):
        return np.ascontiguousarray(slot.read(rng.standard_normal(slot.shape, np.float32)))

    return Model(layout.kind, layout.config, tree_map(parameter, layout.params), settings, **options)


@pytest.fixture
def place(tmp_path):
    save(tmp_path / "model", random_model(GPT2, generation={"max_new_tokens": 3}, tokenizer=byte_tokenizer()))
    return tmp_path / "model"


def contents(place):
    return {path.name: path.read_bytes() for path in place.iterdir()}


def same(a, b):
    a, b = named_leaves(a.params), named_leaves(b.params)
    return a.keys() == b.keys() and all(np.array_equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


def test_what_is_saved_is_what_is_loaded(place):
    model, again = random_model(GPT2), load(place)
    assert same(model, again)
    assert (again.config, again.kind) == (replace(model.config, implementation="blockwise"), model.kind)
    assert again.settings == {**GPT2, "dtype": "float32"}
    assert again.generation == {"max_new_tokens": 3}
    assert again.tokenizer.files == byte_tokenizer().files
    settings = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert set(contents(place)) == {WEIGHTS, *settings}


# --- damage ------------------------------------------------------------------------------------------------------------------


def header(place):
    data = (place / WEIGHTS).read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def with_header(**changes):
    """Damage: entries of the header are changed, None removes one."""

    def damage(place):
        entries, data = header(place)
        entries = {name: entry for name, entry in {**entries, **changes}.items() if entry is not None}
        text = json.dumps(entries).encode()
        (place / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data)

    return damage


def with_tensors(change):
    def damage(place):
        tensors = safetensors.load_file(place / WEIGHTS)
        change(tensors)
        safetensors.save_file(tensors, place / WEIGHTS)

    return damage


def with_config(**changes):
    def damage(place):
        settings = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps({**settings, **changes}))

    return damage


def with_file(name, data):
    def damage(place):
        (place / name).write_bytes(data.encode() if isinstance(data, str) else data)

    return damage


def both(*damages):
    return lambda place: [damage(place) for damage in damages]


def without(name):
    return lambda place: (place / name).unlink()


def cut(where):
    """Damage: the weights end at a share of their length."""

    def damage(place):
        data = (place / WEIGHTS).read_bytes()
        (place / WEIGHTS).write_bytes(data[: where if isinstance(where, int) else int(len(data) * where)])

    return damage


def sharded(change):
    """Damage: the weights stand in several files, and something is wrong with these or with their index."""

    def damage(place):
        save(place, load(place), shard_bytes=4000)
        index = json.loads((place / INDEX).read_text())
        change(place, index["weight_map"])
        (place / INDEX).write_text(json.dumps(index))

    return damage


def named(file):
    return sharded(lambda place, files: files.update({"transformer.wpe.weight": file}))


def pickled(place):
    (place / WEIGHTS).rename(place / "pytorch_model.bin")


def folder_for_file(name):
    def damage(place):
        (place / name).unlink()
        (place / name).mkdir()

    return damage


def in_another_shard(place, files):
    first, other = "transformer.wte.weight", next(file for file in files.values() if file != files["transformer.wte.weight"])
    files[first] = other


WPE = "transformer.wpe.weight"
HUGE = {"dtype": "F32", "shape": [10 << 20, 256 << 10], "data_offsets": [0, 10 << 40]}
DAMAGES = {
    "no folder": (shutil.rmtree, "model: not a folder"),
    "no config": (without("config.json"), "config.json: no such file"),
    "config is a folder": (folder_for_file("config.json"), "config.json: not a file"),
    "config is a dangling link": (both(without("config.json"), lambda place: (place / "config.json").symlink_to("x")),
                                  "config.json: no such file"),
    "config is empty": (with_file("config.json", ""), "config.json: Expecting value"),
    "config is no JSON": (with_file("config.json", "{'a': 1}"), "config.json: Expecting property name"),
    "config is no text": (with_file("config.json", b"\xff\xfe\xff{}"), "config.json: 'utf-16"),
    "config is a list": (with_file("config.json", "[1]"), "config.json: holds list, expected an object"),
    "config is deep": (with_file("config.json", "[" * 100_000), "config.json: "),
    "config has a long number": (with_file("config.json", '{"n_embd": ' + "9" * 5000 + "}"), "config.json: Exceeds the limit"),
    "no model_type": (with_config(model_type=None), "model_type is None, expected one of bart"),
    "unknown model_type": (with_config(model_type="mamba"), "model_type is 'mamba', expected one of bart"),
    "model_type is a list": (with_config(model_type=["gpt2"]), "model_type is .'gpt2'., expected one of bart"),
    "a size is a text": (with_config(n_embd="12"), "config.json: n_embd is '12', expected an integer"),
    "a size is a fraction": (with_config(n_embd=12.0), "config.json: n_embd is 12.0, expected an integer"),
    "a size is NaN": (with_config(n_embd=float("nan")), "config.json: n_embd is nan, expected an integer"),
    "a size is true": (with_config(n_layer=True), "config.json: n_layer is True, expected an integer"),
    "a size is 0": (with_config(n_head=0), "config.json: n_head is 0, expected an integer from 1"),
    "a size is negative": (with_config(n_layer=-1), "config.json: n_layer is -1, expected an integer from 1"),
    "a size is missing": (with_config(vocab_size=None), "config.json: vocab_size is None, expected an integer"),
    "a number is infinite": (with_config(layer_norm_epsilon=float("inf")), "layer_norm_epsilon is inf, expected a number"),
    "an unknown activation": (with_config(activation_function="tanh"), "activation_function is 'tanh', expected one of"),
    "the activation is a list": (with_config(activation_function=[]), "config.json: "),
    "heads do not divide": (with_config(n_head=5), "config.json: n_head is 5, expected a divisor of 12"),
    "2**31 layers": (with_config(n_layer=2**31), "n_layer is 2147483648, expected an integer from 1 to 10000"),
    "a vocabulary of 2**40": (with_config(vocab_size=2**40), "vocab_size is 1099511627776, expected an integer"),
    "a vocabulary of 2**31": (with_config(vocab_size=2**31),
                              "wte.weight has shape .257, 12., expected .2147483648, 12.: fixed"),
    "10,000 layers": (with_config(n_layer=10_000), "the tensor 'transformer.h.2.attn.c_attn.weight' is missing"),
    "only a pickle": (pickled, "has neither model.safetensors nor .*: pytorch_model.bin may hold code"),
    "no weights": (without(WEIGHTS), "has neither model.safetensors nor model.safetensors.index.json$"),
    "weights are a folder": (folder_for_file(WEIGHTS), WEIGHTS),
    **{f"weights end at {at}": (cut(at), f"{WEIGHTS}: ") for at in (0, 1, 7, 8, 9, 100, 0.05, 0.5, 0.999)},
    "weights have more": (lambda place: with_file(WEIGHTS, (place / WEIGHTS).read_bytes() + b"\0")(place), f"{WEIGHTS}: "),
    "a long header": (with_file(WEIGHTS, struct.pack("<Q", 2**63) + b"{}"), f"{WEIGHTS}: "),
    "the header is no JSON": (with_file(WEIGHTS, struct.pack("<Q", 5) + b"{'a':" + bytes(99)), f"{WEIGHTS}: "),
    "the header is a list": (with_file(WEIGHTS, struct.pack("<Q", 2) + b"[]"), f"{WEIGHTS}: "),
    "tensors overlap": (with_header(**{WPE: {"dtype": "F32", "shape": [9, 12], "data_offsets": [4, 436]}}), f"{WEIGHTS}: "),
    "a tensor beyond the file": (with_header(**{WPE: {"dtype": "F32", "shape": [9, 12], "data_offsets": [10**9, 10**9 + 432]}}),
                                 f"{WEIGHTS}: "),
    "offsets turned round": (with_header(**{WPE: {"dtype": "F32", "shape": [9, 12], "data_offsets": [432, 0]}}),
                             f"{WEIGHTS}: "),
    "a negative shape": (with_header(**{WPE: {"dtype": "F32", "shape": [-9, 12], "data_offsets": [0, 432]}}), f"{WEIGHTS}: "),
    "a shape that wraps": (with_header(**{WPE: {"dtype": "F32", "shape": [2**32, 2**32], "data_offsets": [0, 0]}}),
                           f"{WEIGHTS}: "),
    "a tensor of 10 TB": (with_header(**{WPE: HUGE}), f"{WEIGHTS}: "),
    "an unknown dtype": (with_header(**{WPE: {"dtype": "F33", "shape": [9, 12], "data_offsets": [0, 432]}}), f"{WEIGHTS}: "),
    "a tensor is missing": (with_tensors(lambda t: t.pop(WPE)), "the tensor 'transformer.wpe.weight' is missing .1 of 28"),
    "a tensor too many": (with_tensors(lambda t: t.update(x=t[WPE])),
                          f"{WEIGHTS}: holds the tensor 'x', which a model of this"),
    "a misshapen tensor": (with_tensors(lambda t: t.update({WPE: t[WPE].T.copy()})),
                           "wpe.weight has shape .12, 9., expected .9, 12.: fixed by config.json"),
    "a tensor of rank 1": (with_tensors(lambda t: t.update({WPE: t[WPE].reshape(-1)})),
                           "wpe.weight has shape .108,., expected"),
    "a tensor of int8": (with_tensors(lambda t: t.update({WPE: t[WPE].astype(np.int8)})),
                         "wpe.weight has dtype I8, expected one"),
    "a copy that differs": (with_tensors(lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"] + 1})),
                            f"{WEIGHTS}: lm_head.weight is not equal to transformer.wte.weight, though config.json"),
    "a copy that is misshapen": (with_tensors(lambda t: t.update({"lm_head.weight": t[WPE]})),
                                 "lm_head.weight has shape .9, 12."),
    "index: above": (named("../x.safetensors"), f"{INDEX}: names the file '../x.safetensors', expected the plain name"),
    "index: root": (named("/etc/passwd"), f"{INDEX}: names the file '/etc/passwd', expected the plain name"),
    "index: below": (named("a/b.safetensors"), f"{INDEX}: names the file 'a/b.safetensors', expected the plain name"),
    "index: a drive": (named("C:\\x.safetensors"), f"{INDEX}: names the file 'C:.*, expected the plain name"),
    "index: a pickle": (named("pytorch_model.bin"), f"{INDEX}: names the file 'pytorch_model.bin', expected the plain name"),
    "index: a number": (named(5), f"{INDEX}: has no weight_map of names to files"),
    "index: empty": (sharded(lambda place, files: files.clear()), "the tensor 'wte.weight' is missing .28 of 28"),
    "index: no JSON": (both(sharded(lambda place, files: None), with_file(INDEX, "{")), f"{INDEX}: Expecting"),
    "index: no file": (named("model-00009-of-00009.safetensors"), "model-00009-of-00009.safetensors: no such file, though"),
    "index: no tensor": (sharded(lambda place, files: files.update(x=files[WPE])), "tensor 'x' is not in the file, but in"),
    "index: another shard": (sharded(in_another_shard), "'transformer.wte.weight' is not in the file, but in"),
    "index: tensor not listed": (sharded(lambda place, files: files.pop(WPE)), f"{WPE}' is in the file, and not in"),
    "generation is no JSON": (with_file("generation_config.json", "{"), "generation_config.json: Expecting property name"),
    "generation is a list": (with_file("generation_config.json", "[]"), "generation_config.json: holds list"),
    "tokenizer is no JSON": (with_file("tokenizer.json", "{"), "tokenizer.json: EOF while parsing"),
    "tokenizer is no text": (with_file("tokenizer.json", b"\xff"), "tokenizer.json: 'utf-8' codec"),
    "tokenizer is of nothing": (with_file("tokenizer.json", "{}"), "tokenizer.json: "),
    "tokenizer_config is no JSON": (with_file("tokenizer_config.json", "{"), "tokenizer_config.json: Expecting property name"),
    "a token's name is a number": (with_file("tokenizer_config.json", '{"eos_token": 5}'), "5 is no name of a special token"),
    "half a tokenizer": (both(without("tokenizer.json"), with_file("vocab.json", "{}")),
                         "has vocab.json of a tokenizer, expected tokenizer.json, or one of these: vocab.txt"),
    "a cut sentencepiece model": (both(without("tokenizer.json"), with_file("spiece.model", b"\x0a\x0e\x0a")),
                                  "spiece.model: ends within a field"),
    "an endless number": (both(without("tokenizer.json"), with_file("spiece.model", b"\xff" * 9999)),
                          "spiece.model: ends within a field"),
    "an empty sentencepiece model": (both(without("tokenizer.json"), with_file("spiece.model", b"")),
                                     "spiece.model: is no model of sentencepiece"),
    "another file's merges": (both(without("tokenizer.json"), with_file("vocab.json", "{}"), with_file("merges.txt", "a b")),
                              "vocab.json: "),
    "a vocabulary of nothing": (both(without("tokenizer.json"), with_file("vocab.txt", "")), "vocab.txt: has no tokens"),
}  # fmt: skip


def refuse(place, match):
    """load raises ValueError that matches, and allocates nothing."""
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=match):
            load(place)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    return peak


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused(place, damage):
    change, match = DAMAGES[damage]
    change(place)
    # 10,000 layers are as many names as nobody has; whatever else is refused costs no more than the files and their modules.
    assert refuse(place, match) < (200 if "10,000" in damage else 20) << 20


@pytest.mark.parametrize(("settings", "match"), [
    ({**LLAMA, "num_key_value_heads": 4}, "num_key_value_heads is 4, expected a divisor of num_attention_heads, 6"),
    ({**LLAMA, "hidden_size": 13}, "num_attention_heads is 6, expected a divisor of 13, the width"),
    ({**LLAMA, "rope_parameters": {"rope_type": "yarn"}}, "rotary positions are of type 'yarn', expected one of default"),
    ({**LLAMA, "rope_parameters": {"rope_type": "linear"}}, "rotary positions of type 'linear' have no factor"),
    ({**LLAMA, "rope_parameters": [1]}, "config.json: "),
    ({**LLAMA, "tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes', expected true or false"),
    ({**LLAMA, "tie_word_embeddings": False}, "the tensor 'lm_head.weight' is missing .1 of"),
    ({**BART, "encoder_attention_heads": 5, "decoder_attention_heads": 5}, "encoder_attention_heads is 5, expected a divisor"),
    ({**BART, "decoder_attention_heads": 4}, "decoder_attention_heads is 4 in a model of type bart, expected 3"),
    ({**T5, "feed_forward_proj": "gated-x"}, "feed_forward_proj is 'gated-x', expected"),
])  # fmt: skip
def test_settings_that_do_not_fit_are_refused(settings, match, tmp_path):
    save(tmp_path, random_model({"llama": LLAMA, "bart": BART, "t5": T5}[settings["model_type"]]))
    with_file("config.json", json.dumps(settings))(tmp_path)
    assert refuse(tmp_path, match) < 20 << 20


def test_nothing_is_allocated_for_a_file_of_10_tb(place):
    """A file of holes, which takes no place on the disk, and whose header is right."""
    entries, data = header(place)
    end = len(data) + (10 << 40)
    entries["x"] = {"dtype": "U8", "shape": [10 << 40], "data_offsets": [len(data), end]}
    text = json.dumps(entries).encode()
    (place / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data)
    os.truncate(place / WEIGHTS, 8 + len(text) + end)
    assert refuse(place, "holds the tensor 'x'") < 20 << 20


@pytest.mark.parametrize("settings", [GPT2, LLAMA, T5, BART], ids=lambda s: s["model_type"])
def test_whatever_config_says_the_answer_is_a_model_or_a_value_error(settings, tmp_path):
    save(tmp_path, random_model(settings))
    values = [None, True, -1, 0, 1, 7, 2**40, 0.5, float("nan"), float("inf"), "x", [], [1], {}, {"rope_type": "linear"}]
    refused = 0
    for name in [*settings, "rope_scaling", "rope_theta", "norm_eps", "hidden_act", "dtype", "feed_forward_proj", "head_dim"]:
        for value in values:
            (tmp_path / "config.json").write_text(json.dumps({**settings, name: value}))
            try:
                load(tmp_path)
            except ValueError:
                refused += 1
    assert refused > 50


@pytest.mark.parametrize("name", ["config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json"])
def test_whatever_bytes_are_wrong_the_answer_is_a_model_or_a_value_error(place, name):
    rng, data = np.random.default_rng(0), (place / name).read_bytes()
    refused = 0
    for _ in range(150):
        wrong = bytearray(data)
        for at in rng.integers(0, min(len(data), 3000), rng.integers(1, 4)):
            wrong[at] = rng.integers(256) if rng.integers(2) else ord(rng.choice([*'{}[]",:0-9e.']))
        (place / name).write_bytes(wrong)
        try:
            load(place)
        except ValueError:
            refused += 1
    assert refused > 20


# --- what loads --------------------------------------------------------------------------------------------------------------


def test_links_as_the_cache_of_hugging_face_has_them(place, tmp_path):
    save(place, model := load(place), shard_bytes=4000)
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for n, path in enumerate(sorted(place.iterdir())):
        path.rename(blobs / f"{n:040x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{n:040x}")
    again = load(snapshot)
    assert same(again, model)
    assert again.tokenizer.size == 257


def test_a_pickle_beside_the_weights_is_not_read(place):
    with_file("pytorch_model.bin", b"whatever")(place)
    assert same(load(place), random_model(GPT2))


def test_any_one_of_the_tensors_that_are_equal_is_enough(place):
    with_tensors(lambda t: t.update({"lm_head.weight": t.pop("transformer.wte.weight")}))(place)
    assert same(load(place), random_model(GPT2))


def test_names_without_prefix_and_buffers_of_old_files(place):
    def change(tensors):
        for name in [*tensors]:
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = np.tril(np.ones((1, 1, 9, 9), np.uint8))

    with_tensors(change)(place)
    assert same(load(place), random_model(GPT2))


def test_loading_needs_little_more_memory_than_the_model(tmp_path):
    settings = {**GPT2, "n_embd": 252, "n_layer": 10, "vocab_size": 5000}
    save(tmp_path, random_model(settings))
    for dtype in (None, np.float64):
        load(tmp_path, dtype=dtype)  # imports count as memory
        tracemalloc.start()
        model = load(tmp_path, dtype=dtype)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        size = sum(x.nbytes for x in named_leaves(model.params).values())
        largest = max(x.nbytes for x in named_leaves(model.params).values())
        assert peak < size + 2 * largest + (4 << 20)


# --- saving ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [1, 4000, 20_000])
def test_shards(place, shard_bytes):
    model = load(place)
    save(place, model, shard_bytes=shard_bytes)
    files = [path for path in place.iterdir() if path.suffix == ".safetensors"]
    assert len(files) > 1
    assert not (place / WEIGHTS).exists()
    for path in files:
        tensors = safetensors.load_file(path)
        assert len(tensors) == 1 or sum(x.nbytes for x in tensors.values()) <= shard_bytes
    assert same(load(place), model)


@pytest.mark.parametrize("before", [1, 4000, 10**9])
@pytest.mark.parametrize("after", [1, 5000, 10**9])
def test_nothing_is_left_of_the_model_that_was_there(place, tmp_path, before, after):
    save(place, load(place), shard_bytes=before)
    mine = ("notes.txt", "pytorch_model.bin", "adapter.safetensors")  # not written by save: none of its business
    for name in mine:
        (place / name).write_text("mine")
    other = random_model(LLAMA)
    save(place, other, shard_bytes=after)
    save(tmp_path / "alone", other, shard_bytes=after)
    assert contents(place) == contents(tmp_path / "alone") | dict.fromkeys(mine, b"mine")
    assert same(load(place), other)


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("fails", ["mkdtemp", "second shard", "settings", "tokenizer"])
@pytest.mark.parametrize("error", [full_disk, KeyboardInterrupt])
def test_a_failure_leaves_the_folder_as_it_was(place, monkeypatch, fails, error):
    def fail(*args, **kwargs):
        full_disk() if error is full_disk else None
        raise KeyboardInterrupt

    calls, save_file = [], safetensors.save_file

    def second(*args, **kwargs):
        calls.append(1)
        return save_file(*args, **kwargs) if len(calls) < 2 else fail()

    before, other = contents(place), random_model(GPT2, seed=1, tokenizer=byte_tokenizer())
    if fails == "mkdtemp":
        monkeypatch.setattr(tempfile, "mkdtemp", fail)
    elif fails == "second shard":
        monkeypatch.setattr(safetensors, "save_file", second)
    elif fails == "settings":
        other = replace(other, settings={**GPT2, "x": object()})
    else:
        monkeypatch.setattr(type(other.tokenizer), "save", fail)
    expected = TypeError if fails == "settings" else KeyboardInterrupt if error is KeyboardInterrupt else OSError
    with pytest.raises(expected, match="No space" if expected is OSError else None):
        save(place, other, shard_bytes=4000)
    assert contents(place) == before


def test_a_limit_of_the_size_of_files_leaves_the_folder_as_it_was(place):
    resource = pytest.importorskip("resource", reason="needs a Unix")
    before, limits = contents(place), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"model\.safetensors: "):
            save(place, random_model(GPT2, seed=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(place) == before


@pytest.mark.parametrize("at", [0, 1, 3])
def test_an_interruption_while_files_are_moved_leaves_none_in_part(place, monkeypatch, tmp_path, at):
    other = random_model(GPT2, seed=1)
    before = contents(place)
    save(tmp_path / "whole", other, shard_bytes=9000)
    after, move, calls = contents(tmp_path / "whole"), os.replace, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) > at:
            raise KeyboardInterrupt
        move(*args)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(place, other, shard_bytes=9000)
    for name, data in contents(place).items():
        assert data in (before.get(name), after.get(name))


def test_a_folder_that_cannot_be_written_to(place, tmp_path, monkeypatch):
    with pytest.raises(OSError, match=r"config.json/x: cannot be written to: Not a directory"):
        save(place / "config.json" / "x", random_model(GPT2))
    with pytest.raises(OSError, match=r"config.json: cannot be written to: File exists"):
        save(place / "config.json", random_model(GPT2))
    if os.geteuid():
        place.chmod(0o500)
        with pytest.raises(OSError, match="model: cannot be written to: Permission denied"):
            save(place, random_model(GPT2))
        place.chmod(0o700)


def test_parameters_that_do_not_fit_the_settings_are_not_saved(tmp_path):
    model = random_model(GPT2)
    wide = model.params._replace(embed=model.params.embed._replace(positions=np.zeros((10, 12), np.float32)))
    cases = [
        (replace(model, params=wide), ValueError, "the parameter embed.positions has shape .10, 12., expected .9, 12."),
        (replace(model, params=model.params._replace(head=model.params.head._replace(w=wide.embed.table))), ValueError,
         "the parameter head.w is not in what model.settings describes"),
        (replace(model, params=model.params._replace(embed=model.params.embed._replace(positions=None))), ValueError,
         "the parameter embed.positions is missing in what model.settings describes"),
        (replace(model, config=replace(model.config, num_heads=4)), ValueError, "config has num_heads 4, and .* means 3"),
        (replace(model, settings={}), ValueError, "model_type is None"),
        (model.astype(np.longdouble), TypeError, "the parameters are (float128|longdouble), expected float64, float32"),
        (model.astype(np.complex128), TypeError, "the parameters are complex128, expected float64, float32"),
    ]  # fmt: skip
    for wrong, kind, match in cases:
        with pytest.raises(kind, match=match):
            save(tmp_path / "model", wrong)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("settings", [GPT2, LLAMA, T5, BART], ids=lambda s: s["model_type"])
def test_the_byte_order_of_arrays_does_not_matter(settings, tmp_path):
    model = random_model(settings)
    save(tmp_path, replace(model, params=tree_map(lambda x: x.astype(">f4"), model.params)))
    assert same(load(tmp_path), model)




@pytest.mark.parametrize("package", ["safetensors", "tokenizers"])
def test_a_missing_package_is_named_with_its_extra(place, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package} is missing, .*: pip install 'npattn\[models\]'"):
        load(place)


def test_importing_npattn_and_its_models_imports_no_optional_package():
    code = "import sys, npattn.models; print(*{'safetensors', 'tokenizers', 'ml_dtypes', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
    code = "import sys, npattn; print('npattn.models' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
