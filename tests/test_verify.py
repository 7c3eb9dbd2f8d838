"""`npattn verify` and `npattn env`: exit status, what is said, and the four candidates that have to be told apart."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from npattn import attention_backward, attention_forward, cli
from npattn.verify import CASES, CASES_OF, Candidate, examine, load, verify

GOOD = '''
    import numpy as np

    def forward(q, k, v, *, mask=None, bias=None, scale=None, softcap=None, sink=None, dropout_mask=None):
        """Written out once more, in the inputs' precision: dense NumPy."""
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        group = q.shape[1] // k.shape[1] if k.shape[1] else 1
        k, v = k.repeat(group, 1), v.repeat(group, 1)
        with np.errstate(all="ignore"):
            s = scale * (q @ k.swapaxes(-1, -2))
            if softcap is not None:
                s = softcap * np.tanh(s / softcap)
            allowed = np.ones(s.shape, bool) if mask is None else np.broadcast_to(mask, s.shape)
            if bias is not None:
                s, allowed = s + bias, allowed & (bias > -np.inf)
            s = np.where(allowed, s, -np.inf)
            top = s.max(-1, keepdims=True, initial=-np.inf)
            if sink is not None:
                top = np.maximum(top, sink[:, None, None])
            top = np.where(top == -np.inf, s.dtype.type(0), top)
            e = np.exp(s - top)
            z = e.sum(-1, keepdims=True) + (0 if sink is None else np.exp(sink[:, None, None] - top))
            p = np.where(allowed, e / np.where(z == 0, s.dtype.type(1), z), s.dtype.type(0))
            w = p if dropout_mask is None else p * dropout_mask
            # A value that is not finite reaches the queries that see it, and no other.
            finite = np.isfinite(v).all((0, 1, 3))
            out = w @ np.where(finite[:, None], v, v.dtype.type(0))
            for j in np.flatnonzero(~finite):
                out += np.where(allowed[..., j : j + 1], w[..., j : j + 1] * v[:, :, j : j + 1], v.dtype.type(0))
            return out, (top + np.log(z))[..., 0]

    def backward(dout, q, k, v, *, mask=None, bias=None, scale=None, softcap=None, sink=None, dropout_mask=None, dlse=None):
        from npattn import attention_backward, attention_forward
        options = dict(mask=mask, bias=bias, scale=scale, softcap=softcap, sink=sink, dropout_mask=dropout_mask)
        g = attention_backward(dout, attention_forward(q, k, v, **options)[1], dlse)
        return {"dq": g.q, "dk": g.k, "dv": g.v, "dbias": g.bias, "dsink": g.sink}

    def causal_wrong(q, k, v, *, mask=None, scale=None, causal=False):
        """Aligned with the last key, under a declared top_left."""
        if causal:
            lower = np.tri(q.shape[-2], k.shape[-2], k.shape[-2] - q.shape[-2], dtype=bool)
            mask = lower if mask is None else mask & lower
        return forward(q, k, v, mask=mask, scale=scale)

    def group_forgotten(dout, q, k, v, **options):
        """dk of one head of each group in place of their sum."""
        g = backward(dout, q, k, v, **options)
        group = q.shape[1] // k.shape[1] if k.shape[1] else 1
        if group > 1:
            options = {n: x for n, x in options.items()}
            sliced = {n: (x[:, ::group] if np.ndim(x) == 4 and np.shape(x)[1] > 1 else x[::group] if n == "sink" else x)
                      for n, x in options.items()}
            if sliced.get("dlse") is not None:
                sliced["dlse"] = options["dlse"][:, ::group]
            g["dk"] = backward(dout[:, ::group], q[:, ::group], k, v, **sliced)["dk"]
        return g

    def dlse_ignored(dout, q, k, v, *, dlse=None, **options):
        return backward(dout, q, k, v, **options)

    def half_inside(q, k, v, **options):
        def half(x):
            with np.errstate(over="ignore"):
                return x.astype(np.float16).astype(x.dtype) if getattr(x, "dtype", None) in ("f4", "f8") else x

        return forward(half(q), half(k), half(v), **{n: half(x) for n, x in options.items()})
'''


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(textwrap.dedent(GOOD))
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        status = cli.main(["verify", *([] if any(a.startswith("--list") for a in arguments) else ["-v"]), *arguments])
        return status, capsys.readouterr().out

    return run


@pytest.fixture
def few(monkeypatch):
    """Every fifth case, and one of each feature, in place of all."""
    first = {feature: case for case in reversed(CASES) for feature in case.features}
    cases = [case for i, case in enumerate(CASES) if i % 5 == 0 or case in first.values()]
    assert len(cases) < len(CASES) / 2
    monkeypatch.setitem(CASES_OF, "attention", cases)
    return cases


@pytest.mark.parametrize(
    "table", ["few", pytest.param("all", marks=pytest.mark.slow)]
)
def test_the_default_verifies_blockwise_and_everything_is_tested(run, table, request):
    if table == "few":
        request.getfixturevalue("few")
    status, text = run()
    assert status == 0
    assert "RIGHT: blockwise holds in all that was tested" in text
    assert "not supported" not in text
    assert "WRONG" not in text


def test_a_good_candidate_passes(run, few):
    status, text = run("mine.py:forward", "--backward", "backward")
    assert status == 0, text[-3000:]
    assert "RIGHT" in text
    assert "it looks like" not in text


@pytest.mark.parametrize(
    ("arguments", "case", "line", "diagnosis"),
    [
        (["mine.py:causal_wrong"], "causal top_left + L > S", "out[", "causal=bottom_right"),
        (["mine.py:forward", "--backward", "group_forgotten"], "G < H", "dk[", "dk of the first head of a group alone"),
        (["mine.py:forward", "--backward", "dlse_ignored"], "dlse", "dq[", "dlse=ignored"),
        (["mine.py:half_inside", "--backward", "backward"], "plain", "out[", "inputs rounded to 11 bits"),
    ],
    ids=["causal alignment", "group sum", "dlse ignored", "float16 inside"],
)
def test_four_that_are_wrong_are_told_apart(run, arguments, case, line, diagnosis):
    status, text = run(*arguments, "--case", case)
    assert status == 1
    lines = text.splitlines()
    (at,) = [i for i, shown in enumerate(lines) if shown.startswith("  WRONG ") and shown[9:50].strip() == case]
    told = lines[at + 1].strip()
    assert told.startswith(line)
    assert "expected" in told
    assert "sigma" in told
    assert "elements" in told
    (found,) = [shown for shown in lines if shown.startswith("           => ")]
    assert f"matches {diagnosis}" in found
    table = lines[next(i for i, shown in enumerate(lines) if shown.startswith("it looks like")) + 1]
    assert table.split("  ")[1] == diagnosis


def test_they_differ_in_where_they_are_wrong(run):
    _, text = run("mine.py:forward", "--backward", "dlse_ignored", "--case", "float64 softcap + sink + dlse")
    assert "  dsink[" in text
    assert "  lse[" not in text.split("feature")[0]
    _, text = run("mine.py:forward", "--backward", "group_forgotten", "--case", "G < H")
    assert "dv[" not in text.split("feature")[0]
    status, _ = run("mine.py:forward", "--backward", "group_forgotten", "--case", "softcap + sink")
    assert status == 0
    status, _ = run("mine.py:causal_wrong", "--causal", "bottom_right", "-k", "causal")
    assert status == 0


def test_what_is_not_supported_is_read_off_the_signature(run, tmp_path, few):
    (tmp_path / "plain.py").write_text(
        "from mine import forward\n\ndef only(q, k, v, *, scale=None):\n    return forward(q, k, v, scale=scale)[0]\n"
    )
    status, text = run("plain.py:only")
    assert status == 0
    coverage = text[text.index("\ntested ") :]
    for feature in ("mask", "bias", "softcap", "sink", "dropout_mask", "backward not given", "lse is not returned"):
        assert feature in coverage
    assert run("plain.py:only", "--require", "sink")[0] == 3
    assert run("plain.py:only", "--require", "scale")[0] == 0
    assert run("plain.py:only", "--require", "backward")[0] == 3
    assert run("plain.py:only", "-k", "softcap + sink")[0] == 2


def test_not_implemented_is_not_supported_and_anything_else_is_wrong():
    def refuses(q, k, v, *, mask=None):
        if mask is not None:
            raise NotImplementedError("masks on the second device")
        return attention_forward(q, k, v)[0]

    def breaks(q, k, v, *, mask=None):
        raise RuntimeError("out of shared memory")

    by_name = {c.name: c for c in CASES}
    result = examine(Candidate("refuses", refuses), by_name["mask array"])
    assert result.status == "refused"
    assert "second device" in result.checks[0].text
    assert examine(Candidate("refuses", refuses), by_name["plain"]).status == "ok"
    result = examine(Candidate("breaks", breaks), by_name["plain"])
    assert result.status == "wrong"
    assert "raises RuntimeError: out of shared memory" in result.checks[0].text


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda q, k, v: attention_forward(q, k, v)[0].astype(np.float64), "has dtype float64, expected float32"),
        (lambda q, k, v: attention_forward(q, k, v)[0][..., :1], "has shape"),
        (lambda q, k, v: attention_forward(q, k, v)[0].tolist(), "expected a numpy.ndarray"),
        (lambda q, k, v: (q.__imul__(1.5), attention_forward(q, k, v)[0])[1], "an input was modified"),
        (lambda q, k, v: np.zeros_like(attention_forward(q, k, v)[0]), "expected"),
        (lambda q, k, v: np.full_like(attention_forward(q, k, v)[0], np.nan), "is nan, expected"),
    ],
    ids=["dtype", "shape", "kind", "modified", "zeros", "nan"],
)
def test_what_a_wrong_output_is_called(function, text):
    result = examine(Candidate("wrong", function), next(c for c in CASES if c.name == "plain"))
    assert result.status == "wrong"
    assert text in result.checks[0].text


def test_the_backward_gets_what_it_names():
    seen = {}

    def forward(q, k, v):
        return attention_forward(q, k, v, return_lse=True)[0]

    def backward(dout, q, k, v, *, out, lse, dlse=None):
        seen["out"], seen["lse"] = out, lse
        g = attention_backward(dout, attention_forward(q, k, v)[1], dlse)
        return g.q, g.k, g.v

    (case,) = [c for c in CASES if c.name == "dlse"]
    result = examine(Candidate("own", forward, backward), case)
    assert [c.status for c in result.checks] == ["ok"] * 5
    assert seen["lse"].shape == seen["out"].shape[:-1]


def test_stop_list_json_and_usage(run, tmp_path, capsys):
    _, text = run("mine.py:half_inside", "-x")
    assert text.count("\n  WRONG ") + text.startswith("  WRONG ") == 1
    assert "stopped after 1 of" in text
    status, text = run("--list", "-k", "dead")
    assert status == 0
    assert "dead rows + sink" in text
    status, _ = run("blockwise", "-k", "sink", "--json", "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert status == 0
    assert found["candidate"] == "blockwise"
    assert found["total"] >= found["tested"] > 20
    assert {"case", "features", "checks", "status"} <= set(found["results"][0])
    for arguments in (
        ["-k", "plain", "--json", "no/such/folder.json"],
        ["nothing"],
        ["mine.py:absent"],
        ["absent.py:f"],
        ["no_such_package:f"],
        ["-k", "no such case"],
        ["--require", "telepathy"],
        ["blockwise", "--backward", "f"],
        ["mine.py:np"],
    ):
        assert cli.main(["verify", *arguments]) == 2, arguments
        assert capsys.readouterr().err.startswith("npattn verify: ")
    with pytest.raises(SystemExit, match="2"):
        cli.main(["verify", "--causal", "left"])


def test_a_candidate_takes_causal_window_and_key_lengths_its_own_way():
    calls = []

    def forward(q, k, v, *, causal=False, window=None, key_lengths=None):
        calls.append((causal, window, key_lengths))
        L, S = q.shape[-2], k.shape[-2]
        distance = np.arange(S) - np.arange(L)[:, None]
        mask = np.ones((1, 1, L, S), bool)
        if causal:
            mask = mask & (distance <= 0)
        if window is not None:
            mask = mask & (distance >= -window[0]) & (distance <= window[1])
        if key_lengths is not None:
            mask = mask & (np.arange(S) < key_lengths[:, None, None, None])
        return attention_forward(q, k, v, mask=mask)[0]

    names = ("causal top_left", "window", "key_lengths", "window + key_lengths", "causal top_left + key_lengths")
    results = verify(forward, cases=[c for c in CASES if c.name in names]).results
    assert [r.status for r in results] == ["ok"] * 5
    assert any(c[1] is not None and c[2] is not None for c in calls)
    (r,) = verify(forward, cases=[c for c in CASES if c.name == "causal bottom_right"]).results
    assert r.status == "not supported"
    assert "causal bottom_right" in r.checks[0].text


@pytest.mark.parametrize(
    ("case", "line"),
    [
        ("scale 0", "scale = q.shape[-1] ** -0.5 if not scale else scale"),
        ("NaN in values that are seen", "v = np.nan_to_num(v)"),
        ("NaN in a key that is seen", "k = np.nan_to_num(k)"),
        ("sink of -inf", "sink = None if sink is None else np.where(sink == -np.inf, np.float32(np.nan), sink)"),
        (
            "mask of one row",
            "mask = None if mask is None else np.broadcast_to(mask[..., :1, :] & (mask.shape[-2] > 1), mask.shape)",
        ),
    ],
)
def test_small_lies_are_seen(case, line):
    scope: dict = {}
    text = textwrap.dedent(GOOD).replace("group = q.shape[1]", f"{line}\n    group = q.shape[1]", 1)
    exec(text, scope)
    (case,) = [c for c in CASES if c.name == case]
    assert examine(Candidate("lie", scope["forward"]), case).status == "wrong"
    exec(textwrap.dedent(GOOD), scope)
    assert examine(Candidate("honest", scope["forward"]), case).status == "ok"


def test_a_keyword_by_another_name_is_pointed_out(run, tmp_path):
    (tmp_path / "named.py").write_text(
        "from mine import forward\n\ndef f(q, k, v, *, is_causal=False):\n    return forward(q, k, v)\n"
    )
    _, text = run("named.py:f", "-k", "plain")
    assert "also takes is_causal, which verify never gives" in text


def test_places_are_named_by_the_tensor():
    from npattn.verify.judge import compare

    want, sigma = np.zeros((2, 3, 4), np.float32), np.full((2, 3, 4), 1e-7)
    got = want.copy()
    got[1] = 1
    assert "batch 1" in compare("lse", got, want, sigma, [np.float32], letters="BHL").text
    got = np.zeros((2, 3, 4, 5), np.float32)
    got[:, :, 2] = 1
    text = compare("dk", got, np.zeros_like(got), np.full(got.shape, 1e-7), [np.float32], letters="BGSD").text
    assert "keys 2" in text
    assert "batch" not in text


def test_built_in_names_and_modules_load():
    assert load("blockwise").backward is not None
    assert load("npattn.attention:attention").forward is __import__("npattn").attention


def test_module_runs_and_a_terminal_gets_a_progress_bar(monkeypatch, capsys):
    done = subprocess.run(
        [sys.executable, "-m", "npattn", "verify", "-k", "plain"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert "RIGHT" in done.stdout
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert cli.main(["verify", "-k", "plain", "-v"]) == 0
    assert "ok     plain" in capsys.readouterr().out


def test_env(capsys):
    assert cli.main(["env"]) == 0
    text = capsys.readouterr().out
    for fact in ("npattn", "NumPy", "BLAS", "kernels", "threads"):
        assert f"\n{fact} " in f"\n{text}"


def test_env_says_when_better_kernels_are_left_unused(monkeypatch):
    from npattn import environment

    monkeypatch.setattr(environment, "openblas", lambda: {"kernels": "Haswell", "threads": "2"})
    monkeypatch.setattr(environment, "_has_avx512", lambda: True)
    monkeypatch.setattr(environment, "_time_products", lambda kinds: [0.02, 0.01])
    facts = environment.describe()
    assert "OPENBLAS_CORETYPE=SkylakeX" in facts["advice"]
    assert "2.00x" in facts["measured"]
    monkeypatch.setattr(environment, "_has_avx512", lambda: False)
    assert "advice" not in environment.describe()


@pytest.mark.parametrize("case", [c.name for c in CASES if c.dtype == "float64" and "-1e10" not in c.name])
def test_a_change_that_does_nothing_takes_no_power(case):
    """Alignment where nothing is aligned, and the noise of float64: 'causal=top_left' would pass, and so it should."""
    row = next(c for c in CASES if c.name == case)
    assert {c.status for c in examine(load("blockwise"), row).checks} == {"ok"}


@pytest.mark.parametrize("declared", [None, "bfloat16-M1"])
def test_the_class_is_told_on_inputs_that_it_holds(declared):
    """On others the rounding of the inputs hides that of P and dS: M1 would seem to fit."""
    from npattn.verify import PRECISIONS
    from npattn.verify.rounded import rounded

    rows = [c for c in CASES if c.name in ("plain", "mask array", "inputs x30")]
    for name in ("bfloat16-M2", "bfloat16-M3"):
        assert verify(*rounded(PRECISIONS[name]), cases=rows, precision=declared).fits == name
