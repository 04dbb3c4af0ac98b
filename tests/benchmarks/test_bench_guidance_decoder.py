"""The benchmark of guidance decoders: every row of what runs in seconds is made, and says what it is worth."""

from pathlib import Path

import pytest
import torch

from benchmarks import bench_guidance_decoder as bench

CPU = torch.device("cpu")


def test_rows_tell_error_and_cosine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "WIDTHS", (8,))
    monkeypatch.setattr(bench, "IMAGES", {"cpu": 4})
    monkeypatch.setattr(bench, "THIN_SIDE", 16)
    made = bench.groups(CPU, tmp_path, None, 4, 16)
    for group, rows in ((next(made), 2), (next(made), 2)):
        works = {name: make() for name, make in group.rows.items()}
        assert len(works) == rows and group.baseline == bench.VAE
        for name, work in works.items():
            assert work.amount == 4 and work.call().isfinite().all()
            assert (name == bench.VAE) == ("image error" not in work.facts)
            if name != bench.VAE:
                assert 0 < work.facts["image error"] < 255 and -1 <= work.facts["gradient cosine"] <= 1


def test_the_vae_itself_has_no_error(tmp_path: Path) -> None:
    """A decoder that is the prior's own: error 0, cosine 1."""
    from benchmarks import demo
    from dfkd_engine import EMBEDDED
    from dfkd_engine.priors.guidance_decoder import Decoder
    from dfkd_engine.priors.prior import Prior

    prior = Prior.from_pretrained("demo")
    latents = bench.estimates(prior, 4, ())
    own = {"itself": lambda: Decoder.from_pretrained(EMBEDDED["demo"])}
    work = bench.rows_of(prior, demo.teacher().freeze(), latents, own, judged=True)["itself"]()
    assert work.facts["image error"] < 1e-3 and work.facts["gradient cosine"] == pytest.approx(1, abs=1e-4)
