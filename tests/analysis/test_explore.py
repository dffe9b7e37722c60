"""The page of one image: what it computes, and, in a real browser, what a visitor sees."""

import base64
import io
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import tiny, tiny_mae

from mae_dat.analysis.explore import EXAMPLES, build_application, find_examples, listen_locally
from mae_dat.analysis.page_guard import PageGuard
from mae_dat.analysis.views import Change, ImageInspector, ImageView, amplification, prediction_change
from mae_dat.config.commands.explore import ExploreConfig
from mae_dat.config.errors import CheckpointError, ConfigError, DataError, MissingInputError
from mae_dat.config.parse import load_config
from mae_dat.data.generated import draw as generated
from mae_dat.models.classifier import Classifier
from mae_dat.models.mae import MaskedAutoencoder
from mae_dat.models.tokenizer import load_tokenizer
from mae_dat.models.tokenizer.base import VisualTokenizer
from mae_dat.models.weights.formats import ModelFile
from mae_dat.models.weights.open import ModelPlan, OpenedModel, open_model
from mae_dat.robustness.corruptions import as_stored, corrupt_image, image_seed

CPU = torch.device("cpu")
CLASSES = sorted(generated.SHAPES)  # of the demo model
STAR = Path("star/photo.png")
STRANGER = Path("photo.png")


def picture(index: int = 3, size: int = 64) -> Image.Image:
    return Image.fromarray(generated.draw_image(0, "val", index, size=size).image)


def pixels(panel: ImageView) -> np.ndarray:
    return panel.image.mul(255).round().byte().permute(1, 2, 0).numpy()


def opened(model: Classifier | MaskedAutoencoder, title: str, size: tuple[int, int], channels: int = 3) -> OpenedModel:
    kind: Any = "classifier" if isinstance(model, Classifier) else "autoencoder"
    plan = ModelPlan(kind, "tiny", img_size=size, in_chans=channels)
    return OpenedModel(model, plan, ModelFile({}, kind), title)


@pytest.fixture(scope="module")
def tokenizer() -> VisualTokenizer:
    return load_tokenizer("embedded")


@pytest.fixture(scope="module")
def inspector(tokenizer: VisualTokenizer) -> ImageInspector:
    return ImageInspector(open_model("mae_dat_demo"), tokenizer)


# ---- what is computed ----


def test_a_corruption_ends_as_a_stored_file_does(inspector: ImageInspector) -> None:
    image, change = picture(), Change("corruption", "fog", 4, seed=5)
    before, after, difference, decoded, after_decoded, words = inspector.inspect(image, STAR, change)
    expected = as_stored(corrupt_image(np.asarray(image), "fog", 4, image_seed(5, 0, "fog", 4)))
    assert np.array_equal(pixels(before), np.asarray(image))
    assert np.array_equal(pixels(after), expected)
    assert [before.title, after.title] == ["image (star)", "fog 4"]
    tokenizer = inspector.tokenizer
    clean_words, other_words = (tokenizer.encode(one.image[None]) for one in (before, after))
    assert torch.equal(decoded.image, tokenizer.decode(clean_words)[0])
    assert torch.equal(after_decoded.image, tokenizer.decode(other_words)[0])
    assert words.caption.startswith(f"dark: {int((clean_words != other_words).sum())} of 256 words (")
    factor = int(difference.title.removeprefix("difference × "))
    assert torch.allclose(
        difference.image, (0.5 + factor * (after.image - before.image)).clamp(0, 1), rtol=0, atol=1e-6
    )
    assert f"{127.5 / factor:.0f} gray levels" in difference.caption
    assert not difference.predictions
    assert not words.predictions


def test_predictions_are_the_models_first_five(inspector: ImageInspector) -> None:
    for panel in inspector.inspect(picture(), STAR, Change("random")):
        if panel.predictions:
            with torch.no_grad():
                shares = inspector.model(panel.image[None]).softmax(1)[0]
            order = shares.argsort(descending=True)[:5].tolist()
            assert [name for name, _ in panel.predictions] == [CLASSES[index] for index in order]
            assert [share for _, share in panel.predictions] == pytest.approx(shares[order].tolist(), abs=1e-5)


@pytest.mark.parametrize("kind", ["random", "symbolic"])
@pytest.mark.parametrize("share", [0.01, 0.25])
def test_a_budget_is_so_many_words(inspector: ImageInspector, kind: Any, share: float) -> None:
    panels = inspector.inspect(picture(), STAR, Change(kind, share=share))
    count = round(share * 256)
    assert panels[-1].caption == f"dark: {count} of 256 words ({count / 256:.1%})"
    # A word is a square of 4 x 4 px, dark where it has changed.
    dark = (panels[-1].image < 0.5).all(0)[::4, ::4]
    assert int(dark.sum()) == count
    assert "to the decoded image" in panels[2].caption


def test_chance_is_the_seeds(inspector: ImageInspector) -> None:
    for change in (Change("random"), Change("corruption", "shot_noise")):
        one, same, other = (
            inspector.inspect(picture(), STAR, Change(change.kind, change.corruption, seed=seed))[1].image
            for seed in (1, 1, 2)
        )
        assert torch.equal(one, same)
        assert not torch.equal(one, other)


def test_the_symbolic_adversary_is_stronger_than_chance(inspector: ImageInspector) -> None:
    def share_of_star(kind: Any, path: Path = STAR) -> float:
        after = inspector.inspect(picture(), path, Change(kind, share=0.1))[1].image[None]
        with torch.no_grad():
            return float(inspector.model(after).softmax(1)[0, CLASSES.index("star")])

    assert share_of_star("symbolic") < share_of_star("random") - 0.2
    # The clean answer is star: it is the target of an image without a class, but not where the folder says heart.
    assert share_of_star("symbolic", STRANGER) == share_of_star("symbolic")
    assert share_of_star("symbolic", Path("heart/x.png")) > share_of_star("symbolic")


def test_a_photo_is_cropped_as_for_evaluation(inspector: ImageInspector) -> None:
    panels = inspector.inspect(picture(size=300).resize((400, 300)), STRANGER, Change())
    assert panels[0].title == "image"
    assert {tuple(panel.image.shape) for panel in panels} == {(3, 64, 64)}


@pytest.mark.parametrize(("largest", "factor"), [(0.0, 16), (0.03, 16), (0.0625, 8), (0.2, 2), (0.3, 1), (1.0, 1)])
def test_the_difference_is_amplified_as_far_as_it_can_be_shown(largest: float, factor: int) -> None:
    difference = torch.zeros(1000)
    difference[:20] = -largest
    assert amplification(difference) == factor
    difference[:] = 0
    difference[:10] = largest  # one in a hundred may leave the range
    assert amplification(difference) == 16


def test_prediction_changes() -> None:
    first, same = (ImageView("", torch.zeros(3, 1, 1), predictions=[("star", share)]) for share in (0.6, 0.4))
    other = first._replace(predictions=[("moon", 0.5)])
    assert prediction_change([first, same]) == "The prediction stays: star 60% → 40%"
    assert prediction_change([first, other]) == "The prediction changes: star 60% → moon 50%"


def test_imagenet_classes_have_names(tokenizer: VisualTokenizer) -> None:
    inspector = ImageInspector(opened(tiny(1000), "x", (64, 64), 3), tokenizer)
    assert inspector.scorer.class_name(0).startswith("tench")
    assert ImageInspector(opened(tiny(10), "x", (64, 64), 3), tokenizer).scorer.class_name(3) == "class 3"


def test_what_cannot_be_inspected(tokenizer: VisualTokenizer) -> None:
    with pytest.raises(CheckpointError, match=r"pre\.pth is a pretraining and has no predictions"):
        ImageInspector(opened(tiny_mae(), "pre.pth", (64, 64), 3), tokenizer)
    with pytest.raises(ConfigError, match="not divisible by the tokenizer's factor 4"):
        ImageInspector(opened(tiny(), "x", (62, 62), 3), tokenizer)
    with pytest.raises(ConfigError, match="for other channels, train one"):
        ImageInspector(opened(tiny(channels=1), "x", (64, 64), 1), tokenizer)
    small = ImageInspector(opened(tiny(img_size=16), "x", (16, 16), 3), tokenizer)
    with pytest.raises(DataError, match="at least 32 px"):
        small.inspect(picture(), STAR, Change())
    assert len(small.inspect(picture(), STAR, Change("random"))) == 5


# ---- the command ----


def test_examples(tmp_path: Path) -> None:
    drawn = find_examples("demo")
    assert [example.path.parent.name for example in drawn] == list(generated.SHAPES)
    assert drawn[3].open() == picture(3)
    for index in range(25):
        (tmp_path / "moon").mkdir(exist_ok=True)
        picture(index).save(tmp_path / "moon" / f"{index:02d}.png")
    found = find_examples(str(tmp_path))
    assert [example.path.name for example in found] == [f"{index * 25 // EXAMPLES:02d}.png" for index in range(10)]
    assert found[1].open() == picture(2)
    assert [example.path for example in find_examples(str(found[1].path))] == [found[1].path]
    (tmp_path / "letter.png").write_text("dear reader")
    with pytest.raises(DataError, match=r"--images: .*letter\.png: it is not an image that can be read$"):
        build_application([], find_examples(str(tmp_path / "letter.png")), "token")
    with pytest.raises(MissingInputError, match="nothing"):
        find_examples(str(tmp_path / "nothing"))


def test_only_this_machine_is_served() -> None:
    with listen_locally(0) as place:
        host, port = place.getsockname()
        assert host == "127.0.0.1"
        with pytest.raises(ConfigError, match=f"--port {port}: .*in use"):
            listen_locally(port)


@pytest.mark.parametrize(
    ("arguments", "told"), [(["--port", "65536"], "--port must lie"), (["--checkpoint"], "at least one classifier")]
)
def test_flags_that_cannot_be(arguments: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load_config(ExploreConfig, arguments)


def test_without_nicegui_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nicegui", None)
    with pytest.raises(MissingInputError, match="pip install nicegui"):
        build_application([], [], "token")


# ---- in a browser ----

DROP = """([name, type, data]) => {
    const bytes = Uint8Array.from(atob(data), character => character.charCodeAt(0));
    const moved = new DataTransfer();
    moved.items.add(new File([bytes], name, {type}));
    const area = document.querySelector('.q-uploader');
    area.dispatchEvent(new DragEvent('dragover', {dataTransfer: moved, bubbles: true, cancelable: true}));
    return new Promise(done => setTimeout(() => {
        const target = document.querySelector('.q-uploader__dnd');
        target.dispatchEvent(new DragEvent('drop', {dataTransfer: moved, bubbles: true, cancelable: true}));
        done();
    }, 100));
}"""


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


class Visitor:
    """A browser on the page, and what it asked for."""

    def __init__(self, page: Any, url: str) -> None:
        self.page, self.requests, self.errors = page, [], []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("websocket", lambda opened: self.requests.append(opened.url))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.set_default_timeout(30_000)
        page.goto(url)
        page.wait_for_selector(".panel")

    def drop(self, name: str, content: bytes, kind: str = "image/png") -> None:
        self.page.evaluate(DROP, [name, kind, base64.b64encode(content).decode()])

    def images(self, model: int = 0) -> dict[str, np.ndarray]:
        """Return the images of a model's panels as the browser shows them, by their titles."""
        found = {}
        for image in self.page.locator(".model").nth(model).locator(".panel img").all():
            data = base64.b64decode(image.get_attribute("src").partition(",")[2])
            found[image.get_attribute("alt")] = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        return found

    def verdicts(self) -> list[str]:
        return list(self.page.locator(".verdict").all_inner_texts())

    def wait_for_title(self, title: str) -> None:
        self.page.locator(".model").last.get_by_text(title, exact=True).first.wait_for()

    def nudge(self, slider: str) -> None:
        """One step to the right, by keyboard."""
        self.page.get_by_role("slider", name=slider).locator("[tabindex='0']").press("ArrowRight")

    def told(self, words: str) -> None:
        self.page.locator("[role=alert]").get_by_text(words).wait_for()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Callable[[], tuple[int, str]]]]:
    """The running command: its address, and what ends it as Ctrl-C does and gives its exit code and messages."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    command = [sys.executable, "-m", "mae_dat", "explore", "--checkpoint", "mae_dat_demo", "mae_dat_demo"]
    with open(tmp_path / "stderr", "w+") as messages:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=messages, text=True, env=environment)

        def end() -> tuple[int, str]:
            child.send_signal(signal.SIGINT)
            child.wait(60)
            return child.returncode, (tmp_path / "stderr").read_text()

        try:
            assert child.stdout is not None
            line = child.stdout.readline()
            found = re.search(r"http://127\.0\.0\.1:\d+/\?token=[\w-]{22}", line)
            assert found, (tmp_path / "stderr").read_text()
            yield found[0], end
        finally:
            child.kill()
            child.communicate()


@pytest.fixture
def visitor(server: tuple[str, Any]) -> Iterator[Visitor]:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium found: install it to try the page")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        opened = play.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
        yield Visitor(opened.new_page(viewport={"width": 1300, "height": 900}), server[0])
        opened.close()


def status_of(address: str, **options: Any) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(address, **options), timeout=20) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def refuses_strangers(address: str, page: Any) -> None:
    """Without the token nothing is shown: page, files, uploads and websocket; with it, too large a body is refused."""
    root, _, token = address.partition("?token=")
    for path in (
        "",
        "?token=",
        "?token=wrong",
        "_nicegui/auto/static/nothing",
        "_nicegui_ws/socket.io/?EIO=4&transport=polling",
    ):
        assert status_of(root + path) == 403, path
    assert status_of(root, data=b"x" * 1000) == 403
    (cookie,) = [one for one in page.context.cookies() if one["name"].startswith("mae_dat_")]
    assert (cookie["value"], cookie["httpOnly"], cookie["sameSite"]) == (token, True, "Strict")
    headers = {"Cookie": f"odd; {cookie['name']}={token}"}
    assert status_of(root, headers=headers) == 200
    assert status_of(root, headers={"Cookie": f"{cookie['name']}=wrong"}) == 403
    stranger = page.context.browser.new_context().new_page()
    assert stranger.goto(root).status == 403
    stranger.context.close()


@pytest.mark.slow
def test_the_page_in_a_browser(server: tuple[str, Callable[[], tuple[int, str]]], visitor: Visitor) -> None:
    address, end = server
    page = visitor.page
    first, first_verdicts = visitor.images(), visitor.verdicts()
    assert len(first_verdicts) == 2
    assert list(first)[:2] == ["image (disc)", "gaussian noise 3"]
    assert np.array_equal(first["image (disc)"], np.asarray(picture(0)))

    # A dropped image, which has no class, though a generated one is called the same.
    dropped = picture(3)
    visitor.drop("star.png", encoded(dropped))
    visitor.wait_for_title("image")
    assert np.array_equal(visitor.images()["image"], np.asarray(dropped))
    assert np.array_equal(visitor.images(1)["image"], np.asarray(dropped))
    assert visitor.verdicts() != first_verdicts

    # Another corruption, then another severity.
    noisy = visitor.verdicts()
    page.get_by_label("corruption", exact=True).click()
    page.get_by_role("option", name="contrast").click()
    visitor.wait_for_title("contrast 3")
    assert visitor.verdicts() != noisy
    visitor.nudge("severity")
    visitor.wait_for_title("contrast 4")
    seed = image_seed(0, 0, "contrast", 4)
    expected = as_stored(corrupt_image(np.asarray(dropped), "contrast", 4, seed))
    assert np.array_equal(visitor.images()["contrast 4"], expected)

    # Words: random ones, more of them, another seed; then chosen ones.
    page.get_by_role("button", name="random words").click()
    visitor.wait_for_title("5% of its words changed (random)")
    visitor.nudge("word budget")
    visitor.wait_for_title("6% of its words changed (random)")
    visitor.wait_for_title("dark: 15 of 256 words (5.9%)")
    chance = visitor.images()["6% of its words changed (random)"]
    page.get_by_label("seed").fill("7")
    page.wait_for_function(
        "before => [...document.querySelectorAll('.panel img')].every(one => one.src !== before)",
        arg=page.locator('.panel img[alt^="6%"]').first.get_attribute("src"),
    )
    assert not np.array_equal(visitor.images()["6% of its words changed (random)"], chance)
    page.get_by_role("button", name="symbolic words").click()
    visitor.wait_for_title("6% of its words changed (symbolic)")
    assert all("The prediction changes: star" in told for told in visitor.verdicts())

    # What is no image gets a message, and the images stay.
    before = visitor.images()
    frames = [picture(index) for index in range(2)]
    for name, content, told in [
        ("letter.txt", b"dear reader", "letter.txt: it is not an image that can be read"),
        ("moving.gif", encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), "it is animated"),
        ("half.png", encoded(frames[0])[:2000], "half.png: the image is damaged or truncated"),
        ("huge.png", encoded(Image.new("1", (20_000, 6_000))), "more than the 100 megapixels allowed"),
        ("<b>bold.txt", b"x", "<b>bold.txt: it is not an image"),
    ]:
        visitor.drop(name, content)
        visitor.told(told)
        assert "on_bad" not in page.locator("[role=alert]").inner_text()
        assert all(itertools.starmap(np.array_equal, zip(before.values(), visitor.images().values(), strict=True)))
    visitor.drop("print.jpg", encoded(dropped.convert("CMYK"), "JPEG"), "image/jpeg")
    page.locator("[role=alert]").wait_for(state="hidden")
    assert not np.array_equal(visitor.images()["image"], before["image"])

    # An example again; its class is its folder's.
    page.get_by_role("button", name="image moon/").click()
    visitor.wait_for_title("image (moon)")

    assert not visitor.errors
    hosts = {url.removeprefix("blob:").split("/")[2] for url in visitor.requests if not url.startswith("data:")}
    assert hosts == {address.split("/")[2]}
    refuses_strangers(address, visitor.page)
    with pytest.raises(urllib.error.HTTPError, match="400"):  # a name of another site that resolves to this machine
        urllib.request.urlopen(urllib.request.Request(address, headers={"Host": "evil.example"}), timeout=10)
    code, messages = end()
    assert code == 0
    assert "Traceback" not in messages
    assert "Warning" not in messages


# ---- who may see it, and how much it accepts ----


async def read_body(scope: Any, receive: Any, send: Any) -> None:
    """An application that reads a request's whole body and answers with its size."""
    size, more = 0, True
    while more:
        message = await receive()
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(size).encode()})


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_that_is_too_large_is_refused(announced: bool) -> None:
    """Also where the sender does not announce its size."""
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.routing import Mount
    from starlette.testclient import TestClient

    def parts(count: int) -> Iterator[bytes]:
        return (bytes(1 << 20) for _ in range(count))

    application = Starlette(routes=[Mount("/", app=read_body)], middleware=[Middleware(PageGuard, token="secret")])
    client = TestClient(application)
    content = bytes(65 << 20) if announced else parts(65)
    assert client.post("/?token=secret", content=content).status_code == 413
    assert client.post("/?token=secret", content=parts(64)).text == str(64 << 20)
    assert TestClient(application).post("/", content=parts(1)).status_code == 403
