"""The dashboard as a Starlette application: routes, login, and what is answered when.

It changes nothing but its own sessions and the tokens that open them, so that every method but GET
and HEAD is refused elsewhere than at ``/login``. The gateway alone reaches it, over a Unix socket.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from importlib.resources import files
from typing import Final, Protocol
from urllib.parse import parse_qs

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from fedcmr_server.authoriser import authorise
from fedcmr_server.dashboard.access import SESSION, Door, TooManyFailures, address_of
from fedcmr_server.dashboard.headers import SECURITY_HEADERS, SecurityHeaders
from fedcmr_server.dashboard.job_view import job_page
from fedcmr_server.dashboard.pages import Pages
from fedcmr_server.dashboard.reading import Reader
from fedcmr_server.dashboard.views import overview, sites_page
from fedcmr_server.store import Store
from fedcmr_shared.errors import FederationError

Clock = Callable[[], datetime]

_AUTHORISE: Final = "/_authorise"
"""Has rules of its own, and the gateway lets nobody ask it from outside."""

_OPEN: Final = frozenset({"/login", "/healthz", "/style.css", "/icon.svg"})
"""Paths that need no login."""

_STATIC: Final = {"/style.css": "text/css", "/icon.svg": "image/svg+xml"}
_LONGEST_FORM: Final = 4096
_READING: Final = ("GET", "HEAD")


class Settings(Protocol):
    """What the pages take from the coordinator's settings."""

    @property
    def federation(self) -> str:
        """The federation's name."""


class Home(Protocol):
    """What the pages take from the coordinator's folder."""

    @property
    def settings(self) -> Settings:
        """The settings."""

    @property
    def federation_sha256(self) -> str:
        """SHA-256 of the authority's certificate."""


def create_app(home: Home, store: Store, *, clock: Clock = lambda: datetime.now(UTC)) -> Starlette:
    """Return the dashboard of the coordinator at ``home``.

    Also answers the gateway's questions at ``/_authorise``, see :mod:`fedcmr_server.authoriser`.
    """
    dashboard = Dashboard(home, store, clock)
    app = Starlette(
        routes=[
            Route("/", dashboard.overview),
            Route("/jobs/{job}", dashboard.job),
            Route("/sites", dashboard.sites),
            Route("/login", dashboard.login_form),
            Route("/login", dashboard.log_in, methods=["POST"]),
            Route("/healthz", dashboard.health),
            *(Route(path, _static(path, kind)) for path, kind in _STATIC.items()),
            Route(_AUTHORISE, authorise),
        ],
        middleware=[Middleware(SecurityHeaders), Middleware(Guard, dashboard=dashboard)],
        exception_handlers={
            HTTPException: dashboard.refused,
            FederationError: dashboard.unavailable,
            Exception: dashboard.failed,
        },
    )
    app.router.redirect_slashes = False
    app.state.store = store
    return app


class Dashboard:
    """The pages. Whoever is let in is ``request.state.viewer``, as `Guard` found out."""

    def __init__(self, home: Home, store: Store, clock: Clock) -> None:
        self.door = Door(store)
        self.clock = clock
        self._federation_sha256 = home.federation_sha256
        self._reader = Reader(store)
        self._pages = Pages(home.settings.federation)

    def overview(self, request: Request) -> Response:
        """Jobs, sites and newest events."""
        now = self.clock()
        page = overview(self._reader.overview(), now)
        return self._pages.page(request, "overview", now, live=page.live, page=page)

    def job(self, request: Request) -> Response:
        """One job."""
        now = self.clock()
        rows = self._reader.job(request.path_params["job"])
        if rows is None:
            raise HTTPException(404)
        page = job_page(rows, now)
        return self._pages.page(request, "job", now, live=page.card.live, page=page)

    def sites(self, request: Request) -> Response:
        """Members, certificates and roster."""
        now = self.clock()
        page = sites_page(*self._reader.sites(), self._federation_sha256, now)
        return self._pages.page(request, "sites", now, page=page)

    def login_form(self, request: Request) -> Response:
        """A form with a button: whatever only follows links does not use the token up."""
        token = request.query_params.get("token", "")
        return self._pages.page(request, "login", self.clock(), token=token, problem="")

    async def log_in(self, request: Request) -> Response:
        """Use a token up and open a session."""
        # A browser says so when another page sent the form.
        if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            raise HTTPException(403)
        token = await _token(request)
        if token is None:
            raise HTTPException(400)
        address, now = address_of(request.headers), self.clock()
        try:
            session = await run_in_threadpool(self.door.log_in, token, address, now)
        except TooManyFailures:
            raise HTTPException(429, headers={"Retry-After": "60"}) from None
        if session is None:
            return self._pages.page(
                request, "login", now, 401, token="", problem="This token is not valid."
            )
        answer = RedirectResponse("/", status_code=303)
        answer.set_cookie(SESSION, session, secure=True, httponly=True, samesite="strict")
        return answer

    def health(self, request: Request) -> Response:
        """Whether the database answers, for machines."""
        try:
            self._reader.check()
        except FederationError:
            return PlainTextResponse("the database does not answer\n", 503)
        return PlainTextResponse("ok\n")

    def refused(self, request: Request, error: Exception) -> Response:
        """The page of an HTTP error."""
        assert isinstance(error, HTTPException)
        return self._pages.message(request, self.clock(), error.status_code, error.headers)

    def unavailable(self, request: Request, error: Exception) -> Response:
        """The page while the database does not answer; why not stands in the coordinator's log."""
        return self._pages.message(request, self.clock(), 503)

    def failed(self, request: Request, error: Exception) -> Response:
        """The page of a mistake in this program; Starlette sends it past `SecurityHeaders`."""
        return self._pages.message(request, self.clock(), 500, SECURITY_HEADERS)

    def admit(self, request: Request) -> Response | None:
        """Note who asks, or return the answer to somebody who may not.

        Raises:
            FederationError: the database does not answer.
        """
        path, method = request.url.path, request.method
        if method not in _READING and (method, path) != ("POST", "/login"):
            allowed = {"Allow": "GET, HEAD, POST" if path == "/login" else "GET, HEAD"}
            return self._pages.message(request, self.clock(), 405, allowed)
        viewer = self.door.viewer(request.headers, request.cookies, self.clock())
        request.state.viewer = viewer
        if viewer is None and path not in _OPEN:
            return self._pages.message(request, self.clock(), 401)
        return None


class Guard:
    """Lets a request through to ``app`` when the dashboard admits it; so no page can forget to."""

    def __init__(self, app: ASGIApp, dashboard: Dashboard) -> None:
        self._app, self._dashboard = app, dashboard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] != "http" or scope["path"] == _AUTHORISE:
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        try:
            answer = await run_in_threadpool(self._dashboard.admit, request)
        except FederationError as error:
            answer = self._dashboard.unavailable(request, error)
        await (self._app if answer is None else answer)(scope, receive, send)


async def _token(request: Request) -> str | None:
    """Return the form's token; None when the body is no such form."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > _LONGEST_FORM:
            return None
    try:
        fields = parse_qs(body.decode("ascii"), strict_parsing=True, max_num_fields=4)
    except ValueError:
        return None
    tokens = fields.get("token", [])
    return tokens[0] if len(tokens) == 1 else None


def _static(path: str, kind: str) -> Callable[[Request], Response]:
    content = files("fedcmr_server.dashboard").joinpath(f"static{path}").read_bytes()

    def answer(_: Request) -> Response:
        return Response(content, media_type=kind)

    return answer
