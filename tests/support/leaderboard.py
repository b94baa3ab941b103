"""The leaderboard of a results tree as one text."""

from pathlib import Path

from robbench.report.leaderboard_pages import PAGE, render_leaderboard


def read_leaderboard(root: Path) -> str:
    """Make all pages of the leaderboard of a tree, the first page first."""
    return "\n".join(render_leaderboard(root, root.parent / PAGE).values())
