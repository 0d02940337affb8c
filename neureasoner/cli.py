"""``neureasoner [room] command --settings``: a thin layer that turns a command line into a call of a library function.

Exit codes: 0 done, 2 bad input (one line on stderr naming cause and fix), 130 interrupted.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence

from neureasoner import __version__
from neureasoner.commands import COMMANDS, GROUPS
from neureasoner.config import closest, parse
from neureasoner.errors import UserError
from neureasoner.printable import safe


def overview(group: str = "") -> str:
    """The list of commands (of one group)."""
    names = [n for n in COMMANDS if not group or n.startswith(group + " ")]
    width = max(map(len, names)) + 2
    lines = [
        f"usage: neureasoner {group or '[room]'} COMMAND [--name value ...] [--config FILE.yaml]",
        "",
        "Make a reasoning language model catch and repair its own failures.",
        "",
        *[f"  {n:<{width}}{COMMANDS[n].help}" for n in names],
        "",
        "neureasoner COMMAND --help lists a command's settings; neureasoner --version prints the version.",
    ]
    return "\n".join(lines)


def _find(argv: Sequence[str]) -> tuple[str, list[str]]:
    """Command name and its arguments. Raises UserError with the closest command."""
    words = 2 if argv[0] in GROUPS else 1
    name = " ".join(argv[:words])
    if name not in COMMANDS:
        raise UserError(f"command '{name}' is unknown{closest(name, COMMANDS)} (neureasoner --help lists them)")
    return name, list(argv[words:])


def _call(name: str, argv: list[str]) -> None:
    command = COMMANDS[name]
    if command.script:  # its other settings are those of the training library, which only the script knows
        from neureasoner import launch

        if {"-h", "--help"} & set(argv):
            from neureasoner.training.sft_config import usage

            print(usage())
        else:
            launch.accelerate(launch.training_script(command.script), argv)
        return
    config = parse(command.config_class(), argv, f"neureasoner {name}", command.help)
    command.load()(config)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    helps = ("-h", "--help", "help")
    if not argv or argv[0] in helps:
        print(overview())
        return 0
    if argv[0] == "--version":
        print(f"neureasoner {__version__}")
        return 0
    if argv[0] in GROUPS and (len(argv) == 1 or argv[1] in helps):
        print(overview(argv[0]))
        return 0
    try:
        _call(*_find(argv))
        return 0
    except UserError as e:
        return _fail(str(e))
    except KeyboardInterrupt:
        print("\nneureasoner: interrupted; run the same command again to resume", file=sys.stderr)
        return 130
    except PermissionError as e:
        return _fail(f"no permission for {e.filename or 'a file'}; choose a folder you may write to")
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        return _fail(f"cannot write {e.filename or 'a file'} ({e.strerror}); free space or choose another folder")


def _fail(message: str) -> int:
    """One line, in which nothing that a file or a model wrote speaks to the terminal."""
    print(f"neureasoner: error: {safe(' '.join(message.split()))}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
