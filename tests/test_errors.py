"""A wrong call of any command ends with one line and exit status 2."""

import importlib

import pytest

from vlm.errors import Parser, UserError

COMMANDS = ("vlm.checkpoint.__main__", "vlm.convert.__main__", "vlm.demo.__main__", "vlm.predict")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_wrong_call_is_one_line(name, capsys):
    with pytest.raises(SystemExit) as exit_:
        importlib.import_module(name).main(["--wrong"])
    captured = capsys.readouterr()
    assert exit_.value.code == 2 and captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and "usage" not in captured.err


def test_commands_below_a_command_and_abbreviations():
    parser = Parser(description="first\n  second")
    parser.add_argument("--image")
    parser.add_subparsers(dest="command").add_parser("verify").add_argument("path")
    assert "first\n  second" in parser.format_help()
    for arguments, message in ((["verify"], "required: path"), (["--im=a"], "unrecognized arguments: --im=a")):
        with pytest.raises(UserError, match=message):
            parser.parse_args(arguments)
