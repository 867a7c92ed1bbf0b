"""What goes between stages, compressed and with noise: how much is lost, what is refused, and that nothing is drawn or
rounded otherwise when it is computed again."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decentral_harness import model, traced
from decentral_running import Storm, job, losses, machines, mem_gib, training, undisturbed

from llmsys import schema
from llmsys.decentral import compression, noise, owner, schedule
from llmsys.decentral.chain import Chain, chain
from llmsys.decentral.codecs import LEAST, SCALES, decoded, encoded
from llmsys.decentral.compression import GROUP, SHARES, Codecs
from llmsys.decentral.coordinator import Coordinator
from llmsys.decentral.cost import Costs, Workload
from llmsys.decentral.decode import trace_decoder
from llmsys.decentral.exports import Exports
from llmsys.decentral.fleet import Fleet, Provider
from llmsys.decentral.local import Local
from llmsys.decentral.noise import Noise
from llmsys.decentral.order import Pipeline
from llmsys.decentral.plan import plan
from llmsys.decentral.planes import Rules, plane_of
from llmsys.decentral.planes.layout import packed, unpacked
from llmsys.decentral.privacy import noisy
from llmsys.decentral.wire import Array, decode, encode, header

LOSSY = [codec for codec in SHARES if codec != "none"]
RELATIVE = {"fp16": 2.0**-11, "bf16": 2.0**-8, "int8": 1 / 254}
"""Of an element; of int8, of the largest of its group."""
STEPS = 6


# --- codecs ---


def there_and_back(codec: str, tensor: torch.Tensor) -> torch.Tensor:
    sent = encoded(codec, "x", packed(tensor))
    return unpacked(decoded(codec, "x", sent, tuple(tensor.shape)))


def shapes() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    normal = torch.randn(3, 70, 5, generator=draw)
    return {
        "scalar": torch.tensor(3.7),
        "empty": torch.zeros(0, 4),
        "zeros": torch.zeros(2, 100),
        "rows": normal,
        "transposed": normal.transpose(0, 2),
        "expanded": normal[:, :1].expand(3, 9, 5),
        "spread": normal * torch.logspace(-4, 4, 5),
        "gradients": normal * 1e-4,
    }


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("shape", shapes())
def test_what_comes_is_what_was_sent_within_a_bound(codec: str, shape: str) -> None:
    """And lies as it lay; fp16 has nothing below 6e-8."""
    tensor = shapes()[shape]
    found = there_and_back(codec, tensor)
    plain = unpacked(packed(tensor))
    assert (found.dtype, found.shape, found.stride()) == (plain.dtype, plain.shape, plain.stride())
    flat = np.frombuffer(packed(tensor).data, np.float32)
    limit = np.abs(flat)
    if codec == "int8":
        groups = np.concatenate([limit, np.zeros(-len(flat) % GROUP, np.float32)]).reshape(-1, GROUP)
        limit = np.repeat(groups.max(axis=1, initial=0.0), GROUP)[: len(flat)]
    error = np.abs(np.frombuffer(packed(found).data, np.float32) - flat)
    assert (error <= limit * RELATIVE[codec] * (1 + 1e-5) + (3e-8 if codec == "fp16" else 0.0)).all()


@pytest.mark.parametrize("codec", LOSSY)
def test_what_has_been_compressed_once_loses_nothing_more(codec: str) -> None:
    """A tensor that goes on from stage to stage is as good at the last one as at the first."""
    once = there_and_back(codec, shapes()["rows"])
    assert torch.allclose(there_and_back(codec, once), once, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_stays_none(codec: str, wrong: float) -> None:
    """So that the step ends with `NotANumber`; in int8 its group is lost with it, and no other."""
    tensor = torch.ones(2 * GROUP)
    tensor[3] = wrong
    found = there_and_back(codec, tensor)
    assert not found[3].isfinite()
    assert torch.equal(found[GROUP:], tensor[GROUP:])


def test_beyond_the_largest_of_fp16_is_the_largest() -> None:
    assert there_and_back("fp16", torch.tensor([1e6, -1e6])).tolist() == [65504.0, -65504.0]
    assert there_and_back("bf16", torch.tensor([3.4e38])).isfinite().all()


def test_a_mask_takes_nothing_from_the_scores_beside_it() -> None:
    """Scores of attention, cut where the mask has been added: the least number of fp32 stays what it is."""
    scores = torch.linspace(-4, 4, GROUP)
    scores[::3] = torch.finfo(torch.float32).min
    found = there_and_back("int8", scores)
    assert (found[::3] == LEAST).all()
    left = torch.arange(GROUP) % 3 != 0
    assert (found - scores)[left].abs().max() <= 4 / 254 * (1 + 1e-5)


@pytest.mark.parametrize("codec", LOSSY)
def test_bytes_are_as_the_planner_thinks(codec: str) -> None:
    tensor = packed(torch.randn(8, 32, 64))
    sent = encoded(codec, "x", tensor)
    assert sum(len(each.data) for each in sent.values()) == SHARES[codec] * len(tensor.data)


def lies() -> dict[str, tuple[str, dict[str, Array]]]:
    own = packed(torch.ones(2, GROUP))
    int8 = encoded("int8", "x", own)
    one = Array(dtype="float32", shape=(2,), order=(0,), expanded=(True,), data=bytes(4))
    return {
        "not compressed": ("int8", {"x": own}),
        "another codec": ("int8", encoded("fp16", "x", own)),
        "fp16 as bf16": ("bf16", encoded("fp16", "x", own)),
        "no scales": ("int8", {"x": int8["x"]}),
        "fewer scales": ("int8", {**int8, "x" + SCALES: packed(torch.ones(1))}),
        "scales of another kind": ("int8", {**int8, "x" + SCALES: packed(torch.ones(2, dtype=torch.float64))}),
        "another shape": ("int8", encoded("int8", "x", packed(torch.ones(GROUP, 2)))),
        "expanded scales": ("int8", {**int8, "x" + SCALES: one}),
    }


@pytest.mark.parametrize("lie", lies())
def test_what_is_not_as_was_agreed_is_refused(lie: str) -> None:
    codec, sent = lies()[lie]
    with pytest.raises(ValueError, match="was agreed"):
        decoded(codec, "x", sent, (2, GROUP))


# --- a job ---


def together(
    compress: str,
    steps: int,
    *,
    count: int = 3,
    stages: int = 3,
    reserve: int = 0,
    mem: float = 0.0,
    planes: tuple[str, ...] = (),
    watch: Callable[[Local, str, str, int], None] | None = None,
    slow: dict[int, float] | None = None,
    family: str = "llama",
    pins: tuple[int, int] = (0, 0),
    **more: object,
) -> Local:
    """`slow`: lines out of those that have another, in Mbit/s; `pins`: private operators, for p0, p1 and p2 alone."""
    own = job(family)
    work = dataclasses.replace(own.work, compress=compress, private=pins)
    local = Local(
        Coordinator(dataclasses.replace(own, work=work, reserve=reserve), training(family, steps, **more)), watch
    )
    for at, each in enumerate(machines(mem or mem_gib(family, stages), count)):
        plane = planes[at] if planes else "torch"
        up = (slow or {}).get(at, 1e6)
        machine = dataclasses.replace(each, up_mbit=up, down_mbit=1e6, plane=plane, trusted=not any(pins) or at < 3)
        local.join(machine, plane_of(plane))
    return local


def boundary_bytes(local: Local) -> dict[str, int]:
    """Of what goes ahead and back, as it is run: tensors alone."""
    sent = {"ahead": 0, "back": 0}

    def carry(to: str, data: bytes) -> list[bytes]:
        kind = header(data)["kind"]
        if kind in sent and to != "broker":
            sent[kind] += sum(len(each.data) for each in decode(data).tensors.values())
        return [data]

    local.carry = carry
    local.run()
    return sent


def test_fewer_bytes_are_really_sent() -> None:
    plain = boundary_bytes(together("none", 2))
    for codec, share in (("fp16", 0.5), ("int8", SHARES["int8"])):
        found = boundary_bytes(together(codec, 2))
        assert min(plain.values()) > 0
        for kind, nbytes in plain.items():
            assert found[kind] == pytest.approx(share * nbytes, rel=0.02)


LEARNS: dict[str, Any] = {"data": lambda step: training("llama", 1).data(1 + step % 2), "rate": lambda step: 3e-3}


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_the_loss_is_within_two_percent_of_the_dense_one(codec: str) -> None:
    """Its embeddings are tied over the cuts, so that sums of gradients go compressed, too."""
    dense, lossy = (together(each, 35, stages=2, count=2, **LEARNS) for each in ("none", codec))
    for each in (dense, lossy):
        each.run()
    first, *_, last = (each.loss for each in dense.coordinator.updates.values())
    assert last < 0.6 * first
    ours = [each.loss for each in lossy.coordinator.updates.values()]
    assert ours[-1] == pytest.approx(last, rel=0.02)
    assert losses(lossy) != losses(dense)


@pytest.mark.slow
def test_torch_and_onnx_learn_behind_one_codec() -> None:
    """Neither knows of the other's arithmetic, and both round alike."""
    how: dict[str, Any] = {"count": 2, "stages": 2, "exports": Exports(training("llama", 1).rules), **LEARNS}
    mixed, alone = together("int8", 20, planes=("torch", "onnx"), **how), together("int8", 20, **how)
    for each in (mixed, alone):
        each.run()
    ours, theirs = ([each.loss for each in one.coordinator.updates.values()] for one in (mixed, alone))
    assert ours[-1] < 0.85 * ours[0]
    assert ours == pytest.approx(theirs, rel=0.01)


class Kill:
    """The owner of a stage, once, in step `step`."""

    def __init__(self, stage: int, step: int) -> None:
        self.stage, self.step, self.name = stage, step, ""

    def __call__(self, local: Local, name: str, what: str, step: int) -> None:
        own = local.coordinator
        if not self.name and step == self.step and what == "work" and own.state.owners:
            self.name = own.owners[self.stage]
            local.kill(self.name)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("stage", [0, 1])
def test_a_kill_changes_no_bit_behind_a_codec(stage: int, every: int) -> None:
    """The stage is taken over from a copy, or computed again from what its neighbours had sent it, compressed."""
    quiet = together("int8", STEPS, count=3, stages=2, reserve=1)
    quiet.run()
    kill = Kill(stage, 5)
    hit = together("int8", STEPS, count=3, stages=2, reserve=1, watch=kill, copy_every=every)
    hit.run()
    assert kill.name
    assert losses(hit) == losses(quiet)
    assert losses(hit) != undisturbed("llama", STEPS)
    for name, array in quiet.coordinator.trained.items():
        assert hit.coordinator.trained[name] == array, name


@pytest.mark.parametrize("seed", [0, *(pytest.param(each, marks=pytest.mark.slow) for each in range(1, 5))])
def test_nor_does_whatever_else_happens_to_one(seed: int) -> None:
    """At any moment; a spare has the stage then, and the model is cut as it was."""
    quiet, storm = together("int8", STEPS, count=3, stages=2, reserve=1), Storm(seed, STEPS, least=2, most=1)
    hit = together("int8", STEPS, count=3, stages=2, reserve=1, watch=storm, copy_every=2)
    for each in (quiet, hit):
        each.run()
    assert storm.happened
    assert losses(hit) == losses(quiet), storm.happened


def test_a_frame_with_another_codec_than_was_agreed_is_refused_and_counted() -> None:
    """The step waits for the right one: all begin it again."""
    local, done = together("int8", STEPS), []

    def carry(to: str, data: bytes) -> list[bytes]:
        head = header(data)
        if head["kind"] != "ahead" or head["step"] != 3 or done:
            return [data]
        done.append(to)
        frame, plain = decode(data), {}
        for name in (each for each in frame.tensors if not each.endswith(SCALES)):
            plain[name] = decoded("int8", name, frame.tensors, frame.tensors[name].shape)
        return [encode(dataclasses.replace(frame, tensors=plain))]

    local.carry = carry
    local.run()
    assert done
    refused = [each for one in local.providers.values() for each in one.counters.refusals]
    assert any("int8" in each and "was agreed" in each for each in refused), refused
    assert local.coordinator.restarts.astray == 1
    quiet = together("int8", STEPS)
    quiet.run()
    assert losses(local) == losses(quiet)


def test_a_codec_that_there_is_none_of_is_refused() -> None:
    with pytest.raises(ValueError, match="codec zip: must be one of none, fp16, bf16, int8"):
        Codecs.of_json({"ahead": ["zip"], "back": ["none"]})


# --- each line its own ---


def test_fast_lines_are_left_alone_and_slow_ones_compressed_the_more() -> None:
    """One stage after another sends over a line that is fast, slow, and slower yet; each direction by itself."""
    own = Chain(
        names=("a", "b", "c", "d"), work=np.full(4, 1e9), weights=np.ones(4), saved=np.ones(4),
        ahead=np.array([0, 1e6, 1e6, 1e6, 0]), back=np.array([0, 1e6, 1e6, 1e6, 0]),
    )  # fmt: skip
    mbit = (1000.0, 100.0, 20.0, 1000.0)
    fleet = Fleet(
        providers=tuple(
            Provider(name=f"p{at}", tflops=0.01, efficiency=1.0, mem_gib=1, up_mbit=each, down_mbit=1000)
            for at, each in enumerate(mbit)
        )
    )
    work = Workload(micro_batches=4, compress="adaptive")
    costs, cuts = Costs(own, fleet, work), (0, 1, 2, 3, 4)
    found = Codecs.of(costs, range(4), cuts)
    # forward 100 ms and backward 200 ms; a message of 1 MB takes 8, 80, 400 and 8 ms
    assert found == Codecs(ahead=("none", "none", "int8", "none"), back=("none", "none", "bf16", "none"))
    slower = Fleet(providers=tuple(dataclasses.replace(each, up_mbit=each.up_mbit / 2) for each in fleet.providers))
    assert Codecs.of(Costs(own, slower, work), range(4), cuts).ahead == ("none", "bf16", "int8", "none")
    ahead, back, _ = costs.line_s(range(4), cuts)
    assert ahead == pytest.approx([0.008, 0.08, 0.4 * SHARES["int8"]])
    assert back == pytest.approx([0.08, 0.2, 0.008])


@pytest.mark.parametrize("compress", ["fp16", "int8", "adaptive"])
def test_plans_know_what_is_sent(compress: str) -> None:
    """Behind thin lines a step is shorter, by plan and by the simulator's events, and by no more than the bytes are."""
    own = chain(traced("llama").graph)
    fleet = Fleet(providers=tuple(dataclasses.replace(each, up_mbit=0.5) for each in machines(mem_gib("llama", 3), 3)))
    plain, lossy = Workload(micro_batches=4, most=1), Workload(micro_batches=4, most=1, compress=compress)
    dense, found = plan(own, fleet, plain), plan(own, fleet, lossy)

    def played(work: Workload, pipeline: Pipeline) -> float:
        timing = schedule.Timing.of(Costs(own, fleet, work), pipeline)
        return schedule.ends_s(schedule.run(timing, work.schedule, work.micro_batches))

    least = compression.strongest(compress)
    assert least * dense.score.step_s * 0.99 <= found.score.step_s <= 1.1 * least * dense.score.step_s
    assert played(lossy, found.pipelines[0]) == pytest.approx(found.score.step_s, rel=0.05)
    assert played(lossy, found.pipelines[0]) < played(plain, dense.pipelines[0])


def test_memory_is_that_of_tensors_as_they_were() -> None:
    """What has come is kept as it was before it was compressed."""
    own, fleet = chain(traced("llama").graph), Fleet(providers=tuple(machines(1.0, 2)))
    plain, lossy = (Costs(own, fleet, Workload(micro_batches=4, compress=each)) for each in ("none", "int8"))
    middle = own.count // 2
    assert lossy.device_bytes(middle, own.count, 3) == plain.device_bytes(middle, own.count, 3)


def test_masks_and_positions_are_no_hidden_states() -> None:
    """Nor are what frozen weights give anything else: of generation all weights are."""
    for graph in (traced("bert").graph, trace_decoder(model("llama"), 2, 24, chosen=True).graph):
        shapes = {node.values[0].shape for node in graph.operators if node.name in graph.hidden}
        assert not any(node.target.startswith("aten.cos") for node in graph.operators if node.name in graph.hidden)
        assert any(shape[-1] == 32 for shape in shapes if shape)
        wheres = [node for node in graph.operators if node.target.startswith("aten.where")]
        assert wheres
        assert not {node.name for node in wheres} & graph.hidden


def test_a_slower_one_takes_over_and_its_line_is_compressed_from_then_on() -> None:
    """Codecs are agreed anew with the plan; steps before are computed again as they were sent."""
    kill = Kill(0, 4)
    local = together("adaptive", 8, count=3, stages=2, reserve=1, watch=kill, slow={0: 0.05}, copy_every=3)
    before: list[Codecs] = []

    def look(own: Local, name: str, what: str, step: int) -> None:
        if own.coordinator.recovery.where.cutting is not None and not before and own.coordinator.state.step == 2:
            before.append(own.coordinator.recovery.where.cutting.codecs)
        kill(own, name, what, step)

    local.watch = look
    local.run()
    cutting = local.coordinator.recovery.where.cutting
    assert cutting is not None
    assert set(before[0].ahead + before[0].back) == {"none"}
    slow = local.coordinator.owners.index("p0")
    mine = cutting.codecs.ahead[slow], cutting.codecs.back[slow]
    assert "int8" in mine
    assert losses(local)[:4] == undisturbed("llama", 4)
    for found, expected in zip(losses(local)[4:], undisturbed("llama", 8)[4:], strict=True):
        assert found == pytest.approx(expected, rel=0.02)
        assert found != expected


# --- noise ---


def pinned() -> tuple[int, int]:
    return owner.pins(chain(traced("llama").graph), [1, 1])


def test_noise_is_what_the_attack_means_by_it() -> None:
    """Of a tensor's own standard deviation; the same again for a step, micro-batch and name, and for no other."""
    hidden = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * 3 + 1
    own, rules = Noise(share=0.5, key=7), Rules(micro_batches=4)
    found = unpacked(own.added(packed(hidden), rules, 3, 1, "x"))
    theirs = noisy(hidden, 0.5, 0)
    assert (found - hidden).std() == pytest.approx(float((theirs - hidden).std()), rel=0.02)
    assert abs(float((found - hidden).mean())) < 0.02
    assert torch.equal(unpacked(own.added(packed(hidden), rules, 3, 1, "x")), found)
    for other in ((4, 1, "x"), (3, 2, "x"), (3, 1, "y")):
        assert not torch.equal(unpacked(own.added(packed(hidden), rules, *other)), found)
    assert not torch.equal(unpacked(dataclasses.replace(own, key=8).added(packed(hidden), rules, 3, 1, "x")), found)
    assert not unpacked(own.added(packed(torch.full((2, 2), torch.nan)), rules, 3, 1, "x")).isfinite().any()


def test_a_kill_changes_no_bit_behind_noise_and_a_codec() -> None:
    """The private stage's owner is killed; who takes it over, trusted as well, draws the same."""
    how: dict[str, Any] = {"count": 4, "reserve": 1, "mem": 0.8 * mem_gib("llama", 2), "pins": pinned()}
    own = Noise(share=0.3, key=5)
    quiet, plain, kill = together("int8", STEPS, noise=own, **how), together("int8", STEPS, **how), Kill(0, 5)
    hit = together("int8", STEPS, watch=kill, copy_every=3, noise=own, **how)
    for each in (quiet, hit, plain):
        each.run()
    assert kill.name
    assert losses(hit) == losses(quiet)
    assert losses(plain) != losses(quiet)
    assert losses(plain)[0] == pytest.approx(losses(quiet)[0], rel=0.1)


def test_the_key_is_told_to_those_alone_who_have_a_private_stage() -> None:
    own = Noise(share=0.3, key=0x1234567890ABCDEF1234567890ABCDEF)
    local, told = together("none", 3, count=4, mem=mem_gib("llama", 2), pins=pinned(), noise=own), dict[str, bool]()

    def carry(to: str, data: bytes) -> list[bytes]:
        told[to] = told.get(to, False) or str(own.key).encode() in data
        return [data]

    local.carry = carry
    local.run()
    assert any(told.values())
    trusted = {each.name for each in local.coordinator.state.providers if each.trusted}
    assert {name for name, has in told.items() if has} <= trusted
    assert set(told) - trusted - {"broker"}


def test_a_key_is_kept_for_a_broker_that_is_begun_again(tmp_path: Path) -> None:
    assert noise.of(0.0, tmp_path) is None
    first, again = noise.of(0.5, tmp_path), noise.of(0.5, tmp_path)
    assert first == again
    assert (tmp_path / noise.FILE).stat().st_mode & 0o077 == 0


def test_noise_without_anything_private_is_a_mistake() -> None:
    with pytest.raises(ValueError, match=r"task\.noise=0\.5: needs task\.private"):
        schema.DecentralTrain(noise=0.5)
    with pytest.raises(ValueError, match=r"task\.compress=zip: must be one of none, fp16, bf16, int8, adaptive"):
        schema.DecentralGenerate(compress="zip")


def test_codecs_need_no_torch() -> None:
    """A provider may have none."""
    code = "import sys; sys.modules['torch'] = None; from llmsys.decentral import provider, codecs, noise, packing"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
