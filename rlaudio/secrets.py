"""What must not be read by others: which names hold secrets, and text without them."""

import itertools
import os
import re
from collections.abc import Mapping

MASK = "***"

_SECRET_WORDS = frozenset(
    {"token", "secret", "secrets", "password", "passwd", "passphrase", "credential", "credentials", "apikey"}
)
_SECRET_KEYS = frozenset({"api", "access", "private", "secret", "account", "signing", "encryption"})
"""`..._KEY` behind one of these is a secret; `sort_key` is none."""
_SHORTEST = 6
"""Values shorter than this are not searched for: "1" would mask half of a text."""
_IN_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)(?P<user>[^/\s:@]*):(?P<password>[^/\s@]+)@")
_BEARER = re.compile(r"(?i)\b(bearer\s+)[A-Za-z0-9._~+/=-]{6,}")


def is_secret_name(name: str) -> bool:
    """Whether a variable or setting of this name holds a secret. `key_env` holds a variable's name and is none."""
    words = [word for word in re.split(r"[^a-z0-9]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()) if word]
    if words[-1:] == ["path"] or words[-1:] == ["env"]:
        return False
    if _SECRET_WORDS & set(words):
        return True
    return any(first in _SECRET_KEYS and second == "key" for first, second in itertools.pairwise(words))


def has_url_password(text: str) -> bool:
    """Whether `text` holds an address of the form `scheme://user:password@host`."""
    return _IN_URL.search(text) is not None


def masked(text: str, *, environment: Mapping[str, str] | None = None) -> str:
    """`text` without passwords in addresses, bearer tokens, and the values of secret variables of the environment."""
    for name, value in (os.environ if environment is None else environment).items():
        if len(value) >= _SHORTEST and is_secret_name(name):
            text = text.replace(value, MASK)
    text = _IN_URL.sub(rf"\g<scheme>\g<user>:{MASK}@", text)
    return _BEARER.sub(rf"\g<1>{MASK}", text)
