"""Constants that a forward copies to its device; the meta device stands for a GPU here."""

import pytest
import torch

from adapmoe_lab.models.hooks.device_constants import MOST_NUMBERS, DeviceConstants

META = torch.device("meta")


@pytest.fixture
def copies(monkeypatch):
    """Count what is copied and kept."""
    constants = DeviceConstants(META)
    return constants, constants._kept


def test_what_is_copied_is_told_apart_by_its_values_and_by_what_it_becomes(copies):
    constants, kept = copies
    source, place = torch.arange(4.0), torch.empty(1, device=META)
    with constants:
        for _ in range(2):
            source.to(META)
            source.to(device="meta", dtype=torch.bfloat16)
            source.to(place)
            torch.tensor(1.0, device=META)
            torch.tensor([1, 2], device=META)
        assert len(kept) == 5
        source[0] = 7
        assert source.to(META).device == META
        torch.tensor(True, device=META)
    assert len(kept) == 7


def test_nothing_else_is_kept(copies):
    constants, kept = copies
    on_device = torch.empty(3, device=META)
    with constants:
        on_device.to(META)
        on_device.to(torch.float16)
        torch.arange(3.0).to(torch.float16)
        torch.arange(3.0).to("cpu")
        torch.tensor([1.0, 2.0])
        torch.tensor([torch.tensor(1.0)])
        torch.zeros(MOST_NUMBERS + 1).to(META)
        torch.ones(3, requires_grad=True).to(META)
    assert not kept
    torch.tensor(1.0, device=META)
    assert not kept, "it ended"


def test_who_writes_to_a_constant_writes_to_a_copy():
    constants = DeviceConstants(torch.device("cpu"))
    with constants:
        torch.tensor([1.0, 2.0], device="cpu").zero_()
        found = torch.tensor([1.0, 2.0], device="cpu")
    assert found.tolist() == [1, 2]
    assert found.dtype == torch.float32


def test_what_is_first_seen_while_a_step_is_recorded_is_not_kept(monkeypatch, copies):
    constants, kept = copies
    monkeypatch.setattr(
        "adapmoe_lab.models.hooks.device_constants._is_capturing", lambda device: True
    )
    with constants:
        assert torch.tensor(1.0, device=META).device == META
    assert not kept
