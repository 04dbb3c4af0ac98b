"""The errors of compiled engines."""


class EngineError(ValueError):
    """An engine that cannot be built, stored, loaded or called.

    what: the fact, naming the engine, file or tensor. why: the rule it breaks. todo: what to do about it.
    ``str()`` reads "what: why. todo."
    """

    def __init__(self, what: str, why: str, todo: str) -> None:
        super().__init__(what, why, todo)
        self.what, self.why, self.todo = what, why, todo

    def __str__(self) -> str:
        return f"{self.what}: {self.why}. {self.todo}."


class GraphError(EngineError):
    """A function that cannot be traced into a graph of plain operations."""
