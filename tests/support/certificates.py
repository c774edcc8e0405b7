"""Certificates for servers of tests, and the authority that signs them."""

from __future__ import annotations

import datetime
import shutil
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


class Authority:
    """
    A certificate authority of our own.

    Args:
        directory: Where its files are made.
        name: What it is called, and its file.
    """

    def __init__(self, directory: Path, name: str = "authority") -> None:
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name(name)
        self._number = 0
        basic = x509.BasicConstraints(ca=True, path_length=None)
        cert = _builder(self._name, self._name, self._key, 3650, basic).sign(
            self._key, hashes.SHA256()
        )
        self.path: Path = directory / f"{name}.crt"
        self.path.write_bytes(cert.public_bytes(serialization.Encoding.PEM))

    def certify(self, host: str, days: int = 365, user: str | None = None) -> tuple[Path, Path]:
        """
        Make the certificate and the key of a server; return where they are.

        Args:
            host: What the server is called.
            days: For how long it is good from now on; less than 0 if it was.
            user: Who is to be able to read the key; whoever runs this if None.
        """
        self._number += 1
        key = ec.generate_private_key(ec.SECP256R1())
        basic = x509.BasicConstraints(ca=False, path_length=None)
        builder = _builder(_name(host), self._name, key, days, basic)
        names = x509.SubjectAlternativeName([x509.DNSName(host)])
        cert = builder.add_extension(names, critical=False).sign(self._key, hashes.SHA256())
        paths = tuple(self._directory / f"server-{self._number}.{end}" for end in ("crt", "key"))
        paths[0].write_bytes(cert.public_bytes(serialization.Encoding.PEM))
        paths[1].write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        paths[1].chmod(0o600)
        if user is not None:
            shutil.chown(paths[1], user)
        return paths[0], paths[1]


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    days: int,
    basic: x509.BasicConstraints,
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=400))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(basic, critical=True)
    )
