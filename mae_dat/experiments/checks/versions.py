"""Check the versions of Python and of the installed packages, and that the central ones can be imported.

The allowed ranges are those of pyproject.toml, as the metadata of the installed package records them.
"""

import contextlib
import importlib
import platform
from collections.abc import Sequence
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from mae_dat.config.extras import EXTRA_USES, EXTRAS, install_command
from mae_dat.experiments.checks.row import CheckRow, describe_error
from mae_dat.runtime.environment import OTHER_BUILDS, PACKAGE_FOLDER

_DISTRIBUTION = "mae-dat"
_OPENCV, _OPENCV_BUILDS = "opencv-python-headless", ("opencv-python", *OTHER_BUILDS["opencv-python"])
IMPORTED = ("torch", "torchvision", "timm", "numpy")
"""The required packages that are imported to check them, besides OpenCV."""
_SAME_INDEX = (
    "install both from one index: pip install --force-reinstall torch torchvision --index-url "
    "https://download.pytorch.org/whl/cpu (or /cu132 and so on in place of /cpu)"
)


# ---- this package ----


def check_package() -> CheckRow:
    """Check that this package is installed in the version that runs."""
    # No import statement, since the face of the package is above this module.
    version = importlib.import_module("mae_dat").__version__
    place = f"{version} in {PACKAGE_FOLDER}"
    installed = _installed(_DISTRIBUTION)
    if installed is None:
        text = f"{place}, not installed: the allowed versions of other packages are unknown."
        return CheckRow("warning", "mae_dat", text, f"pip install --editable {PACKAGE_FOLDER.parent}")
    if installed != version:
        fix = "uninstall one of them: pip uninstall mae-dat"
        return CheckRow("warning", "mae_dat", f"{place}, but version {installed} is installed.", fix)
    return CheckRow("ok", "mae_dat", place)


def check_python() -> CheckRow:
    """Check the version of Python against those that this package allows and was tested with."""
    try:
        facts = metadata.metadata(_DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return CheckRow("ok", "Python", platform.python_version())
    tested = [
        classifier.rpartition(" ")[2]
        for classifier in facts.get_all("Classifier") or ()
        if classifier.startswith("Programming Language :: Python :: 3.")
    ]
    return python_row(platform.python_version(), facts["Requires-Python"] or "", tested)


def python_row(version: str, allowed: str, tested: Sequence[str]) -> CheckRow:
    """Return the row of a version of Python, given the allowed range and the minor versions that were tested."""
    if not SpecifierSet(allowed).contains(version, prereleases=True):
        return CheckRow("failed", "Python", f"{version}; {allowed} is required", f"install Python {tested[-1]}")
    if tested and version.rpartition(".")[0] not in tested:
        return CheckRow(
            "warning",
            "Python",
            f"{version}; tested were {', '.join(tested)}",
            f"if problems occur, use Python {tested[-1]}",
        )
    return CheckRow("ok", "Python", version)


def requirements(extra: str = "") -> dict[str, Requirement]:
    """Return the requirements of this package by name, or those that an extra adds; none if it is not installed."""
    try:
        listed = [Requirement(text) for text in metadata.requires(_DISTRIBUTION) or ()]
    except metadata.PackageNotFoundError:
        return {}
    return {one.name: one for one in listed if _is_of(one, extra)}


def _is_of(requirement: Requirement, extra: str) -> bool:
    without, with_extra = (
        requirement.marker is None or requirement.marker.evaluate({"extra": name}) for name in ("", extra)
    )
    return with_extra and not without if extra else without


# ---- required packages ----


def reinstall_command(name: str) -> str:
    """Return the command that installs a required package again, in an allowed version."""
    return f'pip install --force-reinstall "{requirements().get(name, name)}"'


def version_row(name: str, version: str | None, requirement: Requirement | None) -> CheckRow:
    """Return the row of a package, given its installed version (None for none) and what is required (None: unknown)."""
    install = f'pip install "{requirement or name}"'
    if version is None:
        return CheckRow("failed", name, "not installed", install)
    if requirement is not None and not requirement.specifier.contains(version, prereleases=True):
        return CheckRow("failed", name, f"{version}; {requirement.specifier} is required", install)
    return CheckRow("ok", name, version)


def check_torch() -> CheckRow:
    """Check that torch has an allowed version and computes."""
    import torch

    row = version_row("torch", torch.__version__, requirements().get("torch"))
    (torch.ones(2, 2) @ torch.ones(2, 2)).sum().item()
    return row


def check_torchvision() -> CheckRow:
    """Check that torchvision has an allowed version, and that it and torch are a matching pair."""
    import torch

    version, required = metadata.version("torchvision"), None
    for text in metadata.requires("torchvision") or ():
        if Requirement(text).name == "torch":
            required = text
    if problem := pair_problem(torch.__version__, version, required):
        pair = " ".join(f'"{requirements().get(name, name)}"' for name in ("torch", "torchvision"))
        return CheckRow("failed", "torchvision", problem, f"pip install --upgrade {pair}")
    row = version_row("torchvision", version, requirements().get("torchvision"))
    try:
        import torchvision

        torchvision.ops.nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.ones(1), 0.5)
    except (ImportError, RuntimeError, AttributeError) as error:
        text = f"{version} does not work with torch {torch.__version__}: {str(error).splitlines()[0]}"
        return CheckRow("failed", "torchvision", text, _SAME_INDEX)
    if row.state == "ok":
        return CheckRow("ok", "torchvision", f"{version}, which matches torch; its operators work")
    return row


def pair_problem(torch_version: str, torchvision_version: str, required: str | None) -> str:
    """Return why a torchvision does not match a torch, empty if it does.

    `required` is the requirement of torch in torchvision's metadata, such as `torch==2.15.0`; None if it has none.
    """
    if required is None or Requirement(required).specifier.contains(torch_version, prereleases=True):
        return ""
    return f"{torchvision_version} needs torch{Requirement(required).specifier}, and torch {torch_version} is installed"


def check_timm() -> CheckRow:
    """Check that timm has an allowed version and can be imported."""
    try:
        import timm
    except (ImportError, OSError, RuntimeError) as error:
        if isinstance(error, ImportError) and error.name == "timm":
            raise
        return CheckRow("failed", "timm", describe_error(error), "correct the packages above first")

    return version_row("timm", timm.__version__, requirements().get("timm"))


def check_numpy() -> CheckRow:
    """Check that NumPy has an allowed version, and that torch was built for it."""
    import numpy
    import torch

    row = version_row("numpy", numpy.__version__, requirements().get("numpy"))
    try:
        torch.from_numpy(torch.ones(2).numpy())
    except (RuntimeError, TypeError) as error:
        text = f"{numpy.__version__} does not work with torch {torch.__version__}: {error}"
        return CheckRow("failed", "numpy", text, "pip install --upgrade numpy torch")
    return row


def check_opencv() -> CheckRow:
    """Check that cv2 can be imported, in an allowed version, whichever build of OpenCV contains it."""
    requirement = requirements().get(_OPENCV)
    builds = [name for name in _OPENCV_BUILDS if _installed(name)]
    reinstall = (f"pip uninstall -y {' '.join(builds)}; " if builds else "") + f'pip install "{requirement or _OPENCV}"'
    try:
        import cv2
    except ImportError as error:
        return CheckRow("failed", "opencv", f"cannot be imported: {error}", reinstall)
    row = version_row("opencv", cv2.__version__, requirement)
    text = f"{cv2.__version__} ({', '.join(builds) or 'of unknown origin'})"
    if row.state == "failed":
        return CheckRow("failed", "opencv", row.text, reinstall)
    if len(builds) > 1:
        text += ": several builds share one folder, and the one installed last is imported."
        return CheckRow("warning", "opencv", text, reinstall)
    return CheckRow("ok", "opencv", text)


def check_other_packages() -> list[CheckRow]:
    """Check the versions of the other required packages; a row for all that are right, one for each that is not."""
    others = {name: requirement for name, requirement in requirements().items() if name not in (*IMPORTED, _OPENCV)}
    rows = [version_row(name, _installed(name), requirement) for name, requirement in others.items()]
    wrong = [row for row in rows if row.state != "ok"]
    right = f"{len(rows) - len(wrong)} more required packages have allowed versions"
    return [CheckRow("ok", "other packages", right), *wrong] if rows else []


# ---- optional packages ----


def check_extras() -> list[CheckRow]:
    """Check the packages of every extra: installed in which version, or how to install them."""
    return [
        extra_row(extra, {name: _installed(name) for name in packages}, requirements(extra))
        for extra, packages in EXTRAS.items()
    ]


def extra_row(extra: str, versions: dict[str, str | None], required: dict[str, Requirement]) -> CheckRow:
    """Return the row of an extra, given the installed versions of its packages and what it requires."""
    name, install = f"extra {extra}", install_command(extra)
    rows = [version_row(package, version, required.get(package)) for package, version in versions.items()]
    missing = [package for package, version in versions.items() if version is None]
    if missing:
        what = "not installed" if len(missing) == len(versions) else f"without {' and '.join(missing)}"
        return CheckRow("-", name, f"{what}; for {EXTRA_USES[extra]}\n{install}")
    text = ", ".join(f"{row.name} {row.text}" for row in rows)
    if all(row.state == "ok" for row in rows):
        return CheckRow("ok", name, text)
    return CheckRow("warning", name, text, install.replace("install", "install --upgrade", 1))


def _installed(name: str) -> str | None:
    """Return the version of an installed package, None for none."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return None
