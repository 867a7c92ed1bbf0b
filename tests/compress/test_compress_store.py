"""A saved state: on another number of ranks, of another method or width, and files that are not what they should be."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors
import torch
from simulated import SHAPES, Ranks, distance, random_grads

from llmsys.compress import CompressConfig, load_state, save_state
from llmsys.compress.state import CompressionState

CONFIG = CompressConfig(r=2, density=0.1, min_rate=1)


def trained(config: CompressConfig = CONFIG, world: int = 2, steps: int = 3) -> Ranks:
    ranks = Ranks(config, world)
    for step in range(steps):
        ranks.step(random_grads(world, step))
    return ranks


def saved(ranks: Ranks, folder: Path) -> Path:
    for state in ranks.states:
        save_state(state, folder)
    return folder


@pytest.mark.parametrize("method", ["powersgd", "acpsgd", "randomk"])
@pytest.mark.parametrize("world", [1, 3, 4])
def test_another_number_of_ranks_keeps_the_averaged_trajectory(method: str, world: int, tmp_path: Path) -> None:
    """Exactly, for linear methods, whatever the new ranks' shares of the same mean gradient are."""
    config = CompressConfig(method=method, r=2, density=0.1, min_rate=1)
    before = trained(config)
    saved(before, tmp_path)
    after = Ranks(config, world)
    for state in after.states:
        load_state(state, tmp_path)
        assert state.step == 3
    for step in range(3, 8):
        grads = random_grads(world, step)
        mean = {name: sum(rank[name] for rank in grads) / world for name in SHAPES}
        assert distance(after.step(grads), before.step([mean, mean])[0]) < 1e-11


@pytest.mark.parametrize("method", ["topk", "efsign"])
def test_the_others_keep_the_sum_of_errors(method: str, tmp_path: Path) -> None:
    config = CompressConfig(method=method, density=0.1)
    saved(trained(config), tmp_path)
    after = Ranks(config, 3)
    for state in after.states:
        load_state(state, tmp_path)
    mean = sum(trained(config).errors("a")) / 2
    torch.testing.assert_close(sum(after.errors("a")) / 3, mean)


def test_a_step_that_was_left_out_is_settled_before_it_is_saved(tmp_path: Path) -> None:
    straight, other = trained(), trained()
    bad = random_grads(2, 3)
    bad[0]["a"][0, 0] = float("nan")
    straight.step(bad)
    other.step(bad)
    saved(other, tmp_path)
    after = Ranks(CONFIG, 2)
    for state in after.states:
        load_state(state, tmp_path)
    grads = random_grads(2, 4)
    assert distance(after.step(grads), straight.step(grads)[0]) == 0.0


@pytest.mark.parametrize(("before", "after"), [(2.0**16, None), (None, 2.0**16), (2.0**16, 2.0**10)])
def test_errors_follow_the_loss_scale_over_a_resume(before: float | None, after: float | None, tmp_path: Path) -> None:
    """Also where a run goes on with a scaler that had none, or without; what comes out is as large as its gradients."""

    def scaled(ranks: Ranks, scale: float | None) -> Ranks:
        for state in ranks.states:
            state.loss_scale = None if scale is None else lambda: scale
        return ranks

    def times(step: int, factor: float) -> list[dict[str, torch.Tensor]]:
        return [{name: g * factor for name, g in rank.items()} for rank in random_grads(2, step)]

    plain, first = Ranks(CONFIG, 2), scaled(Ranks(CONFIG, 2), before)
    second = scaled(Ranks(CONFIG, 2), after)
    for step in range(3):
        plain.step(times(step, 1.0))
        first.step(times(step, before or 1.0))
    saved(first, tmp_path)
    for state in second.states:
        load_state(state, tmp_path)
    wanted = {name: g * (after or 1.0) for name, g in plain.step(times(3, 1.0))[0].items()}
    assert distance(second.step(times(3, after or 1.0)), wanted) < 1e-12 * (after or 1.0)


@pytest.mark.parametrize("r", [1, 4])
def test_another_r_keeps_directions_and_errors(r: int, tmp_path: Path) -> None:
    before = trained()
    saved(before, tmp_path)
    after = Ranks(CompressConfig(r=r, min_rate=1), 2)
    for state in after.states:
        load_state(state, tmp_path)
    error = before.errors("a")[0].clone()
    assert torch.equal(after.errors("a")[0], error)
    after.step(random_grads(2, 3))
    p = after.states[0].memory("a").p
    assert p is not None
    assert len(p) == r


def test_another_method_goes_on_with_the_errors(tmp_path: Path) -> None:
    before = trained(CompressConfig(method="topk", density=0.1))
    saved(before, tmp_path)
    after = Ranks(CONFIG, 2)
    for state in after.states:
        load_state(state, tmp_path)
    assert torch.equal(after.errors("a")[1], before.errors("a")[1])
    after.step(random_grads(2, 3))


@pytest.mark.parametrize(
    "settings",
    [
        *({"method": method} for method in ("none", "fp16", "bf16")),
        *({"method": method, "skip": ["d"]} for method in ("topk", "randomk", "efsign", "powersgd", "acpsgd")),
        {"r": 9},
    ],
    ids=str,
)
def test_errors_of_what_travels_whole_from_now_on_travel_with_it(settings: dict[str, Any], tmp_path: Path) -> None:
    """Once, in the next step that is not left out, and are kept no longer; of a matrix of 40 x 8."""
    before = trained()
    saved(before, tmp_path)
    after = Ranks(CompressConfig(**{"r": 2, "density": 0.1, "min_rate": 1, **settings}), 2)
    for state in after.states:
        load_state(state, tmp_path)
    bad = random_grads(2, 3)
    bad[1]["d"][0, 0] = torch.inf
    after.step(bad)
    kept = sum(before.errors("d")) / 2
    within = {"fp16": 1e-2, "bf16": 1e-1}.get(after.states[0].config.method, 1e-12)
    for step in (4, 5):
        grads = random_grads(2, step)
        (found, _) = after.step(grads)
        torch.testing.assert_close(found["d"], (grads[0]["d"] + grads[1]["d"]) / 2 + kept, rtol=0, atol=within)
        kept = torch.zeros(())
    for state in after.states:
        assert "d/error" not in state.tensors()


@pytest.mark.parametrize("method", ["sign", "topk"])
def test_errors_are_used_up_where_none_are_kept_any_more(method: str, tmp_path: Path) -> None:
    """As if the next gradient were larger by them: Sign-SGD votes with it, and Top-k without error feedback leaves out
    of it what it leaves out of any."""
    before = trained()
    saved(before, tmp_path)
    config = CompressConfig(method=method, density=0.1, error_feedback=False)
    after, fresh = Ranks(config, 2), Ranks(config, 2)
    for state, other in zip(after.states, fresh.states, strict=True):
        load_state(state, tmp_path)
        other.step = state.step
    for step in (3, 4):
        grads = random_grads(2, step)
        more = [{name: g.clone() for name, g in rank.items()} for rank in grads]
        for name in ("a", "c", "d") if step == 3 else ():
            for g, error in zip(more, before.errors(name), strict=True):
                g[name] += error
        assert distance(after.step(grads), fresh.step(more)[0]) < 1e-12
    assert not any(key.endswith("/error") for state in after.states for key in state.tensors())


def test_a_compiled_models_state_is_read_by_the_plain_one(tmp_path: Path) -> None:
    """`torch.compile(model)` has other names for its parameters, which states do not; older ones of aggregators do."""
    before = trained()
    wrapped = Ranks(CONFIG, 2, {f"_orig_mod.{name}": shape for name, shape in SHAPES.items()})
    for state, old in zip(wrapped.states, before.states, strict=True):
        assert list(state.shapes) == list(SHAPES)
        state.load([({f"_orig_mod.{key}": t for key, t in s.tensors().items()}, s.plain()) for s in before.states])
        assert state.tensors().keys() == old.tensors().keys()


class Reads:
    """In place of safetensors' `safe_open`: which tensors are read of which file, and the most alive of one moment."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[tuple[str, str]] = []
        self.alive = self.most = 0
        self._open = safetensors.safe_open
        monkeypatch.setattr(safetensors, "safe_open", self.opened)

    @contextlib.contextmanager
    def opened(self, file: Path, framework: str) -> Iterator[Any]:
        with self._open(file, framework) as real:

            def get_tensor(name: str) -> torch.Tensor:
                self.names.append((Path(file).stem, name))
                tensor: torch.Tensor = real.get_tensor(name)
                self.alive += 1
                self.most = max(self.most, self.alive)
                weakref.finalize(tensor, self._freed)
                return tensor

            yield SimpleNamespace(keys=real.keys, metadata=real.metadata, get_tensor=get_tensor)

    def _freed(self) -> None:
        self.alive -= 1


def test_on_as_many_ranks_each_reads_its_own_tensors_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks' are so many copies of the gradients, on every rank: they were read, and dropped."""
    before = trained(world=4)
    saved(before, tmp_path)
    reads, after = Reads(monkeypatch), Ranks(CONFIG, 4)
    load_state(after.states[2], tmp_path)
    kept = before.states[2].tensors()
    assert sorted(reads.names) == sorted(("compress-rank-2", name) for name in kept)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in after.states[2].tensors().items())


def test_on_other_numbers_of_ranks_one_parameter_is_read_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each error every rank's, and no more than one beside the last: forty were there at once."""
    before = trained(world=4)
    saved(before, tmp_path)
    reads, after = Reads(monkeypatch), Ranks(CONFIG, 2)
    load_state(after.states[1], tmp_path)
    errors = [name for _, name in reads.names if name.endswith("/error")]
    assert errors == [name for name in dict.fromkeys(errors) for _ in range(4)]
    assert reads.most <= 3
    mean = torch.stack(before.errors("a")).mean(0)
    torch.testing.assert_close(after.states[1].memory("a").error, mean, rtol=0, atol=1e-14)


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    folder = saved(trained(), tmp_path)
    fresh = Ranks(CONFIG, 2).states[0]
    second = folder / "compress-rank-1.safetensors"
    whole = second.read_bytes()
    save_state(trained(steps=4).states[1], folder)
    with pytest.raises(ValueError, match=r"compress-rank-1.* at step 4, but rank 0's is of 2 at step 3"):
        load_state(fresh, folder)
    second.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"compress-rank-1.safetensors: damaged"):
        load_state(fresh, folder)
    second.unlink()
    with pytest.raises(ValueError, match=r"compress-rank-1.safetensors: there is no such file"):
        load_state(fresh, folder)
    assert not fresh.memories
    assert fresh.step == 0


def test_a_file_of_another_rank_or_run_or_with_a_flipped_bit_is_refused(tmp_path: Path) -> None:
    """Each of them made replicas differ, and nobody was told."""
    folder = saved(trained(), tmp_path)
    fresh = Ranks(CONFIG, 2).states[1]
    first, second = folder / "compress-rank-0.safetensors", folder / "compress-rank-1.safetensors"
    whole = second.read_bytes()
    second.write_bytes(first.read_bytes())
    with pytest.raises(ValueError, match=r"compress-rank-1.safetensors: written by rank 0; they are not of one save"):
        load_state(fresh, folder)
    save_state(trained(CompressConfig(r=2, density=0.1, min_rate=1, seed=1)).states[1], folder)
    with pytest.raises(ValueError, match=r"compress-rank-1.safetensors: its factors are not those of rank 0's"):
        load_state(fresh, folder)
    second.write_bytes(whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:])
    with pytest.raises(ValueError, match=r"compress-rank-1.safetensors: damaged \(\w+/\w+ is not what was written\)"):
        load_state(fresh, folder)
    assert not fresh.memories
    second.write_bytes(whole)
    load_state(fresh, folder)


def test_the_state_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = saved(trained(), tmp_path)
    for named, words in [
        ([("a", torch.empty(12, 10))], "no parameter c"),
        ([(name, torch.empty(3, 3)) for name in SHAPES], r"shape \(3, 3\), in the saved state \(12, 10\)"),
    ]:
        with pytest.raises(ValueError, match=words):
            load_state(CompressionState(CONFIG, named), folder)
    saved(trained(CompressConfig(r=2, min_rate=1, error_feedback=False)), tmp_path / "without errors")
    wider = [(name, torch.empty(*shape, 2)) for name, shape in SHAPES.items()]
    with pytest.raises(ValueError, match=r"a has the shape \(12, 10, 2\), its factor q in the saved state \(2, 10\)"):
        load_state(CompressionState(CONFIG, wider), tmp_path / "without errors")
