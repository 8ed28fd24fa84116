"""The blur kernel has the sampled standard deviation."""

from __future__ import annotations

import numpy as np
import pytest

from mlssl.views.blurring import gaussian_kernel


@pytest.mark.parametrize("sigma", [0.03, 0.1, 0.3, 0.5, 0.59, 0.6, 0.7, 1.0, 2.0, 5.0])
def test_weights_add_up_to_one_and_have_the_variance(sigma: float) -> None:
    kernel = gaussian_kernel(sigma)
    offsets = np.arange(len(kernel)) - len(kernel) // 2
    assert kernel.sum() == pytest.approx(1)
    assert kernel @ offsets**2 == pytest.approx(sigma**2, rel=0.025)
    np.testing.assert_array_equal(kernel, kernel[::-1])
    assert (kernel > 0).all()
    assert kernel.argmax() == len(kernel) // 2
