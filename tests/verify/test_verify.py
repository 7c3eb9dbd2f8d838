"""`npattn verify` as a whole: a candidate that is right, four that have to be told apart, and one that supports little."""

import pytest

from npattn.verify import load


@pytest.mark.parametrize("table", ["one of each", pytest.param("all", marks=pytest.mark.slow)])
def test_the_default_verifies_blockwise_and_everything_is_tested(run, table, request):
    if table == "one of each":
        request.getfixturevalue("one_of_each")
    status, text = run("-v")
    assert status == 0
    assert "RIGHT: blockwise holds in all that was tested" in text
    assert "not supported" not in text
    assert "WRONG" not in text


def test_a_good_candidate_passes(run, one_of_each):
    status, text = run("theirs:dense", "--backward", "dense_backward")
    assert status == 0, text
    assert text.startswith("RIGHT: theirs:dense holds in all that was tested, ")
    assert "not supported" not in text


@pytest.mark.parametrize(
    ("arguments", "case", "tensors", "diagnosis"),
    [
        (["theirs:causal_at_the_end"], "causal top_left + L > S", ["out", "lse"], "causal=bottom_right"),
        (["theirs:dense", "--backward", "group_forgotten"], "G < H", ["dk"], "dk of the first head of a group alone"),
        (["theirs:dense", "--backward", "dlse_ignored"], "sink + dlse", ["dq", "dk", "dsink"],
         "dlse=ignored"),
        (["theirs:half_inside", "--backward", "dense_backward"], "plain", ["out", "lse"], "inputs rounded to 11 bits"),
    ],
    ids=["causal alignment", "group sum", "dlse ignored", "float16 inside"],
)  # fmt: skip
def test_four_that_are_wrong_are_told_apart(run, arguments, case, tensors, diagnosis):
    status, text = run(*arguments, "-v", "--case", case)
    assert status == 1
    first, *lines = text.splitlines()
    assert first.startswith("  WRONG ")
    assert first[9:50].strip() == case
    told = [line.strip() for line in lines if line.startswith("           ") and " expected " in line]
    assert [line.partition("[")[0] for line in told] == tensors
    assert " sigma " in told[0]
    assert " elements" in told[0]
    (found,) = [line for line in lines if line.startswith("           => ")]
    assert f"matches {diagnosis}" in found
    table = lines[next(i for i, line in enumerate(lines) if line.startswith("it looks like")) + 1]
    assert table.split("  ")[1] == diagnosis


@pytest.mark.parametrize(
    "arguments",
    [
        ["theirs:dense", "--backward", "group_forgotten", "--case", "softcap + sink"],
        ["theirs:causal_at_the_end", "--causal", "bottom_right", "--case", "causal bottom_right + L > S"],
    ],
    ids=["no groups", "declared"],
)
def test_where_its_mistake_makes_no_difference_a_candidate_is_right(run, arguments):
    assert run(*arguments, "--no-diagnosis")[0] == 0


def test_what_is_not_supported_is_read_off_the_signature(run, one_of_each):
    status, text = run("theirs:right")
    assert status == 0
    (unsupported,) = [line for line in text.splitlines() if line.startswith("not supported: ")]
    assert {"bias", "sink", "dropout_mask"} <= set(unsupported.removeprefix("not supported: ").split(", "))
    assert "\nnot given: lse is not returned; backward not given\n" in text
    chosen = ["theirs:right", "--case", "mask array"]
    assert [run(*chosen, "--require", feature)[0] for feature in ("mask", "backward", "sink")] == [0, 3, 3]
    assert run("theirs:right", "-k", "softcap + sink")[0] == 2


def test_built_in_names_and_modules_load():
    assert load("blockwise").backward is not None
    assert load("npattn.ops.attention:attention").forward is __import__("npattn").attention
