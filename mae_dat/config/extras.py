"""The optional packages, by the extra of this package that requires them."""

from importlib.util import find_spec

from mae_dat.config.errors import MissingInputError

EXTRAS: dict[str, tuple[str, ...]] = {
    "export": ("onnx", "onnxruntime", "onnxscript"),
    "shards": ("webdataset",),
    "autoattack": ("torchattacks",),
    "detection": ("torchmetrics", "pycocotools"),
    "explore": ("nicegui",),
    "parquet": ("pyarrow",),
    "huggingface": ("transformers",),
    "multiband": ("tifffile",),
}
"""The names under which the packages of each extra are imported."""
EXTRA_USES: dict[str, str] = {
    "export": "mae-dat convert --to onnx, evaluating ONNX files",
    "shards": "mae-dat pack, shards at gs://, hf:// and ais:// addresses",
    "autoattack": "mae-dat evaluate --suite autoattack-4/255",
    "detection": "mae-dat detect",
    "explore": "mae-dat explore",
    "parquet": "Parquet files of mae-dat predict",
    "huggingface": "classifiers that transformers has saved",
    "multiband": "TIFF files with --in_chans",
}
"""What needs each extra."""

OPENCV_WITHOUT_LIBGL = (
    "OpenCV needs libGL, which this machine lacks: another package has installed opencv-python over the build without "
    "windows. Install that again: pip uninstall -y opencv-python opencv-python-headless; pip install "
    '"opencv-python-headless>=5,<6"'
)


def install_command(extra: str) -> str:
    """Return the command that installs the packages of an extra."""
    # torchattacks requires an old requests, which it never imports and which other packages exclude.
    flags = "--no-deps " if extra == "autoattack" else ""
    return f"pip install {flags}{' '.join(EXTRAS[extra])}"


def require_extra(extra: str, purpose: str) -> None:
    """Raise MissingInputError with the command that installs the extra, unless all its packages are installed.

    `purpose` names what needs them, at the start of the message. Nothing is imported.
    """
    missing = [package for package in EXTRAS[extra] if find_spec(package) is None]
    if missing:
        raise MissingInputError(f"{purpose} needs {' and '.join(missing)}: {install_command(extra)}")
