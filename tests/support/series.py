"""Stored series that tests change."""

from robbench.analysis.series_record import SeriesFile, read_series, summarize_series, write_series


def change_identity(folder, **changes):
    """Write a series anew, as of another identity."""
    file, rows = read_series(folder)
    derived = {"schema_version", "run_id", "identity", "n"}
    described = {name: getattr(file, name) for name in SeriesFile.model_fields if name not in derived}
    return write_series(folder, summarize_series(rows, file.identity | changes, described), rows)
