"""How ranks find each other when the port is taken: by a silent service, by one that sends garbage, by another job."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import TCPStore

from mae_dat.config.errors import ConfigError
from mae_dat.runtime import rendezvous
from mae_dat.runtime.rendezvous import candidate_ports, job_token, join_ranks

HOST = "127.0.0.1"


@pytest.fixture
def ports() -> list[int]:
    """Free ports, of which a test occupies the first ones."""
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server((HOST, 0))) for _ in range(5)]
        return [server.getsockname()[1] for server in servers]


def join_all(size: int, ports: list[int], token: str, timeout: float = 20) -> list[TCPStore]:
    """Every rank's store; the ranks are threads here, since all that they share is the network."""
    with ThreadPoolExecutor(size) as pool:
        tasks = [pool.submit(join_ranks, rank, size, HOST, ports, token, timeout) for rank in reversed(range(size))]
        return [task.result() for task in reversed(tasks)]


def assert_shared(stores: list[TCPStore]) -> None:
    for rank, store in enumerate(stores):
        store.set(f"by {rank}", str(rank))
    for store in stores:
        assert [store.get(f"by {rank}").decode() for rank in range(len(stores))] == list(map(str, range(len(stores))))


@contextlib.contextmanager
def foreign_service(port: int, reply: bytes) -> Iterator[None]:
    """A service that takes connections and sends `reply`, or nothing, and never closes them."""
    server, callers = socket.create_server(("", port)), []

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                callers.append(server.accept()[0])
                callers[-1].sendall(reply)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield
    server.shutdown(socket.SHUT_RDWR)
    for connection in (server, *callers):
        connection.close()
    thread.join()


def test_ranks_skip_ports_that_are_taken(ports: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "REPLY_S", 0.3)
    store = TCPStore(HOST, ports[2], is_master=True, wait_for_workers=False)  # another job's, by torch's own means
    with foreign_service(ports[0], b""), foreign_service(ports[1], b"SSH-2.0-OpenSSH_9.2\r\n"):
        stores = join_all(3, ports, "ours")
    assert_shared(stores)
    assert store.num_keys() == 0, "nothing was left in the other job's store"


def test_two_jobs_on_the_same_ports_do_not_mix(ports: list[int]) -> None:
    """The second job's ranks come while the first one still waits for its own."""
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(join_ranks, 0, 2, HOST, ports, "one", 20)
        other = join_all(3, ports, "other")
        late = join_ranks(1, 2, HOST, ports, "one", 20)
    assert_shared([first.result(), late])
    assert_shared(other)
    late.set("whose", "one")
    assert not other[1].check(["whose"])


def test_two_jobs_that_look_alike_do_not_mix(ports: list[int]) -> None:
    """Started by hand with the same MASTER_PORT: a rank that the first job has already belongs to the second."""
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(join_ranks, 0, 3, HOST, ports, "same", 20)
        early = join_ranks(1, 3, HOST, ports, "same", 20)
        other = join_all(2, ports, "same")
        late = join_ranks(2, 3, HOST, ports, "same", 20)
    assert_shared([first.result(), early, late])
    assert_shared(other)
    early.set("whose", "one")
    assert not other[1].check(["whose"])


def test_a_rank_that_never_comes_is_named(
    ports: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rendezvous, "REMINDER_S", 0.2)
    with ThreadPoolExecutor(1) as pool:
        task = pool.submit(join_ranks, 0, 3, HOST, ports, "job", 1.0)
        join_ranks(1, 3, HOST, ports, "job")
        with pytest.raises(ConfigError, match=rf"waited at {HOST}:{ports[0]}, but rank 2 of 3 never connected"):
            task.result()
    assert f"waiting at {HOST}:{ports[0]} for rank 2 of 3" in caplog.text


def test_an_unreachable_rank_0_is_named(
    ports: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rendezvous, "REMINDER_S", 0.2)
    with pytest.raises(ConfigError, match=rf"rank 1 found no rank 0 of this job at {HOST}, port {ports[0]}, .*refused"):
        join_ranks(1, 2, HOST, ports, "job", 0.5)
    assert f"looking for rank 0 at {HOST}" in caplog.text
    with pytest.raises(ConfigError, match=r"at no-such-host\.invalid, .*MASTER_ADDR"):
        join_ranks(1, 2, "no-such-host.invalid", ports[:1], "job", 0.1)
    with foreign_service(ports[0], b""), pytest.raises(ConfigError, match=f"all of the ports {ports[0]} are taken"):
        join_ranks(0, 2, HOST, ports[:1], "job")


def test_ports_and_tokens_are_the_same_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for base in (29500, 20000, 65535, 1):
        ports = candidate_ports(base)
        assert ports[0] == base
        assert len(set(ports)) == 8
        assert all(20000 <= port < 32000 for port in ports[1:])
    for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
        before = job_token(2)
        monkeypatch.setenv(name, "7")
        assert job_token(2) != before
    assert job_token(2) != job_token(3)
