"""Default folders of the application."""

from __future__ import annotations

import os
from pathlib import Path


def index_folder(path: Path | None) -> Path:
    """Return the index's folder: `path`, else the default (see `clipkit.library.default_index`)."""
    if path is not None:
        return path.expanduser()
    from clipkit.library import default_index

    return default_index()


def features_folder(path: Path | None) -> Path:
    """Return the evaluators' feature cache: `path`, $CLIPKIT_CACHE, or one in the user's cache."""
    if path is None and (named := os.environ.get("CLIPKIT_CACHE")):
        path = Path(named)
    if path is not None:
        return path.expanduser()
    from platformdirs import user_cache_path

    return user_cache_path("clipkit") / "features"


def reports_folder() -> Path:
    """Return where reports are saved: $CLIPKIT_REPORTS, or a folder in the user's data folder."""
    if path := os.environ.get("CLIPKIT_REPORTS"):
        return Path(path)
    from platformdirs import user_data_path

    return user_data_path("clipkit") / "reports"
