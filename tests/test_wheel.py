"""A wheel, used away from the repository: cards, suites and the digits weights travel with it."""

import json
import os
import subprocess
import sys
import zipfile

import pytest

pytestmark = pytest.mark.whole


def test_the_wheel_works_on_its_own(repo, tmp_path):
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(repo)]
    subprocess.run(build, check=True, capture_output=True, text=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
        names = archive.namelist()
    assert "robbench/suites/whitebox.toml" in names and "robbench/py.typed" in names
    assert not [n for n in names if n.startswith(("tests/", "results/", "models/"))]
    command = [sys.executable, "-m", "robbench"]
    env = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}

    def run(*args):
        done = subprocess.run([*command, *args], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = subprocess.run(
        [sys.executable, "-c", "import robbench; print(robbench.__file__)"],
        cwd=tmp_path, env=env, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert str(site) in where.stdout
    models = {row["model"]: row["weights"] for row in json.loads(run("list", "models", "--json"))}
    assert models["digits/at"] == "yes"
    args = ["eval", "-m", "digits/at", "-m", "digits/ls095_sigma03", "-s", "quick", "--samples", "20", "--json"]
    assert [r["n"] for r in json.loads(run(*args))] == [20, 20]
