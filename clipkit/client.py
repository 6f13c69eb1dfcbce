"""A client of the HTTP API that `clipkit app` serves.

    with Client("http://127.0.0.1:7860") as client:
        for hit in client.search("a red car").hits:
            print(hit.rank, hit.score, hit.path)
        client.mark(hit.image_id, "a red car", right=True)

What the server refuses is raised as clipkit's own error with the server's sentence. Needs no model, no
index and no torch.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self, TypeVar
from urllib.parse import unquote

import httpx
import numpy as np

from clipkit.arrays import Float32
from clipkit.errors import CatalogBusy, ClipkitError, InputError

TRIES = 4  # of a request that a busy server puts off
LONGEST_PAUSE = 30.0  # seconds between two tries, whatever Retry-After says

# A picture in a request: an image_id of the server's library, a file, or a file's bytes.
Image = str | Path | bytes

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Picture:
    """What the server knows of a picture; `places` are all files with its content."""

    image_id: str
    name: str
    path: str
    places: tuple[str, ...]
    width: int
    height: int
    format: str
    bytes: int
    taken_at: str | None
    dated: str | None
    camera: str | None
    captions: tuple[str, ...]
    tags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Hit(Picture):
    """A picture in a result; see clipkit.search.SearchHit for score, strength and probability."""

    rank: int
    score: float | None
    strength: str | None
    probability: float | None


@dataclass(frozen=True, slots=True)
class Offer:
    """A search that finds something where another finds nothing."""

    label: str
    query: str
    keeps_filters: bool
    total: int


@dataclass(frozen=True, slots=True)
class Empty:
    """Why no picture passes a search."""

    sentence: str
    offers: tuple[Offer, ...]


@dataclass(frozen=True, slots=True)
class Page:
    """A page of hits; `cursor` asks for the next one and is None after the last."""

    hits: tuple[Hit, ...]
    total: int
    cursor: str | None
    notes: tuple[str, ...]
    empty: Empty | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Mark:
    """A result that was marked right or wrong."""

    image_id: str
    query: str
    right: bool
    at: str


@dataclass(frozen=True, slots=True)
class Status:
    """Which model and which index answer."""

    version: str
    model: str
    encoder_id: str | None
    space_id: str | None
    state: str
    pictures: int
    newest: str | None
    indexing: bool
    marks: int


class Client:
    """A connection to one server; threads may share it. Close it, or use it as a context manager.

    `url` is what `clipkit app` prints, with its token or without; `token` is the server's, if it asks
    for one; `timeout` is in seconds. For https, SSL_CERT_FILE names a certificate of your own. Every
    method raises InputError for what the server refuses, CatalogBusy, and ClipkitError for a server
    that cannot be reached, fails or stays busy.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        *,
        timeout: float = 60.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        address, _, printed = url.partition("/login#token=")
        token = token or unquote(printed)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._url = address.rstrip("/")
        self._http = httpx.Client(timeout=timeout, headers=headers, transport=transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections. Closing twice is fine."""
        self._http.close()

    # ---- searching

    def search(
        self,
        query: str = "",
        *,
        images: Sequence[Image] = (),
        filters: Mapping[str, Any] | None = None,
        sort: str | None = None,
        limit: int = 24,
        cursor: str | None = None,
    ) -> Page:
        """Return a page of what is found for words, example pictures, filters, or several of these.

        `filters` are folder, after, until, orientation, format, camera and size.

            client.search("dog on a beach -leash", images=["reference.jpg"], limit=100)
        """
        body = {"query": query, "images": [_image(image) for image in images]}
        return self._page("search", body, filters, sort, limit, cursor)

    def similar(
        self,
        image_id: str,
        query: str = "",
        *,
        filters: Mapping[str, Any] | None = None,
        sort: str | None = None,
        limit: int = 24,
        cursor: str | None = None,
    ) -> Page:
        """Return a page of what is like a picture of the library, or like it and words together."""
        body = {"image_id": image_id, "query": query}
        return self._page("similar", body, filters, sort, limit, cursor)

    def search_all(self, query: str = "", *, limit: int = 240, **options: Any) -> Iterator[Hit]:
        """Yield every hit of a search, `limit` at a request; the options are those of `search`.

        for hit in itertools.islice(client.search_all("a red car"), 10_000): ...
        """
        page = self.search(query, limit=limit, **options)
        yield from page.hits
        while page.cursor is not None:
            page = self.search(query, limit=limit, cursor=page.cursor, **options)
            yield from page.hits

    def _page(
        self,
        address: str,
        body: dict[str, Any],
        filters: Mapping[str, Any] | None,
        sort: str | None,
        limit: int,
        cursor: str | None,
    ) -> Page:
        body |= {"filters": dict(filters or {}), "sort": sort, "limit": limit, "cursor": cursor}
        answer = self._json("POST", f"/api/v1/{address}", json=body)
        empty = answer["empty"]
        if empty is not None:
            empty = Empty(empty["sentence"], tuple(_read(Offer, one) for one in empty["offers"]))
        hits = tuple(_read(Hit, hit) for hit in answer["hits"])
        return _read(Page, {**answer, "hits": hits, "empty": empty})

    # ---- pictures

    def picture(self, image_id: str) -> Picture:
        """Return what the server knows of a picture."""
        return _read(Picture, self._json("GET", f"/api/v1/pictures/{image_id}"))

    def thumbnail(self, image_id: str, size: int = 320) -> bytes:
        """Return a JPEG whose longer side has at most `size` pixels: 160, 320, 640 or 1280."""
        address = f"/api/v1/pictures/{image_id}/thumbnail"
        return self._request("GET", address, params={"size": size}).content

    def file(self, image_id: str) -> bytes:
        """Return the picture as a JPEG without metadata, its longer side at most 2,048 pixels."""
        return self._request("GET", f"/api/v1/pictures/{image_id}/file").content

    # ---- vectors

    def embed_texts(self, texts: Sequence[str]) -> Float32:
        """Return unit vectors (N, D) of texts."""
        return _vectors(self._json("POST", "/api/v1/embed/text", json={"texts": list(texts)}))

    def embed_images(self, images: Sequence[Path | str | bytes]) -> Float32:
        """Return unit vectors (N, D) of picture files, each a path or a file's bytes."""
        body = {"images": [_base64(image) for image in images]}
        return _vectors(self._json("POST", "/api/v1/embed/image", json=body))

    def similarity(self, a: Mapping[str, Image], b: Mapping[str, Image]) -> float:
        """Return the cosine of two sides, each {"text": ...}, {"image_id": ...} or {"image": file}.

        client.similarity({"text": "a red car"}, {"image": "car.jpg"})
        """
        body = {"a": _side(a), "b": _side(b)}
        return float(self._json("POST", "/api/v1/similarity", json=body)["cosine"])

    # ---- marks

    def marks(self) -> Iterator[Mark]:
        """Yield every mark, the oldest first."""
        cursor: int | None = 0
        while cursor is not None:
            page = self._json("GET", "/api/v1/marks", params={"cursor": cursor})
            yield from (_read(Mark, mark) for mark in page["marks"])
            cursor = page["cursor"]

    def mark(self, image_id: str, query: str, *, right: bool | None) -> int:
        """Mark a result of a query right or wrong, None: neither; return how many marks there are."""
        body = {"image_id": image_id, "query": query, "right": right}
        return int(self._json("POST", "/api/v1/marks", json=body)["total"])

    # ---- the server

    def status(self) -> Status:
        """Say which model and which index answer."""
        return _read(Status, self._json("GET", "/api/v1/status"))

    def ready(self) -> bool:
        """Return whether model and index can answer; False also where no server answers."""
        try:
            return self._http.get(f"{self._url}/readyz").is_success
        except httpx.HTTPError:
            return False

    def _json(self, method: str, address: str, **options: Any) -> dict[str, Any]:
        answer: dict[str, Any] = self._request(method, address, **options).json()
        return answer

    def _request(self, method: str, address: str, **options: Any) -> httpx.Response:
        for tried in range(1, TRIES + 1):
            try:
                answer = self._http.request(method, self._url + address, **options)
            except httpx.InvalidURL as error:
                raise InputError(f"{self._url!r} is no address of a server: {error}") from None
            except httpx.HTTPError as error:
                remedy = "check that it is running"
                if "CERTIFICATE_VERIFY_FAILED" in str(error):
                    remedy = "if the certificate is yours, name its file in SSL_CERT_FILE"
                raise ClipkitError(
                    f"the server at {self._url} does not answer ({error}); {remedy}"
                ) from error
            if answer.status_code not in (429, 503) or tried == TRIES:
                break
            time.sleep(_pause(answer.headers.get("Retry-After", "")))
        if answer.is_success:
            return answer
        raise _error(answer)


def _pause(retry_after: str) -> float:
    return min(float(retry_after), LONGEST_PAUSE) if retry_after.isdecimal() else 1.0


def _error(answer: httpx.Response) -> ClipkitError:
    """Return the error that says the server's sentence."""
    try:
        sentence = str(answer.json()["error"])
    except (ValueError, KeyError, TypeError):
        sentence = (
            f"the server at {answer.url} answered {answer.status_code} {answer.reason_phrase}"
        )
    if answer.status_code == 409:
        return CatalogBusy(sentence)
    refused = 400 <= answer.status_code < 500 and answer.status_code != 429
    return InputError(sentence) if refused else ClipkitError(sentence)


def _read(kind: type[_T], values: Mapping[str, Any]) -> _T:
    """Return a result from JSON; fields that a newer server adds are left out."""
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: _frozen(values[name]) for name in names})


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _vectors(answer: Mapping[str, Any]) -> Float32:
    return np.asarray(answer["vectors"], dtype=np.float32).reshape(-1, answer["dim"])


def _image(image: Image) -> str:
    """Return an image_id as it is, and a file in base64."""
    is_id = isinstance(image, str) and len(image) == 32 and not set(image) - set("0123456789abcdef")
    return str(image) if is_id else _base64(image)


def _base64(image: Image) -> str:
    if isinstance(image, bytes):
        return base64.b64encode(image).decode()
    try:
        return base64.b64encode(Path(image).expanduser().read_bytes()).decode()
    except OSError as error:
        raise InputError(f"{image} cannot be read: {error.strerror or error}") from None


def _side(side: Mapping[str, Image]) -> dict[str, Any]:
    return {key: _base64(value) if key == "image" else value for key, value in side.items()}
