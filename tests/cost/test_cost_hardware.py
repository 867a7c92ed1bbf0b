"""The table of devices is its makers': peaks follow from cores and clocks, and every row says where it is from."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmsys import schema
from llmsys.cost import hardware

CONF = Path(__file__).parents[2] / "conf" / "hardware"

CHIPS = {
    # multiprocessors, boost MHz, fp32 lanes and tensor multiply-adds in fp16 (fp32 accumulation) of a multiprocessor
    "rtx2080ti": (68, 1545, 64, 256),
    "rtx3080": (68, 1710, 128, 256),
    "rtx3090": (82, 1695, 128, 256),
    "rtx4090": (128, 2520, 128, 256),
    "a100": (108, 1410, 64, 1024),
    "h100": (132, 1830, 128, 2048),
    "h100_pcie": (114, 1620, 128, 2048),
}


@pytest.mark.parametrize("name", CHIPS)
def test_peaks_are_cores_times_clock(name: str) -> None:
    """Two operations a multiply-add. Dense: with sparsity they would be twice as high."""
    units, mhz, lanes, tensor = CHIPS[name]
    device = hardware.DEVICES[name]
    assert device.tflops["fp16"] == pytest.approx(2 * units * mhz * tensor * 1e-6, rel=0.01)
    if not name.startswith("h100"):  # whose plain cores have another clock than its tensor cores
        assert device.tflops["fp32"] == pytest.approx(2 * units * mhz * lanes * 1e-6, rel=0.01)


@pytest.mark.parametrize("name", hardware.DEVICES)
def test_dtypes_of_one_device_agree_with_each_other(name: str) -> None:
    """On tensor cores bf16 is as fast as fp16, TF32 half of it, int8 at least twice."""
    device = hardware.DEVICES[name]
    peaks = device.tflops
    assert peaks["int8"] >= 1.99 * peaks["fp16"]
    if "bf16" in peaks:
        assert peaks["bf16"] == peaks["fp16"]
        assert peaks["tf32"] == pytest.approx(peaks["fp16"] / 2, rel=0.01)
    if "fp8" in peaks:
        assert peaks["fp8"] == pytest.approx(2 * peaks["bf16"], rel=0.01), "with fp32 accumulation, as bf16 has it"
    assert ("fp8" in peaks) == (name in hardware.FP8)
    assert device.source
    assert device.gbps(10**6) == device.pcie_gbps


def test_same_chip_same_peaks() -> None:
    """H200 is H100 with other memory, A800 is A100 with slower links."""
    devices = hardware.DEVICES
    assert devices["h200"].tflops == devices["h100"].tflops
    assert devices["a800"].tflops == devices["a100"].tflops
    assert devices["a800"].gbps(8) == pytest.approx(devices["a100"].gbps(8) * 400 / 600)


def test_eight_bit_floats_are_adas_and_hoppers() -> None:
    """Compute capability 8.9 and later. An RTX 4090's 660.6 TFLOP/s are with fp16 accumulation; training has fp32."""
    assert set(hardware.FP8) == {"rtx4090", "h100_pcie", "h100", "h200"}
    assert hardware.DEVICES["rtx4090"].tflops["fp8"] == 330.3


@pytest.mark.parametrize("name", hardware.DEVICES)
def test_products_stay_below_the_peak(name: str) -> None:
    device = hardware.DEVICES[name]
    assert all(0.5 < share <= 1 for share in device.products.values())
    assert device.reached("fp8") <= 1
    assert device.sustained == device.products.get("bf16", hardware.SUSTAINED)


def test_a_bridge_joins_two() -> None:
    device = hardware.DEVICES["rtx3090"]
    assert device.gbps(2) == 56.25
    assert device.gbps(8) == hardware.PCIE_4


def test_numbers_replace_what_is_listed() -> None:
    found = hardware.named(schema.Hardware(name="rtx3090", mem_gib=10, tflops=5, gbps=2))
    assert found is not None
    assert (found.mem_gib, found.peak("bf16"), found.peak("fp32"), found.gbps(2)) == (10, 5e12, 5e12, 2)
    assert hardware.named(schema.Hardware()) is None


def test_an_unknown_name_is_refused_with_the_list() -> None:
    with pytest.raises(ValueError, match=r"hardware\.name=rtx309.*rtx4090.*did you mean rtx3090"):
        hardware.named(schema.Hardware(name="rtx309"))


def test_a_precision_that_the_device_has_not_is_refused() -> None:
    with pytest.raises(ValueError, match=r"train\.precision=bf16.*RTX 2080 Ti.*fp16"):
        hardware.DEVICES["rtx2080ti"].peak("bf16")


def test_every_device_can_be_chosen_by_its_name() -> None:
    """`hardware=rtx3090` is a file of that name, which says that name; `rtx3090x8` is eight of it."""
    files = {path.stem: path.read_text() for path in CONF.glob("*.yaml") if path.stem != "auto"}
    single, several = ({n: t for n, t in files.items() if ("\ndevices: " in t) == many} for many in (False, True))
    assert set(single) == set(hardware.DEVICES)
    for name, text in several.items():
        one, _, count = name.removesuffix("_pcie").rpartition("x")
        assert f"[{one}, _self_]\ndevices: {count}\n" in text
        assert hardware.DEVICES[one].title in text.splitlines()[0]
    for name, text in single.items():
        assert text.startswith("# ")
        assert hardware.DEVICES[name].title in text.splitlines()[0]
        assert f"\nname: {name}\n" in text
