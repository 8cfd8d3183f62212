"""A version's signature, `model.sig`, in the format of OpenSSF model signing: made here and checked here.

    model.sig = Sigstore bundle ⊃ DSSE envelope ⊃ in-toto statement ⊃ {file name: sha256}

Signed are manifest.json and, through the hashes in it, every file of the version, those too that were
removed to save space. So checking a signature costs nothing, and whoever checks it must still compare the
files with the manifest. The `model-signing` package reads and writes the same files; it is not used here,
because it brings twenty packages for signing with an account or a certificate, and hashes everything again.

Needs the `cryptography` package, which is loaded with the first key.
"""

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from deploy import atomic
from deploy.errors import SignatureError
from deploy.manifest import (
    MANIFEST_NAME,
    SIGNATURE_NAME,
    Manifest,
    load_manifest,
    parse_manifest,
)

MAX_SIGNATURE_BYTES = 1 << 20
MAX_MANIFEST_BYTES = 64 << 20
_MAX_KEY_BYTES = 1 << 20
_BUNDLE_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_PAYLOAD_TYPE = "application/vnd.in-toto+json"
_STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
_PREDICATE_TYPE = "https://model_signing/signature/v1.0"
_HASHES = {"secp256r1": "SHA256", "secp384r1": "SHA384", "secp521r1": "SHA512"}
_PUBLIC_PEM = re.compile(rb"-----BEGIN PUBLIC KEY-----.*?-----END PUBLIC KEY-----", re.DOTALL)
_KIND = "an unencrypted EC key in PEM form on the curve P-256, P-384 or P-521"


@dataclass(frozen=True)
class SigningKey:
    """A private key that signs versions."""

    _key: Any

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a private key.

        Raises:
            SignatureError: there is none, or of another kind.
        """
        serialization = _cryptography().serialization
        try:
            key = serialization.load_pem_private_key(_read_key(path), password=None)
        except (ValueError, TypeError) as error:
            raise SignatureError(f"{path} is not a private key: expected {_KIND}. ({error})") from error
        _check_kind(key, path)
        return cls(key)

    def sign_version(self, directory: Path) -> None:
        """Write ``directory``/model.sig durably, over manifest.json as it lies there.

        Raises:
            ManifestError: the manifest cannot be read.
        """
        content = (directory / MANIFEST_NAME).read_bytes()
        manifest = parse_manifest(content, directory / MANIFEST_NAME)
        signature = self.sign(content, manifest)
        atomic.write_file(directory / SIGNATURE_NAME, signature, mode=0o444)

    def has_signed(self, directory: Path) -> bool:
        """Tell whether ``directory``/model.sig is this key's, and over manifest.json as it lies there.

        Raises:
            ManifestError: the manifest cannot be read.
        """
        try:
            TrustedKeys((self._key.public_key(),)).load_manifest(directory)
        except SignatureError:
            return False
        return True

    def sign(self, content: bytes, manifest: Manifest) -> bytes:
        """Return the content of model.sig for a manifest and the bytes it was read from."""
        payload = json.dumps(_statement(content, manifest), indent=2).encode()
        signed = self._key.sign(_pre_authentication(payload), _algorithm(self._key))
        bundle = {
            "mediaType": _BUNDLE_TYPE,
            "verificationMaterial": {
                "publicKey": {"hint": _fingerprint(self._key.public_key())},
                "tlogEntries": [],
            },
            "dsseEnvelope": {
                "payload": base64.b64encode(payload).decode(),
                "payloadType": _PAYLOAD_TYPE,
                "signatures": [{"sig": base64.b64encode(signed).decode(), "keyid": ""}],
            },
        }
        return json.dumps(bundle).encode()


@dataclass(frozen=True)
class TrustedKeys:
    """Public keys, any of which may have signed a version; several let one be replaced by another."""

    _keys: Sequence[Any]

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the public keys of one PEM file.

        Raises:
            SignatureError: there is none, or of another kind.
        """
        serialization = _cryptography().serialization
        keys = []
        for block in _PUBLIC_PEM.findall(_read_key(path)):
            try:
                keys.append(serialization.load_pem_public_key(block))
            except ValueError as error:
                raise SignatureError(
                    f"{path} holds a public key that cannot be read: expected {_KIND}. ({error})"
                ) from error
            _check_kind(keys[-1], path)
        if not keys:
            raise SignatureError(
                f"{path} holds no public key: expected -----BEGIN PUBLIC KEY-----, and {_KIND}"
            )
        return cls(tuple(keys))

    def load_manifest(self, directory: Path) -> Manifest:
        """Return a version's manifest; parsed is what was signed, not what lies there a moment later.

        Raises:
            SignatureError: it is not signed, or not by a trusted key, or was changed since.
            ManifestError: it cannot be read.
        """
        try:
            content = _read_limited(directory / MANIFEST_NAME, MAX_MANIFEST_BYTES)
        except OSError:
            return load_manifest(directory)  # which says what is wrong
        try:
            signature = _read_limited(directory / SIGNATURE_NAME, MAX_SIGNATURE_BYTES)
        except FileNotFoundError:
            signature = b""
        return self.check(content, signature, directory)

    def check(self, content: bytes, signature: bytes, place: Path) -> Manifest:
        """Check a manifest's bytes against the content of model.sig, and return the manifest.

        Args:
            place: where the version lies, for the message.

        Raises:
            SignatureError: nobody trusted has signed these bytes.
            ManifestError: they are signed, but no manifest.
        """
        if not signature:
            raise SignatureError(
                f"{place} is not signed: expected {SIGNATURE_NAME} in it, made with the trusted key. "
                f"Sign it where it was made (`dynlora sign`)."
            )
        try:
            payload, signed = _open_envelope(signature)
        except (KeyError, TypeError, ValueError, IndexError, RecursionError, binascii.Error) as error:
            raise SignatureError(
                f"{place / SIGNATURE_NAME} is not a signature that can be read: expected a Sigstore bundle "
                f"of OpenSSF model signing, made with a key. ({error})"
            ) from error
        if not any(_has_signed(key, payload, signed) for key in self._keys):
            raise SignatureError(
                f"{place} is signed, but not with a trusted key, or its signature was changed. "
                "Trust that key too, or get the version from where it was made."
            )
        _check_statement(payload, content, place)
        return parse_manifest(content, place / MANIFEST_NAME)


def _statement(content: bytes, manifest: Manifest) -> dict[str, Any]:
    """Return the in-toto statement: every file of the version with its sha256."""
    digests = {name: record.sha256 for name, record in manifest.files.items()}
    digests[MANIFEST_NAME] = hashlib.sha256(content).hexdigest()
    root = hashlib.sha256()
    for name in sorted(digests):
        root.update(bytes.fromhex(digests[name]))
    return {
        "_type": _STATEMENT_TYPE,
        "subject": [{"name": str(manifest.version), "digest": {"sha256": root.hexdigest()}}],
        "predicateType": _PREDICATE_TYPE,
        "predicate": {
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": False,
                "ignore_paths": [SIGNATURE_NAME],
            },
            "resources": [
                {"name": name, "algorithm": "sha256", "digest": digests[name]} for name in sorted(digests)
            ],
        },
    }


def _open_envelope(signature: bytes) -> tuple[bytes, bytes]:
    """Return payload and signature of a bundle; nothing of it is trusted yet.

    Raises:
        KeyError, TypeError, ValueError, IndexError, RecursionError: it is not such a bundle.
    """
    envelope = json.loads(signature)["dsseEnvelope"]
    if envelope["payloadType"] != _PAYLOAD_TYPE:
        raise ValueError(f"expected a payload of type {_PAYLOAD_TYPE}")
    [entry] = envelope["signatures"]
    payload = base64.b64decode(envelope["payload"], validate=True)
    return payload, base64.b64decode(entry["sig"], validate=True)


def _check_statement(payload: bytes, content: bytes, place: Path) -> None:
    """Check that an authentic statement is about this manifest.

    Raises:
        SignatureError: it is about something else.
    """
    try:
        statement = json.loads(payload)
        is_ours = statement["predicateType"] == _PREDICATE_TYPE
        digests = {
            str(entry["name"]): entry["digest"]
            for entry in statement["predicate"]["resources"]
            if entry["algorithm"] == "sha256"
        }
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise SignatureError(f"{place / SIGNATURE_NAME} signs no model: {error}") from error
    if not is_ours or digests.get(MANIFEST_NAME) != hashlib.sha256(content).hexdigest():
        raise SignatureError(
            f"{place / MANIFEST_NAME} is not what was signed: it was changed, or the signature is another "
            "version's. Get the version from where it was made."
        )


def _has_signed(key: Any, payload: bytes, signed: bytes) -> bool:
    try:
        key.verify(signed, _pre_authentication(payload), _algorithm(key))
    except _cryptography().InvalidSignature:
        return False
    return True


def _pre_authentication(payload: bytes) -> bytes:
    """What DSSE signs: type and content, each with its length, so that neither can pass for the other."""
    return b"DSSEv1 %d %s %d %s" % (len(_PAYLOAD_TYPE), _PAYLOAD_TYPE.encode(), len(payload), payload)


def _algorithm(key: Any) -> Any:
    modules = _cryptography()
    return modules.ec.ECDSA(getattr(modules.hashes, _HASHES[key.curve.name])())


def _fingerprint(public_key: Any) -> str:
    serialization = _cryptography().serialization
    pem = public_key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(pem).hexdigest()


def _check_kind(key: Any, path: Path) -> None:
    if getattr(getattr(key, "curve", None), "name", None) not in _HASHES:
        raise SignatureError(f"{path} holds a key of another kind: expected {_KIND}")


def _read_key(path: Path) -> bytes:
    try:
        return _read_limited(path, _MAX_KEY_BYTES)
    except OSError as error:
        raise SignatureError(
            f"the key {path} cannot be read: {error.strerror}; give the path of {_KIND}"
        ) from error


def _read_limited(path: Path, limit: int) -> bytes:
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise SignatureError(f"{path} is too large: expected at most {limit} bytes")
    return content


@dataclass(frozen=True)
class _Modules:
    """The parts of the cryptography package that are used."""

    serialization: Any
    hashes: Any
    ec: Any
    InvalidSignature: Any


def _cryptography() -> _Modules:
    """Load the package.

    Raises:
        SignatureError: it is not installed.
    """
    try:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ModuleNotFoundError as error:
        raise SignatureError(
            "signatures need the cryptography package: pip install 'dynlora[signing]'"
        ) from error
    return _Modules(serialization, hashes, ec, InvalidSignature)
