"""Explore an image on a local page: corrupt it or change its visual words, and compare one or several classifiers.

`mae-dat explore [--checkpoint OUT_A OUT_B]` serves the page to this machine only, to those who know the token in its
address, and the page loads nothing from other servers. `views.py` computes the content, and this module shows it with
NiceGUI.
"""

import base64
import dataclasses
import io
import logging
import socket
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image
from torch import Tensor
from torchvision.transforms import functional

from mae_dat.analysis.page_guard import MAX_UPLOAD_BYTES, PageGuard, new_token
from mae_dat.analysis.views import Change, ImageInspector, ImageView, prediction_change
from mae_dat.config.commands.explore import ExploreConfig
from mae_dat.config.errors import ConfigError, DataError, UserError
from mae_dat.config.extras import require_extra
from mae_dat.config.groups import DEMO, image_size
from mae_dat.config.terminal import print_text
from mae_dat.data.decode import ImageError, decode_bytes, decode_file
from mae_dat.data.generated import draw as generated
from mae_dat.data.image_set import ImageFolder
from mae_dat.data.sampler import evenly_spaced
from mae_dat.models.describe import describe_tokenizer
from mae_dat.models.tokenizer import load_tokenizer
from mae_dat.models.weights.describe import add_opened_models, describe_pixels
from mae_dat.models.weights.open import open_model
from mae_dat.robustness.corruptions import CATEGORIES, EXTRA, SEVERITIES
from mae_dat.runtime.console import console_for_command
from mae_dat.runtime.device import describe_device, pick_device
from mae_dat.runtime.inputs import InputSummary, count_of

if TYPE_CHECKING:
    from fastapi import FastAPI
    from nicegui import events

logger = logging.getLogger(__name__)

_HOST = "127.0.0.1"
EXAMPLES = 10
_MAX_SHARE = 50  # percent of the words
_BLUE = "#1f5f99"  # white text on it reads well
_CHANGE_KINDS = {"corruption": "corruption", "random": "random words", "symbolic": "symbolic words"}
_STYLE = """
<style>
  body { background: #fafafa }
  .views { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 12px }
  .views img, .example img { width: 100%; image-rendering: pixelated; display: block }
  .example { width: 48px; min-height: 0; padding: 2px }
  .model { flex: 1 1 420px; max-width: 760px }
  .small { font-size: 12px; line-height: 1.3 }
  .quiet { color: #595959 }
  .q-uploader__subtitle { display: none }
  .q-uploader__list { min-height: 32px; padding: 4px }
  .q-btn-toggle .q-btn { font-size: 13px; padding: 4px }
</style>
"""


class Example(NamedTuple):
    """An image to choose: its file, whose folder may name its class, and a function that opens it."""

    path: Path
    open: Callable[[], Image.Image]


def load_inspectors(config: ExploreConfig) -> list[ImageInspector]:
    """Load the classifiers that the flags name.

    Raises ConfigError, MissingInputError, CheckpointError, DownloadError.
    """
    device = pick_device(config.device)
    tokenizer = load_tokenizer(config.tokenizer).to(device)
    size = image_size(config.input_size) if config.input_size else None
    return [
        ImageInspector(open_model(source, config.model, size, flag="--checkpoint").to(device), tokenizer)
        for source in config.checkpoint
    ]


def find_examples(images: str) -> list[Example]:
    """Find up to ten images, evenly spread over a folder, or generated. Raises MissingInputError, DataError."""
    if images == DEMO:
        return [
            Example(Path(generated.SHAPES[index], f"generated-{index}.png"), partial(_generated_image, index))
            for index in range(len(generated.SHAPES))
        ]
    paths = [Path(images)]
    if not paths[0].is_file():
        paths = [Path(path) for path, *_ in ImageFolder(paths[0], functional.to_tensor, labeled=False).samples]
    selection = [paths[index] for index in evenly_spaced(len(paths), EXAMPLES)]
    return [Example(path, partial(decode_file, path)) for path in selection]


def page_inputs(config: ExploreConfig, inspectors: list[ImageInspector], examples: list[Example]) -> InputSummary:
    """Return the summary of what the page shows. Nothing is written, so it is only logged."""
    inputs = InputSummary(config.verb)
    place = f"{DEMO}: generated images" if config.images == DEMO else str(Path(config.images).absolute())
    inputs.add("images", f"{place}, {count_of(len(examples), 'example')}")
    add_opened_models(inputs, [inspector.opened for inspector in inspectors])
    inputs.add("pixels", *dict.fromkeys(describe_pixels(inspector.opened) for inspector in inspectors))
    inputs.add("tokenizer", describe_tokenizer(config.tokenizer, inspectors[0].tokenizer))
    inputs.add("device", describe_device(pick_device(config.device)))
    return inputs


def _reason(error: UserError) -> str:
    """Return why an image cannot be opened, without the advice on flags that only training has."""
    return error.problem if isinstance(error, ImageError) else str(error)


def _generated_image(index: int) -> Image.Image:
    return Image.fromarray(generated.draw_image(0, "val", index).image)


def data_url(image: Tensor | Image.Image) -> str:
    """Encode an image as a PNG inside a URL: (C, H, W) in [0, 1] with 1 or 3 channels, or one of PIL's."""
    image = functional.to_pil_image(image.cpu()) if isinstance(image, Tensor) else image
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


# ---- the page ----


class ExplorePage:
    """One visit: the chosen image and change, and the elements of the page that show them."""

    def __init__(self, inspectors: list[ImageInspector], examples: list[Example], thumbnails: list[str]) -> None:
        self.inspectors = inspectors
        self.change = Change()
        self.path, self.image = examples[0].path, examples[0].open()
        self.requests = self.shown_request = 0
        self.busy = False
        self._draw_frame(examples, thumbnails)

    async def set_change(self, **values: Any) -> None:
        """Replace fields of `Change`, and update the page."""
        self.change = dataclasses.replace(self.change, **values)
        await self.update()

    async def open(self, path: Path, opener: Callable[[], Image.Image]) -> None:
        """Open another image and update the page, or show why it cannot be opened."""
        from nicegui import run as threads

        try:
            image = await threads.io_bound(opener)
        except UserError as error:
            self.show_message(_reason(error))
            return
        if image is not None:  # None when the server is shutting down
            self.image, self.path = image, path
            await self.update()

    async def update(self) -> None:
        """Compute and draw the current image and change.

        Of the requests that arrive meanwhile, for example while a slider moves, only the newest is processed.
        """
        self.requests += 1
        if self.busy:
            return
        self.busy = True
        self.spinner.set_visibility(True)
        while self.shown_request != self.requests:
            self.shown_request = self.requests
            await self._compute_and_draw()
        self.busy = False
        self.spinner.set_visibility(False)

    async def _compute_and_draw(self) -> None:
        from nicegui import run as threads

        try:
            if results := await threads.io_bound(self.compute):
                self._draw_results(results)
                self.show_message("")
        except UserError as error:
            self.show_message(str(error))
        except Exception as error:
            logger.exception("the page could not show an image")
            self.show_message(f"This could not be computed ({type(error).__name__}); see the console for details.")

    def compute(self) -> list[tuple[str, list[ImageView]]]:
        """Return each classifier's name and views."""
        image, path, change = self.image, self.path, self.change
        return [(inspector.name, inspector.inspect(image, path, change)) for inspector in self.inspectors]

    def show_message(self, message: str) -> None:
        """Show a message above the images; hide it if it is empty."""
        self.message.set_text(message)
        self.message.set_visibility(bool(message))

    # ---- drawing ----

    def _draw_frame(self, examples: list[Example], thumbnails: list[str]) -> None:
        from nicegui import ui

        ui.add_head_html(_STYLE)
        ui.colors(primary=_BLUE)
        with ui.row().classes("w-full no-wrap max-md:flex-wrap items-start gap-6 p-2"):
            with ui.column().classes("w-80 shrink-0 gap-3"):
                ui.label("mae_dat explore").classes("text-xl font-medium").props("role=heading aria-level=1")
                self._draw_image_choice(examples, thumbnails)
                self._draw_change_choice()
                tokenizer = self.inspectors[0].tokenizer
                words = f"Tokenizer: factor {tokenizer.factor}, {tokenizer.num_words} words."
                ui.label(f"{words} Served to this machine only; nothing is stored.").classes("small quiet")
            with ui.column().classes("grow gap-3"):
                self.message = ui.label().classes("w-full p-3 bg-amber-100").props("role=alert")
                self.message.set_visibility(False)
                self.results = ui.row().classes("w-full gap-4 items-start")
                self.spinner = ui.spinner(size="lg")

    def _draw_image_choice(self, examples: list[Example], thumbnails: list[str]) -> None:
        from nicegui import ui

        with ui.row().classes("gap-1"):
            for example, thumbnail in zip(examples, thumbnails, strict=True):
                with ui.button(on_click=partial(self.open, *example)).props("flat").classes("example") as button:
                    _draw_image(thumbnail, "")
                button.props["aria-label"] = f"image {'/'.join(example.path.parts[-2:])}"
        self.upload = (
            ui.upload(
                label="or drop an image here",
                auto_upload=True,
                max_file_size=MAX_UPLOAD_BYTES,
                on_upload=self._open_upload,
                on_rejected=lambda: self.show_message(f"Give one file, of at most {MAX_UPLOAD_BYTES >> 20} MiB."),
            )
            .props("flat bordered")
            .classes("w-full")
        )

    def _draw_change_choice(self) -> None:
        from nicegui import ui

        kind = ui.toggle(
            _CHANGE_KINDS, value=self.change.kind, on_change=lambda event: self.set_change(kind=event.value)
        )
        kind.props("no-caps dense spread").classes("w-full")
        with ui.column().classes("w-full gap-1").bind_visibility_from(kind, "value", value="corruption"):
            self._draw_corruption_controls()
        with ui.column().classes("w-full gap-1") as word_controls:
            word_controls.bind_visibility_from(kind, "value", lambda value: value != "corruption")
            share = ui.label().classes("small mt-2")
            slider = ui.slider(
                min=1,
                max=_MAX_SHARE,
                value=round(100 * self.change.share),
                on_change=lambda event: self.set_change(share=event.value / 100),
            ).props('aria-label="word budget"')
            share.bind_text_from(slider, "value", lambda value: f"word budget: {value} % of the image's words")
        ui.number("seed", value=self.change.seed, min=0, precision=0, on_change=self._set_seed).classes("w-full")

    def _draw_corruption_controls(self) -> None:
        from nicegui import ui

        names = {name: f"{name.replace('_', ' ')} ({group})" for group, names in CATEGORIES.items() for name in names}
        names |= {name: f"{name.replace('_', ' ')} (extra)" for name in EXTRA}
        ui.select(
            names,
            value=self.change.corruption,
            label="corruption",
            on_change=lambda event: self.set_change(corruption=event.value),
        ).classes("w-full")
        severity = ui.label().classes("small mt-2")
        slider = ui.slider(
            min=SEVERITIES[0],
            max=SEVERITIES[-1],
            value=self.change.severity,
            on_change=lambda event: self.set_change(severity=int(event.value)),
        ).props("markers aria-label=severity")
        severity.bind_text_from(slider, "value", lambda value: f"severity {value} of {SEVERITIES[-1]}")

    async def _set_seed(self, event: "events.ValueChangeEventArguments[float | None]") -> None:
        if event.value is not None and event.value >= 0:  # None while the visitor edits the field
            await self.set_change(seed=int(event.value))

    async def _open_upload(self, event: "events.UploadEventArguments") -> None:
        content = await event.file.read()
        self.upload.reset()
        # The path has no folder, because the name of a folder would be used as the class.
        await self.open(Path(event.file.name), partial(decode_bytes, content, event.file.name))

    def _draw_results(self, results: list[tuple[str, list[ImageView]]]) -> None:
        from nicegui import ui

        self.results.clear()
        with self.results:
            for name, views in results:
                with ui.card().classes("model p-4 gap-3"):
                    ui.label(name).classes("font-medium").props("role=heading aria-level=2")
                    ui.label(prediction_change(views)).classes("verdict")
                    with ui.element("div").classes("views w-full"):
                        for view in views:
                            _draw_view(view)


def _draw_image(url: str, description: str) -> None:
    from nicegui import ui

    ui.element("img").props.update(src=url, alt=description)


def _draw_view(view: ImageView) -> None:
    from nicegui import ui

    with ui.column().classes("gap-1 panel"):
        _draw_image(data_url(view.image), view.title)
        ui.label(view.title).classes("small font-medium")
        if view.caption:
            ui.label(view.caption).classes("small quiet")
        for name, probability in view.predictions:
            with ui.row().classes("w-full no-wrap justify-between small gap-1 answer"):
                ui.label(name).classes("truncate")
                ui.label(f"{probability:.1%}")
            ui.linear_progress(probability, show_value=False, size="4px").props("instant-feedback aria-hidden=true")


def build_application(inspectors: list[ImageInspector], examples: list[Example], token: str) -> "FastAPI":
    """Build the web application, which answers only requests with the token.

    Raises MissingInputError without NiceGUI, DataError for an example that cannot be decoded.
    """
    require_extra("explore", "the page")
    from fastapi import FastAPI
    from nicegui import ui
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    thumbnails = []
    for example in examples:
        try:
            image = example.open()
        except DataError as error:
            raise DataError(f"--images: {_reason(error)}") from error
        image.thumbnail((96, 96))
        thumbnails.append(data_url(image))

    def show() -> None:
        # The timer lets the page appear first: a browser may time out while a large model computes.
        ui.timer(0, ExplorePage(inspectors, examples, thumbnails).update, once=True)

    application = FastAPI(openapi_url=None)
    # Rejects requests of other sites whose name resolves to this machine (DNS rebinding).
    application.add_middleware(TrustedHostMiddleware, allowed_hosts=[_HOST, "localhost"])
    application.add_middleware(PageGuard, token=token)
    ui.run_with(application, root=show, title="mae_dat explore", show_welcome_message=False)
    return application


def listen_locally(port: int) -> socket.socket:
    """Open a socket on this machine's loopback interface only. Raises ConfigError for a port that is in use."""
    try:
        return socket.create_server((_HOST, port))
    except OSError as error:
        raise ConfigError(f"--port {port}: {error.strerror}; use another port, or 0 for any free one.") from error


def main(config: ExploreConfig) -> None:
    """Run the command."""
    console = console_for_command()
    inspectors, examples = load_inspectors(config), find_examples(config.images)
    console.report_inputs(page_inputs(config, inspectors, examples))
    token = new_token()
    application = build_application(inspectors, examples, token)
    import uvicorn

    with listen_locally(config.port) as server_socket:
        address = f"http://{_HOST}:{server_socket.getsockname()[1]}/?token={token}"
        print_text(f"Open {address} in a browser; Ctrl-C stops it.")
        # NiceGUI searches all objects in memory for its server, which triggers a warning of torch.
        warnings.filterwarnings("ignore", ".*torch.distributed.reduce_op", FutureWarning)
        settings = uvicorn.Config(application, log_level="warning", timeout_graceful_shutdown=1)
        try:
            uvicorn.Server(settings).run([server_socket])
        except KeyboardInterrupt:
            print_text("stopped.")
