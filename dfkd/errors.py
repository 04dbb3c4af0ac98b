"""The exceptions that the commands turn into words and an exit status."""


class UsageError(Exception):
    """Wrong input, found before work begins; the commands print it and exit with status 2.

    what: the fact, naming the value and the option or file it came from.
    why:  the bound or rule that it breaks (may be empty).
    todo: what to do about it (may be empty).
    `str()` reads "what: why. todo."
    """

    def __init__(self, what: str, why: str = "", todo: str = "") -> None:
        super().__init__(what, why, todo)
        self.what, self.why, self.todo = (part.strip().rstrip(".") for part in (what, why, todo))

    def __str__(self) -> str:
        first = ": ".join(part for part in (self.what, self.why) if part)
        return " ".join(f"{part}." for part in (first, self.todo) if part)


class SettingError(ValueError):
    """A value that a settings class of `dfkd.config` refuses; the commands print it and exit with status 2."""


class Stopped(Exception):
    """A run that a signal ended once its state was on disk; the commands print it and exit with 128 + signum.

    `str()` says where it stands.
    """

    def __init__(self, signum: int, words: str) -> None:
        super().__init__(signum, words)
        self.signum, self.words = signum, words

    def __str__(self) -> str:
        return self.words
