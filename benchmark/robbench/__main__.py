"""`python -m robbench` and the `robbench` command."""

import contextlib
import os
import sys


def run_in_process() -> int:
    """Run the command line in this process, and return its exit code.

    Errors a user can mend are printed as one sentence, without a traceback. Their exit code is 2.
    """
    import typer

    from robbench.commands.app import app
    from robbench.commands.printing import reserve_stdout
    from robbench.commands.usage import word_usage
    from robbench.core.errors import RobbenchError
    from robbench.report.console import leave_out_python, protect_terminal

    # The base of all errors of the parser. Typer does not export it.
    wrong_command: type[Exception] = typer.BadParameter.__mro__[1]
    message = ""
    with protect_terminal():
        try:
            with reserve_stdout() if "--json" in sys.argv[1:] else contextlib.nullcontext():
                return int(app(prog_name="robbench", standalone_mode=False) or 0)
        except SystemExit as ended:  # of the command line; one of a model is an error of its command
            if isinstance(ended.__context__, BrokenPipeError):  # `robbench … | head`: the parser makes this of it
                return 141
            return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        except RobbenchError as error:
            message = f"robbench: {leave_out_python(_name_option(str(error)))}"
        except wrong_command as error:
            message = word_usage(error)
        except MemoryError:
            message = (
                "robbench: out of memory. What was finished is kept; the command goes on, with fewer --lanes perhaps."
            )
        except BrokenPipeError:  # `robbench … | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        except OSError as error:  # readers and writers word theirs; this is a path that the system refuses
            if error.filename is None:
                raise
            place, reason = str(error.filename), error.strerror
            place = f"{place[:200]}{'...' * (len(place) > 200)}"
            message = f"robbench: {place}: {reason}. Give a path that this system accepts."
        print(message, file=sys.stderr)
    return 2


def main() -> None:
    """Run the command line in a child process, so that no code but the command's decides about exit code 0."""
    from robbench.commands.supervise import run_supervised

    sys.exit(run_supervised(run_in_process))


def _name_option(text: str) -> str:
    """Name an option as it was typed: `max_drop: -1 given` -> `--max-drop: -1 given`."""
    option = f"--{text.partition(':')[0].replace('_', '-')}"
    is_typed = any(argument.partition("=")[0] == option for argument in sys.argv[1:])
    return f"{option}:{text.partition(':')[2]}" if is_typed else text


if __name__ == "__main__":
    main()
