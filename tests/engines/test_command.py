"""One line and an exit code, whatever went wrong."""

import os
import signal
from enum import StrEnum

import pytest
import typer

from ltx_engines.command import invoke
from ltx_engines.errors import UserError


def app(error: BaseException | None) -> typer.Typer:
    commands = typer.Typer(pretty_exceptions_enable=False)

    @commands.command()
    def work(count: int = 1) -> None:
        if error is not None:
            raise error
        print(count)

    return commands


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("the thing\nis broken"), 2, "tool: the thing is broken\n"),
        (FileNotFoundError(2, "No such file", "x.onnx"), 2, "tool: x.onnx: No such file\n"),
        (MemoryError("9 GB"), 2, "tool: out of memory; ask for less at once (9 GB)\n"),
        (KeyError("own"), 2, "tool: 'own'\n"),
        (KeyboardInterrupt(), 130, "tool: interrupted; nothing is half-written\n"),
    ],
)
def test_what_can_be_mended_is_one_line(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, said: str
) -> None:
    assert invoke(app(error), "tool", [], mendable=(KeyError,)) == code
    assert capsys.readouterr() == ("", said)


def test_wrong_words_are_one_line_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(app(None), "tool", ["--count", "many"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "--count" in said
    assert "tool --help" in said


def test_a_wrong_word_of_a_command_points_to_the_help_of_that_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    commands = app(None)
    commands.command("rest")(lambda: None)
    for words, wanted in (
        (["work", "--cuont", "1"], "tool work --help"),
        (["wrok"], "tool --help"),
    ):
        assert invoke(commands, "tool", words) == 2
        assert capsys.readouterr().err.endswith(f"({wanted})\n")


def test_a_word_of_no_choice_is_refused_without_the_name_of_an_exception(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Size(StrEnum):
        small = "small"

    commands = typer.Typer(pretty_exceptions_enable=False)

    @commands.command()
    def work(size: Size | None = None) -> None:
        print(size)

    assert invoke(commands, "tool", ["--size", "huge"]) == 2
    said = capsys.readouterr().err
    assert "'huge' is not" in said
    assert "alue error" not in said


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        invoke(app(ZeroDivisionError()), "tool", [])


def test_success_is_zero(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(app(None), "tool", ["--count", "3"]) == 0
    assert capsys.readouterr() == ("3\n", "")


def test_a_termination_cleans_up_as_ctrl_c_does(capsys: pytest.CaptureFixture[str]) -> None:
    commands, cleaned = typer.Typer(pretty_exceptions_enable=False), list[str]()

    @commands.command()
    def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            cleaned.append("up")

    before = signal.getsignal(signal.SIGTERM)
    assert invoke(commands, "tool", []) == 130
    assert cleaned == ["up"]
    assert signal.getsignal(signal.SIGTERM) is before
    assert "interrupted; nothing is half-written" in capsys.readouterr().err
