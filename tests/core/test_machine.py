"""Settings of the whole process: freed memory stays in it, and the user may forbid all changes."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.whole

CODE = """
import resource, sys, torch
from robbench.core.machine import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def round_of_work():
    before = faults()
    a = [torch.ones(10 << 20) for _ in range(3)]  # 40 MiB each: glibc maps more than 32 anew unless told otherwise
    del a
    return faults() - before
print(min(round_of_work() for _ in range(8)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_blocks_are_not_faulted_in_again():
    def run(mode):
        done = subprocess.run([sys.executable, "-c", CODE, mode], capture_output=True, text=True, check=True)
        return int(done.stdout)

    # Without: every page of 3 blocks (of 2 MiB, where the kernel uses huge pages) in every round. With: none in some
    # round; in others a small block may sit in the middle of the space that a large one left.
    kept, left = run("keep"), run("leave")
    assert left >= 3 * 20
    assert kept < left / 2


SETTINGS = """
import os, robbench
from robbench.core.machine import keep_freed_memory
print(os.environ.get("MKL_CBWR"), keep_freed_memory())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
@pytest.mark.parametrize(
    ("asked", "found"), [(None, "AUTO,STRICT True"), ("0", "AUTO,STRICT True"), ("1", "None False")]
)
def test_settings_of_the_process_can_be_kept(asked, found):
    env = {k: v for k, v in os.environ.items() if k not in ("MKL_CBWR", "ROBBENCH_KEEP_SETTINGS")}
    env |= {} if asked is None else {"ROBBENCH_KEEP_SETTINGS": asked}
    done = subprocess.run([sys.executable, "-c", SETTINGS], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.strip() == found
