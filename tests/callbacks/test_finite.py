"""Steps with a gradient that is not finite: the run ends, or continues without the step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch

from mlssl.callbacks import CollapseMonitor, FiniteSteps, OnlineLinearProbe

Make = Callable[..., Any]


class Poison(L.Callback):
    """Make the gradient, or everything from the input on, NaN at some steps; record the weights before each."""

    def __init__(self, *steps: int, value: float = torch.nan, forward: bool = False) -> None:
        self.steps, self.value, self.forward = steps, value, forward
        self.states: list[dict[str, torch.Tensor]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.states.append({name: value.clone() for name, value in pl_module.state_dict().items()})
        self.mean = pl_module.pixel_mean.clone()
        if self.forward and trainer.global_step in self.steps:
            pl_module.pixel_mean.fill_(self.value)

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if self.forward:
            pl_module.pixel_mean.copy_(self.mean)
        elif trainer.global_step in self.steps:
            next(pl_module.projector.parameters()).grad[0, 0] = self.value


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_it_stops_with_step_rank_and_images(
    value: float, make_model: Make, make_data: Make, make_trainer: Make
) -> None:
    message = r"the gradient of step 5 \(epoch 1\) is not finite on rank 0, with the images \[\d+(, \d+){3}\]; 0 steps"
    with pytest.raises(FloatingPointError, match=message):
        make_trainer(FiniteSteps(), Poison(5, value=value)).fit(make_model(), make_data())


@pytest.mark.filterwarnings("ignore:Skipped. the gradient of step 5")
@pytest.mark.parametrize("forward", [False, True])
def test_a_skipped_step_leaves_weights_and_statistics_as_they_were(
    forward: bool, make_model: Make, make_data: Make, make_trainer: Make
) -> None:
    poison, model, probe = Poison(2, 5, forward=forward), make_model(), OnlineLinearProbe()
    with pytest.warns(match=r"Skipped: the gradient of step 2 .* 1 more may be skipped"):
        make_trainer(FiniteSteps(2), poison, CollapseMonitor(), probe).fit(model, make_data())
    for step in range(7):
        before, after = poison.states[step], poison.states[step + 1]
        same = [name for name, value in before.items() if torch.equal(value, after[name])]
        if step in (2, 5):
            assert same == list(before)
        else:
            assert not {name for name, _ in model.named_parameters()} & set(same)
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert all(value.isfinite().all() for value in probe.state_dict().values() if isinstance(value, torch.Tensor))


@pytest.mark.filterwarnings("ignore:Skipped")
def test_one_more_skip_than_allowed_stops_also_after_a_resume(
    make_model: Make, make_data: Make, make_trainer: Make, tmp_path: Any
) -> None:
    first = make_trainer(FiniteSteps(1), Poison(1), max_epochs=1)
    first.fit(make_model(), make_data())
    first.save_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(FloatingPointError, match=r"the gradient of step 6 .* 1 steps were skipped before"):
        make_trainer(FiniteSteps(1), Poison(6)).fit(
            make_model(), make_data(), ckpt_path=tmp_path / "one.ckpt", weights_only=True
        )


def test_every_image_of_accumulated_batches_is_named(make_model: Make, make_data: Make, make_trainer: Make) -> None:
    with pytest.raises(FloatingPointError, match=r"gradient of step 1 .* with the images \[\d+(, \d+){7}\]"):
        make_trainer(FiniteSteps(), Poison(1), accumulate_grad_batches=2).fit(make_model(), make_data())


def test_a_negative_number_of_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="max_skipped=-1 was given: pass a number of steps, at least 0"):
        FiniteSteps(-1)
