"""The one exception of this package."""


class EngineError(ValueError):
    """A prior that cannot be used, or an engine that cannot be traced, built, stored, loaded or called.

    what: the fact, naming the engine, file or tensor. why: the rule it breaks. todo: what to do about it.
    `str()` reads "what: why. todo."
    """

    def __init__(self, what: str, why: str, todo: str) -> None:
        super().__init__(what, why, todo)
        self.what, self.why, self.todo = what, why, todo

    def __str__(self) -> str:
        return f"{self.what}: {self.why}. {self.todo[:1].upper()}{self.todo[1:]}."


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type where it has none: for the `why` of an EngineError."""
    return (str(error).strip() or type(error).__name__).partition("\n")[0].rstrip(".: ")
