"""A certificate authority made on the spot with the openssl command, for tests of TLS."""

import ssl
import subprocess
from pathlib import Path


class Authority:
    """A fresh CA in a directory. `ca_file` is what a client must trust."""

    def __init__(self, directory: Path, name: str = "Test CA") -> None:
        self._directory = directory
        self.ca_file = str(directory / "ca.pem")
        self._key_file = str(directory / "ca.key")
        _openssl(
            *("-keyout", self._key_file, "-out", self.ca_file, "-subj", f"/CN={name}"),
            *("-addext", "keyUsage=critical,keyCertSign,cRLSign"),  # Python 3.13 insists on it
        )

    def server_context(self, *names: str) -> ssl.SSLContext:
        """For a server whose certificate is for these names: `DNS:localhost`, `IP:127.0.0.1`."""
        stem = "-".join(names).replace(":", "_")
        key, certificate = str(self._directory / f"{stem}.key"), str(self._directory / f"{stem}.pem")
        _openssl(
            *("-CA", self.ca_file, "-CAkey", self._key_file, "-keyout", key, "-out", certificate),
            *("-subj", "/CN=server", "-addext", f"subjectAltName={','.join(names)}"),
            *("-addext", "basicConstraints=critical,CA:FALSE"),
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        return context


def _openssl(*arguments: str) -> None:
    new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    subprocess.run(["openssl", "req", "-x509", *new_key, *arguments], check=True, capture_output=True)
