"""What several tests share: models, attacks, suites, files, and how to run a command."""

from pathlib import Path

import pytest

TESTS = str(Path(__file__).resolve().parents[1])  # a script in a process of its own needs it in sys.path
# An assert in these modules shows its values, as one in a test does.
pytest.register_assert_rewrite(*(f"support.{path.stem}" for path in Path(__file__).parent.glob("*.py")))
