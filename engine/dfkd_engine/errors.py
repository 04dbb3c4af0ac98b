"""The one exception of this package."""

import re

# What a C++ compiler or a linker says of a fault; the lines before it tell which file includes which.
_FAULT = re.compile(r"\berror\s*:|\bcannot find\b|\bundefined reference\b|\bnot found\b")
COMMAND_OUTPUT = "Output:\n"  # what torch writes in front of that
_AFTERWARDS = "ld returned"  # gcc's own last line, once the linker has said why


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


def compiler_line(error: BaseException) -> str:
    """The line of a compiler's failure that says what is wrong: for the `why` of an EngineError.

    Torch gives the command, and behind "Output:" what the C++ compiler wrote: of that the first line with a fault, else
    the first. Of other errors it is `first_line`, with the type in front unless the message begins with one.
    """
    text, found, output = str(error).partition(COMMAND_OUTPUT)
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if not found:
        line = first_line(error)
        return line if re.match(r"\w+: ", line) else f"{type(error).__name__}: {line}"
    command = text.partition("Command:\n")[2].split()
    if not lines:
        return f"{command[0] if command else 'the C++ compiler'} ended with an error and without a word"
    faults = (line for line in lines if _FAULT.search(line) and _AFTERWARDS not in line)
    return next(faults, lines[0]).rstrip(".: ")
