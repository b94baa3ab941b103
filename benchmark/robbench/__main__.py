"""`python -m robbench` and the `robbench` command."""

import contextlib
import os
import sys


def run_in_process() -> int:
    """Run the command line in this process, and return its exit code.

    Errors a user can mend are printed without a traceback. Their exit code is 2.
    """
    from robbench.commands.app import app
    from robbench.commands.printing import reserve_stdout
    from robbench.core.errors import RobbenchError
    from robbench.report.console import protect_terminal

    message = ""
    with protect_terminal():
        try:
            with reserve_stdout() if "--json" in sys.argv[1:] else contextlib.nullcontext():
                app()
        except SystemExit as ended:  # of the command line; one of a model is an error of its command
            return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        except RobbenchError as error:
            message = str(error)
        except MemoryError:
            message = "out of memory. What was finished is kept; the same command goes on, with fewer --lanes perhaps."
        except BrokenPipeError:  # `robbench … | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        except OSError as error:  # readers and writers word theirs; this is a path that the system refuses
            if error.filename is None:
                raise
            place, reason = str(error.filename), error.strerror
            message = f"{place[:200]}{'...' * (len(place) > 200)}: {reason}. Give a path that this system accepts."
        if message:
            print(f"robbench: {message}", file=sys.stderr)
    return 2 if message else 0


def main() -> None:
    """Run the command line in a child process, so that no code but the command's decides about exit code 0."""
    from robbench.commands.supervise import run_supervised

    sys.exit(run_supervised(run_in_process))


if __name__ == "__main__":
    main()
