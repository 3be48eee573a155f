"""Who may call: API keys, compared in constant time, on the matched route and never on a URL's text.

Deny by default: with keys configured every route wants one, unknown paths included, except the resources named public.
Keys are kept as SHA-256 digests only.
"""

import hashlib
import hmac
from pathlib import Path

from helixd.api.errors import ApiError
from helixd.errors import ConfigError


def digest_of(key: str) -> bytes:
    """The digest under which a key is known."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def load_keys(path: Path, *, guarded: bool = False) -> frozenset[bytes]:
    """The digests of a key file: one key per line, `#` starts a comment line.

    Raises ConfigError for a file that others can read (unless it is `guarded` by its directory), that cannot be read,
    or that holds no key.
    """
    try:
        if path.stat().st_mode & 0o077 and not guarded:
            raise ConfigError(f"{path}: others can read this key file; run chmod 600 on it")
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read the key file: {error}") from error
    keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not keys:
        raise ConfigError(f"{path}: the key file holds no key; write one key per line")
    return frozenset(map(digest_of, keys))


def client_of(authorization: str | None, digests: frozenset[bytes]) -> str:
    """The caller's digest in hex ("" for an open API). Raises a 401."""
    if not digests:
        return ""
    scheme, _, key = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise _unauthorized("This server wants an API key: Authorization: Bearer YOUR_KEY.")
    given = digest_of(key.strip())
    # All are compared, whichever matches: the time taken says nothing about which.
    if sum(hmac.compare_digest(given, known) for known in digests) == 0:
        raise _unauthorized("The API key is not one of this server's.")
    return given.hex()


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
