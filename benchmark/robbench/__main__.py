"""`python -m robbench` and the `robbench` command."""

import contextlib
import os
import sys


def main() -> None:
    """Run the command line; errors a user can mend are printed without a traceback and exit with 2."""
    from robbench.commands.app import app
    from robbench.commands.printing import reserve_stdout
    from robbench.core.errors import RobbenchError
    from robbench.report.console import protect_terminal

    with protect_terminal():
        try:
            with reserve_stdout() if "--json" in sys.argv[1:] else contextlib.nullcontext():
                app()
        except RobbenchError as error:
            message = str(error)
        except MemoryError:
            message = "out of memory. What was finished is kept; the same command goes on, with fewer --lanes perhaps."
        except BrokenPipeError:  # `robbench … | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        except OSError as error:  # readers and writers word theirs; this is a path that the system refuses
            if error.filename is None:
                raise
            place, reason = str(error.filename), error.strerror
            message = f"{place[:200]}{'...' * (len(place) > 200)}: {reason}. Give a path that this system accepts."
        else:
            return
        print(f"robbench: {message}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
