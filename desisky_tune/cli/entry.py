"""`main`: from arguments to an exit code, with every failure told in one line.

========= ==============================================================
exit code meaning
========= ==============================================================
0         done
1         a failure of the program or of the machine
2         something that the user gave cannot be used
75        a search that was stopped from outside, and wants to be resumed
130       stopped by Ctrl-C
========= ==============================================================
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NoReturn

import typer

from desisky_tune.cli.app import app
from desisky_tune.cli.console import one_line, say
from desisky_tune.errors import INTERRUPTED, DesiskyTuneError
from desisky_tune.ray_session import start_was_cut_off

PROGRAM = "desisky-tune"
DEBUG_VARIABLE = "DESISKY_TUNE_DEBUG"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    Parameters
    ----------
    argv
        The arguments after the program's name; those of the process by default.

    Returns
    -------
    int
        0 done, 1 failed, 2 bad input or usage, 75 to be resumed, 130 stopped by Ctrl-C.
    """
    state = {"debug": os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0")}
    if argv is None:
        argv = sys.argv[1:]
        if not sys.warnoptions and not state["debug"]:
            # A user of the command can act on our messages, not on a library's deprecations.
            warnings.simplefilter("ignore")
    try:
        return _run(list(argv), state)
    except KeyboardInterrupt as stop:
        say(f"{PROGRAM}: {one_line(stop) or 'interrupted'}")
        return int(getattr(stop, "exit_code", INTERRUPTED))
    except BrokenPipeError:
        # The reader of our output left (`| head`): nothing more to say, and nobody to say it to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        # The last resort of the command: any failure is one line and an exit code.
        if state["debug"]:
            traceback.print_exc()
        say(f"{PROGRAM}: error: {_message(error, state['debug'])}")
        return _exit_code(error)


def program() -> NoReturn:
    """Run the command of the process, and end the process with its exit code.

    Where a signal cut off the start of Ray, it ends without Python's own end: what Ray would do
    then can crash, and the exit code would be another. Ray's processes end with their driver, as
    they do where it is killed.
    """
    code = main()
    if start_was_cut_off():
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def _run(argv: list[str], state: dict[str, Any]) -> int:
    command = typer.main.get_command(app)
    try:
        with command.make_context(PROGRAM, argv, obj=state) as context:
            command.invoke(context)
            sys.stdout.flush()
    except typer.Exit as end:
        return end.exit_code
    except typer.Abort:
        raise KeyboardInterrupt from None
    return 0


def _message(error: Exception, debug: bool) -> str:
    if isinstance(error, typer.TyperException):
        return one_line(error.format_message())
    if isinstance(error, DesiskyTuneError):
        return one_line(error)
    hint = "" if debug else " (--debug shows where)"
    return f"{one_line(error) or 'no message'} [{type(error).__name__}]{hint}"


def _exit_code(error: Exception) -> int:
    if isinstance(error, typer.TyperException | DesiskyTuneError):
        return error.exit_code
    return 1
