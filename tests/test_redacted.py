"""Secrets in a command line are hidden, and other values are not."""

from __future__ import annotations

import pytest

from mlssl.redacted import redacted

WANDB_KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    "words",
    [
        ["--trainer.logger.init_args.api_key", "hunter2"],
        ["--trainer.logger.init_args.api_key=hunter2"],
        ["--trainer.logger.init_args.password=a,hunter2; b"],
        ['--trainer.logger={"class_path": "WandbLogger", "init_args": {"api_key": "hun\\"ter hunter2", "a": 1}}'],
        ["--data.storage_options", "{key: AKIAIOSFODNN7, secret: my hunter2}"],
        ["--data.root", "https://me:hunter2@host/photos"],
        ["--data.root=s3://me:hunter2@bucket/photos"],
        ["--data.root", "https://host/photos?X-Amz-Signature=hunter2&size=1"],
        ["--data.root", "https://host/photos?token=hunter2"],
        ["WANDB_API_KEY=hunter2"],
        ["--anything", f"{WANDB_KEY}"],
        ["--anything", f"prefix {WANDB_KEY} suffix"],
        ["--anything=hf_abcdefghijklmnopqrstuvwx"],
        ["--anything", "ghp_abcdefghijklmnopqrstuvwx"],
        ["--anything", "wandb_v1_abcdefghijklmnopqrstuvwx"],
    ],
)
def test_a_secret_is_hidden(words: list[str]) -> None:
    shown = redacted(["mlssl", "fit", *words])
    assert "***" in shown
    assert not any(secret in shown for secret in ("hunter2", WANDB_KEY, "abcdefghijklmnopqrstuvwx"))


@pytest.mark.parametrize(
    "words",
    [
        ["--data.root", "s3://bucket/photos", "--seed_everything", "3"],
        ["--model.backbone_kwargs.class_token", "true"],
        ["--model.backbone_kwargs={class_token: false, reg_tokens: 4}"],
        ["--trainer.callbacks.monkey=banana", "--data.keys", "a"],
        ["--token", "--other", "x"],
    ],
)
def test_other_values_are_not_hidden(words: list[str]) -> None:
    assert "***" not in redacted(words)


def test_words_are_quoted_for_a_shell() -> None:
    assert redacted(["mlssl", "fit", "--data.root", "my photos"]) == "mlssl fit --data.root 'my photos'"
