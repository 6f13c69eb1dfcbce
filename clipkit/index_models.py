"""The models of one index: which have encoded its pictures, which one answers, and changing that.

An index may hold the vectors of several models. One of them, the active one, answers where no model is
named. Models with the same picture side (`space_id`) share their vectors.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clipkit import checkpoint, models
from clipkit.catalog import Catalog, EncoderRow
from clipkit.errors import InputError, suggestion
from clipkit.lazy_encoder import Encoder, LazyEncoder
from clipkit.wording import count

OWN_MODELS = "models"  # in the index's folder: models that were trained for it, and go with it
LEAST_DIGITS = 4  # of an encoder_id that names a model
MOST_REFUSED = 0.01  # of all pictures: a model that gives no vector for more may not answer


@dataclass(frozen=True, slots=True)
class IndexModel:
    """A model of an index: `vectors` of its `pictures` have one of this model."""

    spec: str
    encoder_id: str
    space_id: str
    dim: int
    vectors: int
    pictures: int
    active: bool
    complete: bool  # it may answer: see `is_complete`
    gone: bool  # the spec names a folder or file that is not there
    shared_with: tuple[str, ...]  # specs of the other models that have the same vectors

    @property
    def missing(self) -> int:
        """How many pictures have no vector yet."""
        return self.pictures - self.vectors

    @property
    def bytes(self) -> int:
        """The size of the vectors, two bytes a value."""
        return 2 * self.dim * self.vectors


def models_of(catalog: Catalog) -> list[IndexModel]:
    """Return the models of an index, the oldest first."""
    rows, active, pictures = catalog.encoders(), catalog.active_encoder(), catalog.stats().pictures
    spaces = {row.encoder_id: space_of(row) for row in rows}
    return [
        IndexModel(
            spec=row.spec,
            encoder_id=row.encoder_id,
            space_id=spaces[row.encoder_id],
            dim=row.dim,
            vectors=catalog.stats(row.encoder_id).vectors,
            pictures=pictures,
            active=active is not None and row.encoder_id == active.encoder_id,
            complete=is_complete(catalog, row.encoder_id),
            gone=models.is_gone(row.spec),
            shared_with=tuple(
                other.spec
                for other in rows
                if spaces[other.encoder_id] == spaces[row.encoder_id]
                and other.encoder_id != row.encoder_id
            ),
        )
        for row in rows
    ]


def is_complete(catalog: Catalog, encoder_id: str) -> bool:
    """Return whether a model may answer searches: it has the vectors of all pictures, but for up to
    MOST_REFUSED of them, for which it gives none."""
    stats = catalog.stats(encoder_id)
    missing = stats.pictures - stats.vectors
    return not missing or (
        missing <= MOST_REFUSED * stats.pictures and missing <= catalog.refused_pictures(encoder_id)
    )


def space_of(row: EncoderRow) -> str:
    """Return a model's space_id: that of its files where an index of an earlier version has none; its
    encoder_id, which is no other model's space, where only loading would tell."""
    if row.space_id is not None:
        return row.space_id
    known = None if models.is_gone(row.spec) else checkpoint.identify(row.spec)
    return known.space_id if known and known.encoder_id == row.encoder_id else row.encoder_id


def find_model(listed: Sequence[IndexModel], name: str, *, index: Path) -> IndexModel:
    """Return the model that `name` names: by spec, path, or the unique beginning of its encoder_id.

    A spec whose files have changed since is the model that they hold now. Raises InputError, with the
    nearest names, for another name or one that several models have.
    """
    specs = [model for model in listed if model.spec in (name, checkpoint.absolute(name))]
    begun = [model for model in listed if model.encoder_id.startswith(name.lower())]
    found = specs or (begun if len(name) >= LEAST_DIGITS else [])
    if len(found) != 1 and models.names_model(name) and (known := checkpoint.identify(name)):
        found = [model for model in listed if model.encoder_id == known.encoder_id] or found
    if len(found) == 1:
        return found[0]
    if found:
        ids = " or ".join(model.encoder_id for model in found)
        raise InputError(f"{name} names {len(found)} models of the index at {index}; use {ids}")
    if not listed:
        raise InputError(
            f"the index at {index} has no model yet; fill it: clipkit index ~/Pictures"
        )
    names = [text for model in listed for text in (model.spec, model.encoder_id)]
    hint = suggestion(name, names, "it has")
    raise InputError(f"the index at {index} has no model {name!r}; {hint}")


def use_model(folder: Path, name: str) -> IndexModel:
    """Make a model the active one, in one transaction, and return it.

    It may be one that is new to the index but shares its picture side with one that is there: their
    vectors are the same, so nothing is encoded or copied. Raises InputError if there is none of this
    name, if pictures that can be found now lack its vector, or if its files are gone or hold another
    model now; CatalogBusy while another process writes to the index.
    """
    with Catalog.open(folder) as catalog:
        listed = models_of(catalog)
    encoder = None
    try:
        model = find_model(listed, name, index=folder)
    except InputError:
        encoder = _sharing(listed, name)
        if encoder is None:
            raise
    else:
        _check_files(model)
    with Catalog.open(folder, write=True) as catalog:
        if encoder is not None:
            register(catalog, encoder)
        elif model.space_id != model.encoder_id:
            join_vectors(catalog, model.space_id)
        encoder_id = model.encoder_id if encoder is None else encoder.encoder_id
        listed = models_of(catalog)
        model = next(one for one in listed if one.encoder_id == encoder_id)
        # The vectors of the model that answers: pictures that lack one are not found now either.
        same_vectors = any(one.active and one.space_id == model.space_id for one in listed)
        if not (model.complete or same_vectors):
            raise InputError(
                f"{model.missing:,} of {count(model.pictures, 'picture')} have no vector of "
                f"{model.spec} yet, and would not be found; encode them first: "
                f"{fill_command(catalog.roots(), model.spec)}"
            )
        catalog.activate_encoder(model.encoder_id)
    return model


def drop_model(folder: Path, name: str) -> tuple[IndexModel, int]:
    """Remove a model and its vectors from the index; return it, and how many vectors went.

    Vectors that another model shares stay. A model in the index's own folder is deleted. Raises
    InputError for the active model and for one that is not there; CatalogBusy as `use_model` does.
    """
    with Catalog.open(folder, write=True) as catalog:
        model = find_model(models_of(catalog), name, index=folder)
        if model.active:
            raise InputError(
                f"{model.spec} answers the searches in the index at {folder}; "
                "use another model first: clipkit use MODEL"
            )
        removed = catalog.drop_encoder(model.encoder_id)
    own = folder.absolute() / OWN_MODELS
    if Path(model.spec).parent == own:
        shutil.rmtree(model.spec, ignore_errors=True)
    return model, removed


def register(catalog: Catalog, encoder: Encoder) -> None:
    """Add a model to the index, whose vectors can then be stored; loads its towers."""
    towers = encoder.towers()
    join_vectors(catalog, encoder.space_id)
    catalog.register_encoder(
        encoder.encoder_id,
        spec=checkpoint.absolute(encoder.spec),
        config_json=towers.describe(),
        dim=towers.dim,
        space_id=encoder.space_id,
    )


def join_vectors(catalog: Catalog, space_id: str) -> None:
    """Note the space of the models that have it where an index of an earlier version does not say it;
    their vectors, which it kept for each of them, become one set."""
    for row in catalog.encoders():
        if row.space_id is None and space_of(row) == space_id:
            catalog.register_encoder(
                row.encoder_id,
                spec=row.spec,
                config_json=row.config_json,
                dim=row.dim,
                space_id=space_id,
            )


def fill_command(roots: Sequence[str], spec: str) -> str:
    """Return the command that encodes the pictures of `roots` with a model."""
    folders = " ".join(map(shlex.quote, roots)) if len(roots) <= 3 else "FOLDER ..."
    every = f" (all {len(roots)} folders, see clipkit status)" if len(roots) > 3 else ""
    return f"clipkit index {folders} --model {shlex.quote(spec)}{every}"


def _sharing(listed: Sequence[IndexModel], name: str) -> LazyEncoder | None:
    """Return the model `name` if a model of the index has its picture side; None otherwise."""
    known = checkpoint.identify(name) if models.names_model(name) else None
    if known is None or known.space_id not in (model.space_id for model in listed):
        return None
    return LazyEncoder(name)


def _check_files(model: IndexModel) -> None:
    """Raise InputError if the model's files are gone, or hold another model now."""
    if model.gone:
        raise InputError(
            f"{model.spec} is not there any more, so it cannot encode a query; put it back, or name "
            f"its new place: clipkit index FOLDER --model PATH"
        )
    known = checkpoint.identify(model.spec)
    if known is not None and known.encoder_id != model.encoder_id:
        raise InputError(
            f"{model.spec} has changed since it encoded the pictures (encoder {model.encoder_id} then, "
            f"{known.encoder_id} now); encode them again: clipkit index FOLDER --model {model.spec}"
        )
