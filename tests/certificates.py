"""A private authority and its certificates for tests, made by the openssl command."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from helixd.tls import KeyPair

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="the openssl command is not installed")
NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


def openssl(*words: object) -> str:
    done = subprocess.run(["openssl", *map(str, words)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@dataclass(frozen=True, slots=True)
class Authority:
    """`cert` is what those who trust it are given."""

    home: Path
    name: str

    @classmethod
    def make(cls, home: Path, name: str = "ca") -> "Authority":
        made = cls(home, name)
        openssl("req", "-x509", *NEW_KEY, "-keyout", made.key, "-out", made.cert, "-days", 30, "-subj", f"/CN={name}")
        return made

    @property
    def cert(self) -> Path:
        return self.home / f"{self.name}.pem"

    @property
    def key(self) -> Path:
        return self.home / f"{self.name}.key"

    def sign(self, names: str, file: str = "", extra: str = "") -> KeyPair:
        """A certificate for `names` as a subjectAltName writes them, as in "DNS:a,IP:127.0.0.1"."""
        at = self.home / (file or names.replace("DNS:", "").replace(",", "-").replace(":", "-"))
        pair = KeyPair(at.with_suffix(".pem"), at.with_suffix(".key"))
        request, extensions = at.with_suffix(".csr"), at.with_suffix(".ext")
        extensions.write_text(f"subjectAltName={names}\n{extra}" if names else extra or "basicConstraints=CA:FALSE\n")
        openssl("req", *NEW_KEY, "-keyout", pair.key, "-out", request, "-subj", f"/CN={at.name}")
        openssl(
            "x509", "-req", "-in", request, "-CA", self.cert, "-CAkey", self.key, "-CAcreateserial", "-days", 30,
            "-out", pair.cert, "-extfile", extensions,
        )  # fmt: skip
        pair.key.chmod(0o600)
        return pair
