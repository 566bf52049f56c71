"""Secrets are known by their names and never printed."""

import pytest

from rlaudio.secrets import has_url_password, is_secret_name, masked


@pytest.mark.parametrize(
    "name",
    [
        *("OPENAI_API_KEY", "api_key", "apiKey", "HF_TOKEN", "RAY_AUTH_TOKEN", "MLFLOW_TRACKING_PASSWORD"),
        *("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "private_key", "client-secret", "rewards.options.token"),
    ],
)
def test_names_of_secrets(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    [
        *("key_env", "OPENAI_API_KEY_ENV", "RAY_AUTH_TOKEN_PATH", "max_new_tokens", "micro_batch_tokens", "key"),
        *("sort_key", "monkey", "tokenizer", "constant_tokens", "PATH", ""),
    ],
)
def test_names_of_what_is_no_secret(name: str) -> None:
    assert not is_secret_name(name)


def test_masked_text_holds_no_secret() -> None:
    environment = {"OPENAI_API_KEY": "sk-abcdef", "SHORT_TOKEN": "1", "PATH": "/usr/bin"}
    text = "key sk-abcdef in /usr/bin, 1 of https://me:hunter2@host/x, Authorization: Bearer abc.def-ghi"
    shown = masked(text, environment=environment)
    assert shown == "key *** in /usr/bin, 1 of https://me:***@host/x, Authorization: Bearer ***"


def test_an_address_with_a_password_is_found() -> None:
    assert has_url_password("postgresql://user:pw@db/mlflow")
    assert not has_url_password("https://host:5000/x@y")
    assert not has_url_password("https://user@host/")
