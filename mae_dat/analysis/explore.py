"""A local page: drop a picture, corrupt it or change its visual words, and see what one or several classifiers make of
it.

`python -m mae_dat explore [--checkpoint OUT_A OUT_B]` serves it to this machine alone, and the page loads nothing from
elsewhere. `panels` computes; here it is drawn, by NiceGUI.
"""

import base64
import dataclasses
import io
import logging
import socket
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image
from torch import Tensor
from torchvision.transforms import functional

from mae_dat.analysis.views import Change, ImageInspector, ImageView, prediction_change
from mae_dat.config.errors import ConfigError, DataError, MissingInputError, UserError
from mae_dat.config.groups import image_size
from mae_dat.config.parse import load_config
from mae_dat.data.decode import ADVICE, MAX_BYTES, decode_bytes, decode_file
from mae_dat.data.generated import draw as generated
from mae_dat.data.image_set import ImageFolder
from mae_dat.data.open import DEMO
from mae_dat.data.sampler import evenly_spaced
from mae_dat.models.tokenizer import load_tokenizer
from mae_dat.models.weights.open import open_model
from mae_dat.robustness.corruptions import CATEGORIES, EXTRA, SEVERITIES
from mae_dat.runtime.console import console_for_command
from mae_dat.runtime.device import pick_device

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


@dataclasses.dataclass(frozen=True)
class ExploreConfig:
    """A local page: drop a picture, corrupt it or change its visual words, and see what classifiers make of it."""

    checkpoint: tuple[str, ...] = ("mae_dat_demo",)
    """Classifiers, shown side by side: output folders, weights files or names of released weights."""
    model: str | None = None
    """Their architecture, where the files do not say."""
    tokenizer: str = "embedded"
    """`embedded` (for 64 px), a light tokenizer's .safetensors, or a VQGAN."""
    images: str = DEMO
    """Folder of pictures to choose from, a picture, or `demo` for generated ones."""
    input_size: tuple[int, ...] | None = None
    """Side, or height and width, in pixels (default: each checkpoint's)."""
    device: str = "auto"
    port: int = 0
    """Of 127.0.0.1; 0 for any that is free. Nothing is served to other machines."""

    def __post_init__(self) -> None:
        if not self.checkpoint:
            raise ConfigError("--checkpoint needs at least one classifier.")
        if not 0 <= self.port < 2**16:
            raise ConfigError(f"--port must lie between 0 and 65535, got {self.port}.")


class Example(NamedTuple):
    """A picture to choose: its file, whose folder may name its class, and what opens it."""

    path: Path
    open: Callable[[], Image.Image]


def load_examiners(config: ExploreConfig) -> list[ImageInspector]:
    """The classifiers that the flags name. Raises ConfigError, MissingInputError, CheckpointError, DownloadError."""
    device = pick_device(config.device)
    tokenizer = load_tokenizer(config.tokenizer).to(device)
    size = image_size(config.input_size) if config.input_size else None
    return [
        ImageInspector(open_model(one, config.model, size, flag="--checkpoint").to(device), tokenizer)
        for one in config.checkpoint
    ]


def find_examples(images: str) -> list[Example]:
    """Up to ten pictures, evenly spread over a folder, or generated. Raises MissingInputError, DataError."""
    if images == DEMO:
        return [
            Example(Path(generated.SHAPES[index], f"generated-{index}.png"), partial(_generated, index))
            for index in range(len(generated.SHAPES))
        ]
    paths = [Path(images)]
    if not paths[0].is_file():
        paths = [Path(path) for path, *_ in ImageFolder(paths[0], functional.to_tensor, labelled=False).samples]
    chosen = [paths[index] for index in evenly_spaced(len(paths), EXAMPLES)]
    return [Example(path, partial(decode_file, path)) for path in chosen]


def _reason(error: UserError) -> str:
    """Why a picture cannot be opened, without advice on flags that training has."""
    return str(error).removesuffix(f"; {ADVICE}")


def _generated(index: int) -> Image.Image:
    return Image.fromarray(generated.draw_image(0, "val", index).image)


def data_url(picture: Tensor | Image.Image) -> str:
    """A picture, (C, H, W) in [0, 1] with 1 or 3 channels or one of PIL's, as the PNG inside a URL."""
    image = functional.to_pil_image(picture.cpu()) if isinstance(picture, Tensor) else picture
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


# ---- the page ----


class ExplorePage:
    """One visit: the chosen picture and change, and what is drawn of it."""

    def __init__(self, examiners: list[ImageInspector], examples: list[Example], thumbnails: list[str]) -> None:
        self.examiners = examiners
        self.change = Change()
        self.path, self.image = examples[0].path, examples[0].open()
        self.asked = self.answered = 0
        self.busy = False
        self._draw_frame(examples, thumbnails)

    async def set(self, **values: Any) -> None:
        """Another change: fields of `Change`."""
        self.change = dataclasses.replace(self.change, **values)
        await self.update()

    async def open(self, path: Path, opener: Callable[[], Image.Image]) -> None:
        """Another picture, or a message why not."""
        from nicegui import run as threads

        try:
            image = await threads.io_bound(opener)
        except UserError as error:
            self.say(_reason(error))
            return
        if image is not None:  # as it is when the server is about to end
            self.image, self.path = image, path
            await self.update()

    async def update(self) -> None:
        """Computes and draws what is asked for now; while a slider moves, only the newest of what it passed over."""
        self.asked += 1
        if self.busy:
            return
        self.busy = True
        self.waiting.set_visibility(True)
        while self.answered != self.asked:
            self.answered = self.asked
            await self._answer()
        self.busy = False
        self.waiting.set_visibility(False)

    async def _answer(self) -> None:
        from nicegui import run as threads

        try:
            if found := await threads.io_bound(self.compute):
                self._draw(found)
                self.say("")
        except UserError as error:
            self.say(str(error))
        except Exception as error:
            logger.exception("the page could not show a picture")
            self.say(f"This could not be computed ({type(error).__name__}); the console says more.")

    def compute(self) -> list[tuple[str, list[ImageView]]]:
        """Each classifier's name and panels."""
        image, path, change = self.image, self.path, self.change
        return [(one.name, one.panels(image, path, change)) for one in self.examiners]

    def say(self, message: str) -> None:
        """A message above the pictures; none if it is empty."""
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
                with ui.row().classes("gap-1"):
                    for example, thumbnail in zip(examples, thumbnails, strict=True):
                        with (
                            ui.button(on_click=partial(self.open, *example)).props("flat").classes("example") as button
                        ):
                            _draw_picture(thumbnail, "")
                        button.props["aria-label"] = f"picture {'/'.join(example.path.parts[-2:])}"
                self.upload = (
                    ui.upload(
                        label="or drop a picture here",
                        auto_upload=True,
                        max_file_size=MAX_BYTES,
                        on_upload=self._dropped,
                        on_rejected=lambda: self.say(f"Give one file, of at most {MAX_BYTES >> 20} MiB."),
                    )
                    .props("flat bordered")
                    .classes("w-full")
                )
                self._draw_controls()
                tokenizer = self.examiners[0].tokenizer
                words = f"Tokenizer: factor {tokenizer.factor}, {tokenizer.num_words} words."
                ui.label(f"{words} Served to this machine alone; nothing is kept.").classes("small quiet")
            with ui.column().classes("grow gap-3"):
                self.message = ui.label().classes("w-full p-3 bg-amber-100").props("role=alert")
                self.message.set_visibility(False)
                self.stage = ui.row().classes("w-full gap-4 items-start")
                self.waiting = ui.spinner(size="lg")

    def _draw_controls(self) -> None:
        from nicegui import ui

        names = {name: f"{name.replace('_', ' ')} ({group})" for group, names in CATEGORIES.items() for name in names}
        names |= {name: f"{name.replace('_', ' ')} (extra)" for name in EXTRA}
        now = self.change
        kind = ui.toggle(_CHANGE_KINDS, value=now.kind, on_change=lambda event: self.set(kind=event.value))
        kind.props("no-caps dense spread").classes("w-full")
        with ui.column().classes("w-full gap-1").bind_visibility_from(kind, "value", value="corruption"):
            ui.select(
                names,
                value=now.corruption,
                label="corruption",
                on_change=lambda event: self.set(corruption=event.value),
            ).classes("w-full")
            severity = ui.label().classes("small mt-2")
            slider = ui.slider(
                min=SEVERITIES[0],
                max=SEVERITIES[-1],
                value=now.severity,
                on_change=lambda event: self.set(severity=int(event.value)),
            ).props("markers aria-label=severity")
            severity.bind_text_from(slider, "value", lambda value: f"severity {value} of {SEVERITIES[-1]}")
        with (
            ui.column().classes("w-full gap-1").bind_visibility_from(kind, "value", lambda value: value != "corruption")
        ):
            share = ui.label().classes("small mt-2")
            slider = ui.slider(
                min=1,
                max=_MAX_SHARE,
                value=round(100 * now.share),
                on_change=lambda event: self.set(share=event.value / 100),
            ).props('aria-label="word budget"')
            share.bind_text_from(slider, "value", lambda value: f"word budget: {value} % of the picture's words")
        ui.number("seed", value=now.seed, min=0, precision=0, on_change=self._seeded).classes("w-full")

    async def _seeded(self, event: "events.ValueChangeEventArguments[float | None]") -> None:
        if event.value is not None and event.value >= 0:  # an emptied field is about to be filled
            await self.set(seed=int(event.value))

    async def _dropped(self, event: "events.UploadEventArguments") -> None:
        content = await event.file.read()
        self.upload.reset()
        # Not below a folder: only a folder's name is taken for a class.
        await self.open(Path(event.file.name), partial(decode_bytes, content, event.file.name))

    def _draw(self, found: list[tuple[str, list[ImageView]]]) -> None:
        from nicegui import ui

        self.stage.clear()
        with self.stage:
            for name, panels in found:
                with ui.card().classes("model p-4 gap-3"):
                    ui.label(name).classes("font-medium").props("role=heading aria-level=2")
                    ui.label(prediction_change(panels)).classes("verdict")
                    with ui.element("div").classes("views w-full"):
                        for panel in panels:
                            _draw_panel(panel)


def _draw_picture(url: str, description: str) -> None:
    from nicegui import ui

    ui.element("img").props.update(src=url, alt=description)


def _draw_panel(panel: ImageView) -> None:
    from nicegui import ui

    with ui.column().classes("gap-1 panel"):
        _draw_picture(data_url(panel.picture), panel.title)
        ui.label(panel.title).classes("small font-medium")
        if panel.caption:
            ui.label(panel.caption).classes("small quiet")
        for answer, share in panel.answers:
            with ui.row().classes("w-full no-wrap justify-between small gap-1 answer"):
                ui.label(answer).classes("truncate")
                ui.label(f"{share:.1%}")
            ui.linear_progress(share, show_value=False, size="4px").props("instant-feedback aria-hidden=true")


def build_application(examiners: list[ImageInspector], examples: list[Example]) -> "FastAPI":
    """The web application. Raises MissingInputError without NiceGUI, DataError for an example that is no picture."""
    try:
        from fastapi import FastAPI
        from nicegui import ui
        from starlette.middleware.trustedhost import TrustedHostMiddleware
    except ImportError as error:
        raise MissingInputError(f'the page needs the package {error.name}: pip install "mae_dat[explore]"') from error
    thumbnails = []
    for example in examples:
        try:
            picture = example.open()
        except DataError as error:
            raise DataError(f"--images: {_reason(error)}") from error
        picture.thumbnail((96, 96))
        thumbnails.append(data_url(picture))

    def show() -> None:
        # The page appears first: a large network may take longer than a browser likes to wait for one.
        ui.timer(0, ExplorePage(examiners, examples, thumbnails).update, once=True)

    application = FastAPI(openapi_url=None)
    # Another site's name that resolves to this machine does not reach the page.
    application.add_middleware(TrustedHostMiddleware, allowed_hosts=[_HOST, "localhost"])
    ui.run_with(application, root=show, title="mae_dat explore", show_welcome_message=False)
    return application


def listen_locally(port: int) -> socket.socket:
    """A socket on this machine's loopback alone. Raises ConfigError for a port that is taken."""
    try:
        return socket.create_server((_HOST, port))
    except OSError as error:
        raise ConfigError(f"--port {port}: {error.strerror}; give another, or 0 for any that is free.") from error


def main(arguments: Sequence[str]) -> None:
    """Run the command with its arguments."""
    console_for_command()
    config = load_config(ExploreConfig, arguments)
    application = build_application(load_examiners(config), find_examples(config.images))
    import uvicorn

    with listen_locally(config.port) as place:
        print(f"Open http://{_HOST}:{place.getsockname()[1]} in a browser; Ctrl-C ends it.", flush=True)
        # From NiceGUI, which looks at every object in memory for the server that runs it, torch's old names included.
        warnings.filterwarnings("ignore", ".*torch.distributed.reduce_op", FutureWarning)
        settings = uvicorn.Config(application, log_level="warning", timeout_graceful_shutdown=1)
        try:
            uvicorn.Server(settings).run([place])
        except KeyboardInterrupt:
            print("ended.")
