"""Commands: options from a dataclass, one line for a user's error with the fix, exit codes."""

from __future__ import annotations

import dataclasses
import errno
import io
import os
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any, Literal

import pytest
import tyro

from farl import cli
from farl_engine.data import BadDataError


@dataclasses.dataclass(frozen=True)
class Options:
    source: tyro.conf.Positional[str]
    """What to read."""
    out: str
    """Where to write."""
    steps: int = 10
    """How long."""
    base_lr: float = 1e-3  # how fast
    kind: Literal["softmax", "sigmoid"] = "softmax"
    crop: tuple[float, float] = (0.9, 1.0)
    resume: bool = True
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"--steps is {self.steps}: wanted 1 or more")


def parse(line: str, **options: Any) -> Options:
    return cli.parse(Options, line.split(), prog="farl.thing", description="Does a thing.", **options)


class TestParse:
    def test_values(self) -> None:
        assert parse("in --out o") == Options("in", "o")
        assert parse("in --out o --base_lr 2 --no-resume --crop 0.1 1 --limit None") == Options(
            "in", "o", base_lr=2.0, resume=False, crop=(0.1, 1.0)
        )

    def test_a_default_replaces_the_class_defaults_and_nothing_is_required(self) -> None:
        preset = Options("in", "o", steps=99)
        assert parse("", default=preset) == preset
        assert parse("other --base-lr 2", default=preset) == Options("other", "o", steps=99, base_lr=2.0)

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("in --out o --stepz 3", "unrecognized option --stepz; did you mean --steps?"),
            ("--outt o", "unrecognized option --outt; did you mean --out?"),
            ("in --out o --qqq 3", "unrecognized option --qqq; see --help"),
            ("in", "missing --out ...; see --help"),
            ("--out o", "missing SOURCE; see --help"),
            ("in --out o more", "unexpected more; see --help"),
            ("in --out o --steps", "--steps needs a value"),
            ("in --out o --crop 1", "--crop needs 2 values"),
            ("in --out o --steps three", "--steps: 'three' is not a whole number"),
            ("in --out o --base-lr fast", "--base-lr: 'fast' is not a number"),
            ("in --out o --limit all", "--limit: 'all' is not of the right kind, see --help"),
            ("in --out o --kind tanh", "--kind: 'tanh' is not one of 'softmax', 'sigmoid'"),
            ("in --out o --steps 0", "--steps is 0: wanted 1 or more"),
            (f"in --out o --kind {'x' * 300}", f"--kind: '{'x' * 300}' is not one of 'softmax', 'sigmoid'"),
        ],
    )
    @pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
    def test_errors_are_one_line_with_the_fix(
        self,
        line: str,
        message: str,
        encoding: str,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        # tyro draws its boxes differently where stdout is not UTF-8.
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
        with pytest.raises(SystemExit) as leaving:
            parse(line)
        assert leaving.value.code == 2
        assert capsys.readouterr().err == f"farl.thing: {message}\n"

    def test_other_ranks_are_silent(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RANK", "1")
        with pytest.raises(SystemExit) as leaving:
            parse("in --stepz 3")
        assert leaving.value.code == 2
        assert capsys.readouterr().err == ""

    def test_help_is_tyros(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", "80")
        with pytest.raises(SystemExit) as leaving:
            parse("--help")
        assert leaving.value.code == 0
        printed = capsys.readouterr().out
        for text in ("usage: farl.thing", "Does a thing.", "Where to write.", "how fast", "(default: 10)"):
            assert text in printed
        assert os.environ["COLUMNS"] == "80"

    def test_torch_is_not_imported(self) -> None:
        code = "import sys, farl.cli, farl.data.build; print('torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "False"


class TestSubcommand:
    commands = types.MappingProxyType({"build": (len, "builds"), "check": (lambda words: 7, "checks")})

    def call(self, *words: str) -> int | None:
        return cli.subcommand(self.commands, words, prog="farl.data", description="Shards.")

    def test_the_rest_goes_to_the_command(self) -> None:
        assert self.call("build", "a", "--b") == 2
        assert self.call("check") == 7

    def test_help(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.call("--help") == 0
        assert "  build  builds\n  check  checks\n" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ([], "missing command; choose one of build, check"),
            (["chek"], "unrecognized command chek; did you mean check?"),
            (["--zzz"], "unrecognized command --zzz; choose one of build, check"),
        ],
    )
    def test_errors(self, words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as leaving:
            self.call(*words)
        assert leaving.value.code == 2
        assert capsys.readouterr().err == f"farl.data: {message}\n"


def raising(error: BaseException) -> Callable[[], int | None]:
    """A main of one of our modules that fails."""
    space = {"__name__": "farl.thing", "error": error}
    exec("def main():\n    raise error", space)
    return space["main"]  # type: ignore[return-value]


def code_of(main: Callable[[], int | None]) -> int | str | None:
    with pytest.raises(SystemExit) as leaving:
        cli.run(main, "farl.thing")
    return leaving.value.code


class TestRun:
    @pytest.mark.parametrize(("result", "code"), [(None, 0), (0, 0), (3, 3)])
    def test_code_of_a_good_end(self, result: int | None, code: int) -> None:
        assert code_of(lambda: result) == code

    @pytest.mark.parametrize(
        ("error", "line"),
        [
            (ValueError("--data matches nothing:\n  give a pattern"), "--data matches nothing: give a pattern"),
            (FileNotFoundError(2, "No such file or directory", "a.tar"), "no such file or directory: a.tar"),
            (FileNotFoundError("no checkpoint in runs/x"), "no checkpoint in runs/x"),
            (PermissionError(13, "Permission denied", "/root/x"), "permission denied: /root/x"),
            (
                OSError(errno.ENOSPC, "No space left on device"),
                "no space left on device; free some and run the same command again",
            ),
            (
                BadDataError("7 % of the samples are bad; worst shard a.tar"),
                "7 % of the samples are bad; worst shard a.tar",
            ),
            (
                ModuleNotFoundError("No module named 'pyarrow'", name="pyarrow"),
                "the package 'pyarrow' is missing: install farl-engine with its [train] extra",
            ),
        ],
    )
    def test_a_users_error_is_one_line(self, error: Exception, line: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert code_of(raising(error)) == 1
        assert capsys.readouterr().err == f"farl.thing: {line}\n"

    def test_an_error_from_elsewhere_says_how_to_find_it(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert code_of(lambda: dataclasses.field(default=1, default_factory=int)) == 1
        assert capsys.readouterr().err.endswith("(ValueError; FARL_DEBUG=1 shows where)\n")

    @pytest.mark.parametrize(
        "error", [ZeroDivisionError("x"), RuntimeError("x"), ModuleNotFoundError("x", name="farl.x")]
    )
    def test_a_defect_keeps_its_traceback(self, error: Exception) -> None:
        with pytest.raises(type(error)):
            cli.run(raising(error), "farl.thing")

    def test_debug_shows_the_traceback(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FARL_DEBUG", "1")
        with pytest.raises(ValueError, match="bad"):
            cli.run(raising(ValueError("bad")), "farl.thing")

    def test_interrupt(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert code_of(raising(KeyboardInterrupt())) == 130
        assert capsys.readouterr().err == "\nfarl.thing: interrupted\n"

    def test_an_error_of_one_rank_is_labelled(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("RANK", "3")
        monkeypatch.setattr(cli, "RANK_PATIENCE", 0.0)
        before = signal.getsignal(signal.SIGTERM)
        try:
            assert code_of(raising(ValueError("bad"))) == 1
        finally:
            signal.signal(signal.SIGTERM, before)
        assert capsys.readouterr().err == "farl.thing [rank 3]: bad\n"

    def test_the_end_of_another_process_is_no_defect(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def main() -> None:
            raise RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:1949. GLHF!")

        with pytest.raises(RuntimeError):  # without torchrun there is no other process
            cli.run(main, "farl.thing")
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(SystemExit) as leaving:
            cli.run(main, "farl.thing")
        assert leaving.value.code == 1
        said = capsys.readouterr().err
        assert said == "farl.thing: another process of this run has ended: see what it says, or its exit code\n"

    def test_a_rank_that_torchrun_ends_meanwhile_says_nothing(self) -> None:
        code = (
            "import os, signal, threading; from farl import cli\n"
            "signal.signal(signal.SIGTERM, lambda *_: None)\n"
            "def main():\n"
            "    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()\n"
            "    raise ValueError('the same on all ranks')\n"
            "cli.run(main, 'farl.thing')"
        )
        environment = {**os.environ, "RANK": "1"}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert (done.returncode, done.stderr) == (-signal.SIGTERM, "")

    def test_a_reader_that_leaves_is_no_error(self) -> None:
        code = "from farl import cli\ncli.run(lambda: [print('x' * 99) for _ in range(9999)] and 0, 'farl.thing')"
        first = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert first.stdout is not None and first.stderr is not None
        first.stdout.readline()
        first.stdout.close()
        assert first.stderr.read() == ""
        first.stderr.close()
        assert first.wait() == 141
