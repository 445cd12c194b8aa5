"""Which teachers of a run ask one service with one key: its limits are of all of them together.

Pure arithmetic over the configuration; imports no Ray. A key is compared by a digest, which is made
in the process that has it.
"""

import os
from collections.abc import Mapping
from hashlib import blake2b
from urllib.parse import urlsplit

from raystill.config.base import ApiConfig
from raystill.config.run import RunConfig

RATES = ("requests_per_minute", "tokens_per_minute")
PORTS = {"http": 80, "https": 443}


def service_of(base_url: str) -> str:
    """A service's URL in one spelling: small letters of scheme and host, a port that is not the
    scheme's own, and no slash at the end.
    """
    parts = urlsplit(base_url)
    scheme, host = parts.scheme.lower(), (parts.hostname or "").rstrip(".")
    port = "" if parts.port in (None, PORTS.get(scheme)) else f":{parts.port}"
    place = f"[{host}]" if ":" in host else host
    return f"{scheme}://{place}{port}{parts.path.rstrip('/')}"


def account_of(api: ApiConfig, salt: str = "") -> bytes:
    """Digest of a service and the key that this process has for it; nobody reads the key from it.

    salt: makes digests of two runs differ.
    """
    key = os.environ.get(api.api_key_env or "", "")
    secret = blake2b(key.encode("utf-8", "surrogateescape"), digest_size=32).digest()
    place = service_of(api.base_url or "").encode()
    return blake2b(place + b"\0" + salt.encode(), key=secret, digest_size=16).digest()


def same_service(config: RunConfig) -> dict[str, list[str]]:
    """Teachers of each service that several are behind, by its URL."""
    found: dict[str, list[str]] = {}
    for name, view in config.by_teacher.items():
        if view.teacher.engine == "api" and view.teacher.api.base_url is not None:
            found.setdefault(service_of(view.teacher.api.base_url), []).append(name)
    return {url: names for url, names in found.items() if len(names) > 1}


def same_account(config: RunConfig) -> list[list[str]]:
    """Of these, those that have one key, as far as this process knows: by value, else by name."""
    views, accounts = config.by_teacher, dict[tuple[str, bytes], list[str]]()
    for names in same_service(config).values():
        for name in names:
            api = views[name].teacher.api
            known = api.api_key_env is None or api.api_key_env in os.environ
            which = "" if known else str(api.api_key_env)
            accounts.setdefault((which, account_of(api)), []).append(name)
    return [names for names in accounts.values() if len(names) > 1]


def least_rates(apis: Mapping[str, ApiConfig]) -> tuple[int | None, int | None]:
    """Requests and tokens a minute of all together: the smallest of each that is set."""
    set_ones = [
        [value for api in apis.values() if (value := getattr(api, name)) is not None]
        for name in RATES
    ]
    requests, tokens = (min(values, default=None) for values in set_ones)
    return requests, tokens
