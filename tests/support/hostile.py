"""Files made to execute code, to fill memory or to hang whoever loads them. `CODE` would leave a file at the canary's
path; `TRAPS` do harm otherwise."""

import argparse
import collections
import functools
import io
import os
import pickle
import struct
import subprocess
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch


class Call:
    """Pickles into a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> Any:
        return self.reduced


def text(value: str) -> bytes:
    """Opcodes that push a string."""
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def named(module: str, name: str) -> bytes:
    """Opcodes that push a global, its name with dots."""
    return text(module) + text(name) + b"\x93"


def opcodes(body: bytes) -> bytes:
    """A pickle of protocol 4."""
    return b"\x80\x04" + body + b"."


def touch_by_python(canary: Path) -> str:
    return f"open({str(canary)!r}, 'w').close()"


def code(canary: Path) -> dict[str, bytes]:
    """Pickles by name, each of which creates `canary` where pickles are executed."""
    path, python = str(canary), touch_by_python(canary)
    calls: dict[str, Any] = {
        "os.system": Call(os.system, f"touch '{path}'"),
        "os.mkdir": Call(os.mkdir, path),
        "eval": Call(eval, python),
        "exec": Call(exec, python),
        "Popen": Call(subprocess.Popen, ["touch", path]),
        "partial": Call(functools.partial, os.mkdir, path),
        "load_from_bytes": Call(torch.storage._load_from_bytes, torch_file({"w": Call(os.mkdir, path)})),
        "pickle.loads": Call(pickle.loads, pickle.dumps(Call(os.mkdir, path))),
        "beside weights": {"model": {"w": torch.ones(2)}, "args": Call(os.mkdir, path)},
        "as a key": {"model": {Call(os.mkdir, path): torch.ones(2)}},
        "in an array of objects": np.array([Call(os.mkdir, path)], dtype=object),
        "in a namespace": argparse.Namespace(model=Call(os.mkdir, path)),
        "in an ordered dictionary": collections.OrderedDict(model=Call(os.mkdir, path)),
        "runs a script": Call(torch.utils.collect_env.run, f"touch '{path}'"),
    }
    pickles = {name: torch_pickle(value) for name, value in calls.items()}
    argument = text(path) + b"\x85"
    mkdir = named("builtins", "getattr") + named("builtins", "__import__") + text("os") + b"\x85R"
    return {
        **pickles,
        "getattr of an import": opcodes(mkdir + text("mkdir") + b"\x86R" + argument + b"R"),
        "an old instance": b"(V" + path.encode() + b"\nios\nmkdir\n.",
        "a name through an allowed module": opcodes(named("argparse", "_os.mkdir") + argument + b"R"),
        "a name through torch": opcodes(named("torch", "os.mkdir") + argument + b"R"),
        "a state that is set": opcodes(
            named("functools", "partial") + named("os", "mkdir") + b"\x85R" + named("os", "mkdir") + argument + b"Rb"
        ),
    }


def torch_pickle(value: Any) -> bytes:
    """The pickle in torch's file of a value, storages as persistent ids."""
    return zipfile.ZipFile(io.BytesIO(torch_file(value))).read("archive/data.pkl")


def torch_file(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def as_archive(pickled: bytes, *after: bytes, name: str = "archive/data.pkl", **others: bytes) -> bytes:
    """torch's archive with a pickle of one's own, more pickles of the same name after it, and other records."""
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w") as archive:
        warnings.simplefilter("ignore")  # of a name given twice
        archive.writestr("archive/version", b"3\n")
        archive.writestr("archive/byteorder", b"little")
        for content in (pickled, *after):
            archive.writestr(name, content)
        archive.writestr("archive/data/0", struct.pack("<2f", 1, 1))
        for other, content in others.items():
            archive.writestr(f"archive/{other.replace('__', '.')}", content)
    return buffer.getvalue()


def as_legacy(pickled: bytes) -> bytes:
    """torch's format before archives: magic number, protocol, machine, object, keys of storages."""
    start = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    return b"".join([*start, pickled, pickle.dumps([], 2)])


def as_tar(pickled: bytes) -> bytes:
    """torch's first format."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in {
            "sys_info": pickle.dumps({}),
            "pickle": pickled,
            "storages": pickled,
            "tensors": b"",
        }.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def array_of_objects(canary: Path, suffix: str) -> bytes:
    """numpy's own file with a pickle inside."""
    buffer, array = io.BytesIO(), np.array([Call(os.mkdir, str(canary))], dtype=object)
    np.save(buffer, array) if suffix == "npy" else np.savez(buffer, model=array)
    return buffer.getvalue()


def hostile_files(canary: Path) -> dict[str, bytes]:
    """Files of every container that torch has had, each with every pickle of `code`."""
    benign, files = torch_pickle({"model": {"w": torch.ones(2)}}), {}
    for name, pickled in code(canary).items():
        files[f"{name}, archive"] = as_archive(pickled)
        files[f"{name}, legacy"] = as_legacy(pickled)
        files[f"{name}, pickle"] = pickled
    worst = code(canary)["os.mkdir"]
    return {
        **files,
        "second data.pkl": as_archive(benign, worst),
        "first data.pkl": as_archive(worst, benign),
        "torchscript": as_archive(benign, constants__pkl=worst, code="import os\n"),
        "tar": as_tar(worst),
        "in the machine's facts": pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + worst,
        "array": array_of_objects(canary, "npy"),
        "arrays": array_of_objects(canary, "npz"),
    }


def nested(depth: int) -> Any:
    """A dictionary in itself under every name that is looked into, `depth` deep: 5^depth ways down."""
    inner: Any = {"lr": 0.1}
    for _ in range(depth):
        inner = {"model": inner, "state_dict": inner, "ema": inner, "model_ema": inner, "state_dict_ema": inner}
    return inner


def cyclic() -> dict[str, Any]:
    inner: dict[str, Any] = {}
    inner["model"] = inner
    return inner


def bomb() -> bytes:
    """An archive whose pickle is compressed: 200 MB in 200 kB."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/version", b"3\n")
        with archive.open("archive/data.pkl", "w") as record:
            for part in [b"\x80\x02", *[b"N0" * 1_000_000] * 100, b"N."]:
                record.write(part)
    return buffer.getvalue()


def storage_of(size: int) -> bytes:
    """An archive with a tensor of `size` floats in a record of two."""
    pickled = torch_pickle({"model": {"w": torch.ones(2)}})
    return as_archive(pickled.replace(b"K\x02", b"\x8a\x08" + struct.pack("<q", size)))


def safetensors(header: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + bytes(16)


def traps() -> dict[str, bytes]:
    """Files that do harm without any code, by name; those of safetensors end so."""
    tensor = b'{"dtype":"F32","shape":[%s],"data_offsets":[%s]}'
    return {
        "cycle": torch_file(cyclic()),
        "nested": torch_file(nested(30)),
        "compressed": bomb(),
        "huge storage": storage_of(1 << 60),
        "large storage": storage_of(1 << 36),
        "negative storage": storage_of(-1),
        "deep pickle": as_archive(opcodes(b"]" * 200_000 + b"a" * 199_999)),
        "long string": as_archive(b"\x80\x04\x8d" + struct.pack("<Q", 1 << 62) + b"."),
        "large array": as_archive(b"\x80\x04\x96" + struct.pack("<Q", 1 << 40) + b"."),
        "record elsewhere": as_archive(torch_pickle({"w": torch.ones(2)}), name="../../data.pkl"),
        "length.safetensors": safetensors(b"{}", 1 << 63),
        "long header.safetensors": safetensors(b"{}", 1 << 34),
        "deep header.safetensors": safetensors(b"[" * 1_000_000),
        "huge shape.safetensors": safetensors(b'{"w":' + tensor % (b"4611686018427387904,4", b"0,16") + b"}"),
        "past the end.safetensors": safetensors(b'{"w":' + tensor % (b"1000000000", b"0,4000000000") + b"}"),
        "overlapping.safetensors": safetensors(
            b'{"v":' + tensor % (b"4", b"0,16") + b',"w":' + tensor % (b"4", b"0,16") + b"}"
        ),
    }
