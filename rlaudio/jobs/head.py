"""A cluster's head, asked over Ray's Jobs API: every request has a deadline, every refusal says what to set.

Ray 2.60 protects a head with a token. It is taken from where Ray itself looks (`RAY_AUTH_TOKEN`, the file named by
`RAY_AUTH_TOKEN_PATH`, `~/.ray/auth_token`), sent as a header, and never shown.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from rlaudio.errors import ClusterError
from rlaudio.preflight import PACKAGES
from rlaudio.secrets import masked

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

DASHBOARD_PORT = 8265
REQUEST_DEADLINE_S = 30.0
_PORTS = {10001: "Ray Client's port", 6379: "the port at which nodes and drivers join"}
_OVERRIDING = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
"""Ray 2.60 takes these before the address that it is given."""
_TOKEN = (
    "set RAY_AUTH_TOKEN to the cluster's token, or RAY_AUTH_TOKEN_PATH to a file that holds it (on the head: "
    "`ray get-auth-token`; with KubeRay: the cluster's secret, key auth_token)"
)


def connect(
    address: str, *, environment: Mapping[str, str] | None = None, deadline_s: float = REQUEST_DEADLINE_S
) -> JobSubmissionClient:
    """A client of the head at `address`, once it has shown that it is one and takes the token.

    Args:
        address: of the dashboard, `http://HOST:8265`; scheme and port may be left out.
        environment: where the token is looked up.
        deadline_s: for each request, its connection and its answer.

    Raises:
        ClusterError: nobody answers there in time, something else does, the token is missing or refused, or the
            cluster's Ray is not one that rlaudio works with.
    """
    url = dashboard_url(address)
    token = find_token(os.environ if environment is None else environment)
    import requests
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):
        """Ray's own waits for ever, and says of a refused token only that it was refused."""

        def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
            try:
                return super()._do_request(method, endpoint, timeout=deadline_s, **options)
            except AuthenticationError as error:
                raise ClusterError(_refused(url, has_token=token is not None)) from error
            except requests.Timeout as error:
                raise ClusterError(f"{url} gave no answer in {deadline_s:g} s: {_where(url)}") from error
            except requests.RequestException as error:
                raise ClusterError(f"{url} cannot be asked ({_reason(error)}): {_where(url)}") from error

    try:
        with _without(_OVERRIDING):
            client = Client(url, headers={"Authorization": f"Bearer {token}"} if token else None)
        _require_version(str(client._do_request("GET", "/api/version").json()["ray_version"]), url)
        client.get_job_info("rlaudio-is-the-token-right")
    except AuthenticationError as error:
        raise ClusterError(_refused(url, has_token=token is not None)) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ClusterError(f"{url} answers, but not as Ray's dashboard does: {_where(url)}") from error
    except RuntimeError as error:
        if "does not exist" not in str(error):  # the answer to a job that there is not: all is well
            raise ClusterError(f"{url} answers, but not as Ray's dashboard does ({error}): {_where(url)}") from error
    return client


def dashboard_url(address: str) -> str:
    """`address` as the dashboard's URL. Raises ClusterError: it is another service's, or holds a password."""
    parts = urlsplit(address if "://" in address else f"http://{address}")
    try:
        port = parts.port
    except ValueError:
        port = -1
    if parts.scheme == "ray":
        raise ClusterError(
            f"{address} is Ray Client's address, jobs go to the dashboard: http://{parts.hostname}:{DASHBOARD_PORT}"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
        raise ClusterError(f"{masked(address)!r} is no dashboard's address: write http://HOST:{DASHBOARD_PORT}")
    if parts.username or parts.password:
        raise ClusterError("the address holds a user or password, which logs would show: " + _TOKEN)
    if port is None and parts.scheme == "http":
        port = DASHBOARD_PORT
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}" + (f":{port}" if port else "") + parts.path.rstrip("/")


def find_token(environment: Mapping[str, str]) -> str | None:
    """The cluster's token, from where Ray looks for it; None with `RAY_AUTH_MODE=disabled`, or when there is none.

    Raises:
        ClusterError: `RAY_AUTH_TOKEN_PATH` names a file that cannot be read or is empty.
    """
    if environment.get("RAY_AUTH_MODE", "").lower() == "disabled":
        return None
    if token := environment.get("RAY_AUTH_TOKEN", "").strip():
        return token
    named = environment.get("RAY_AUTH_TOKEN_PATH", "")
    path = Path(named) if named else Path(environment.get("HOME", str(Path.home()))) / ".ray" / "auth_token"
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        if not named:
            return None
        raise ClusterError(f"RAY_AUTH_TOKEN_PATH names {path}, which cannot be read ({error}): correct it") from error
    if named and not token:
        raise ClusterError(f"RAY_AUTH_TOKEN_PATH names {path}, which is empty: put the cluster's token into it")
    return token or None


def _require_version(version: str, url: str) -> None:
    if Version(version) not in SpecifierSet(PACKAGES["ray"].accepts):
        raise ClusterError(
            f"the cluster at {url} runs Ray {version}, and rlaudio works with {PACKAGES['ray'].accepts}: install that "
            "Ray on its nodes, as cluster/ does, or submit from the rlaudio that fits it"
        )


def _refused(url: str, *, has_token: bool) -> str:
    if has_token:
        return f"{url} refuses the token it was given, which is another cluster's: {_TOKEN}"
    return f"{url} asks for a token and none was found: {_TOKEN}"


def _where(url: str) -> str:
    port = urlsplit(url).port
    if port in _PORTS:
        return f"port {port} is {_PORTS[port]}; jobs go to the dashboard's, usually {DASHBOARD_PORT}"
    return (
        f"give the dashboard of the head as --address http://HOST:{DASHBOARD_PORT}; it listens on loopback unless "
        f"asked otherwise, so from another machine forward the port first (ssh -L {DASHBOARD_PORT}:127.0.0.1:"
        f"{DASHBOARD_PORT} HOST, or kubectl port-forward service/NAME-head-svc {DASHBOARD_PORT})"
    )


def _reason(error: Exception) -> str:
    cause: BaseException = error
    while (inner := cause.__cause__ or cause.__context__) is not None:
        cause = inner
    return masked(" ".join(str(cause).split())[:200])


@contextmanager
def _without(names: tuple[str, ...]) -> Iterator[None]:
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)
