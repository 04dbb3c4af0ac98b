"""A process that keeps what it frees takes no new pages for the next tensor of that size."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from dfkd.allocator import keep_freed_memory
kept = {kept} and keep_freed_memory()
def pages():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def take():
    for _ in range(4):
        torch.ones(4 << 20), torch.ones(8 << 20)
for _ in range(4):  # blocks lie side by side only after a while
    take()
before = pages()
take()
print(kept, pages() - before)
"""


def faults(kept):
    """Whether memory is kept, and pages that the system handed out for 4 times 16 and 32 MB."""
    command = [sys.executable, "-c", PROGRAM.format(kept=kept)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    said, count = found.stdout.split()
    return said == "True", int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library does as it does")
def test_pages_are_handed_out_once():
    (kept, few), (plain, many) = faults(True), faults(False)
    assert kept and not plain
    assert 10 * few < many
