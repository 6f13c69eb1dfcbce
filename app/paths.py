"""Where clipkit keeps indexes and caches unless a folder is named."""

from __future__ import annotations

from pathlib import Path


def index_folder(named: Path | None) -> Path:
    """Return the named index folder, else the default one (see `clipkit.library.default_index`)."""
    if named is not None:
        return named.expanduser()
    from clipkit.library import default_index

    return default_index()


def features_folder(named: Path | None) -> Path:
    """Return the named feature cache, else one in the user's cache folder."""
    if named is not None:
        return named.expanduser()
    from platformdirs import user_cache_path

    return user_cache_path("clipkit") / "features"
