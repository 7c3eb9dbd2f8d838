"""Ask verify about each bug, and count what it says."""

from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from fnmatch import fnmatchcase

from npattn.verify import CASES, verify

from .bugs import BUGS

FEW = """plain; G < H; E != D; E < D; L > S; L < S; mask array; mask HLS; mask of one column; mask array, L = S; causal
top_left; causal bottom_right; window; window (5, 0); window (None, 2); key_lengths; key_lengths 0 and S; packed; bias L; bias
BHLS; bias BLS; negative scale; softcap; sink; sinks far off; dropout_mask; a row is dropped; dlse; dlse alone; causal top_left
+ G < H; causal top_left + bias BHLS; causal top_left + key_lengths; causal top_left + dropout_mask; mask array + softcap; mask
array + sink; G < H + bias HLS; softcap + bias BHLS; softcap + sink; sink + dlse; window + sink; window + key_lengths;
everything; inputs x5; inputs x30; inputs tiny; inputs V mean; inputs near-tie; dead rows; every row dead; dead rows + sink;
bias of -inf; scores of -1e5; strided; layout BLHD; L = 1; S = 1; S = 0; B = 3; D = 17; D = 72; D = 128; causal, L = S; one
more than a tile"""
FACTS = ("nothing that is known", "times what it should be", "everywhere")  # true, and no name of a mistake


def made(make, bug=""):
    """(the candidate, its cases: for attention one or two of each feature, for the others all)"""
    candidate = getattr(make(bug), "candidate", None) or make(bug)
    few = FEW.replace("\n", " ").split("; ")
    return candidate, [case for case in CASES if case.name in few] if candidate.op == "attention" else None


def measure(make, bug):
    """(bug, its class, verdict, cases that are wrong, what was said in how many; ! where that is a wrong name)

    Named is what has a right name in at least as many cases as a wrong one, misnamed what has wrong ones in more.
    """
    (kind, *patterns), (candidate, cases) = BUGS[make][bug], made(make, bug)
    report, right, wrong, said = verify(candidate, cases=cases), 0, 0, Counter()
    for r in report.wrong:
        texts = [e.text for e in r.explanations] + [c.text for c in r.checks if c.status == "wrong"]
        good = {t for t in texts if any(fnmatchcase(t, f"*{p}*") for p in patterns)}
        bad = {e.text for e in r.explanations if " matches " in e.text and not any(f in e.text for f in FACTS)} - good
        right, wrong = right + bool(good), wrong + bool(bad)
        said.update({"!" * (e.text in bad) + " and ".join(e.names) for e in r.explanations} or good or texts)
    verdict = "MISSED" if not report.wrong else "named" if right >= max(wrong, 1) else "MISNAMED" if wrong else "unnamed"
    return bug, kind, verdict, len(report.wrong), "; ".join(f"{text} ({n})" for text, n in said.most_common(5))


def measure_all():
    rows, found = [(make, bug) for make in BUGS for bug in BUGS[make]], []
    with ProcessPoolExecutor() as pool:
        for one in pool.map(measure, *zip(*rows, strict=True)):
            found.append(one)
            bug, kind, verdict, cases, said = one
            print(f"{verdict:9} {kind:3} {bug:50} {cases:3} wrong: {said}", flush=True)
    return found


def main():
    found = measure_all()
    print(f"\n{'class':6} {'seeded':>6} {'caught':>6} {'named':>6} {'misnamed':>8}")
    for kind in (*sorted({row[1] for row in found}, key=int), "all"):
        verdicts = [row[2] for row in found if kind in (row[1], "all")]
        missed, named, misnamed = map(verdicts.count, ("MISSED", "named", "MISNAMED"))
        print(f"{kind:6} {len(verdicts):6} {len(verdicts) - missed:6} {named:6} {misnamed:8}")
    return any(row[2] == "MISSED" for row in found)
