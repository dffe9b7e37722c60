"""Released weights: the registry, and downloads that are interrupted, corrupted, redirected or made by many at once."""

import hashlib
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.parse
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from weights_server import Server, serving

from mae_dat.config.errors import (
    CheckpointError,
    ConfigError,
    DownloadError,
    MissingInputError,
    OutputError,
    StorageError,
)
from mae_dat.models.mae import IMAGENET_MEAN, IMAGENET_STD, MAE_MODELS, VIT_SIZES
from mae_dat.models.tokenizer import VQGAN_PRESETS
from mae_dat.storage import download
from mae_dat.storage.released import (
    PACKAGE_ROOT,
    ReleasedWeights,
    fetch,
    find_local_file,
    find_released,
    local_path,
    released_weights,
    weights_folder,
)
from mae_dat.storage.weight_files import read_weights

CONTENT = save({"weight": torch.arange(300_000.0)})
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MAE_DAT_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MAE_DAT_MIRROR", raising=False)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download, "RETRY_PAUSE_SECONDS", 0.0)
    return tmp_path / "home" / "weights"


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate of 127.0.0.1 with its key, in one file."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is needed to make a certificate")
    path = tmp_path_factory.mktemp("tls") / "server.pem"
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1"
    )
    made = [*command.split(), "-keyout", str(path), "-out", str(path) + ".crt"]
    subprocess.run(made, check=True, capture_output=True)
    path.write_bytes(path.read_bytes() + Path(f"{path}.crt").read_bytes())
    return path


@pytest.fixture
def secure(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("SSL_CERT_FILE", f"{certificate}.crt")
    with serving(certificate) as running:
        yield running


def entry(*urls: str, sha256: str | None = SHA256, **fields: object) -> ReleasedWeights:
    """Released weights at these URLs."""
    facts = {"what": "w", "kind": "mae", "model": "m", "licence": "Apache-2.0", "origin": "o", **fields}
    return ReleasedWeights("tiny", file="tiny.safetensors", urls=urls, sha256=sha256, **facts)  # type: ignore[arg-type]


def names(folder: Path) -> list[str]:
    """Files in a folder, locks aside."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def in_another_process(*urls: str, sha256: str | None = SHA256, before: str = "") -> subprocess.Popen[str]:
    """The same `fetch` in a process of its own."""
    code = (
        # rich is imported before the connection is open: under load that takes longer than a whole dripping download.
        "import sys, rich.progress\nfrom mae_dat.storage.released import ReleasedWeights, fetch\n"
        f"{before}\n"
        f"one = ReleasedWeights('tiny', what='w', kind='mae', model='m', file='tiny.safetensors',\n"
        f"    licence='Apache-2.0', origin='o', urls={urls!r}, sha256={sha256!r})\n"
        "fetch(one)\nassert 'torch' not in sys.modules\n"
    )
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)


# ---- the registry ----


def test_every_entry_can_be_built_and_says_what_a_user_has_to_know() -> None:
    text = (PACKAGE_ROOT / "storage" / "released_weights.yaml").read_text()
    assert len(re.findall(r"^\w+:$", text, re.MULTILINE)) == len(released_weights())  # no name twice
    assert len({one.file for one in released_weights().values()}) == len(released_weights())
    known = {"mae": MAE_MODELS, "tokenizer": {**VQGAN_PRESETS, "light": 0}, "export": VIT_SIZES}
    for name, one in released_weights().items():
        assert one.model in known.get(one.kind, {**VIT_SIZES, "resnet50": 0}), name
        assert (one.mean, one.std) == (IMAGENET_MEAN, IMAGENET_STD), name
        assert one.sha256 is None or re.fullmatch("[0-9a-f]{64}", one.sha256), name
        assert all((one.what, one.licence, one.origin)), name
        assert one.embedded or one.urls, name


def test_mae_weights_are_marked_as_not_for_commercial_use() -> None:
    from_mae = [one for one in released_weights().values() if "fbaipublicfiles" in str(one.urls)]
    assert len(from_mae) == 13
    for one in [*from_mae, released_weights()["mae_vit_huge_patch14_dat"]]:
        assert "CC-BY-NC-4.0, not for commercial use" in one.licence


def test_https_comes_first_and_the_copies_of_others_only_with_a_known_hash() -> None:
    publishers = {"dl.fbaipublicfiles.com", "ommer-lab.com", "heibox.uni-heidelberg.de"}
    publishers.add("alisec-competition.oss-cn-shanghai.aliyuncs.com")
    for name, one in released_weights().items():
        assert all(url.startswith("https://") for url in one.urls[:1]), name
        hosts = {urllib.parse.urlsplit(url).netloc for url in one.urls}
        assert one.sha256 or hosts <= publishers, name


def test_an_unknown_name_brings_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where the demo has been run, there is a folder `output`
    with pytest.raises(ConfigError, match="unknown weights 'mae_vit_bse_patch16': did you mean mae_vit_base_patch16"):
        find_released("mae_vit_bse_patch16")
    with pytest.raises(MissingInputError, match="no such file or folder.*did you mean mae_vit_base_patch16"):
        local_path("mae_vit_bse_patch16")
    with pytest.raises(MissingInputError, match=r"output; .*mae-dat list"):
        local_path("output")


def test_a_path_stays_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert local_path(tmp_path / "absent.pth") == tmp_path / "absent.pth"
    assert local_path("runs/absent") == Path("runs/absent")
    monkeypatch.chdir(tmp_path)
    Path("vit_base_patch16").mkdir()
    assert local_path("vit_base_patch16") == Path("vit_base_patch16")  # the user's own folder goes before the name


def test_the_embedded_weights_need_no_network_and_are_checked() -> None:
    path = local_path("vqgan_demo")
    assert path == PACKAGE_ROOT / "models/tokenizer/weights/light_f4_512.safetensors"
    assert find_local_file(released_weights()["vqgan_demo"]) == path
    assert not weights_folder().exists()
    with pytest.raises(MissingInputError, match="belongs to the package.*install"):
        fetch(ReleasedWeights("gone", "w", "mae", "m", "embedded/gone.safetensors", "l", "o", embedded=True))


# ---- a download that goes well ----


def test_a_download_is_verified_recorded_and_not_repeated(
    server: Server, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = entry(server.page("/w", CONTENT), licence="CC-BY-NC-4.0, not for commercial use")
    assert find_local_file(one) is None
    path = fetch(one)
    assert path == home / "tiny.safetensors" == find_local_file(one)
    assert torch.equal(read_weights(path).tensors["weight"], torch.arange(300_000.0))
    card = json.loads(path.with_suffix(".json").read_text())
    assert (card["sha256"], card["sha256_from"], card["url"]) == (SHA256, "registry", one.urls[0])
    assert "CC-BY-NC-4.0, not for commercial use" in caplog.text
    assert fetch(one) == path
    assert len(server.requests) == 1
    assert names(home) == ["tiny.json", "tiny.safetensors"]


def test_another_folder_can_be_filled_for_a_machine_without_network(
    server: Server, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = entry(server.page("/w", CONTENT))
    assert fetch(one, folder=tmp_path / "mirror") == tmp_path / "mirror/tiny.safetensors"
    server.pages.clear()
    monkeypatch.setenv("MAE_DAT_MIRROR", str(tmp_path / "mirror"))
    assert fetch(one) == tmp_path / "mirror/tiny.safetensors"
    assert not home.exists()


def test_a_checkpoint_is_taken_out_of_a_zip_archive(server: Server) -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("folder/model.ckpt", CONTENT)
        file.writestr("folder/config.yaml", "x: 1")
    assert fetch(entry(server.page("/w.zip", archive.getvalue()))).read_bytes() == CONTENT
    two = io.BytesIO()
    with zipfile.ZipFile(two, "w") as file:
        file.writestr("a.ckpt", CONTENT)
        file.writestr("b.ckpt", CONTENT)
    weights_folder().joinpath("tiny.safetensors").unlink()
    with pytest.raises(DownloadError, match="archive with 2 checkpoints"):
        fetch(entry(server.page("/two.zip", two.getvalue())))


def test_torch_files_are_zip_archives_that_stay_as_they_are(server: Server) -> None:
    buffer = io.BytesIO()
    torch.save({"weight": torch.ones(3)}, buffer)
    sha256 = hashlib.sha256(buffer.getvalue()).hexdigest()
    assert fetch(entry(server.page("/w", buffer.getvalue()), sha256=sha256)).read_bytes() == buffer.getvalue()


# ---- interrupted ----


def test_an_interrupted_download_goes_on_where_it_broke_off(server: Server) -> None:
    url = server.page("/w", CONTENT, cut_after=100_000)
    assert fetch(entry(url)).read_bytes() == CONTENT
    assert [asked for _, asked in server.requests[:3]] == [None, "bytes=100000-", "bytes=200000-"]
    assert server.bytes_sent == len(CONTENT)


def test_a_killed_process_leaves_what_the_next_one_goes_on_with(server: Server, home: Path) -> None:
    url = server.page("/w", CONTENT, drip=True)
    process = in_another_process(url)
    partial = home / ".tiny.safetensors.partial"
    deadline = time.monotonic() + 30
    while not (partial.is_file() and partial.stat().st_size > 0):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert find_local_file(entry(url)) is None
    had = partial.stat().st_size
    assert fetch(entry(url)).read_bytes() == CONTENT
    assert server.requests[-1] == ("/w", f"bytes={had}-")
    assert names(home) == ["tiny.json", "tiny.safetensors"]


@pytest.mark.parametrize(
    "first, then",
    [
        ({}, {"etag": '"v2"'}),
        ({}, {"ranges": False}),
        ({"etag": ""}, {"etag": ""}),  # no version: nothing says that it is still the same
        ({"etag": 'W/"like"'}, {"etag": 'W/"like"'}),  # only alike, not equal byte by byte
    ],
)
def test_a_file_that_changed_or_cannot_be_resumed_is_fetched_anew(
    server: Server, first: dict[str, object], then: dict[str, object]
) -> None:
    url = server.page("/w", b"x" * 500_000, claim=600_000, ranges=False, **first)
    with pytest.raises(DownloadError):
        fetch(entry(url))
    server.page("/w", CONTENT, **then)
    assert fetch(entry(url)).read_bytes() == CONTENT


def test_what_one_address_gave_is_not_continued_from_another(server: Server) -> None:
    broken = server.page("/broken", b"x" * 500_000, claim=600_000, ranges=False)
    assert fetch(entry(broken, server.page("/w", CONTENT))).read_bytes() == CONTENT


def test_a_partial_file_longer_than_the_servers_is_no_dead_end(server: Server) -> None:
    with pytest.raises(DownloadError):
        fetch(entry(server.page("/w", CONTENT + b"more", claim=10**7)))
    assert fetch(entry(server.page("/w", CONTENT))).read_bytes() == CONTENT


def test_a_file_that_always_ends_early_is_never_used(server: Server, home: Path) -> None:
    url = server.page("/w", CONTENT[:700_000], claim=len(CONTENT), ranges=False)
    with pytest.raises(DownloadError, match=r"ended after 700,000 of 1,200,0\d\d bytes"):
        fetch(entry(url))
    assert len(server.requests) == download.MAX_ATTEMPTS
    assert names(home) == [".tiny.safetensors.note", ".tiny.safetensors.partial"]


def test_a_busy_server_is_asked_again_and_the_next_mirror_after_it(server: Server) -> None:
    assert fetch(entry(server.page("/busy", CONTENT, failures=2))).is_file()
    assert len(server.requests) == 3
    weights_folder().joinpath("tiny.safetensors").unlink()
    assert fetch(entry(server.url + "/gone", server.page("/w", CONTENT))).is_file()
    assert [path for path, _ in server.requests[3:]] == ["/gone", "/w"]


# ---- has the wrong content ----


def test_a_corrupted_download_is_put_aside_and_the_next_mirror_is_used(server: Server, home: Path) -> None:
    bad = bytearray(CONTENT)
    bad[-1] ^= 1
    url = server.page("/bad", bytes(bad))
    with pytest.raises(
        DownloadError, match=f"sha256 {hashlib.sha256(bad).hexdigest()}; the registry records {SHA256}.*renamed to"
    ):
        fetch(entry(url))
    assert names(home) == ["tiny.safetensors.bad"]
    assert fetch(entry(url, server.page("/w", CONTENT))).read_bytes() == CONTENT


def test_a_file_that_changed_on_disk_is_not_loaded_but_put_aside(server: Server, home: Path) -> None:
    one = entry(server.page("/w", CONTENT))
    path = fetch(one)
    path.write_bytes(CONTENT[:-1] + b"\0")
    with pytest.raises(CheckpointError, match=rf"has the wrong content.*the registry records {SHA256}.*\.bad.*again"):
        fetch(one)
    assert names(home) == ["tiny.json", "tiny.safetensors.bad"]
    assert fetch(one).read_bytes() == CONTENT


@pytest.mark.parametrize("sha256", [None, SHA256])
def test_a_web_page_is_no_weights(server: Server, home: Path, sha256: str | None) -> None:
    url = server.page("/w", b"\n<!DOCTYPE html><html>Sign in to continue</html>")
    with pytest.raises(DownloadError, match="a web page instead of weights"):
        fetch(entry(url, sha256=sha256), trust=True)
    assert find_local_file(entry(url)) is None


@pytest.mark.parametrize(
    "content, facts, message",
    [
        (b"Quota exceeded", {}, "neither a torch nor a safetensors file"),
        (b"", {}, "neither a torch nor a safetensors file"),
        (CONTENT, {"size": 5}, r"1,200,0\d\d bytes, not 5"),
        (CONTENT, {"md5": "8cad7c"}, "begins with 8cad7c"),
    ],
)
def test_without_a_sha256_the_rest_that_is_known_is_checked(
    server: Server, content: bytes, facts: dict[str, object], message: str
) -> None:
    with pytest.raises(DownloadError, match=message):
        fetch(entry(server.page("/w", content), sha256=None, **facts), trust=True)
    md5 = hashlib.md5(CONTENT).hexdigest()[:6]
    good = entry(server.page("/w", CONTENT), sha256=None, md5=md5, size=len(CONTENT))
    assert fetch(good, trust=True).is_file()


def test_the_first_hash_is_recorded_said_and_checked_ever_after(
    server: Server, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = entry(server.page("/w", CONTENT), sha256=None)
    path = fetch(one, trust=True)
    assert f"no sha256 is published. The sha256 of this file, {SHA256}" in caplog.text
    assert json.loads(path.with_suffix(".json").read_text())["sha256_from"] == "first use"
    assert fetch(one) == path
    path.write_bytes(b"PK" + CONTENT)
    with pytest.raises(CheckpointError, match=rf"tiny\.json records {SHA256}"):
        fetch(one)
    # A server that gives something else the second time is not believed either.
    server.page("/w", save({"weight": torch.ones(2)}))
    with pytest.raises(DownloadError, match=rf"tiny\.json records {SHA256}"):
        fetch(one)


def test_a_file_put_there_by_hand_is_taken_and_recorded(home: Path) -> None:
    home.mkdir(parents=True)
    (home / "tiny.safetensors").write_bytes(CONTENT)
    assert fetch(entry(sha256=None)) == home / "tiny.safetensors"
    assert json.loads((home / "tiny.json").read_text())["sha256"] == SHA256
    (home / "tiny.json").unlink()
    for content, fault in {b"<html>": "a web page instead of weights", b"text": "neither a torch nor"}.items():
        (home / "tiny.safetensors").write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{fault}.*remove it"):
            fetch(entry(sha256=None))
    (home / "tiny.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tiny\.json is not a card: .* Restore it"):
        fetch(entry(sha256=None))


# ---- the way there ----


def test_plain_http_without_a_known_hash_is_not_even_asked(server: Server) -> None:
    one = entry(server.page("/w", CONTENT), sha256=None)
    with pytest.raises(DownloadError, match="not encrypted.*mae-dat get tiny --trust"):
        fetch(one)
    assert not server.requests
    assert fetch(one, trust=True).is_file()
    with pytest.raises(DownloadError, match="not encrypted"):
        fetch(entry("file:///etc/hostname", sha256=None), folder=weights_folder() / "other")


def test_https_needs_no_trust_and_follows_redirects_but_not_to_http(secure: Server, server: Server) -> None:
    secure.page("/here", status=302, location=secure.page("/w", CONTENT))
    assert fetch(entry(secure.url + "/here", sha256=None)).read_bytes() == CONTENT
    weights_folder().joinpath("tiny.safetensors").unlink()
    plain = server.page("/w", CONTENT)
    url = secure.page("/down", status=302, location=plain)
    with pytest.raises(DownloadError, match=f"rejected a redirect from https to {plain}"):
        fetch(entry(url))
    assert not server.requests


def test_a_certificate_that_nobody_signed_is_refused(secure: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(DownloadError, match="certificate verify failed"):
        fetch(entry(secure.page("/w", CONTENT)))


def test_a_redirect_to_another_host_is_followed_and_checked(server: Server) -> None:
    elsewhere = server.page("/w", CONTENT).replace("127.0.0.1", "localhost")
    url = server.page("/here", status=302, location=elsewhere)
    assert fetch(entry(url)).read_bytes() == CONTENT
    weights_folder().joinpath("tiny.safetensors").unlink()
    with pytest.raises(DownloadError, match="rejected a redirect from https to ftp://"):
        fetch(entry(server.page("/ftp", status=302, location="ftp://127.0.0.1/w")))
    with pytest.raises(DownloadError, match="HTTP 302"):
        fetch(entry(server.page("/loop", status=302, location="/loop")))


def test_no_network_is_said_with_the_way_out(home: Path) -> None:
    with pytest.raises(DownloadError) as error:
        fetch(entry("https://nowhere.invalid/w", "https://127.0.0.1:9/w"))
    for part in (
        "nowhere.invalid",
        "refused",
        "mae-dat get tiny --output_dir DIR",
        "MAE_DAT_MIRROR=DIR",
        str(home),
    ):
        assert part in str(error.value)


# ---- mirrors, processes, disks ----


def test_a_mirror_folder_is_read_and_never_written(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mirror = tmp_path / "mirror"
    monkeypatch.setenv("MAE_DAT_MIRROR", str(mirror))
    with pytest.raises(ConfigError, match=r"MAE_DAT_MIRROR=.*no such folder"):
        fetch(entry())
    mirror.mkdir()
    (mirror / "tiny.safetensors").write_bytes(CONTENT)
    assert fetch(entry()) == mirror / "tiny.safetensors"
    assert not home.exists()
    assert fetch(entry(sha256=None)) == mirror / "tiny.safetensors"
    assert names(home) == ["tiny.json"]  # the mirror may be read-only: what was seen is recorded at home
    for sha256 in (None, SHA256):
        (mirror / "tiny.safetensors").write_bytes(b"PK")
        with pytest.raises(CheckpointError, match=f"records {SHA256}. It was not loaded.$"):
            fetch(entry(sha256=sha256))
    assert names(mirror) == ["tiny.safetensors"]


def test_sixteen_processes_make_one_download(server: Server, home: Path) -> None:
    url = server.page("/w", CONTENT, drip=True)
    processes = [in_another_process(url) for _ in range(16)]
    said = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 16, said
    assert server.requests == [("/w", None)]
    assert names(home) == ["tiny.json", "tiny.safetensors"]
    assert (home / "tiny.safetensors").read_bytes() == CONTENT


def test_a_full_disk_is_told_and_the_rest_comes_later(server: Server, home: Path) -> None:
    """A limit on the size of files stands for the disk: writing fails midway in the same way."""
    url = server.page("/w", CONTENT)
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))"
    process = in_another_process(url, before=f"import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); {limit}")
    message = process.communicate()[1]
    assert process.returncode != 0
    assert re.search(r"StorageError: could not write .*partial: no space left", message), message
    assert find_local_file(entry(url)) is None
    assert fetch(entry(url)).read_bytes() == CONTENT


def test_a_disk_too_small_is_noticed_before_anything_is_written(server: Server, home: Path) -> None:
    with pytest.raises(StorageError, match=r"tiny needs 1,000,000,000,000,000 bytes in .*home/weights"):
        fetch(entry(server.page("/w", CONTENT, claim=10**15)))
    assert names(home) == []


def test_a_store_that_is_a_file(server: Server, home: Path) -> None:
    home.parent.write_text("a file")
    with pytest.raises(OutputError, match="weights folder.*Set MAE_DAT_HOME"):
        fetch(entry(server.page("/w", CONTENT)))
