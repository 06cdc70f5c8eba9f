"""Where networks can compute, and what is said of other places."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedcmr_client.devices import on_device
from fedcmr_shared.errors import ConfigurationError


def test_a_network_is_moved_and_set_to_evaluation() -> None:
    network = on_device(nn.Dropout(0.5), "cpu")
    assert not network.training


@pytest.mark.parametrize("device", ["meta", "abacus", "cuda:99", "hpu", ""])
def test_where_nothing_can_be_computed_is_refused(device: str) -> None:
    network = nn.Linear(2, 2)
    with pytest.raises(ConfigurationError, match=f"device '{device}' cannot be used: .*: use cpu"):
        on_device(network, device)
    assert network.weight.device == torch.device("cpu")
