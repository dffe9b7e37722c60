"""Two evaluations compared image by image, from Python: `Evaluation.compare`."""

from pathlib import Path

from mae_dat.config.flags import expand_home
from mae_dat.robustness.report.changes import changed_images, changes_table
from mae_dat.robustness.report.headline import aligned_text, headline_text
from mae_dat.robustness.report.merge import choose_models, merge_evaluations
from mae_dat.robustness.report.summarize import summarize
from mae_dat.robustness.report.write import write_comparison
from mae_dat.robustness.scores.results import Results


class EvaluationChanges:
    """What changed between two evaluations. Prints the numbers of both models, and the images won and lost.

    Attributes:
        changed: every image that only one of the models predicts correctly, a row each: suite, cell, image, label,
            before, after (the predictions) and change (won or lost).
    """

    def __init__(self, before: Results, after: Results, names: tuple[str, ...] = ()) -> None:
        pair = choose_models({"the first evaluation": before, "the other evaluation": after}, names)
        self._report = summarize(merge_evaluations(*pair))
        self.changed = changed_images(self._report)

    def report(self, output_dir: str | Path) -> Path:
        """Write the report of both models and changes.csv, and return the path of the page.

        Raises OutputError, StorageError.
        """
        return write_comparison(self._report, Path(expand_home(output_dir)))

    def __repr__(self) -> str:
        table = changes_table(self._report)
        return "\n".join([headline_text(self._report), *([aligned_text(table)] if table else [])])
