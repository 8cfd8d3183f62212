"""Every error that deploy raises on purpose.

    DeployError
    ├── StoreError       the version store, or a step of publishing into it
    ├── ManifestError    manifest.json or classes.json does not say what it must
    ├── WeightsError     weights.safetensors is cut short, malformed or does not fit
    ├── DeltaError       a delta cannot be folded into these weights
    ├── ExportError      the model cannot be turned into the two graphs
    ├── VerifyError      a version is not what its manifest says
    │   └── SignatureError   nobody who is trusted has signed it
    ├── ShareError       a version could not be taken to another place, or fetched from one
    ├── ImageError       a picture cannot be used (the sender's fault; see .reason)
    ├── ClientError      the client was asked for something it cannot do
    └── ServerError      the server was told to serve in a way that it cannot or should not

A message says what happened, what was expected, what was found and what to do.
Errors of the operating system (a full disk, missing rights) pass through as OSError,
except where publishing turns them into a StoreError that says what is still live.
"""


class DeployError(Exception):
    """Root of everything deploy raises on purpose."""


class StoreError(DeployError):
    """The version store is not in a state that allows what was asked."""


class ManifestError(DeployError):
    """A manifest or a class list is missing, malformed, or of an unknown schema."""


class WeightsError(DeployError):
    """A weights file is cut short, malformed, or does not fit the model."""


class DeltaError(DeployError):
    """A delta file is malformed, or does not fit the weights it is folded into."""


class ExportError(DeployError):
    """A model could not be exported as the two graphs of a version."""


class VerifyError(DeployError):
    """A version differs from what its manifest or its parent promises."""


class SignatureError(VerifyError):
    """A version's signature is missing, or not made with a trusted key, or a key cannot be used."""


class ShareError(DeployError):
    """A mirror, a model repository or a remote store cannot be used, or holds what it must not."""


class ImageError(DeployError):
    """A picture cannot be used.

    ``reason`` is one short sentence for the person who sent it.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class ClientError(DeployError):
    """A client was asked for something it cannot do."""


class ServerError(DeployError):
    """A server cannot start as it was told to, or should not."""
