"""Models in folders of Hugging Face: config.json, generation_config.json, safetensors, and the files of a tokenizer.

A folder is not trusted. Pickles are not read, and no code in it runs. Names in an index must be plain. All shapes are compared
with those that config.json asks for before anything is allocated. Symbolic links are followed: the cache of Hugging Face has
them.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from npattn.models import tokens
from npattn.models.config import Config
from npattn.models.encoders import TextHeadParams
from npattn.models.files import read_bytes, read_json, replacing
from npattn.models.layouts import Layout, Slot, layout_of
from npattn.models.model import Model, as_dtype
from npattn.models.trees import named_leaves, tree_map
from npattn.ops.checks import Array, computing_dtype

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG, GENERATION = "config.json", "generation_config.json"
MODULES, POOLING, SENTENCES = "modules.json", Path("1_Pooling", "config.json"), "sentence_bert_config.json"
MODES = {"first": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens", "last": "pooling_mode_lasttoken"}
OLD_NORM = re.compile(r"\.LayerNorm\.(gamma|beta)$")
OLD_NAMES = {"gamma": "weight", "beta": "bias"}  # of the first files of BERT
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
SHARD_BYTES = 5 << 30  # of a file of weights, as transformers had it for long


def load(folder: str | os.PathLike[str], *, dtype: Any = None) -> Model:
    """The model in a folder that transformers saved, or `save`.

    dtype : of the parameters; as in the file unless given, and float32 where the file has float16 or bfloat16
    What sentence-transformers wrote beside a BERT is used: how states are pooled, and the most tokens. Then BERT's own pooler
    is left out, so that ``model.forward(ids, inside=inside)`` gives the embeddings of sentences.
    Raises ValueError where the folder is damaged, or holds what is not known here: which file, what it has, what was expected.

    >>> from npattn.models import load
    >>> model = load("DIR")  # doctest: +SKIP
    >>> logits, _ = model.forward(model.tokenizer.encode("In the beginning").ids)  # doctest: +SKIP
    """
    place = Path(folder)
    if not place.is_dir():
        raise ValueError(f"{place}: not a folder")
    settings, generation = read_json(place / CONFIG), read_json(place / GENERATION, missing={})
    layout, tensors = layout_of(settings), _tensors(place)
    layout, tensors = _fitting(layout, tensors)
    tokenizer = tokens.load_tokenizer(place, settings)
    params = _read(layout, tensors, None if dtype is None else as_dtype(dtype))
    config = layout.config
    if isinstance(config, Config):
        config = replace(config, implementation="blockwise", **(_pooling(place) if layout.kind == "encoder" else {}))
        if config.pooling is not None and (params.head is None or getattr(params.head, "out", True) is None):
            params = params._replace(head=TextHeadParams())  # sentence-transformers does not use BERT's pooler
    longest = read_json(place / SENTENCES, missing={}).get("max_seq_length")
    return Model(layout.kind, config, params, settings, generation, tokenizer, longest if isinstance(longest, int) else None)


def _pooling(place: Path) -> dict[str, Any]:
    """What sentence-transformers does with the states of a text: fields of `Config`."""
    if not (place / MODULES).exists():
        return {}
    try:
        types = [str(module["type"]).rpartition(".")[2] for module in json.loads(read_bytes(place / MODULES))]
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{place / MODULES}: expected a list of modules with a type") from None
    if unknown := [t for t in types if t not in ("Transformer", "Pooling", "Normalize")]:
        raise ValueError(f"{place / MODULES}: has a module {unknown[0]}, expected Transformer, Pooling and Normalize")
    given = read_json(place / POOLING)
    kinds = [kind for kind, mode in MODES.items() if given.get(mode)]
    if len(kinds) != 1 or sum(bool(x) for name, x in given.items() if name.startswith("pooling_mode_")) != 1:
        raise ValueError(f"{place / POOLING}: expected one of {', '.join(MODES.values())} to be true, and no other mode")
    return {"pooling": kinds[0], "normalize": "Normalize" in types}


# --- reading -----------------------------------------------------------------------------------------------------------------


class _Tensor:
    """A tensor of a file: its shape and dtype are known, and it is read when it is asked for."""

    def __init__(self, file: Path, name: str, shape: tuple[int, ...], stored: str) -> None:
        self.file, self.name, self.shape, self.stored = file, name, shape, stored

    def read(self) -> Array:
        with _opened(self.file) as file:
            return np.asarray(file.get_tensor(self.name))  # of a file that is mapped: one copy, of this tensor alone


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ImportError("safetensors is missing, which reads the files of weights: pip install 'npattn[models]'") from None
    with contextlib.suppress(ImportError):
        import ml_dtypes  # noqa: F401  With it NumPy knows bfloat16.
    try:
        with safe_open(str(path), framework="np") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path}: {error}") from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None


def _tensors(place: Path) -> dict[str, _Tensor]:
    """All tensors of a folder, by name. Where there is one file with all of them it counts, as in transformers."""
    index = place / INDEX
    if os.path.lexists(place / WEIGHTS):
        return _of_file(place / WEIGHTS)
    if not os.path.lexists(index):
        pickles = sorted(p.name for p in place.iterdir() if p.suffix in PICKLES)
        why = f": {', '.join(pickles)} may hold code, which reading would run; save the model as safetensors" if pickles else ""
        raise ValueError(f"{place}: has neither {WEIGHTS} nor {INDEX}{why}")
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(f, str) for f in names.values()):
        raise ValueError(f"{index}: has no weight_map of names to files")
    for file in names.values():
        if not _plain(file):
            raise ValueError(f"{index}: names the file {file!r}, expected the plain name of a file in {place}")
    found: dict[str, _Tensor] = {}
    for file in dict.fromkeys(names.values()):
        if not (place / file).exists():
            raise ValueError(f"{place / file}: no such file, though {INDEX} names it")
        there = _of_file(place / file)
        listed = {name for name, of in names.items() if of == file}
        if wrong := sorted(listed ^ set(there)):
            where = "is in the file, and not in" if wrong[0] in there else "is not in the file, but in"
            raise ValueError(f"{place / file}: the tensor {wrong[0]!r} {where} {INDEX} ({len(wrong)} such tensors)")
        found |= there
    return found


def _plain(name: str) -> bool:
    return name not in ("", ".", "..") and not any(c in name for c in "/\\\0:") and name.endswith(".safetensors")


def _of_file(path: Path) -> dict[str, _Tensor]:
    with _opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  It is no mapping.
        return {n: _Tensor(path, n, tuple(s.get_shape()), str(s.get_dtype())) for n, s in slices.items()}


def _fitting(layout: Layout, tensors: Mapping[str, _Tensor]) -> tuple[Layout, dict[str, _Tensor]]:
    """The layout with the names that the files have, and the tensors. Raises where one is missing, superfluous or misshapen."""
    if layout.prefix and not any(name.startswith(layout.prefix) for name in tensors):
        layout = layout.without_prefix()
    if layout.kind == "encoder" and not any("pooler." in name for name in tensors):
        layout = layout.without_pooler()
    found = {OLD_NORM.sub(lambda m: f".LayerNorm.{OLD_NAMES[m[1]]}", name): tensor for name, tensor in tensors.items()}
    for name, of in layout.copies.items():
        if of not in found and name in found:  # a file may hold any one of those that are equal
            found[of] = found[name]
    expected = {slot.name: slot.shape for slot in layout.slots()}
    if missing := [name for name in expected if name not in found and name not in layout.optional]:
        raise ValueError(f"the tensor {missing[0]!r} is missing ({len(missing)} of {len(expected)} are), expected of shape "
                         f"{expected[missing[0]]}")  # fmt: skip
    known = {*expected, *layout.copies}
    if more := [name for name in found if name not in known and not name.endswith(layout.ignored or ("\0",))]:
        raise ValueError(f"{found[more[0]].file}: holds the tensor {more[0]!r}, which a model of this kind does not have "
                         f"({len(more)} such tensors)")  # fmt: skip
    shapes = expected | {name: expected[of] for name, of in layout.copies.items()}
    for name, shape in ((name, shape) for name, shape in shapes.items() if name in found):
        tensor = found[name]
        if tensor.shape != shape:
            raise ValueError(f"{tensor.file}: {name} has shape {tensor.shape}, expected {shape}: fixed by config.json")
        if tensor.stored not in DTYPES:
            raise ValueError(f"{tensor.file}: {name} has dtype {tensor.stored}, expected one of {', '.join(DTYPES)}")
    return layout, found


def _read(layout: Layout, tensors: Mapping[str, _Tensor], dtype: np.dtype[Any] | None) -> Any:
    """The parameters. A tensor that several of them share is read once; copies of a tensor are compared with it."""
    stored = {DTYPES[tensors[slot.name].stored] for slot in layout.slots() if slot.name in tensors}
    if dtype is None:
        dtype = np.dtype("float64" if "float64" in stored else "float32")
    if computing_dtype(dtype) is None:
        raise TypeError(f"load: dtype is {dtype}, expected one that npattn computes with")
    for name, of in layout.copies.items():
        if name in tensors and of in tensors and not np.array_equal(tensors[name].read(), tensors[of].read()):
            raise ValueError(f"{tensors[name].file}: {name} is not equal to {of}, though config.json says that they are one")
    last: dict[str, Array] = {}

    def parameter(slot: Slot) -> Array:
        if slot.name not in tensors:
            last[slot.name] = np.zeros(slot.shape, dtype)
        elif slot.name not in last:
            last.clear()  # parameters that share a tensor stand beside each other
            last[slot.name] = tensors[slot.name].read().astype(dtype, copy=False)
        return np.ascontiguousarray(slot.read(last[slot.name]))

    return tree_map(parameter, layout.params)


# --- writing -----------------------------------------------------------------------------------------------------------------


def save(folder: str | os.PathLike[str], model: Model, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes a folder that `load` and transformers read: weights as safetensors, the settings and the tokenizer.

    shard_bytes : of a file of weights at most; a tensor that is larger has a file of its own
    All files are written beside their places, and then moved there, so that none is ever there in part and a failure leaves the
    folder as it was. Files of another model are removed: weights as safetensors, tokenizer and settings, and nothing else.
    Raises TypeError, ValueError where parameters and ``model.settings`` do not fit, OSError.

    >>> from npattn.models import save
    >>> save("DIR", model.astype("float16"))  # doctest: +SKIP
    """
    parts = _parts(model, model.params)
    meant = layout_of(model.settings).config
    pooled = {name: getattr(model.config, name) for name in ("pooling", "normalize") if hasattr(model.config, name)}
    for field in fields(meant):
        given, expected = getattr(model.config, field.name), getattr(meant, field.name)
        if given != expected and field.name not in ("implementation", *pooled):
            raise ValueError(f"save: model.config has {field.name} {given!r}, and model.settings means {expected!r}")
    if model.dtype.name not in DTYPES.values():
        raise TypeError(f"save: the parameters are {model.dtype}, expected {', '.join(DTYPES.values())}: see model.astype")
    settings = {**model.settings, "dtype": model.dtype.name}
    settings.pop("torch_dtype", None)
    with replacing(Path(folder), _ours) as place:
        _write_tensors(place, parts, shard_bytes)
        for name, values in ((CONFIG, settings), (GENERATION, model.generation)):
            if values:
                (place / name).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if model.tokenizer is not None:
            model.tokenizer.save(place)
        if any(getattr(meant, name) != x for name, x in pooled.items()):
            _write_pooling(place, model.config.pooling or "first", model.config.normalize)
        if model.longest is not None:
            (place / SENTENCES).write_text(json.dumps({"max_seq_length": model.longest, "do_lower_case": False}) + "\n")


def _write_pooling(place: Path, pooling: str, normalize: bool) -> None:
    modules = [("", "Transformer"), (POOLING.parent.name, "Pooling"), *([("2_Normalize", "Normalize")] if normalize else [])]
    listed = [{"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{kind}"}
              for n, (path, kind) in enumerate(modules)]  # fmt: skip
    (place / MODULES).write_text(json.dumps(listed, indent=2) + "\n")
    for path, _ in modules[1:]:
        (place / path).mkdir()
    modes = {mode: kind == pooling for kind, mode in MODES.items()}
    (place / POOLING).write_text(json.dumps(modes, indent=2) + "\n")


def _ours(name: str) -> bool:
    shard = r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"
    return re.fullmatch(shard, name) is not None or name in (CONFIG, GENERATION, MODULES, SENTENCES, *tokens.FILES)


def as_tensors(model: Model, params: Any = None) -> dict[str, Array]:
    """Parameters, or gradients of them, by the names and in the shapes that transformers has.

    >>> from npattn.models.folder import load
    >>> gradients = as_tensors(load("DIR"), grads.params)  # doctest: +SKIP
    """
    parts = _parts(model, model.params if params is None else params)
    if params is not None:
        parts = {name: [(slot.of_gradient(), x) for slot, x in of_tensor] for name, of_tensor in parts.items()}
    return {name: _tensor(of_tensor) for name, of_tensor in parts.items()}


Parts = dict[str, list[tuple[Slot, Array]]]  # by the name of a tensor the parameters that it holds


def _parts(model: Model, params: Any) -> Parts:
    layout = layout_of(model.settings)
    names = model.settings.get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else ""  # such as GPT2Model, or GPT2LMHeadModel
    if layout.kind == "encoder" and not named_leaves(model.params.head):
        layout = layout.without_pooler()
    if name.endswith("Model") and not name.endswith(("HeadModel", "HeadsModel", "MTModel")):
        layout = layout.without_prefix()  # as a model without a head has it
    slots, arrays = named_leaves(layout.params), named_leaves(params)
    if wrong := sorted(set(slots) ^ set(arrays)):
        raise ValueError(f"the parameter {wrong[0]} is {'missing' if wrong[0] in slots else 'not'} in what model.settings "
                         f"describes ({len(wrong)} such parameters)")  # fmt: skip
    parts: Parts = {}
    for path, slot in slots.items():
        expected = slot.read(np.broadcast_to(np.float32(0), slot.shape)).shape
        if arrays[path].shape != expected:
            found = arrays[path].shape
            raise ValueError(f"the parameter {path} has shape {found}, expected {expected}: fixed by model.settings")
        parts.setdefault(slot.name, []).append((slot, arrays[path]))
    return parts


def _tensor(parts: list[tuple[Slot, Array]]) -> Array:
    tensor = np.empty(parts[0][0].shape, np.dtype(parts[0][1].dtype.name))  # in the byte order of this machine
    for slot, x in parts:
        slot.write(x, tensor)
    return tensor


def _write_tensors(place: Path, parts: Parts, shard_bytes: int) -> None:
    try:
        from safetensors import SafetensorError
        from safetensors.numpy import save_file
    except ImportError:
        raise ImportError("safetensors is missing, which writes the files of weights: pip install 'npattn[models]'") from None
    sizes = {name: math.prod(slots[0][0].shape) * slots[0][1].dtype.itemsize for name, slots in parts.items()}
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    files = [WEIGHTS]
    if len(shards) > 1:
        files = [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
        of = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        whole = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": of}
        (place / INDEX).write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    for file, names in zip(files, shards, strict=True):
        try:
            save_file({name: _tensor(parts[name]) for name in names}, place / file, metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            raise OSError(f"{file}: {error}") from None


__all__ = ["as_tensors", "load", "save"]
