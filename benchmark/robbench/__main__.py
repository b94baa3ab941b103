"""`python -m robbench` and the `robbench` command."""

import contextlib
import os
import sys


def main() -> None:
    """Run the command line; errors a user can mend are printed without a traceback and exit with 2."""
    from robbench.commands.app import app
    from robbench.commands.printing import reserve_stdout
    from robbench.core.errors import RobbenchError

    try:
        with reserve_stdout() if "--json" in sys.argv[1:] else contextlib.nullcontext():
            app()
    except RobbenchError as error:
        print(f"robbench: {error}", file=sys.stderr)
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


if __name__ == "__main__":
    main()
