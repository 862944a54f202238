import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from pelton.cli.main import VERBS, Verbs
from pelton.errors import CheckpointError


def exit_of(error: BaseException):
    @click.command()
    def verb():
        raise error

    app = Verbs("app")
    app.get_command = lambda ctx, name: verb
    return CliRunner().invoke(app, ["verb"])


def test_a_user_error_is_one_line_and_exit_code_2():
    result = exit_of(CheckpointError("no file x", "give a folder"))
    assert (result.exit_code, result.stderr) == (2, "error: no file x; give a folder\n")


def test_ctrl_c_is_exit_code_130_and_says_nothing():
    result = exit_of(KeyboardInterrupt())
    assert (result.exit_code, result.output) == (130, "")


def test_a_bug_is_not_dressed_up():
    assert isinstance(exit_of(ZeroDivisionError()).exception, ZeroDivisionError)


def test_the_help_lists_every_verb(pelton):
    result = pelton("--help")
    assert result.exit_code == 0
    assert all(verb in result.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_help(pelton, verb):
    result = pelton(verb, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.stdout


def test_the_version_is_printed(pelton):
    result = pelton("--version")
    assert result.exit_code == 0
    assert result.stdout.strip()


@pytest.mark.parametrize(
    "arguments",
    [["run", "--no-such-option"], ["run", "--top-k", "many"], ["inspect", "--dtype", "int3"], ["generate"],
     ["--nonsense"], ["no-such-verb"]],
)  # fmt: skip
def test_a_wrong_command_line_is_one_line_and_exit_code_2(pelton, arguments):
    result = pelton(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert "--help" in result.stderr


def test_without_a_verb_the_help_is_printed(pelton):
    assert pelton().stdout == pelton("--help").stdout


@pytest.mark.parametrize("verb", VERBS)
def test_a_help_says_its_purpose_shows_examples_and_fits_80_columns(pelton, verb):
    text = pelton(verb, "--help").stdout
    assert "Examples:\n" in text and f"pelton {verb}" in text.split("Examples:")[1]
    assert max(map(len, text.splitlines())) <= 80


def test_the_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['pelton', '--help']\n"
        "from pelton.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert not {'numpy', 'torch', 'rich', 'tokenizers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_a_reader_that_leaves_early_is_no_error():
    code = (
        "import sys; from pelton.cli.main import one_line_errors\n"
        "with one_line_errors():\n"
        "    for i in range(100_000): print(i)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 141
