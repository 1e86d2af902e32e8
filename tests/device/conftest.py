from typing import Any

import pytest


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A device that is not this machine's memory, for runs; see `pretend`."""
    from pretend import PLACE, with_device

    from surgery.device import crew, lane
    from surgery.device.choose import Device

    monkeypatch.setattr(crew.Matrices, "apply", with_device(crew.Matrices.apply))
    monkeypatch.setattr(lane.Lane, "send", with_device(lane.Lane.send))
    return Device("pretended", PLACE, "a device that is not there")
