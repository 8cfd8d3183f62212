"""Signatures: what was signed is served, anything else is refused, and the field's own tool agrees."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from deploy.client import Client
from deploy.errors import ManifestError, ShareError, SignatureError
from deploy.manifest import MANIFEST_NAME, SIGNATURE_NAME, UNLISTED_NAMES
from deploy.prune import prune_version
from deploy.pull import PullOptions, pull
from deploy.remote import FolderRemote, open_remote
from deploy.signing import SigningKey, TrustedKeys
from deploy.store import VersionStore
from deploy.verify import verify_version
from tests.deploy.swaps import point
from tests.deploy.test_pull import file_server

pytest.importorskip("cryptography", reason="signatures need the signing extra")


def make_key(folder: Path, name: str, curve: str = "SECP256R1") -> tuple[Path, Path]:
    """Write a new private key and its public key; returns both paths."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(getattr(ec, curve)())
    private, public = folder / f"{name}.key", folder / f"{name}.pub"
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    public.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return private, public


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    """A private key and its public key."""
    return make_key(tmp_path, "own")


@pytest.fixture
def small(version_dir: Path, tmp_path: Path) -> Path:
    """A version directory with everything but the weights: signing does not read them."""
    copy = tmp_path / "version"
    shutil.copytree(version_dir, copy, ignore=shutil.ignore_patterns("weights.safetensors"))
    return copy


@pytest.mark.parametrize("curve", ["SECP256R1", "SECP384R1", "SECP521R1"])
def test_a_signed_manifest_is_trusted_and_its_files_are_not_needed(
    small: Path, tmp_path: Path, curve: str
) -> None:
    """Signed is the manifest, which has every hash: a thinned version stays signed."""
    private, public = make_key(tmp_path, "own", curve)
    SigningKey.load(private).sign_version(small)
    prune_version(small)

    manifest = TrustedKeys.load(public).load_manifest(small)

    assert manifest.version == 0
    assert (small / SIGNATURE_NAME).is_file()
    assert not (small / "tokenizer.json").exists()


def test_any_of_several_keys_will_do(small: Path, tmp_path: Path) -> None:
    """So that a key can be replaced by another without a gap."""
    (one, one_public), (_, two_public) = make_key(tmp_path, "one"), make_key(tmp_path, "two")
    both = tmp_path / "both.pub"
    both.write_bytes(two_public.read_bytes() + one_public.read_bytes())
    SigningKey.load(one).sign_version(small)

    assert TrustedKeys.load(both).load_manifest(small).version == 0
    with pytest.raises(SignatureError, match="not with a trusted key"):
        TrustedKeys.load(two_public).load_manifest(small)


def tamper_manifest(directory: Path) -> None:
    """Change one byte of what was signed."""
    path = directory / MANIFEST_NAME
    path.chmod(0o644)
    path.write_bytes(path.read_bytes().replace(b'"version": 0', b'"version": 1'))


def tamper_payload(directory: Path) -> None:
    """Swap the signed statement for another one."""
    import base64

    path = directory / SIGNATURE_NAME
    path.chmod(0o644)
    bundle = json.loads(path.read_text())
    payload = base64.b64decode(bundle["dsseEnvelope"]["payload"]).replace(b'"0"', b'"7"')
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(payload).decode()
    path.write_text(json.dumps(bundle))


def write_signature(content: bytes) -> Any:
    """Put something else in the signature's place."""

    def write(directory: Path) -> None:
        (directory / SIGNATURE_NAME).unlink()
        (directory / SIGNATURE_NAME).write_bytes(content)

    return write


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (tamper_manifest, "not what was signed"),
        (tamper_payload, "not with a trusted key, or its signature was changed"),
        (lambda directory: (directory / SIGNATURE_NAME).unlink(), "is not signed"),
        (write_signature(b"{}"), "not a signature that can be read"),
        (write_signature(b"[" * 100_000), "not a signature that can be read"),
        (write_signature(b'{"dsseEnvelope": null}'), "not a signature that can be read"),
        (write_signature(b" " * (2 << 20)), "too large"),
    ],
)
def test_what_was_tampered_with_is_refused(
    small: Path, keys: tuple[Path, Path], tamper: Any, message: str
) -> None:
    """Each with a sentence of its own."""
    SigningKey.load(keys[0]).sign_version(small)
    tamper(small)

    with pytest.raises(SignatureError, match=message):
        TrustedKeys.load(keys[1]).load_manifest(small)


def test_a_key_of_another_kind_is_refused(tmp_path: Path) -> None:
    """RSA, a public key for a private one, a text, a file that is missing."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ed25519

    private, public = make_key(tmp_path, "own")
    other = tmp_path / "ed25519.pub"
    other.write_bytes(
        ed25519.Ed25519PrivateKey.generate()
        .public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    for load, path in [
        (SigningKey.load, public),
        (TrustedKeys.load, private),
        (TrustedKeys.load, other),
        (SigningKey.load, tmp_path / "none"),
    ]:
        with pytest.raises(SignatureError, match="EC key in PEM form"):
            load(path)


def test_the_tool_of_the_field_agrees(version_dir: Path, tmp_path: Path, keys: tuple[Path, Path]) -> None:
    """OpenSSF's model-signing verifies what we sign, file by file, and we trust what it signs."""
    model_signing = pytest.importorskip("model_signing", reason="the model-signing package is not installed")
    version = tmp_path / "version"
    shutil.copytree(version_dir, version)
    SigningKey.load(keys[0]).sign_version(version)

    def verify() -> None:
        checker = model_signing.verifying.Config().use_elliptic_key_verifier(public_key=keys[1])
        checker.verify(version, version / SIGNATURE_NAME)

    verify()
    classes = version / "classes.json"
    classes.chmod(0o644)
    content = classes.read_bytes()
    classes.write_bytes(content + b" ")
    with pytest.raises(ValueError, match="mismatch"):
        verify()
    classes.write_bytes(content)

    (version / SIGNATURE_NAME).unlink()
    signer = model_signing.signing.Config().use_elliptic_key_signer(private_key=keys[0])
    signer.sign(version, version / SIGNATURE_NAME)
    assert TrustedKeys.load(keys[1]).load_manifest(version).version == 0


def test_publishing_signs_before_anyone_can_see(
    serving: Path, keys: tuple[Path, Path], version_maker: Any
) -> None:
    """A client that trusts the key follows; the signature is no part of the manifest."""
    for version in (0, 1, 2):
        SigningKey.load(keys[0]).sign_version(serving / "versions" / str(version))
    point(serving, 2)
    store = VersionStore(serving, sign=SigningKey.load(keys[0]).sign_version)
    with Client(serving, trust=keys[1]) as client:
        staging, manifest = version_maker.stage_random(serving, 11)
        store.publish(staging, manifest)

        assert client.refresh() == 3
    assert not set(UNLISTED_NAMES) & store.manifest(3).files.keys()
    verify_version(store.path(3))


def test_a_client_keeps_the_old_version_when_the_new_one_is_not_signed(
    serving: Path, keys: tuple[Path, Path]
) -> None:
    """And takes the new one as soon as it is."""
    key = SigningKey.load(keys[0])
    key.sign_version(serving / "versions/0")
    with Client(serving, trust=keys[1]) as client:
        point(serving, 1)
        assert client.refresh() == 0
        assert isinstance(client.last_error, SignatureError)
        key.sign_version(serving / "versions/1")
        assert client.refresh() == 1


def test_pull_takes_signed_versions_only(serving: Path, tmp_path: Path, keys: tuple[Path, Path]) -> None:
    """The ancestors too; what was refused is not there, and the signature comes along."""
    key, options = SigningKey.load(keys[0]), PullOptions(trust=TrustedKeys.load(keys[1]))
    key.sign_version(serving / "versions/0")
    edge = tmp_path / "edge"
    assert pull(FolderRemote(serving), edge, options).version == 0
    point(serving, 1)
    with pytest.raises(SignatureError, match="is not signed"):
        pull(FolderRemote(serving), edge, options)
    assert VersionStore(edge).current() == 0
    key.sign_version(serving / "versions/1")
    assert pull(FolderRemote(serving), edge, options).version == 1
    assert TrustedKeys.load(keys[1]).load_manifest(edge / "versions/1").version == 1


def test_a_copy_gets_the_signature_that_came_later_and_the_new_key_s(
    serving: Path, tmp_path: Path, keys: tuple[Path, Path]
) -> None:
    """Pulled before it was signed, or signed with a key that has been replaced since."""
    edge, new = tmp_path / "edge", make_key(tmp_path, "new")
    pull(FolderRemote(serving), edge)
    for private, public in (keys, new):
        SigningKey.load(private).sign_version(serving / "versions/0")
        trusted = TrustedKeys.load(public)
        assert pull(FolderRemote(serving), edge, PullOptions(trust=trusted)).version == 0
        assert trusted.load_manifest(edge / "versions/0").version == 0


def test_a_forbidden_signature_is_no_signature_for_who_insists_on_one(
    serving: Path, tmp_path: Path, keys: tuple[Path, Path]
) -> None:
    """A file that may not be read is refused with what to do, not taken as fine."""
    with file_server(serving) as (url, server):
        server.says_of_missing = 403
        with pytest.raises(ShareError, match=r"model\.sig is not there, or may not be read"):
            pull(open_remote(url), tmp_path / "edge", PullOptions(trust=TrustedKeys.load(keys[1])))

    assert VersionStore(tmp_path / "edge").versions() == []


def test_a_signed_file_that_is_no_manifest_is_refused(small: Path, keys: tuple[Path, Path]) -> None:
    """A signature says who made it, not that it can be read."""
    key = SigningKey.load(keys[0])
    manifest = TrustedKeys.load(keys[1])
    key.sign_version(small)
    real = manifest.load_manifest(small)

    with pytest.raises(ManifestError, match="cannot be used"):
        manifest.check(b"{}", key.sign(b"{}", real), small)
