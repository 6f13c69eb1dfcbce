"""Where clipkit keeps things unless it is told otherwise."""

from __future__ import annotations

from pathlib import Path


def index_folder(given: Path | None) -> Path:
    """The index's folder: what was given, else one place in the user's data folder."""
    if given is not None:
        return given.expanduser()
    from platformdirs import user_data_path

    return user_data_path("clipkit") / "index"


def features_folder(given: Path | None) -> Path:
    """The evaluators' feature cache: what was given, else one place in the user's cache folder."""
    if given is not None:
        return given.expanduser()
    from platformdirs import user_cache_path

    return user_cache_path("clipkit") / "features"
