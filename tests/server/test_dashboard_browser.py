"""The dashboard in a real browser: both themes, a telephone's width, and nothing but its own files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from dashboard_federation import NOW, Federation, busy_federation, job_spec
from dashboard_shot import CHROMIUM, WithHeaders, browse, serving, shoot
from other_host import other_host
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedcmr_server.dashboard import create_app

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

JOB = f"/jobs/{job_spec('cardiomm-running', rounds=10).sha256}"
SCRIPT = "<script>document.title = 'a script ran'</script>"
# A window is at least 500 pixels wide, a frame is not.
MEASURE = """<script>
if (self === top) {
  const frame = document.createElement("iframe");
  frame.style = "width: 360px; height: 800px; border: 0";
  frame.onload = () => {
    document.title = "width " + frame.contentDocument.documentElement.scrollWidth;
  };
  frame.src = "?live=off";  // a page may not frame itself under the same address
  document.body.append(frame);
}
</script>"""


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    made = busy_federation(tmp_path_factory.mktemp("busy"))
    with made.store:
        yield made


@pytest.fixture(scope="module")
def dashboard(federation: Federation) -> ASGIApp:
    """The app behind a gateway that shows the certificate of a site."""
    app = create_app(federation.home, federation.store, clock=lambda: NOW)
    return WithHeaders(app, federation.headers("alder"))


class Adding:
    """Adds markup to each HTML page of ``app``, as an injection would; ``open`` drops the policy."""

    def __init__(self, app: ASGIApp, markup: str, *, open_: bool = False) -> None:
        self._app, self._markup, self._open = app, markup.encode(), open_
        self.paths: list[str] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.paths.append(scope["path"])

        async def altered(message: Message) -> None:
            policies = {b"content-security-policy", b"x-frame-options"} if self._open else set()
            dropped = {b"content-length"} | policies
            if message["type"] == "http.response.start":
                kept = [each for each in message["headers"] if each[0] not in dropped]
                message = {**message, "headers": kept}
            elif b"</main>" in message["body"]:
                body = message["body"].replace(b"</main>", self._markup + b"</main>")
                message = {**message, "body": body}
            await send(message)

        await self._app(scope, receive, altered)


def corner(picture: Path) -> float:
    """How bright the page is at its left edge, from 0 to 1."""
    from matplotlib.image import imread

    return float(imread(picture)[-2, 2, :3].mean())


@pytest.mark.parametrize("path", ["/", JOB])
def test_pages_look_right_light_and_dark(dashboard: ASGIApp, tmp_path: Path, path: str) -> None:
    with serving(dashboard) as address:
        light = shoot(address + path, tmp_path / "light.png")
        dark = shoot(address + path, tmp_path / "dark.png", dark=True)
    assert corner(tmp_path / "light.png") > 0.9
    assert corner(tmp_path / "dark.png") < 0.15
    assert "CONSOLE" not in light + dark  # no error, and nothing that the policy refused


@pytest.mark.parametrize(
    ("path", "markup", "fits"),
    [
        ("/", "", True),
        (JOB, "", True),
        ("/sites", "", True),
        ("/sites", '<p style="width: 400px">wide</p>', False),
    ],
)
def test_pages_fit_a_telephone(dashboard: ASGIApp, path: str, markup: str, fits: bool) -> None:
    """A script measures the page, which only runs because the policy is dropped."""
    with serving(Adding(dashboard, markup + MEASURE, open_=True)) as address:
        page, _ = browse(address + path, "--dump-dom")
    width = re.search(r"<title>width (\d+)</title>", page)
    assert width is not None
    assert (int(width[1]) <= 360) == fits


def test_nothing_is_loaded_from_elsewhere_even_if_markup_got_in(dashboard: ASGIApp) -> None:
    with other_host() as (other, paths):
        markup = f'<img src="{other}/blocked">{SCRIPT}'
        closed = Adding(dashboard, markup)
        with serving(closed) as address:
            page, log = browse(address, "--dump-dom")
        assert paths == []
        assert "a script ran</title>" not in page
        assert log.count("Content Security Policy") >= 2
        assert set(closed.paths) == {"/", "/style.css", "/icon.svg"}
        # Without its policy the same page loads and runs both.
        with serving(Adding(dashboard, markup, open_=True)) as address:
            page, _ = browse(address, "--dump-dom")
        assert "/blocked" in paths
        assert "a script ran</title>" in page
