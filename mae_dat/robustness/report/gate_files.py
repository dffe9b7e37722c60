"""The files of a gate: JUnit XML for a CI system, and the evidence: hashes of all that the verdicts depend on."""

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from mae_dat.config.requirements import NoWorse, Requirements
from mae_dat.robustness.scores.results import Results
from mae_dat.runtime.environment import code_facts
from mae_dat.storage.files import atomic_write, prepare_output_folder, sha256_of

JUNIT_FILE, EVIDENCE_FILE = "requirements.xml", "requirements.json"


def write_gate_files(
    lines: Sequence[Any],
    verdict: str,
    undecided: str,
    results: Results,
    requirements: Requirements,
    places: tuple[Path | None, Path],
) -> None:
    """Write requirements.xml and requirements.json; `places` are the results.json that was judged, and the folder.

    Raises OutputError, StorageError.
    """
    file, folder = places
    prepare_output_folder(folder)
    evidence = evidence_of(lines, verdict, undecided, results, requirements, file)
    with atomic_write(folder / EVIDENCE_FILE) as stream:
        stream.write(json.dumps(evidence, indent=1).encode() + b"\n")
    with atomic_write(folder / JUNIT_FILE) as stream:
        stream.write(junit_xml(lines, undecided))


def junit_xml(lines: Sequence[Any], undecided: str) -> bytes:
    """Return one test suite per model and one test case per requirement; an undecided one fails, or is skipped."""
    root = ElementTree.Element("testsuites", name="mae-dat evaluate --require")
    for model in dict.fromkeys(line.model for line in lines):
        own = [line for line in lines if line.model == model]
        unmet = [line for line in own if line.verdict == "failed" or (line.verdict, undecided) == ("undecided", "fail")]
        skipped = [line for line in own if (line.verdict, undecided) == ("undecided", "pass")]
        counts = {"tests": str(len(own)), "failures": str(len(unmet)), "errors": "0", "skipped": str(len(skipped))}
        suite = ElementTree.SubElement(root, "testsuite", {"name": _xml_text(model), **counts})
        for line in own:
            case = ElementTree.SubElement(
                suite, "testcase", classname=_xml_text(model), name=_xml_text(line.requirement)
            )
            if line in unmet:
                failure = ElementTree.SubElement(case, "failure", type=line.verdict, message=_xml_text(str(line)))
                failure.text = _xml_text(str(line))
            elif line in skipped:
                ElementTree.SubElement(case, "skipped", message=_xml_text(str(line)))
            ElementTree.SubElement(case, "system-out").text = _xml_text(str(line))
    ElementTree.indent(root)
    content: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return content + b"\n"


def _xml_text(text: str) -> str:
    """Return a text without characters that XML cannot hold."""
    valid = text.encode(errors="replace").decode()
    return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in valid)


def evidence_of(
    lines: Sequence[Any],
    verdict: str,
    undecided: str,
    results: Results,
    requirements: Requirements,
    file: Path | None,
) -> dict[str, Any]:
    """Return the verdicts with the hashes of models, data, code, requirements and results."""
    earlier = [entry.file for entry in requirements.entries if isinstance(entry, NoWorse)]
    files = [requirements.path, *earlier, *([file] if file is not None else [])]
    return {
        "verdict": verdict,
        "undecided": undecided,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "requirements": [line.as_json() for line in lines],
        "files": {str(path): sha256_of(path) for path in files},
        "models": {
            name: {"source": facts["source"], "sha256": facts["sha256"], "precision": facts["precision"]}
            for name, facts in results["models"].items()
        },
        "data": {
            model: {
                suite: {"sha256": facts["fingerprint"], "images": facts["images"]} for suite, facts in suites.items()
            }
            for model, suites in results["suites"].items()
        },
        "code": dict(code_facts()),
        "measured": {"created": results["created"], "command": results["command"], "versions": results["versions"]},
    }
