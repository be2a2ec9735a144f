"""Merged weights in memory that XLA reads in place, one buffer a thread."""

import threading

import jax
import numpy as np

from jdetune.staging import ALIGNMENT, Staging


def test_arrays_lie_side_by_side_and_xla_reads_them_in_place():
    rng = np.random.default_rng(0)
    stacks = [rng.standard_normal((3, 16, 8)).astype(np.float32) for _ in range(2)]
    found = Staging().fill(stacks)
    np.testing.assert_array_equal(found, np.stack(stacks))
    assert found.ctypes.data % ALIGNMENT == 0
    here = jax.device_put(found, jax.devices("cpu")[0])
    assert here.unsafe_buffer_pointer() == found.ctypes.data


def test_memory_is_used_again_by_its_thread_only():
    staging, stack = Staging(), np.ones((3, 16, 8), np.float32)
    first = staging.fill([stack])
    assert staging.fill([2 * stack]).ctypes.data == first.ctypes.data
    others = []
    thread = threading.Thread(target=lambda: others.append(staging.fill([stack])))
    thread.start()
    thread.join()
    assert others[0].ctypes.data != first.ctypes.data
    assert (first == 2).all()
    assert staging.fill([stack[:, :4]]).shape == (1, 3, 4, 8)
