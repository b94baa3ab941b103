"""The committed certificates: they are vouched for, and no image is both certified and broken."""

import pytest

from robbench.certify.interval import find_contradictions
from robbench.certify.record import read_certified_files
from robbench.results.reader import read_results

MODELS = ("at", "ls095_sigma03", "lsq2_sigma03", "natural", "trades")


@pytest.mark.parametrize("model", MODELS)
def test_no_image_is_both_certified_and_broken(repo, model):
    root, name = repo / "results", f"digits/{model}"
    files, damaged = read_certified_files(root, name)
    assert not damaged
    # Proofs and breaks of the same function: otherwise the comparison would be empty.
    proven = [f for f, _ in files if f.method != "smoothing" and f.counts.get("proven")]
    same = [r for r in read_results(root, name).results if r.identity["weights"] == proven[0].identity["weights"]]
    assert proven and same
    assert find_contradictions(root, name) == []
