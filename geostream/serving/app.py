"""Define the HTTP interface: the page, and what it asks for.

Every refusal is a JSON object with the one line ``error``. Nothing that is served refers to another host, and the
Content-Security-Policy forbids browsers to ask one. The schema is at ``/openapi.json``; the pages of FastAPI that show
it are left out, because they load scripts from elsewhere.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from geostream import __version__
from geostream.errors import GeostreamError, NotFound
from geostream.images import is_jpeg
from geostream.serving.answers import Answers, Failure, Info, MapPart
from geostream.serving.base_map import Bounds
from geostream.serving.service import Service, line_of
from geostream.serving.uploads import FIELD, receive_photos

STATIC = Path(__file__).with_name("static")
FOR_EVER = "public, max-age=31536000, immutable"
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
        "worker-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
PHOTOS_SCHEMA = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": [FIELD],
                "properties": {FIELD: {"type": "array", "items": {"type": "string", "format": "binary"}}},
            }
        }
    },
}
REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": Failure, "description": text}
    for status, text in {
        400: "No photo, or not a whole request.",
        408: "The request came too slowly.",
        413: "Too large: a photo, the request, or their number.",
        415: "No photo that can be read.",
        429: "Too many requests at the same time; come again after Retry-After seconds.",
        503: "The store cannot be read just now.",
    }.items()
}
Longitude = Annotated[float, Query(ge=-540, le=540)]
Latitude = Annotated[float, Query(ge=-90, le=90)]


def make_app(service: Service) -> FastAPI:
    """Make the application of an opened service.

    Args:
        service: What it answers from.
    """

    @asynccontextmanager
    async def running(_: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            yield

    app = FastAPI(
        title="geostream serve",
        summary="Where is this photo?",
        version=__version__,
        lifespan=running,
        docs_url=None,
        redoc_url=None,
    )

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(STATIC / "index.html")

    @app.get("/api/info")
    async def info() -> Info:
        """Say what this page answers from."""
        return service.info()

    @app.post("/api/locate", responses=REFUSALS, openapi_extra={"requestBody": PHOTOS_SCHEMA})
    async def locate(request: Request) -> Answers:
        """Answer where photos were taken. If none of them can be answered, the first one's reason is the response."""
        async with service.admitted():
            photos = await receive_photos(request, service.limits)
            try:
                return await service.locate(photos)
            finally:
                for photo in photos:
                    await photo.close()

    @app.get("/api/places")
    def places(west: Longitude, south: Latitude, east: Longitude, north: Latitude) -> MapPart:
        """Say which tiles cover a part of the map, or where there are too many, how many places lie where."""
        return service.map_part(Bounds(west, south, east, north))

    @app.get(
        "/tiles/{place}.jpg",
        response_class=Response,
        responses={200: {"content": {"image/jpeg": {}}}, 404: {"model": Failure}, 503: REFUSALS[503]},
    )
    async def tile(place: int, layout: str = "") -> Response:
        """Read a place's tile from its shard, as it is stored. With the layout's id, browsers may keep it."""
        try:
            data = await service.tiles.read(place)
        except NotFound as error:
            raise HTTPException(404, str(error)) from error
        kept = FOR_EVER if layout == service.layout.id else "no-cache"
        media_type = "image/jpeg" if is_jpeg(data) else "image/png"
        return Response(data, media_type=media_type, headers={"Cache-Control": kept})

    @app.get("/healthz")
    async def alive() -> dict[str, str]:
        """Say that the server answers."""
        return {"status": "alive"}

    @app.get("/readyz", responses={503: REFUSALS[503]})
    async def ready() -> dict[str, str]:
        """Say that the store can be read, too."""
        await service.check_store()
        return {"status": "ready"}

    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    _answer_errors(app)
    app.add_middleware(_Headers)
    return app


def _answer_errors(app: FastAPI) -> None:
    """Make every error a JSON object with one line."""

    @app.exception_handler(GeostreamError)
    async def ours(_: Request, error: GeostreamError) -> JSONResponse:
        status, line = line_of(error)
        headers = {408: {"Connection": "close"}, 429: {"Retry-After": "1"}, 503: {"Retry-After": "5"}}
        return JSONResponse({"error": line}, status, headers.get(status))

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": str(error.detail)}, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return JSONResponse({"error": f"{first['loc'][-1]}: {first['msg']}"}, 422)

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=400)  # nobody reads it

    @app.exception_handler(Exception)
    async def failed(_: Request, __: Exception) -> JSONResponse:
        return JSONResponse({"error": "the server failed; its log says more"}, 500)


class _Headers:
    """Add the headers that keep browsers from asking other hosts."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                more = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *more]}
            await send(message)

        await self.app(scope, receive, with_headers)
