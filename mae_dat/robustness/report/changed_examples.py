"""Example images for the comparison of two evaluations: unchanged images that one of the models wins or loses."""

import dataclasses
import io
import warnings
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from mae_dat.robustness.report.changes import WON, changed_images
from mae_dat.robustness.report.class_predictions import shows_classes
from mae_dat.robustness.report.summarize import ReportData
from mae_dat.storage.files import atomic_write, prepare_output_folder

EXAMPLES_OF_EACH = 4
"""Images won, and as many lost."""
THUMBNAIL_SIDE = 224
_UNREADABLE = (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError, Warning)


def with_changed_examples(report: ReportData, folder: Path) -> ReportData:
    """Write thumbnails of changed images to `folder`/examples, and return the report with them as examples.

    Only unchanged images are shown, which exist as files; those that are no longer there are left out. Raises
    OutputError or StorageError.
    """
    plain = {one.suite for one in report.measurements if one.kind == "plain" and shows_classes(one)}
    examples: list[dict[str, Any]] = []
    taken = {True: 0, False: 0}
    for row in changed_images(report):
        is_won = row["change"] == WON
        if row["suite"] not in plain or taken[is_won] == EXAMPLES_OF_EACH:
            continue
        png = _thumbnail(report, row["suite"], row["image"])
        if png is None:
            continue
        taken[is_won] += 1
        file = f"examples/{len(examples) + 1}.png"
        prepare_output_folder(folder / "examples")
        with atomic_write(folder / file) as target:
            target.write(png)
        before, after = (next(iter(group.members.values())) for group in report.groups)
        answers = {before: row["before"], after: row["after"]}
        examples.append({"file": file, "suite": row["suite"], "cell": "", "label": row["label"], "answers": answers})
    return dataclasses.replace(report, examples=examples)


def _thumbnail(report: ReportData, suite: str, name: str) -> bytes | None:
    """Return an image below its folder as a small PNG; None if there is none that can be read."""
    for facts in report.image_sets.get(suite, {}).values():
        root = Path(facts["root"]).resolve()
        path = (root / name).resolve()
        if not (path.is_relative_to(root) and path.is_file()):
            continue
        try:
            with warnings.catch_warnings(), Image.open(path) as image:
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
                png = io.BytesIO()
                image.convert("RGB").save(png, "PNG")
                return png.getvalue()
        except _UNREADABLE:
            continue
    return None
