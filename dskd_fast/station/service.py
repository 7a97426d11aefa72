"""A service that judges the photographs that are sent to it, and a page to drop them on.

Photographs are read and drawn in threads; those that come at about the same time go through the networks as one batch.
What a request may take is bounded: the bytes of its body, the pixels of its image, and how many there are at a time.
"""

import asyncio
import base64
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from numpy.typing import NDArray
from pydantic import BaseModel, Field
from starlette.requests import ClientDisconnect
from torch import Tensor

import dskd_fast
from dskd_fast.data.images import ImageError, decode_image
from dskd_fast.detection.detector import Detector
from dskd_fast.detection.overlay import colour_range
from dskd_fast.detection.pictures import drawable, overlay_file
from dskd_fast.detection.prediction import Prediction, caption, judge, map_to_draw
from dskd_fast.detection.scoring.parts import PARTS
from dskd_fast.errors import UserError
from dskd_fast.evaluation.html import filled, resource
from dskd_fast.metrics.maps import map_file
from dskd_fast.station.batches import Batches
from dskd_fast.workers import n_threads

BATCH, WAIT = 8, 0.01
"""Images in a batch, and the seconds that the first of them waits at most for others that are being read."""
MOST_AT_ONCE = 64
"""Requests; a further one is refused."""
BODY_SECONDS = 60
"""Within which a body has to be there."""

_MEDIA_TYPES = ("image/png", "image/jpeg", "image/bmp", "image/tiff", "image/webp", "application/octet-stream")
# What a message calls the body.
_NAME = Path("the image")
# A found map: the one that an overlay shows, and the combined one, (S, S) each.
_Maps = tuple[NDArray[np.float32], NDArray[np.float32]]


class Judgement(BaseModel):
    """What was found in a photograph; scores in standard deviations above what is normal."""

    score: float
    threshold: float | None = Field(description="of the decision; null where the run has none")
    decision: str | None = Field(description="normal, anomalous or suspect; null without a threshold")
    reason: str | None = Field(description="why the decision is suspect")
    decided_by: str | None = Field(description="the part of the score with the largest value")
    parts: dict[str, float] = Field(description="the value of each part of the score")
    width: int
    height: int
    overlay: str | None = Field(description="with overlay=true: photograph and heat map side by side, base64 of a JPEG")
    map: str | None = Field(description="with map=true: the heat map's values, base64 of a float32 TIFF")
    seconds: float = Field(description="from the whole body to the answer")


class Problem(BaseModel):
    """Why there is no judgement."""

    detail: str


class Health(BaseModel):
    """What is served, and what it takes."""

    run: str
    version: str
    threshold: float | None
    max_bytes: int


def make_app(detector: Detector, *, run: str, threshold: float | None, max_bytes: int, wait: float = WAIT) -> FastAPI:
    """The service, for an ASGI server.

    Args:
        detector: calibrated.
        run: what the page calls it.
        threshold: of the decisions; None makes none.
        max_bytes: of a body; larger ones are refused unread.
        wait: seconds, see `WAIT`.

    The pixels of an image are limited by `dskd_fast.data.images.pixel_limit`, in whose context the service has to run.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with (
            Batches(partial(_judge, detector, threshold), BATCH, wait) as batches,
            ThreadPoolExecutor(n_threads()) as pool,
        ):
            app.state.service = _Service(detector, threshold, max_bytes, batches, pool)
            yield

    app = FastAPI(
        title="dskd-fast",
        version=dskd_fast.__version__,
        summary="Finds what is wrong in photographs of a product.",
        lifespan=lifespan,
        # Their pages load from elsewhere; /openapi.json is there.
        docs_url=None,
        redoc_url=None,
    )
    app.add_exception_handler(RequestValidationError, _invalid)
    refusals: dict[int | str, dict[str, Any]] = {
        400: {"model": Problem, "description": "The body ended early"},
        408: {"model": Problem, "description": "The body took too long"},
        413: {"model": Problem, "description": "The body is too large"},
        415: {"model": Problem, "description": "The body is a form, not an image"},
        422: {"model": Problem, "description": "The body is no image that can be used, or a parameter is wrong"},
        503: {"model": Problem, "description": "Too many requests at a time"},
    }
    body = {
        "required": True,
        "content": {name: {"schema": {"type": "string", "format": "binary"}} for name in _MEDIA_TYPES},
    }

    @app.post("/predict", responses=refusals, openapi_extra={"requestBody": body})
    async def predict(
        request: Request,
        overlay: Annotated[bool, Query(description="draw it")] = False,
        with_map: Annotated[bool, Query(alias="map", description="send it")] = False,
    ) -> Judgement:
        """Judge the image file that is the body, whatever its content type says: PNG, JPEG, BMP, TIFF or WebP."""
        for name in {*request.query_params} - {"overlay", "map"}:
            raise HTTPException(422, f"there is no parameter {name[:50]!r}: overlay and map are possible")
        return await request.app.state.service.answer(request, overlay, with_map)

    @app.get("/health")
    async def health() -> Health:
        """Answers while the service runs."""
        return Health(run=run, version=dskd_fast.__version__, threshold=threshold, max_bytes=max_bytes)

    page = _page(run, threshold, max_bytes)

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return HTMLResponse(page, headers={"X-Content-Type-Options": "nosniff"})

    return app


class _Service:
    """What the requests of an app share."""

    def __init__(
        self,
        detector: Detector,
        threshold: float | None,
        max_bytes: int,
        batches: Batches[Tensor, tuple[Prediction, _Maps]],
        pool: ThreadPoolExecutor,
    ) -> None:
        self.detector, self.threshold, self.max_bytes = detector, threshold, max_bytes
        self.batches, self.pool = batches, pool
        self.n_requests = 0

    async def answer(self, request: Request, with_overlay: bool, with_map: bool) -> Judgement:
        if self.n_requests >= MOST_AT_ONCE:
            detail = f"{MOST_AT_ONCE} requests are being answered, and no more at a time: try again"
            raise HTTPException(503, detail, {"Retry-After": "1"})
        self.n_requests += 1
        try:
            data = await self._body(request)
            started = time.monotonic()
            in_thread = partial(asyncio.get_running_loop().run_in_executor, self.pool)
            with self.batches.announced() as submit:
                image, resized = await in_thread(self._read, data)
                height, width = image.shape[:2]
                del data
                prediction, maps = await asyncio.wrap_future(submit(resized))
            drawn = await in_thread(self._draw, image, prediction, maps[0]) if with_overlay else None
            values = await in_thread(self._values, (height, width), maps[1]) if with_map else None
        finally:
            self.n_requests -= 1
        seconds = round(time.monotonic() - started, 4)
        found = {"width": width, "height": height, "overlay": drawn, "map": values, "seconds": seconds}
        return Judgement.model_validate(asdict(prediction) | found)

    async def _body(self, request: Request) -> bytes:
        if request.headers.get("content-type", "").lower().startswith("multipart/"):
            raise HTTPException(
                415, "the body is a form: send the image file itself as the body, as by curl --data-binary @FILE"
            )
        too_large = HTTPException(
            413, f"the body has more than {self.max_bytes:,} bytes: send a smaller file, or serve with --max-bytes"
        )
        announced = request.headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > self.max_bytes:
            raise too_large
        pieces, n_bytes = [], 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for piece in request.stream():
                    n_bytes += len(piece)
                    if n_bytes > self.max_bytes:
                        raise too_large
                    pieces.append(piece)
        except TimeoutError:
            raise HTTPException(408, f"the body was not there within {BODY_SECONDS} seconds: send it faster") from None
        except ClientDisconnect:
            raise HTTPException(400, "the body ended early") from None
        return b"".join(pieces)

    def _read(self, data: bytes) -> tuple[NDArray[np.uint8], Tensor]:
        try:
            image = decode_image(data, _NAME, bits=self.detector.bits)
        except ImageError as error:
            reason = "; ".join(reason for _, reason in error.failures)
            raise HTTPException(422, f"the image cannot be used: {reason}") from None
        return image, self.detector.resized(image)

    def _draw(self, image: NDArray[np.uint8], prediction: Prediction, anomaly_map: NDArray[np.float32]) -> str:
        small = drawable(self.detector, anomaly_map, image.shape[:2])
        try:
            data = overlay_file(
                image, small, caption(prediction), colour_range(self.threshold), "jpg", what_to_do="ask for none"
            )
        except UserError as error:
            raise HTTPException(422, str(error)) from None
        return base64.b64encode(data).decode("ascii")

    def _values(self, size: tuple[int, int], anomaly_map: NDArray[np.float32]) -> str:
        return base64.b64encode(map_file(self.detector.localisation_map(anomaly_map, size))).decode("ascii")


def _judge(detector: Detector, threshold: float | None, images: list[Tensor]) -> list[tuple[Prediction, _Maps]]:
    judged, found = judge(detector, torch.stack(images), [""] * len(images), threshold)
    return [(one, (map_to_draw(one, found.maps, i), found.maps.combined[i])) for i, one in enumerate(judged)]


async def _invalid(_: Request, error: Exception) -> Response:
    """A wrong parameter, in one sentence."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    detail = f"{first['loc'][-1]}={str(first.get('input'))[:50]!r} is not possible: use true or false"
    return JSONResponse({"detail": detail}, 422)


def _page(run: str, threshold: float | None, max_bytes: int) -> str:
    page, style, script = (
        resource(__package__, f"service_page/{name}") for name in ("page.html", "style.css", "script.js")
    )
    data = {
        "run": run,
        "threshold": threshold,
        "max_bytes": max_bytes,
        "meanings": {name: kind.meaning for name, kind in PARTS.items()},
    }
    return filled(page, resource("dskd_fast.evaluation", "report_page/style.css") + style, script, data)
