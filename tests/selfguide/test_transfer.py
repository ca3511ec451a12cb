"""Arrays on their way to the device."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from selfguide.data.transfer import on_device


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float16, np.float32])
def test_an_array_on_the_cpu_keeps_its_memory_and_its_type(dtype: type) -> None:
    array = np.arange(6, dtype=dtype).reshape(2, 3)
    moved = on_device(array, "cpu")
    array[0, 0] = 5
    assert moved.shape == (2, 3) and moved[0, 0] == 5
    assert moved.numpy().dtype == array.dtype


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_an_array_on_a_gpu_is_whole_though_nobody_waited_for_it() -> None:
    arrays = [np.full((1024, 1024), index, dtype=np.float32) for index in range(16)]
    moved = [on_device(array, "cuda") for array in arrays]
    assert [each.mean().item() for each in moved] == list(range(16))
