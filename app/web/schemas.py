"""The bodies and answers of the HTTP API: pydantic models with examples, which OpenAPI is made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from app.web.requests import MOST_HITS, PAGE_SIZE
from clipkit.errors import suggestion
from clipkit.query import MAX_CHARS

MOST_IMAGES = 16  # pictures in one request
MOST_TEXTS = 256
CAT = "0123456789abcdef0123456789abcdef"  # the examples' picture
# the examples' file: one pixel
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR42mNoAAAAggCB2kUIOwAAAABJRU5ErkJggg=="

# ---- what is sent


class Body(BaseModel):
    """A JSON object of known fields; text is no number, and a number is no text."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _name_the_nearest(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            for name in data:
                if name not in cls.model_fields:
                    raise ValueError(
                        f"unknown field {name!r}; {suggestion(name, cls.model_fields)}"
                    )
        return data


ImageId = Annotated[str, Field(pattern="^[0-9a-f]{32}$", examples=[CAT])]
Text = Annotated[str, Field(max_length=MAX_CHARS)]
Day = Annotated[str, Field(json_schema_extra={"format": "date"}, max_length=10)]
Size = Annotated[
    Literal[160, 320, 640, 1280],
    BeforeValidator(lambda text: int(text) if str(text).isdecimal() else text),
]
Base64 = Annotated[str, Field(min_length=1, json_schema_extra={"contentEncoding": "base64"})]


class SearchFilters(Body):
    """What a picture must be to be searched at all."""

    folder: Annotated[str, Field(max_length=4_096)] | None = Field(
        None,
        description="An absolute path, or the key that the page has for it",
        examples=["/home/me/Pictures/2024"],
    )
    after: Day | None = Field(None, description="First day", examples=["2024-05-01"])
    until: Day | None = Field(None, description="Last day", examples=["2024-05-31"])
    orientation: Literal["landscape", "portrait", "square"] | None = None
    format: Annotated[str, Field(max_length=40)] | None = Field(None, examples=["JPEG"])
    camera: Annotated[str, Field(max_length=400)] | None = Field(
        None, description="Its whole name", examples=["Canon EOS 80D"]
    )
    size: int | None = Field(
        None, ge=0, le=9_999_999, description="Pixels of the longer side, at least", examples=[1920]
    )


class _Page(Body):
    filters: SearchFilters = Field(default_factory=SearchFilters)
    sort: Literal["score", "date", "name"] | None = None
    limit: int = Field(PAGE_SIZE, ge=1, le=MOST_HITS, description="Most hits in the answer")
    cursor: Annotated[str, Field(max_length=4_096)] | None = Field(
        None, description="`cursor` of the answer before, to go on after it"
    )


class SearchBody(_Page):
    """A search by words, by pictures, by filters, or by several of these."""

    query: Text = Field("", description="In the query language", examples=["dog on a beach -leash"])
    images: list[Annotated[str, Field(min_length=1)]] = Field(
        [],
        max_length=MOST_IMAGES,
        description="Examples: the image_id of a picture in the library, or a picture file in base64",
    )

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"query": "dog on a beach", "limit": 10}]}
    )


class SimilarBody(_Page):
    """A search for what is like one picture of the library."""

    image_id: ImageId
    query: Text = Field("", description="Words that count together with the picture")

    model_config = ConfigDict(json_schema_extra={"examples": [{"image_id": CAT, "limit": 10}]})


class TextsBody(Body):
    """Texts to encode."""

    texts: list[Text] = Field(max_length=MOST_TEXTS, examples=[["a dog on a beach"]])


class ImagesBody(Body):
    """Pictures to encode, each a file in base64."""

    images: list[Base64] = Field(max_length=MOST_IMAGES, examples=[[PNG]])


class SideBody(Body):
    """A picture of the library, a picture file in base64, or a text: exactly one of them."""

    image_id: ImageId | None = None
    image: Base64 | None = None
    text: Text | None = None

    @model_validator(mode="after")
    def _one(self) -> SideBody:
        if len(self.model_fields_set) != 1 or None in (
            getattr(self, n) for n in self.model_fields_set
        ):
            raise ValueError("give one of image_id, image and text")
        return self

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"text": "a dog on a beach"}, {"image_id": CAT}],
            "oneOf": [{"required": [name]} for name in ("image_id", "image", "text")],
        }
    )


class SimilarityBody(Body):
    """Two sides to compare."""

    a: SideBody
    b: SideBody


class MarkBody(Body):
    """A result of a query by words, marked right or wrong; null takes a mark back."""

    image_id: ImageId
    query: Text = Field(examples=["a red car"])
    right: bool | None = Field(examples=[True])


# ---- what is answered


class Error(BaseModel):
    """One sentence: what, the value, the limit, the remedy."""

    error: str = Field(examples=["limit is 5000; it must be less than or equal to 2400"])


class PictureAnswer(BaseModel):
    """What the catalog knows of a picture."""

    image_id: ImageId
    name: str = Field(examples=["beach.jpg"])
    path: str = Field(examples=["/home/me/Pictures/2024/beach.jpg"])
    width: int = Field(examples=[4032])
    height: int = Field(examples=[3024])
    format: str = Field(examples=["JPEG"])
    captions: list[str]
    tags: list[str]
    dated: str | None = Field(
        description="When it was taken, else when its oldest file was last changed; local time",
        examples=["2024-05-01T12:30:00"],
    )
    taken_at: str | None
    camera: str | None
    bytes: int
    places: list[str] = Field(description="All files with this content")
    thumbnail: str = Field(
        description="Address, relative to that of the request",
        examples=[f"pictures/{CAT}/thumbnail"],
    )


class Hit(PictureAnswer):
    """A picture in a result."""

    rank: int = Field(description="From 1, going on from page to page", examples=[1])
    score: float | None = Field(
        description="Cosine; null where nothing was compared", examples=[0.31]
    )
    strength: Literal["strong", "fair", "weak"] | None
    probability: float | None = Field(description="Of being right for the words", examples=[0.92])


class Offer(BaseModel):
    """A search that finds something."""

    label: str
    query: str
    keeps_filters: bool
    total: int


class Empty(BaseModel):
    """Why nothing passes, and what would."""

    sentence: str = Field(examples=["No folder is called “2042”"])
    offers: list[Offer]


class SearchResult(BaseModel):
    """A page of hits, the best first."""

    hits: list[Hit]
    total: int = Field(description="Pictures that pass the filters", examples=[1280])
    cursor: str | None = Field(description="To ask for the next page; null after the last hit")
    notes: list[str] = Field(description="Sentences about the whole result")
    empty: Empty | None = Field(description="Why nothing passes")
    seconds: float = Field(examples=[0.012])


class Vectors(BaseModel):
    """Unit vectors in the order of what was sent."""

    vectors: list[list[float]]
    encoder_id: str = Field(description="Hash of both towers")
    space_id: str | None = Field(description="Vectors of one space_id can be compared")
    dim: int = Field(examples=[512])


class Similarity(BaseModel):
    """How alike two are."""

    cosine: float = Field(ge=-1, le=1, examples=[0.27])
    encoder_id: str


class MarkAnswer(BaseModel):
    """A stored mark."""

    image_id: str
    query: str
    right: bool | None
    total: int = Field(description="Marks in force")


class StoredMark(BaseModel):
    image_id: str
    query: str
    right: bool
    at: str = Field(description="UTC", examples=["2026-05-01T12:30:00.000+00:00"])


class Marks(BaseModel):
    """Marks in force, the oldest first."""

    marks: list[StoredMark]
    total: int
    cursor: int | None = Field(description="To ask for the next page; null after the last mark")


class StatusAnswer(BaseModel):
    """Which model and which index answer."""

    version: str
    model: str = Field(examples=["builtin"])
    encoder_id: str | None
    space_id: str | None
    state: Literal["unloaded", "loading", "ready"] = Field(description="Of the model")
    pictures: int
    newest: str | None = Field(description="When a picture was last added; UTC")
    indexing: bool
    marks: int


class Health(BaseModel):
    status: Literal["ok"]
