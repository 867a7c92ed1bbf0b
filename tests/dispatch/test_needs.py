"""Claims about what a run needs of a cluster: computed, before anything is asked of one."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmsys import compose, device
from llmsys.dispatch import cluster, needs
from llmsys.dispatch.needs import GIB, Need, Node
from llmsys.job import code_hash


def need(*words: str) -> Need:
    return Need.of(compose.compose(["dispatch=ray", *words]))


def node(name: str, **resources: float) -> Node:
    return Node(id=name, name=name, address="10.0.0.1", resources=resources)


def most(wanted: Need, nodes: list[Node]) -> int:
    """How many such runs there is room for, by trying: each bundle of each run somewhere, one after another."""

    def placed(left: list[dict[str, float]], run: int, used: frozenset[int], bundle: int) -> int:
        best = run
        if bundle == len(wanted.bundles):
            return placed(left, run + 1, frozenset(), 0)
        for at, own in enumerate(left):
            fits = all(own.get(key, 0.0) >= value for key, value in wanted.bundles[bundle].items())
            if fits and not (wanted.nodes and at in used):
                rest = [dict(each) for each in left]
                for key, value in wanted.bundles[bundle].items():
                    rest[at][key] -= value
                best = max(best, placed(rest, run, used | {at}, bundle + 1))
        return best

    return placed([dict(each.resources) for each in nodes], 0, frozenset(), 0)


def test_a_rank_asks_for_its_threads_its_gpu_and_its_memory() -> None:
    assert need("train.threads=3").rank == {"CPU": 3}
    assert need("train.threads=0").rank == {"CPU": 1}
    assert need("train.threads=3", "dispatch.cpus=1", "hardware.device=cuda").rank == {"CPU": 1, "GPU": 1}
    assert need("hardware.device=cuda", "dispatch.gpus=0.5").rank["GPU"] == 0.5
    assert need("dispatch.memory_gib=2", "+dispatch.resources.fast=1").rank["memory"] == 2 * GIB
    assert need("+dispatch.resources.fast=1").rank["fast"] == 1


def test_ranks_over_so_many_nodes_share_bundles() -> None:
    words = ("engine=ddp", "train.world=4", "train.global_batch=8", "train.micro_batch=2")
    assert (need(*words).strategy, len(need(*words).bundles)) == ("PACK", 4)
    two = need(*words, "dispatch.nodes=2")
    assert (two.strategy, two.bundles) == ("STRICT_SPREAD", [{"CPU": 2}, {"CPU": 2}])


def test_dispatch_world_is_train_world() -> None:
    config = compose.compose(["dispatch=ray", "engine=ddp", "dispatch.world=2", "train.micro_batch=4"])
    assert (config["train"]["world"], config["dispatch"]["world"]) == (2, 0)
    with pytest.raises(ValueError, match=r"dispatch\.world=2: and train\.world=4; they are one"):
        compose.compose(["dispatch=ray", "dispatch.world=2", "train.world=4"])


@pytest.mark.parametrize(("world", "over"), [(1, 0), (2, 0), (2, 2), (4, 2), (3, 3)])
def test_room_for_as_many_runs_as_can_be_placed(world: int, over: int) -> None:
    """Against trying every placement, on all small clusters of three nodes."""
    wanted = Need(world=world, rank={"CPU": 1}, nodes=over)
    for cores in itertools.combinations_with_replacement(range(4), 3):
        nodes = [node(f"n{at}", CPU=each) for at, each in enumerate(cores)]
        assert wanted.runs(nodes) == most(wanted, nodes), cores


def test_what_no_cluster_has_is_said_with_what_each_node_has() -> None:
    nodes = [node("a", CPU=8, memory=2.5 * GIB), node("b", CPU=2, GPU=1)]
    with pytest.raises(ValueError, match="a run needs 1 GPU, 16 CPU") as error:
        needs.check(Need(world=1, rank={"GPU": 1, "CPU": 16}), nodes)
    assert "\n  a (10.0.0.1): 8 CPU, 2.5 GiB\n  b (10.0.0.1): 2 CPU, 1 GPU" in str(error.value)
    with pytest.raises(ValueError, match="no node is alive"):
        needs.check(Need(world=1, rank={"CPU": 1}), [])


def test_nodes_with_different_gpus_are_not_one_machine() -> None:
    fast, slow = (device.Machine("cpu", name, 1, 8) for name in ("H100", "RTX 3090"))
    assert cluster.agreed([(node("a"), fast), (node("b"), device.Machine("other", "H100", 2, 4))]).threads == 4
    with pytest.raises(ValueError, match=r"different devices: a H100, b RTX 3090; .*dispatch\.resources"):
        cluster.agreed([(node("a"), fast), (node("b"), slow)])


def test_no_more_threads_are_taken_than_ray_gives_away() -> None:
    """In a container a process may see all of its host's cores."""
    seen = device.Machine("cpu", None, 0, 64)
    assert cluster._given(seen, node("pod", CPU=8)).threads == 8
    assert cluster._given(seen, node("whole", CPU=96)).threads == 64


class Nodes:
    """Stands for `llmsys.dispatch.ray`: nodes that say this of themselves."""

    def __init__(self, **said: Any) -> None:
        self.said = {"fault": "", "code": code_hash(), "machine": {}} | said

    def survey(self, asked: Path, which: list[Node]) -> Iterator[tuple[Node, dict[str, Any]]]:
        assert asked.read_text(), "what a node has to find"
        return ((each, self.said) for each in which)


def test_a_folder_that_a_node_cannot_write_and_other_code_are_named_with_the_node(tmp_path: Path) -> None:
    asked, where = cluster._asked, [node("far")]
    with pytest.raises(ValueError, match=r"results=.*cannot be written there: Read-only.*node far .*LLMSYS_RESULTS"):
        asked(Nodes(fault="cannot be written there: Read-only file system"), str(tmp_path), where)
    with pytest.raises(ValueError, match=r"node far .* has other code of llmsys"):
        asked(Nodes(code="0123"), str(tmp_path), where)
    assert asked(Nodes(), str(tmp_path), where) == [(where[0], Nodes().said)]
    assert not list(tmp_path.iterdir()), "what was asked is gone again"


def test_a_node_says_what_it_is_and_whether_it_has_the_folder(tmp_path: Path) -> None:
    """In a process of its own, as a cluster asks it."""

    def answer(asked: Path) -> dict[str, Any]:
        words = [sys.executable, "-m", "llmsys.dispatch.node", str(asked)]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        said: dict[str, Any] = json.loads(done.stdout)
        return said

    assert answer(tmp_path / "nothing")["fault"] == "is not the same folder there"
    (tmp_path / "asked").write_text("this")
    said = answer(tmp_path / "asked")
    assert (said["fault"], said["code"]) == ("", code_hash())
    assert device.Machine(**said["machine"]).threads == device.threads()
    assert [path.name for path in tmp_path.iterdir()] == ["asked"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["dispatch.nodes=3"], r"dispatch\.nodes=3: must share the train\.world=1 ranks evenly"),
        (["dispatch.gpus=1.5"], r"dispatch\.gpus=1\.5: must be a whole number"),
        (["+dispatch.resources.CPU=1"], r"dispatch\.resources\.CPU: is dispatch\.cpus"),
        (["dispatch.retries=-1"], r"dispatch\.retries"),
        (["dispatch.address=nowhere"], r"dispatch\.address=nowhere: must be auto, host:port or ray://host:port"),
    ],
)
def test_what_cannot_be_is_said_before_a_cluster_is_asked(words: list[str], said: str) -> None:
    config: dict[str, Any] = compose.compose(["dispatch=ray", *words])
    with pytest.raises(ValueError, match=said), cluster.ready([config]):
        pass
