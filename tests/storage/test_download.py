"""Downloads from servers with odd headers and endless files: a result or a message, never a traceback."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from weights_server import Server, serving

from mae_dat.storage import download as module
from mae_dat.storage.download import UrlFailedError, download

CONTENT = b"0123456789" * 100


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


@pytest.fixture(autouse=True)
def without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_PAUSE_SECONDS", 0.0)


@pytest.mark.parametrize("claim", ["", "abc", "-5", "1_000", "9" * 40, "\xb2"])
def test_a_senseless_length_is_no_length(claim: str, server: Server, tmp_path: Path) -> None:
    url = server.page("/file", CONTENT, claim=claim)
    download(url, tmp_path / "file", "file")
    assert (tmp_path / "file").read_bytes() == CONTENT


@pytest.mark.parametrize(
    "headers",
    [{"Content-Range": "nonsense"}, {"Last-Modified": "yesterday"}, {"ETag": "W/"}, {"Content-Encoding": "identity"}],
)
def test_odd_headers_do_not_matter(headers: dict[str, str], server: Server, tmp_path: Path) -> None:
    download(server.page("/file", CONTENT, headers=headers), tmp_path / "file", "file")
    assert (tmp_path / "file").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ({"headers": {"Content-Encoding": "gzip"}}, "encodes the file"),
        ({"headers": {"Transfer-Encoding": "chunked"}, "claim": ""}, "connection"),
        ({"status": 302, "location": "http://[not an address"}, "not valid|IPv6"),
        ({"status": 302, "location": "http://127.0.0.1:notaport/"}, "not valid|port"),
        ({"status": 302, "location": "file:///etc/passwd"}, "redirect|302"),
    ],
)
def test_answers_that_cannot_be_used(page: dict[str, object], message: str, server: Server, tmp_path: Path) -> None:
    with pytest.raises(UrlFailedError, match=message):
        download(server.page("/file", CONTENT, **page), tmp_path / "file", "file")


@pytest.mark.parametrize("claim", [None, ""])
def test_a_file_that_is_too_large_is_not_kept(claim: str | None, server: Server, tmp_path: Path) -> None:
    url = server.page("/large", bytes(5 << 20), claim=claim)
    before = server.bytes_sent
    with pytest.raises(UrlFailedError, match=r"more than the 1,000,000 bytes allowed"):
        download(url, tmp_path / "large", "large", max_bytes=1_000_000)
    assert not list(tmp_path.iterdir())
    if claim is None:
        assert server.bytes_sent - before <= 5 << 20
    download(url, tmp_path / "large", "large", max_bytes=5 << 20)
    assert (tmp_path / "large").stat().st_size == 5 << 20
