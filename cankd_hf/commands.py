"""Shared code of the commands: parsers, exit codes, what is said of errors, and faster imports."""

import argparse
import errno
import gc
import os
import platform
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from cankd_hf.errors import InputError
from cankd_hf.quiet import quiet_libraries
from cankd_hf.tokens import mask

DEBUG = "CANKD_DEBUG"  # environment variable: exceptions are raised with their traceback
# Exit codes of all commands. Beside them 2 is bad input, 0 that everything was done.
BUG, INTERRUPTED, UNREAD, TERMINATED = 1, 130, 141, 143
_OTHER_CODES = f"""
Further exit codes: {BUG} an unexpected error (the message names a file with its traceback; {DEBUG}=1 shows it, and
all warnings of libraries), {UNREAD} nobody reads the output any more, {TERMINATED} terminated (SIGTERM)."""
# What to do about errors of the machine.
_FIXES = {
    errno.ENOSPC: "free space on the disk, then the same command goes on",
    errno.EDQUOT: "free some of your quota on the disk, then the same command goes on",
    errno.EROFS: "name a folder that can be written",
    errno.EACCES: "name a folder that you may read and write",
    errno.EMFILE: "raise the limit of open files (ulimit -n), or use fewer loading processes",
}


class _Parser(argparse.ArgumentParser):
    """A parser whose messages repeat no token, and name what is missing alone."""

    def error(self, message: str) -> NoReturn:
        more = next((str(action.metavar) for action in self._actions if action.nargs == "*" and action.metavar), "")
        if "are required" in message:  # where options stand between them, argparse names what may be left out too
            message = message.replace(f", {more}", "")
        elif message.startswith("unrecognized arguments: --") and "=" in more:
            message += f"; settings are written as {more}, without dashes"
        super().error(mask(message))


def command_parser(name: str, description: str, examples: str) -> argparse.ArgumentParser:
    """The parser of a command, with examples and exit codes below its help, in the words it was called by: `cankd
    NAME` or `python -m cankd_hf.NAME`."""
    raw = argparse.RawDescriptionHelpFormatter
    called, module = Path(sys.argv[0]), "python -m cankd_hf."
    short = called.stem == "cankd" or called.parts[-2:] == (Path(__file__).parent.name, "__main__.py")
    said = examples.replace(module, "cankd ") if short else examples
    prog = f"{'cankd ' if short else module}{name}"
    return _Parser(prog=prog, description=description, epilog=f"{said}\n{_OTHER_CODES}", formatter_class=raw)


def console(width: int | None = None) -> Any:
    """A console of rich that prints names as they are: `[x]` and `:x:` in them are no markup.

    Args:
        width: where nobody looks, as in a file.
    """
    from rich.console import Console

    return Console(width=None if os.isatty(1) else width, markup=False, emoji=False)


def check_file(file: str | Path | None, place: str) -> None:
    """Raises InputError, before any work is done, if a file that a command writes at its end cannot be written."""
    if file is None:
        return
    there = os.path.lexists(file)
    try:
        with open(file, "ab"):
            pass
    except OSError as error:
        reason = error.strerror or "it is no name of a file"
        raise InputError(f"{place}: expected a file that can be written, got {file}: {reason}; name another") from None
    if not there:
        os.unlink(file)


@contextmanager
def importing() -> Iterator[None]:
    """Disables the garbage collector during imports, which saves a sixth of the start-up time.

    In a new process what was imported is left out of later collections too: each training asks for one, which takes
    0.3 s with it.
    """
    new = "torch" not in sys.modules  # else there may be garbage, which would be kept for ever
    gc.disable()
    try:
        yield
    finally:
        if new:
            gc.freeze()
        gc.enable()


def exit_code(command: Callable[[], int], interrupted: str = "nothing was changed") -> int:
    """Runs a command and returns its exit code; whatever it raises is told in lines without a traceback.

    Bad input is a line per problem. Any other exception is one line with its place, and the name of a file with the
    traceback. Warnings of other libraries are hidden. With the environment variable CANKD_DEBUG=1 exceptions are
    raised instead, and all warnings are shown. Tokens are never printed.

    Args:
        command: returns the exit code.
        interrupted: end of the message after Ctrl-C or SIGTERM.

    Returns:
        The command's own code; 1 after an unexpected exception; 2 after bad input; 130 after Ctrl-C; 141 where nobody
        reads the output; 143 after SIGTERM.
    """
    _writes_anything(sys.stdout)
    try:
        with _sigterm_raises(), quiet_libraries(_debugging()):
            _check_place()
            code = command()
            sys.stdout.flush()
            return code
    except _Terminated:
        _say(f"Terminated; {interrupted}.", first_process_only=True)
        return TERMINATED
    except BaseException as error:
        # an import that Ctrl-C breaks off may raise something else, then or when a library tries it again
        if _caused_by(error, KeyboardInterrupt) or "cannot load module more than once per process" in str(error):
            _say(f"Interrupted; {interrupted}.", first_process_only=True)
            return INTERRUPTED
        if _nobody_reads(error):
            return UNREAD
        if _debugging() or isinstance(error, SystemExit):
            raise
        if isinstance(error, InputError):
            _say(*(f"error: {problem}" for problem in error.problems))
            return 2
        _say(f"error: {unexpected(error)}")
        return BUG


def _writes_anything(stream: Any) -> None:
    """Where an output cannot hold a letter, as in a file on Windows or an ASCII terminal, its code is written."""
    if getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")


def _check_place() -> None:
    """Raises InputError in a folder that was deleted, where libraries end the process with an error of their own."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise InputError("the folder that this command runs in was deleted; go to one that is there") from None


def _debugging() -> bool:
    return os.environ.get(DEBUG, "0") not in ("", "0")


def unexpected(error: BaseException) -> str:
    """One line about an exception that is no bad input: what, where, what to do; its traceback goes to a file."""
    said = " ".join(str(error).split())
    what = (
        f"{type(error).__name__}: {said if len(said) <= 300 else said[:297] + '...'}" if said else type(error).__name__
    )
    fix = _FIXES.get(error.errno or 0) if isinstance(error, OSError) else None
    if isinstance(error, MemoryError) or "out of memory" in said.lower():
        fix = "there is not enough memory: make batches, images or the model smaller"
    report = f"{fix}; if that is not it, open an issue" if fix else "this should not happen: please open an issue"
    return f"{what} (at {_place(error)}); {report} with {_log(error)}"


def _place(error: BaseException) -> str:
    """`cankd_hf/runs/run.py:93`: the innermost line of ours, else the innermost line of all."""
    frames = traceback.extract_tb(error.__traceback__)
    package = Path(__file__).parent
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(package) and frame.filename != __file__]
    for frame in reversed(ours or frames):
        file = Path(frame.filename)
        shown = file.relative_to(package.parent) if file.is_relative_to(package.parent) else file.name
        return f"{shown}:{frame.lineno}"
    return "an unknown place"


def _log(error: BaseException) -> str:
    """Writes the traceback where only this user can read it, and returns the words that name the file."""
    lines = [
        f"python {platform.python_version()} on {platform.platform()}",
        f"command: {' '.join(sys.argv)}",
        *(f"{name} {_version(name)}" for name in ("cankd_hf", "torch", "transformers") if name in sys.modules),
        "".join(traceback.format_exception(error)),
    ]
    try:
        handle, name = tempfile.mkstemp(prefix="cankd_hf-", suffix=".log")  # of mode 0600
        with open(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(mask("\n".join(lines)))
    except OSError as problem:
        return f"the traceback, which could not be written ({problem.strerror}); {DEBUG}=1 shows it"
    return f"the traceback in {name}"


def _version(name: str) -> Any:
    return getattr(sys.modules[name], "__version__", "?")


class _Terminated(BaseException):
    """SIGTERM arrived."""


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """SIGTERM unwinds the command, so that temporary folders and locks go; training has its own handler."""
    usual = signal.SIG_DFL
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != usual:
        yield
        return

    def stop(*_: Any) -> None:
        raise _Terminated

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, usual)


def _caused_by(error: BaseException | None, kind: type[BaseException]) -> bool:
    """Whether an exception is of this kind, or was raised because of one."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, kind):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def _nobody_reads(error: BaseException) -> bool:
    """Whether the reader of the output is gone (`... | head`); then nothing more is written to it."""
    if not _caused_by(error, BrokenPipeError):
        return False
    if not isinstance(error, SystemExit):  # rich raises it after it has closed the output itself
        with suppress(BrokenPipeError, ValueError):
            sys.stdout.write("\n")  # fails if it is the reader that is gone
            sys.stdout.flush()
            return False  # another pipe broke
    with suppress(OSError, ValueError):  # an output without a file has nothing that the interpreter would flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _say(*lines: str, first_process_only: bool = False) -> None:
    """Writes lines to stderr; of several processes the first one all of them, each other one its first line."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
        lines = () if first_process_only else (f"process {rank}: {lines[0]}{more}",)
    with suppress(BrokenPipeError):  # nobody reads that either
        if sys.stderr.isatty() and lines:
            sys.stderr.write("\n")  # the line may contain a progress bar
        sys.stderr.writelines(f"{mask(line)}\n" for line in lines)
