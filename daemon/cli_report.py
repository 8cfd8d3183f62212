"""`dynlora report`: a page on how the model developed."""

from datetime import UTC, datetime
from pathlib import Path

import click

from daemon.errors import ConfigError, RequestError
from daemon.output import Options, common_options, pass_options

_OR_ANOTHER = "name another with -o"


@click.command()
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("dynlora-report.html"),
    show_default=True,
    help="The file to write.",
)
@click.option(
    "--no-images", is_flag=True, help="Ask no exam images again: quicker, and none are on the page."
)
@common_options
@pass_options
def report(options: Options, *, output: Path, no_images: bool) -> None:
    """Write one HTML page: accuracy of all versions, ranks, drift, flipped answers, decisions, classes.

    Thumbnails of exam images whose answer changed are on it, unless --no-images.
    """
    from daemon.chronicle import gather
    from daemon.chronicle_page import render
    from daemon.comparison import compare
    from daemon.progress import showing
    from deploy import atomic

    home = options.existing_home()
    _check_folder(output)
    found = gather(home)
    with showing("warning") as view:
        view.update("exam", version=found.live)
        comparison = None if no_images else compare(options.home)
    page = render(found, comparison, datetime.now(UTC))
    try:
        atomic.write_text(output, page)
    except OSError as error:  # it names the temporary file, of which nobody knows
        raise RequestError(f"{output} cannot be written: {error.strerror or error}; {_OR_ANOTHER}") from error
    document = {"file": str(output), "version": found.live, "versions": len(found.manifests)}
    options.show(document, lambda: click.echo(f"wrote {output}: {len(found.manifests)} versions"))


def _check_folder(output: Path) -> None:
    """Before all images are asked again.

    Raises:
        ConfigError: there is no folder to write the file into.
    """
    if not output.parent.is_dir():
        raise ConfigError(
            f"{output} cannot be written: the folder {output.parent} does not exist; make it or {_OR_ANOTHER}"
        )
