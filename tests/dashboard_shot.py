"""Serves the dashboard on this machine and takes pictures of it with a headless Chromium.

Tests use the parts; the picture of the documentation is made from a real coordinator's folder::

    python tests/dashboard_shot.py FOLDER docs/images/dashboard.png --path /jobs/ID
"""

from __future__ import annotations

import argparse
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import uvicorn
from dashboard_federation import client_of
from PIL import Image
from starlette.types import ASGIApp, Receive, Scope, Send

from fedcmr_server.dashboard import create_app
from fedcmr_server.home import CoordinatorHome
from fedcmr_server.store import Tokens

CHROMIUM = shutil.which("chromium")


class WithHeaders:
    """Adds headers to each request, as the gateway in front of the app does."""

    def __init__(self, app: ASGIApp, headers: Mapping[str, str]) -> None:
        self._app = app
        self._headers = [(name.encode(), value.encode()) for name, value in headers.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app({**scope, "headers": [*scope["headers"], *self._headers]}, receive, send)


@contextmanager
def serving(app: ASGIApp) -> Iterator[str]:
    """Serve ``app`` on a free port of this machine alone; yield its URL."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)  # before the server's thread runs, browsers wait in the queue
        config = uvicorn.Config(
            app, http="h11", ws="none", lifespan="off", log_config=None, access_log=False
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def browse(url: str, *options: str, dark: bool = False, size: str = "1200,900") -> tuple[str, str]:
    """Open ``url`` in a new browser; return the page as the browser made it, and its log."""
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory() as profile:
        done = subprocess.run(
            [
                CHROMIUM,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--hide-scrollbars",
                "--disable-background-networking",
                "--disable-component-update",
                "--no-first-run",
                "--force-prefers-reduced-motion",
                "--enable-logging=stderr",
                f"--user-data-dir={profile}",
                f"--blink-settings=preferredColorScheme={0 if dark else 1}",
                f"--window-size={size}",
                *options,
                url,
            ],
            check=True,
            capture_output=True,
            text=True,
            timeout=120,
        )
    return done.stdout, done.stderr


def shoot(url: str, picture: Path, *, dark: bool = False, size: str = "1200,900") -> str:
    """Take a picture of ``url`` and return the browser's log."""
    return browse(url, f"--screenshot={picture.absolute()}", dark=dark, size=size)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description="Take a picture of a coordinator's dashboard.")
    parser.add_argument("folder", type=Path, help="the coordinator's folder")
    parser.add_argument("picture", type=Path)
    parser.add_argument("--path", default="/", help="which page, such as /sites")
    parser.add_argument("--size", default="1200,2056", help="width,height in pixels")
    parser.add_argument("--dark", action="store_true")
    chosen = parser.parse_args()
    home = CoordinatorHome.open(chosen.folder)
    with home.store() as store:
        app = create_app(home, store)
        token = Tokens(store).issue("picture", timedelta(minutes=1))
        cookie = client_of(app).post("/login", data={"token": token}).headers["set-cookie"]
        with serving(WithHeaders(app, {"cookie": cookie.partition(";")[0]})) as address:
            shoot(address + chosen.path, chosen.picture, dark=chosen.dark, size=chosen.size)
    with Image.open(chosen.picture) as picture:
        small = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    small.save(chosen.picture, optimize=True)


if __name__ == "__main__":
    main()
