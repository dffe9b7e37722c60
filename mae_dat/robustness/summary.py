"""The outcome of an evaluation in Python: numbers that print as a table, and the report."""

import html
from pathlib import Path

from mae_dat.config.flags import expand_home
from mae_dat.robustness.compared import EvaluationChanges
from mae_dat.robustness.report.comparison import headline_table
from mae_dat.robustness.report.findings import collapse_warnings
from mae_dat.robustness.report.headline import headline_text
from mae_dat.robustness.report.summarize import ReportData, summarize
from mae_dat.robustness.report.write import write_report
from mae_dat.robustness.scores.results import Results, read_results, write_results
from mae_dat.storage.files import prepare_output_folder


class Evaluation:
    """What `evaluate` measured. Prints as the table that `mae-dat evaluate` prints, and as HTML in a notebook.

    Attributes:
        results: the content of results.json: integer counts of every measurement, and what they depend on.
        output_dir: the folder with results.json and the report, or None if none was requested.
    """

    def __init__(self, results: Results, output_dir: Path | None = None) -> None:
        self.results, self.output_dir = results, output_dir

    @property
    def scores(self) -> dict[str, float]:
        """The numbers of the table by name, such as `clean` or `generated/mean`; in percent, except for a shape bias.

        With several models the names are `MODEL: NAME`. Of models that differ only in their seed, every one is listed.
        """
        values = {
            (model, metric.key): number.value
            for metric in self._report().metrics
            for model, number in metric.values.items()
        }
        several = len(self.results["models"]) > 1
        return {f"{model}: {key}" if several else key: value for (model, key), value in values.items()}

    def report(self, output_dir: str | Path) -> Path:
        """Write results.json and the report (page, Markdown, LaTeX, CSV, figures), and return the path of the page.

        Raises OutputError, StorageError.
        """
        folder = prepare_output_folder(Path(expand_home(output_dir)))
        write_results(self.results, folder / "results.json")
        return write_report(self._report(), folder)

    def compare(self, other: "Evaluation | str | Path", names: tuple[str, ...] = ()) -> EvaluationChanges:
        """Compare with a later evaluation of the same images, an object or its folder: which images it wins and loses.

        `names` are the model of this evaluation and of the other one, where there are several. Raises ConfigError, and
        CheckpointError for evaluations of other images, protocols or versions, or that were edited.
        """
        if isinstance(other, Evaluation):
            return EvaluationChanges(self.results, other.results, names)
        path = Path(expand_home(other))
        return EvaluationChanges(self.results, read_results(path / "results.json" if path.is_dir() else path), names)

    def _report(self) -> ReportData:
        return summarize(self.results)

    def __repr__(self) -> str:
        return headline_text(self._report())

    def _repr_html_(self) -> str:
        report = self._report()
        table = headline_table(report)
        notes = (*collapse_warnings(report), *table.notes)
        head = "".join(f"<th>{html.escape(text)}</th>" for text in table.head)
        rows = [
            "".join(_cell(text, column, (row, column) in table.best) for column, text in enumerate(texts))
            for row, texts in enumerate(table.rows)
        ]
        return (
            f"<table><thead><tr>{head}</tr></thead>"
            f"<tbody>{''.join(f'<tr>{row}</tr>' for row in rows)}</tbody></table>"
            f"{''.join(f'<p><small>{html.escape(note)}</small></p>' for note in notes)}"
        )


def _cell(text: str, column: int, is_best: bool) -> str:
    text = f"<b>{html.escape(text)}</b>" if is_best else html.escape(text)
    return f'<th style="text-align: left">{text}</th>' if column == 0 else f"<td>{text}</td>"
