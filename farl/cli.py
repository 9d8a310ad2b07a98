"""What every command of the project shares: options from a dataclass, one-line errors, exit codes.

A command reads top to bottom like this::

    @dataclass(frozen=True)
    class Options:
        out: str
        '''Folder for the result.'''

    def main(argv: list[str] | None = None) -> int | None:
        options = cli.parse(Options, argv, prog="farl.thing", description="Does the thing.")
        ...

    if __name__ == "__main__":
        cli.run(main, "farl.thing")

Exit codes: 0 done, 1 failed (bad file, bad value, no space), 2 wrong command line, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import errno
import importlib
import io
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

ConfigT = TypeVar("ConfigT")

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_VALUE_ERRORS = (
    (r"invalid literal for int\(\).*?: (.+)", "a whole number"),
    (r"could not convert string to float: (.+)", "a number"),
    (r"no type matching .+ could be instantiated from \[(.+)\]", "of the right kind, see --help"),
)
# Seconds that another rank waits before it reports an error that may be rank 0's too; torchrun needs a fraction.
RANK_PATIENCE = 2.0
_OUR_PACKAGES = ("farl", "farl_engine", "farl_kernels")
# What gloo says at a process whose partner in a collective call has ended.
_LOST_PROCESS = re.compile(r"Connection (closed|reset) by peer|Broken pipe")


def parse(
    config_class: type[ConfigT],
    argv: Sequence[str] | None = None,
    *,
    default: ConfigT | None = None,
    prog: str,
    description: str,
) -> ConfigT:
    """Reads the command line into a flat (frozen) dataclass; the help text is the docstring or comment of each field.

    Args:
        config_class: the dataclass; a field without default is required, `tyro.conf.Positional[T]` is positional.
        argv: the words after the command's name; None = `sys.argv[1:]`.
        default: values that replace the defaults of the class, as a preset does.
        prog: the name for messages, such as "farl.train".
        description: the text at the head of `--help`.

    Wrong options end the process with code 2 and one line on stderr that names the fix; under torchrun rank 0 alone
    prints it, because all ranks got the same command line.
    """
    import tyro

    words = list(sys.argv[1:] if argv is None else argv)
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured), _unwrapped(words):
            if default is None:
                return tyro.cli(config_class, args=words, prog=prog, description=description)
            return tyro.cli(config_class, args=words, prog=prog, description=description, default=default)
    except SystemExit as leaving:
        if leaving.code in (0, None):
            raise
    fail_usage(prog, _explain(config_class, words, captured.getvalue(), all_given=default is not None))


def fail_usage(prog: str, problem: str) -> NoReturn:
    """Leaves with code 2 and the line "PROG: PROBLEM" (on rank 0 alone)."""
    if process_rank() == 0:
        print(f"{prog}: {problem}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def main_of(module: str) -> Callable[[list[str]], int | None]:
    """The `main` of a module, imported when it is called, so that no command waits for the imports of the others."""

    def call(argv: list[str]) -> int | None:
        return importlib.import_module(module).main(argv)

    return call


def subcommand(
    commands: Mapping[str, tuple[Callable[[list[str]], int | None], str]],
    argv: Sequence[str] | None = None,
    *,
    prog: str,
    description: str,
) -> int | None:
    """Calls the command named by the first word with the words after it; `commands` maps name -> (function, help)."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in commands:
        return commands[words[0]][0](words[1:])
    if words and words[0] in ("-h", "--help"):
        width = max(map(len, commands))
        lines = [f"  {name:<{width}}  {text}" for name, (_, text) in commands.items()]
        print(f"usage: {prog} COMMAND ...\n\n{description}\n\ncommands:\n" + "\n".join(lines))
        print(f"\n{prog} COMMAND --help shows the options of one command.")
        return 0
    choices = ", ".join(commands)
    if not words:
        fail_usage(prog, f"missing command; choose one of {choices}")
    hint = _did_you_mean(words[0], list(commands)) or f"; choose one of {choices}"
    fail_usage(prog, f"unrecognized command {words[0]}{hint}")


def _explain(config_class: type, words: list[str], box: str, *, all_given: bool) -> str:
    """One line from tyro's boxed message. Unknown and missing options come from the dataclass itself, because tyro
    reports a missing argument before the misspelt option that caused it."""
    fields = dataclasses.fields(config_class)
    positional = {f.name: f for f in fields if "Positional" in str(f.type)}
    flags = {"--" + f.name.replace("_", "-"): f for f in fields if f.name not in positional}
    known = {*flags, *("--no-" + flag[2:] for flag in flags), "--help"}
    given = [word.split("=", 1)[0].replace("_", "-") for word in words if re.match(r"--[A-Za-z]", word)]

    text = _box_text(box)
    unknown = [flag for flag in given if flag not in known]
    if unknown and not text.startswith("Error parsing"):
        return f"unrecognized option {unknown[0]}{_did_you_mean(unknown[0], sorted(known)) or '; see --help'}"
    if text.startswith("Missing from") and not all_given:
        missing = [f"{flag} ..." for flag, f in flags.items() if _has_no_default(f) and flag not in given]
        missing = missing or [name.upper() for name, f in positional.items() if _has_no_default(f)]
        return f"missing {', '.join(missing)}; see --help"
    if match := re.match(r"Missing value for argument '([^']+)'\. Expected (\d+)", text):
        name, count = match.groups()
        if name in positional:
            return f"missing {name.upper()}; see --help"
        return f"{name} needs {'a value' if count == '1' else f'{count} values'}"
    if match := re.match(r"Unrecognized options: (.+)", text):
        return f"unexpected {match[1]}; see --help"
    if match := re.match(r"invalid choice (.+) for argument '(.+)'\. Expected one of \((.*?),?\)\.?", text):
        return f"{match[2]}: {match[1]} is not one of {match[3]}"
    if match := re.match(r"Error parsing (\S+): (.+)", text):
        name, reason = match.groups()
        for pattern, wanted in _VALUE_ERRORS:
            if value := re.match(pattern, reason):
                return f"{name}: {value[1]} is not {wanted}"
        # A message of the dataclass's own __post_init__ is already whole.
        return f"{name}: {reason}" if name.startswith("--") else reason
    return text or "the command line was not understood; see --help"


def _box_text(box: str) -> str:
    """The first paragraph inside tyro's box, whose first line is a title; the frame is absent without UTF-8."""
    lines: list[str] = []
    for line in _ANSI.sub("", box).splitlines()[1:]:
        inner = line.strip().strip("│╰╯").strip()
        if inner and not set(inner) & set("─") and set(inner) != {"-"}:
            lines.append(inner)
        elif lines:
            break
    return " ".join(lines)


def _has_no_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


@contextlib.contextmanager
def _unwrapped(words: list[str]) -> Iterator[None]:
    """Lets tyro's messages keep long words, such as paths, whole; the help is for the terminal and wraps there."""
    before = os.environ.get("COLUMNS")
    if not {"-h", "--help"} & set(words):
        os.environ["COLUMNS"] = "10000"
    try:
        yield
    finally:
        os.environ.pop("COLUMNS", None)
        if before is not None:
            os.environ["COLUMNS"] = before


def _did_you_mean(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def run(main: Callable[[], int | None], prog: str) -> NoReturn:
    """Calls `main` and ends the process with its code; an error that a user can mend becomes one line on stderr.

    Those are ValueError, OSError (a missing file, no permission, no space), FloatingPointError (a loss that is not
    finite), a missing optional package, bad data, and the end of another process of the run, which says why itself.
    Anything else is a defect and keeps its traceback, as everything does with FARL_DEBUG=1 in the environment.
    """
    try:
        code = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"\n{prog}: interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output left (as in `... | head`); the interpreter would complain again at its own flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        if os.environ.get("FARL_DEBUG", "0") not in ("", "0") or not _is_users(error):
            raise
        _say_failure(prog, error)
        sys.exit(1)
    sys.exit(code or 0)


def describe(error: BaseException) -> str:
    """One line for an error, without Python's errno brackets."""
    if isinstance(error, ModuleNotFoundError):
        return f"the package {error.name!r} is missing: install farl-engine with its [train] extra"
    if _is_lost_process(error):
        return "another process of this run has ended: see what it says, or its exit code"
    if isinstance(error, OSError) and error.strerror and error.errno is not None:
        name = f": {error.filename}" if error.filename is not None else ""
        advice = "; free some and run the same command again" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        return f"{error.strerror[0].lower()}{error.strerror[1:]}{name}{advice}"
    text = " ".join(str(error).split()) or type(error).__name__
    if not _raised_by_us(error):
        text += f" ({type(error).__name__}; FARL_DEBUG=1 shows where)"
    return text


def _is_users(error: Exception) -> bool:
    if isinstance(error, ModuleNotFoundError):
        return (error.name or "").split(".")[0] not in _OUR_PACKAGES
    if isinstance(error, (ValueError, OSError, FloatingPointError)) or _is_lost_process(error):
        return True
    # If the data package was never imported, this is not its error.
    data = sys.modules.get("farl_engine.data")
    return data is not None and isinstance(error, data.BadDataError)


def _is_lost_process(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and "WORLD_SIZE" in os.environ and bool(_LOST_PROCESS.search(str(error)))


def _raised_by_us(error: BaseException) -> bool:
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    module = frames[-1].f_globals.get("__name__", "") if frames else ""
    return not frames or module == "__main__" or module.split(".")[0] in _OUR_PACKAGES


def _say_failure(prog: str, error: Exception) -> None:
    """Most errors are the same on all ranks, and rank 0 says them. An error of another rank alone must not be silent:
    such a rank waits until torchrun would have ended it because rank 0 left, and speaks if it is still there."""
    rank = process_rank()
    if rank != 0:
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(RANK_PATIENCE)
        prog = f"{prog} [rank {rank}]"
    print(f"{prog}: {describe(error)}", file=sys.stderr, flush=True)


def process_rank() -> int:
    """This process's number among those that torchrun started; 0 without torchrun."""
    value = os.environ.get("RANK", "0")
    return int(value) if value.isdigit() else 0
