"""Renders the templates. Every value is escaped; nothing a member wrote becomes markup."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import HTMLResponse

from fedcmr_server.dashboard import charts
from fedcmr_server.dashboard.access import SESSION_LIFE
from fedcmr_server.words import ago, bytes_text, machine, plural, short_utc, utc
from fedcmr_shared import __version__

REFRESH_S: Final = 15
"""A page of something under way loads itself again after so many seconds."""

_MESSAGES: Final[Mapping[int, tuple[str, str]]] = {
    400: ("This form cannot be read", "Open the link that you were given once more."),
    401: ("Please log in", ""),
    403: ("Not from there", "The form came from another site. Open the link yourself."),
    404: ("No such page", "The job may have another id. All jobs are on the overview."),
    405: ("This dashboard only shows", "Nothing can be changed here."),
    429: ("Too many failed logins", "Wait a minute, then try again."),
    500: ("This page failed", "The coordinator's log says why."),
    503: ("The database does not answer", "The coordinator's log says why. Try again later."),
}


class Pages:
    """The pages of the federation of this name."""

    def __init__(self, federation: str) -> None:
        self._environment = Environment(
            loader=PackageLoader("fedcmr_server.dashboard"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._environment.filters.update(
            utc=utc, short_utc=short_utc, machine=machine, ago=ago, bytes=bytes_text, plural=plural
        )
        self._environment.globals.update(
            box=charts,
            federation=federation,
            version=__version__,
            refresh_s=REFRESH_S,
            session_hours=int(SESSION_LIFE.total_seconds() // 3600),
        )

    def page(
        self,
        request: Request,
        name: str,
        now: datetime,
        status: int = 200,
        *,
        live: bool = False,
        headers: Mapping[str, str] | None = None,
        **values: Any,
    ) -> HTMLResponse:
        """Return template ``name``; one that is ``live`` loads itself again, unless told not to."""
        content = self._environment.get_template(f"{name}.html.j2").render(
            path=request.url.path,
            viewer=getattr(request.state, "viewer", None),
            now=now,
            live=live,
            refresh=live and request.query_params.get("live") != "off",
            **values,
        )
        return HTMLResponse(content, status, headers=dict(headers or {}))

    def message(
        self,
        request: Request,
        now: datetime,
        status: int,
        headers: Mapping[str, str] | None = None,
    ) -> HTMLResponse:
        """Return the page that says what is wrong."""
        title, text = _MESSAGES.get(status, ("This did not work", ""))
        return self.page(
            request, "message", now, status, headers=headers, code=status, title=title, text=text
        )
