"""The unit files as an archive, for machines that are set up by other means than `dynlora systemd install`.

    python -m daemon.unit_archive DIRECTORY

Filled in for an environment in /opt/dynlora and a home in /var/lib/dynlora, for every systemd from 252 on.
"""

import io
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path, PurePosixPath

from daemon.unit_files import SYSTEM_HOME, Target, render

PYTHON = Path("/opt/dynlora/bin/python")


def pack(path: Path, target: Target) -> list[str]:
    """Write an archive of the files of an installation, and return their names in it.

    Raises:
        OSError: it cannot be written.
    """
    names = []
    with tarfile.open(path, "w:gz", compresslevel=9) as archive:
        for place, content in sorted(render(target).items()):
            data = content.encode()
            member = tarfile.TarInfo(str(PurePosixPath(place.relative_to(target.root))))
            member.size, member.mode = len(data), 0o644
            member.uname = member.gname = "root"
            archive.addfile(member, io.BytesIO(data))
            names.append(member.name)
    return names


def main(directory: Path) -> None:
    """Write the archive of this release into a directory."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"dynlora-units-{version('dynlora')}.tar.gz"
    for name in pack(path, Target(home=SYSTEM_HOME, python=PYTHON)):
        print(f"{path.name}: {name}")  # noqa: T201 - it is a program of its own


if __name__ == "__main__":
    main(Path(sys.argv[1]))
