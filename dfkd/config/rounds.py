"""Settings of a run whose synthesis and distillation alternate."""

from dataclasses import MISSING, dataclass

from dfkd.config.fields import Config, option


@dataclass(frozen=True, kw_only=True)
class RoundsConfig(Config):
    """Rounds: the images of a run come in equal parts, and every so many of them a student learns from all so far."""

    SECTION = "rounds"

    rounds: int | None = option(
        MISSING, "equal parts of the images; none: no rounds, where a preset has some", low=2, unit="rounds"
    )
    refresh_every: int = option(10, "the student is refreshed after so many rounds", low=1, unit="rounds")
    adv_from: int | None = option(
        None,
        "rounds without a student; from then on images are made against the one last refreshed; none: never",
        low=1,
        unit="rounds",
    )

    def validate(self) -> None:
        if self.rounds is None:
            return
        if self.refresh_every >= self.rounds:
            raise ValueError(f"refresh-every {self.refresh_every} is no less than rounds {self.rounds}: none comes")
        if self.adv_from is not None and not self.refresh_every <= self.adv_from < self.rounds:
            raise ValueError(
                f"adv-from {self.adv_from} cannot act: the first student comes after {self.refresh_every} rounds, and"
                f" the last round is after {self.rounds - 1}"
            )
        if self.adv_from is not None and self.adv_from % self.refresh_every:
            raise ValueError(
                f"adv-from {self.adv_from} is no multiple of refresh-every {self.refresh_every}: a student comes to"
                " act where one is refreshed"
            )
