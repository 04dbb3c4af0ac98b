"""docs/guidance.md names every option of guidance."""

import re
from pathlib import Path

from dfkd.config import GuidanceConfig, leaves

TEXT = (Path(__file__).parents[2] / "docs/guidance.md").read_text(encoding="utf-8")


def test_every_option_of_guidance_has_its_row():
    rows = "\n".join(line for line in TEXT.splitlines() if line.startswith("|"))
    named = {word.replace("-", "_") for word in re.findall(r"--([a-z][a-z-]+)", rows)}
    assert not leaves(GuidanceConfig).keys() - named
