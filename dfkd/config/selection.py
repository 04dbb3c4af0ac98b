"""Settings of which images a run keeps: one of several candidates, and those that the teacher reads as their label."""

from dataclasses import dataclass

from dfkd.config.fields import Config, option

KEEPS = ("sure", "medium", "learnable")


@dataclass(frozen=True, kw_only=True)
class CandidatesConfig(Config):
    """Candidates: several images are made for each that is kept"""

    EXAMPLE = "--candidates 3 --keep medium"

    count: int = option(
        1, "images made for each that is kept; 1: no choice", unit="images", low=1, high=1000, flag="candidates"
    )
    keep: str = option(
        "medium",
        "of them, by cross-entropies with the label. sure: the lowest of the teacher; medium: its median; learnable:"
        " the highest of the student, less --keep-weight times the teacher's; needs --student-checkpoint",
        choices=KEEPS,
    )
    weight: float = option(
        1.0, "learnable: weight of the teacher's cross-entropy", low=0, high=1000, flag="keep_weight"
    )

    def validate(self) -> None:
        if self.keep != "medium" and self.count == 1:
            raise ValueError(f"--keep {self.keep} needs --candidates above 1: of one image there is no choice")
        if self.keep == "medium" and self.count == 2:
            raise ValueError("--candidates 2 with --keep medium: the median of two is the easier one; use 3 or more")
        if self.weight != 1 and not self.takes_student:
            raise ValueError("--keep-weight needs --keep learnable: it does not act otherwise")

    @property
    def takes_student(self) -> bool:
        """Whether the choice goes by a student."""
        return self.count > 1 and self.keep == "learnable"


@dataclass(frozen=True, kw_only=True)
class FilterConfig(Config):
    """Filter: images that the teacher does not read as their label under other views are left out of training"""

    EXAMPLE = "--filter-views 8 --filter-agreement 0.75"

    views: int = option(
        0,
        "random views in which the teacher reads each image, shifted by up to an eighth and cut to 85 % of the side or"
        " more, mirrored with --guide-flip; 0: no filter",
        low=0,
        high=1000,
        flag="filter_views",
    )
    agreement: float = option(
        0.5, "least share of them in which it gives the label", low=0.001, high=1, flag="filter_agreement"
    )

    def validate(self) -> None:
        if self.agreement != 0.5 and not self.views:
            raise ValueError("--filter-agreement needs --filter-views above 0: it does not act otherwise")
