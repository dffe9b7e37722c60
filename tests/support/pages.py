"""Looking at the pages of reports: what is in them, and how a browser lays them out."""

import html
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

VOID = {"meta", "img", "br", "hr", "input", "link"}


class Page(HTMLParser):
    """Collects what the tests look at: tags with attributes, rows of table cells, visible text, tags left open."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.in_cell = False
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another tag"
        if tag in ("td", "th"):
            self.in_cell = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.in_cell:
            self.rows[-1][-1] = (self.rows[-1][-1] + data).strip()


def require_self_contained(page: str) -> None:
    """Nothing on the page asks for anything outside it, and every image has words."""
    tags = Page(page).tags
    for tag, attributes in tags:
        assert tag not in ("link", "iframe")
        if tag == "script":
            assert not attributes.get("src")
        if tag == "img":
            assert (attributes["src"] or "").startswith("data:image/png;base64,")
            assert attributes["alt"]
    links = [v for _, attributes in tags for k, v in attributes.items() if k in ("href", "src") and v]
    assert all(link.startswith(("#", "data:")) for link in links)
    assert not re.search(r"url\(|@import|https?://", re.sub(r"base64,[^\"]*", "", without_scripts(page)))


def without_scripts(page: str) -> str:
    """The page without the content of its scripts."""
    return re.sub(r"(?s)(<script[^>]*>).*?</script>", r"\1</script>", page)


def phone_widths(page: str, folder: Path) -> tuple[int, int]:
    """Widths in px of what is on the page and of a frame 390 px wide that shows it. Skips without Chromium."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium found: install it to check the layout")
    frame = f'<iframe style="width:390px;height:800px;border:0" srcdoc="{html.escape(page)}"></iframe>'
    script = (
        "onload = () => { const page = document.querySelector('iframe').contentDocument.documentElement;"
        "document.title = 'widths ' + page.scrollWidth + ' ' + page.clientWidth; }"
    )
    (folder / "frame.html").write_text(f'<!DOCTYPE html><meta charset="utf-8"><script>{script}</script>{frame}')
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=5000", "--dump-dom"]
    dom = subprocess.run(
        [*command, (folder / "frame.html").as_uri()], capture_output=True, text=True, timeout=120
    ).stdout
    found = re.search(r"<title>widths (\d+) (\d+)", dom)
    assert found is not None, "the page did not load"
    return int(found[1]), int(found[2])
