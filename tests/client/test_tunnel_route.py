"""Proxy URLs and addresses are taken whole or refused, and a password appears nowhere."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from fedcmr_client.tunnel import Proxy, Route
from fedcmr_shared.errors import ConfigurationError


@pytest.fixture(autouse=True)
def no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDCMR_PROXY_PASSWORD", raising=False)


@pytest.mark.parametrize(
    ("url", "proxy"),
    [
        ("http://proxy.hospital.example:3128", Proxy("proxy.hospital.example", 3128)),
        ("http://10.0.0.1:80/", Proxy("10.0.0.1", 80)),
        ("https://[fd00::1]:443", Proxy("fd00::1", 443, tls=True)),
        (
            "http://svc_mri:p%40ss%2Fword@dmz_proxy:8080",
            Proxy("dmz_proxy", 8080, False, "svc_mri", "p@ss/word"),
        ),
        ("http://me:@proxy:1", Proxy("proxy", 1, False, "me", "")),
    ],
)
def test_urls(url: str, proxy: Proxy) -> None:
    assert Proxy.parse(url) == proxy


@pytest.mark.parametrize(
    "url",
    [
        "",
        "proxy:3128",
        "http://proxy",
        "http://:3128",
        "http://me:hunter2@proxy:0",
        "http://me:hunter2@proxy:99999",
        "http://me:hunter2/@proxy:3128",
        "http://me:hun/ter2@proxy:3128",
        "http://me:hunter2@[proxy:3128",
        "http://me:hunter2@pro xy:3128",
        "http://me:hunter2@proxy:3128/path",
        "http://me:hunter2@proxy:3128?query",
        "http://me:hunter2@proxy:3128#fragment",
        "socks5://me:hunter2@proxy:1080",
        "http://m%3ae:hunter2@proxy:3128",
        "http://me:hunter2%0a@proxy:3128",
    ],
)
def test_other_urls_are_refused_without_their_password(url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^proxy: ") as refusal:
        Proxy.parse(url)
    for error in (refusal.value, refusal.value.__cause__, refusal.value.__context__):
        assert "hunter2" not in str(error)
        assert "hun" not in str(error)


def test_password_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="set FEDCMR_PROXY_PASSWORD"):
        Proxy.parse("http://me@proxy:3128")
    monkeypatch.setenv("FEDCMR_PROXY_PASSWORD", "hünter2")
    assert Proxy.parse("http://me@proxy:3128").password == "hünter2"
    assert Proxy.parse("http://me:mine@proxy:3128").password == "mine"
    assert Proxy.parse("http://proxy:3128").authorisation is None


def test_password_is_sent_and_not_shown() -> None:
    proxy = Proxy.parse("http://me:hunter2@proxy:3128")
    assert "hunter2" not in repr(Route("coordinator.example", 8443, proxy))
    assert proxy.authorisation is not None
    assert base64.b64decode(proxy.authorisation.removeprefix("Basic ")) == b"me:hunter2"


def test_unreadable_authority_of_the_proxy(tmp_path: Path) -> None:
    (tmp_path / "empty.pem").write_text("")
    for name in ("empty.pem", "missing.pem"):
        proxy = Proxy.parse("https://proxy:3128", tmp_path / name)
        with pytest.raises(ConfigurationError, match=f"^proxy: .*{name}"):
            proxy.tls_context()


@pytest.mark.parametrize(
    ("host", "port"),
    [
        ("", 8443),
        ("-h", 8443),
        ("a b", 8443),
        ("a\r\nb", 8443),
        ("a:1", 8443),
        ("a..b", 8443),
        ("a." + "b" * 64, 8443),
        ("a." * 127 + "b", 8443),
        ("a", 0),
        ("a", 65536),
    ],
)
def test_addresses_that_are_none(host: str, port: int) -> None:
    with pytest.raises(ConfigurationError, match=r"^coordinator: "):
        Route(host, port)


def test_address_of_ipv6_stands_in_brackets() -> None:
    assert Route("fd00::1", 8443).address == "[fd00::1]:8443"
    assert Route("coordinator.example", 8443).address == "coordinator.example:8443"
