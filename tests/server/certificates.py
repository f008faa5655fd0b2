"""Certificates that sign themselves."""

from __future__ import annotations

import subprocess
from pathlib import Path


def make_certificate(folder: Path, name: str = "localhost") -> tuple[str, str]:
    """Returns the paths of a self-signed certificate and of its key."""
    certificate, key = folder / "tls.crt", folder / "tls.key"
    made = [
        *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
        *("-subj", f"/CN={name}", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"),
        *("-out", str(certificate), "-keyout", str(key)),
    ]
    subprocess.run(made, check=True, capture_output=True)
    return str(certificate), str(key)
