"""`python -m dfkd COMMAND ...` is `dfkd-COMMAND ...`."""

import importlib
import sys

from dfkd.cli import COMMANDS
from dfkd.config.words import nearest


def main(argv: list[str] | None = None) -> None:
    """Run the command that the first argument names; exit status 2 for one that does not exist."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in COMMANDS:
        importlib.import_module(f"dfkd.cli.{name.replace('-', '_')}").main(rest)
    elif name in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        lines = [f"  {command:<{width}}  {what}" for command, what in COMMANDS.items()]
        print("usage: python -m dfkd COMMAND [options]\n", *lines, sep="\n")
    else:
        print(f"error: unknown command '{name}': {nearest(name, COMMANDS)}.", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
