"""`python -m robbench` and the `robbench` command."""

import contextlib
import os
import sys
from typing import Any


def main() -> None:
    """Run the command line; errors a user can mend are printed as one sentence and exit with 2."""
    import typer

    from robbench.commands.app import app
    from robbench.commands.printing import reserve_stdout
    from robbench.core.errors import RobbenchError

    # The base of all errors of the parser. Typer does not export it.
    wrong_command: type[Exception] = typer.BadParameter.__mro__[1]
    try:
        with reserve_stdout() if "--json" in sys.argv[1:] else contextlib.nullcontext():
            sys.exit(app(prog_name="robbench", standalone_mode=False))
    except RobbenchError as error:
        print(f"robbench: {_name_option(str(error))}", file=sys.stderr)
        sys.exit(2)
    except wrong_command as error:
        print(_word_usage(error), file=sys.stderr)
        sys.exit(2)
    except MemoryError:
        print(
            "robbench: out of memory. What was finished is kept; the same command goes on, with fewer --lanes perhaps.",
            file=sys.stderr,
        )
        sys.exit(2)
    except BrokenPipeError:  # `robbench … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def _name_option(text: str) -> str:
    """Name an option as it was typed: `samples: 0 given` -> `--samples: 0 given`."""
    option = f"--{text.partition(':')[0].replace('_', '-')}"
    is_typed = any(argument.partition("=")[0] == option for argument in sys.argv[1:])
    return f"--{text}" if is_typed else text


def _word_usage(error: Any) -> str:
    """Word an error of the parser as every other error. A command without arguments gets its help."""
    text = error.format_message()
    if text.startswith("Usage:"):
        return str(text)
    path = error.ctx.command_path if error.ctx else "robbench"
    return f"robbench: {text.rstrip('.')}. See `{path} --help`."


if __name__ == "__main__":
    main()
