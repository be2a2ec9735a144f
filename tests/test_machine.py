"""How many layers at a time: what a budget allows, and what the devices make of it."""

import jax
import pytest

from jdetune import machine


def test_a_layer_at_least_whatever_the_budget():
    assert machine.plan((3, 100, 100), 8, polish=True, max_memory=1).layers >= 1


def test_threads_on_a_single_cpu_device_fit_the_budget(monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    monkeypatch.setattr(machine, "cores", lambda: 8)
    one = 8 * 3 * 100 * 100 * machine.COPIES[False]
    assert machine.plan((3, 100, 100), 20, False, 3 * one).threads == 3
    assert machine.plan((3, 100, 100), 20, False, 100 * one).threads == 8
    assert machine.plan((3, 100, 100), 2, False, 100 * one).threads == 2


def test_accelerators_take_as_many_layers_as_fit(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    one = 8 * 3 * 100 * 100 * machine.COPIES[True]
    sizes = machine.plan((3, 100, 100), 100, True, 2 * one)
    assert (sizes.layers, sizes.devices, sizes.threads) == (16, 8, 1)
    assert machine.plan((3, 100, 100), 3, True, 2 * one).devices == 3


def test_free_memory_is_some():
    assert machine.free_memory() > 2**20
    assert machine.cores() >= 1


@pytest.mark.parametrize("polish", [True, False])
def test_the_default_budget_is_a_share_of_what_is_free(monkeypatch, polish):
    monkeypatch.setattr(machine, "free_memory", lambda: 1000)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert machine.plan((3, 10, 10), 100, polish).layers == 8
