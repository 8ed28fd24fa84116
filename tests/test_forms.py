"""Forms and positives by name, as functions, and as text in hyper-parameters."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mlssl.forms import (
    by_overlap,
    form_of,
    gated,
    log_of_sum,
    mean_of_logs,
    plain_setting,
    positives_of,
    same_image,
)


def own_form(logits: Tensor, weights: Tensor) -> Tensor:
    return mean_of_logs(logits, weights)


class OwnPositives:
    def __call__(self, cosines: Tensor, same_image: Tensor, *boxes: Tensor | None) -> Tensor:
        return cosines


def test_a_form_is_named_or_given() -> None:
    assert form_of("log_of_sum") is log_of_sum
    assert form_of("mean_of_logs") is mean_of_logs
    assert form_of(own_form) is own_form


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("same_image", same_image),
        ("gated(0.3)", gated(0.3)),
        ("gated( -1 )", gated(-1.0)),
        ("gated(1e-2)", gated(0.01)),
        ("by_overlap(1.0)", by_overlap(1.0)),
        ("by_overlap(0)", by_overlap(0)),
    ],
)
def test_positives_are_named_or_given(text: str, meant: Any) -> None:
    assert positives_of(text) == meant
    assert positives_of(meant) is meant


@pytest.mark.parametrize("value", [log_of_sum, mean_of_logs])
def test_the_text_of_a_form_gives_the_form_back(value: Any) -> None:
    assert form_of(plain_setting(value)) is value


@pytest.mark.parametrize("value", [same_image, gated(0.3), gated(1e-12), by_overlap(2.5)])
def test_the_text_of_positives_gives_the_positives_back(value: Any) -> None:
    assert positives_of(plain_setting(value)) == value
    assert plain_setting(plain_setting(value)) == plain_setting(value)


@pytest.mark.parametrize(
    ("value", "path"),
    [
        (own_form, f"{__name__}.own_form"),
        (OwnPositives(), f"{__name__}.OwnPositives"),
        (functools.partial(own_form), "functools.partial"),
    ],
)
@pytest.mark.parametrize(("argument", "of"), [("form", form_of), ("positives", positives_of)])
def test_the_text_of_a_custom_function_is_its_import_path_and_never_imported(
    value: Any, path: str, argument: str, of: Callable[..., Any]
) -> None:
    assert plain_setting(value) == f"custom {path}"
    message = rf"import path of the {argument} '{path}', which is never imported: pass the function again, "
    with pytest.raises(ValueError, match=message + rf"load_from_checkpoint\(path, {argument}=…\)"):
        of(plain_setting(value))


def test_positives_can_be_copied_and_sent_to_another_process() -> None:
    for positives in (gated(0.3), by_overlap(1.0)):
        assert pickle.loads(pickle.dumps(positives)) == copy.deepcopy(positives) == positives


@pytest.mark.parametrize(
    ("of", "value", "message"),
    [
        (form_of, "log_of_sums", "form='log_of_sums' is unknown: did you mean 'log_of_sum'"),
        (form_of, "gated(0.3)", "form='gated.0.3.' is unknown: Pass 'log_of_sum', 'mean_of_logs', or a function"),
        (form_of, "my_package.my_form", "form='my_package.my_form' is unknown"),
        (positives_of, "gate(0.3)", r"positives='gate\(0.3\)' is unknown: did you mean 'gated\(0.3\)'"),
        (positives_of, "gated", r"positives='gated' is unknown: did you mean 'gated\(0.3\)'"),
        (positives_of, "gated(high)", r"positives='gated\(high\)' is unknown"),
        (positives_of, "by_overlap(1.0) ", r"did you mean 'by_overlap\(1.0\)'"),
        (positives_of, "__import__('os').getcwd()", "is unknown: Pass 'same_image'"),
        (positives_of, "gated(2)", r"gated\(2.0\) was given: pass a cosine in -1–1"),
        (positives_of, "gated(nan)", r"gated\(nan\) was given"),
        (positives_of, "by_overlap(-1)", r"by_overlap\(-1.0\) was given: pass a power of at least 0"),
        (positives_of, "by_overlap(inf)", r"by_overlap\(inf\) was given"),
        (positives_of, "by_overlap(nan)", r"by_overlap\(nan\) was given"),
    ],
)
def test_unknown_names_and_numbers_out_of_range_are_refused(of: Callable[[str], Any], value: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        of(value)


@pytest.mark.parametrize(("argument", "of"), [("form", form_of), ("positives", positives_of)])
def test_neither_a_name_nor_a_function_is_refused(argument: str, of: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match=f"{argument}=0.3 was given: pass a name or a function"):
        of(0.3)


@pytest.mark.parametrize("form", [log_of_sum, mean_of_logs])
def test_autograd_gives_the_gradient_of_a_form(form: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(4, 6, generator=generator, dtype=torch.float64) * torch.tensor([1, 0, 1, 0, 0, 1])
    torch.autograd.gradcheck(lambda values: form(values, weights), logits)


def test_only_relative_weights_matter_in_an_averaging_form() -> None:
    logits, weights = torch.randn(3, 5), torch.tensor([[1.0, 2.0, 0.0, 0.0, 0.0]]).expand(3, 5)
    torch.testing.assert_close(mean_of_logs(logits, 7 * weights), mean_of_logs(logits, weights))
