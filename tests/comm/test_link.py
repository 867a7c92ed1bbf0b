"""Ranks on shaped links: the rates hold, users without rights have them too, and whatever is killed leaves nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from link_harness import Net, killed
from llmsys.comm import link

HARNESS = Path(__file__).parents[1] / "link_harness.py"
NOBODY = "65534"


@pytest.fixture(autouse=True)
def _links_can_be_made(request: pytest.FixtureRequest) -> None:
    if "refused" not in request.node.name and (why := link.why_not()):
        pytest.skip(why)


def host() -> tuple[set[str], str]:
    """The host's interfaces and its named namespaces."""
    shown = [subprocess.run(["ip", *what], capture_output=True, text=True, check=True).stdout for what in
             (["-o", "link"], ["netns", "list"])]  # fmt: skip
    return {line.split(":")[1].strip() for line in shown[0].splitlines()}, shown[1]


def mbit(net: Net, source: int, target: int, nbytes: int) -> float:
    """The best of five, since other work on the machine only ever makes it slower."""
    rates = [nbytes * 8e-6 / net.send(source, target, nbytes) for _ in range(5)]
    assert max(rates) < net.links[source].up_mbit * 1.01, "faster than the link"
    return max(rates)


@pytest.mark.parametrize("rate", [100, 1000])
def test_a_stream_reaches_the_rate_within_ten_percent(rate: float) -> None:
    """In both directions; frames' headers take 4 % of it."""
    with Net(2, rate, rate) as net:
        nbytes = int(rate * 1e6 / 8 * 0.2)  # a fifth of a second
        assert mbit(net, 0, 1, nbytes) > 0.9 * rate
        assert mbit(net, 1, 0, nbytes) > 0.9 * rate


def test_a_small_message_is_not_early() -> None:
    """64 kB at 100 Mbit/s are 5.2 ms on the wire; the token bucket gives away 4 kB of them at each end."""
    with Net(2, 100, 100) as net:
        assert min(net.send(0, 1, 2**16) for _ in range(5)) > (2**16 - 2 * 4000) * 8 / 100e6


def test_home_links_send_slowly_and_receive_fast() -> None:
    """20/100: one stream has 20 Mbit/s; four ranks that send to a fifth have 20 each, not 20 together."""
    with Net(5, 20, 100) as net:
        nbytes = 500_000
        alone = nbytes * 8 / 20e6
        assert mbit(net, 0, 1, nbytes) > 0.9 * 20
        together = min(net.fetch_all(4, [0, 1, 2, 3], nbytes) for _ in range(3))
        assert alone < together < 1.25 * alone


def test_a_downlink_is_shared_by_those_who_send_to_it() -> None:
    with Net(3, 100, 20) as net:
        nbytes = 250_000
        assert net.fetch_all(2, [0, 1], nbytes) > 2 * (nbytes - 8000) * 8 / 20e6


def test_two_networks_at_once_do_not_meet() -> None:
    """The same addresses in both, and each has its own rate."""
    with Net(2, 100, 100) as fast, Net(2, 20, 20) as slow:
        assert fast.links[0].address == slow.links[0].address
        fast.start(0, 1, 10**6)
        slow.start(0, 1, 10**6)
        assert fast.finish(0, 1) < 0.35
        assert slow.finish(0, 1) > 0.39


def test_a_rank_sees_its_link_and_nothing_else() -> None:
    with Net(2, 100, 100) as net:
        found = net.ranks[0].ask("whoami")
    assert found == {"uid": os.getuid(), "interfaces": ["eth0", "lo"], "dies_with_parent": True}


def test_what_went_over_the_wire_is_counted() -> None:
    """A megabyte and its headers: one for each segment of up to 64 kB at least, one for each frame at most."""
    command = [sys.executable, "-c", "from llmsys.comm import wire; print(list(wire.wire_bytes()))"]
    env = {"PYTHONPATH": str(Path(link.__file__).parents[2])}
    with Net(2, 1000, 1000) as net:
        before = [rank.ask("run", command=command, env=env) for rank in net.ranks]
        net.send(0, 1, 2**20)
        after = [rank.ask("run", command=command, env=env) for rank in net.ranks]
    for rank, way in ((0, 0), (1, 1)):  # rank 0 has sent it, rank 1 has received it
        assert 2**20 < after[rank][way] - before[rank][way] < 1.08 * 2**20
    assert after[1][0] - before[1][0] < 2**17, "acknowledgements only"


def test_a_delay_is_had_or_said() -> None:
    """Never silently left out."""
    with Net(2, 100, 100, delay_ms=20) as net:
        for made in net.links:
            assert (made.delay_ms, bool(made.notes)) in ((20, False), (0, True))
        fastest = min(net.send(0, 1, 1) for _ in range(3))
        assert (fastest > 0.04) == (net.links[0].delay_ms == 20), "a request and its answer are delayed"


def parent(*prefix: str, python: str = sys.executable) -> tuple[subprocess.Popen[str], dict[str, object]]:
    command = [*prefix, python, "-B", str(HARNESS), "parent", "3", "100", "100"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, json.loads(process.stdout.readline())


def test_nothing_remains_after_sigkill() -> None:
    """Not while it runs either: the host's own namespace has the same devices and names throughout."""
    before = host()
    process, found = parent()
    pids = found["pids"]
    assert isinstance(pids, list)
    spaces = {os.readlink(f"/proc/{pid}/ns/net") for pid in pids}
    assert len(spaces) == 4
    assert os.readlink("/proc/self/ns/net") not in spaces
    assert host() == before
    killed(process, pids)
    assert host() == before
    assert not spaces & {name for path in Path("/proc").glob("[0-9]*/ns/net") if (name := readlink(path))}
    mounted = Path("/proc/self/mountinfo").read_text()
    assert not any(name in mounted for name in spaces), "a namespace is kept by a mount"


def readlink(path: Path) -> str | None:
    try:
        return os.readlink(path)
    except OSError:
        return None  # ended meanwhile, or a process of the kernel's


def test_a_killed_switch_takes_the_links_with_it() -> None:
    with Net(2, 100, 100) as net:
        net.switch.close()
        assert net.ranks[0].ask("unplugged") == ["lo"]


@pytest.mark.skipif(os.getuid() != 0, reason="the other tests run without rights then")
def test_a_user_without_rights_has_links_too() -> None:
    """In a user namespace; the ranks still see their own user id, and nothing of theirs outlives the parent."""
    python = readable_python()
    prefix = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--bounding-set=-all"]
    why = subprocess.run([*prefix, python, "-B", HARNESS, "why"], capture_output=True, text=True, check=True).stdout
    if why.strip() != "None":
        pytest.skip(f"as nobody: {why}")
    process, found = parent(*prefix, python=python)
    seconds, pids = found["seconds"], found["pids"]
    assert isinstance(seconds, float)
    assert isinstance(pids, list)
    assert 0.076 < seconds < 0.2, "a megabyte at 100 Mbit/s"
    assert found["rank"] == {"uid": int(NOBODY), "interfaces": ["eth0", "lo"], "dies_with_parent": True}
    killed(process, pids)


def readable_python() -> str:
    """A Python that another user can start, in a checkout that it can read."""
    tries = f"import subprocess, sys; open({str(HARNESS)!r}); subprocess.run([sys.executable, '-c', ''], check=True)"
    for python in (sys.executable, shutil.which("python3", path="/usr/local/bin:/usr/bin")):
        command = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", str(python), "-c", tries]
        if python and not subprocess.run(command, capture_output=True, check=False).returncode:
            return python
    pytest.skip("no Python here that another user can run, or a checkout that it cannot read")


def test_where_the_kernel_forbids_it_one_line_says_so() -> None:
    """As on machines whose administrator has set these limits to 0."""
    limits = " && ".join(f"echo 0 > /proc/sys/user/max_{kind}_namespaces" for kind in ("user", "net"))
    command = [
        "unshare",
        "--user",
        "--map-root-user",
        "sh",
        "-c",
        f"{limits} && exec {sys.executable} -B {HARNESS} why",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no user namespace to try it in: {done.stderr.strip()}")
    assert "max_net_namespaces" in done.stdout
    assert len(done.stdout.splitlines()) == 1


def test_a_rank_that_did_not_isolate_itself_is_refused() -> None:
    """Its interface would appear in the host's namespace."""
    before = host()
    network = SimpleNamespace(up_mbit=100.0, down_mbit=100.0, delay_ms=0.0)
    with link.Switch() as switch, pytest.raises(OSError, match=r"isolate\(\)"):
        switch.connect([os.getpid()], network)  # type: ignore[arg-type]
    assert host() == before


def test_isolation_after_a_thread_has_started_is_refused() -> None:
    """That thread would stay in the host's namespace."""
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        with pytest.raises(AssertionError, match="thread"):
            link.isolate(os.getpid())
    finally:
        done.set()
        thread.join()


@pytest.mark.slow
def test_gloo_all_reduces_over_it() -> None:
    """Three ranks at 100 Mbit/s: a ring sends 2 (p-1)/p of the gradient, and takes as long as that lasts."""
    program = """
import json, sys, time, torch, torch.distributed as dist
dist.init_process_group("gloo", init_method="tcp://10.77.0.1:29400", rank=int(sys.argv[1]), world_size=3)
x = torch.full((10**6,), float(dist.get_rank()))
dist.all_reduce(x[:1])
start = time.perf_counter()
dist.all_reduce(x)
print(json.dumps([x[1].item(), time.perf_counter() - start]))
dist.destroy_process_group()
"""
    env = {"GLOO_SOCKET_IFNAME": link.INTERFACE, "OMP_NUM_THREADS": "1"}
    with Net(3, 100, 100) as net:
        for index, rank in enumerate(net.ranks):
            rank.tell("run", command=[sys.executable, "-c", program, str(index)], env=env)
        least = 2 * 2 / 3 * 4 * 10**6 * 8 / 100e6
        for total, seconds in [rank.hear() for rank in net.ranks]:
            assert total == 3.0
            assert 0.95 * least < seconds < 1.4 * least
