"""Whether a batch can be promoted or reverted, and whether it has been already.

Changes nothing but what a crash left half done.
"""

from daemon.errors import DaemonError
from daemon.publish import Publisher
from daemon.reception import known
from daemon.requests import Answer
from deploy.lineage import reverted_batches


def check_promotable(publisher: Publisher, batch_id: str) -> Answer | None:
    """The answer where there is nothing to promote: it is in the live version already, or was not held.

    Raises:
        DaemonError: it cannot be promoted; says what to do.
    """
    live = publisher.store.live_manifest()
    publisher.finish_promoted()
    if batch_id in {entry.batch for entry in live.lineage}:
        version = publisher.store.published_batches()[batch_id].version
        return Answer(exit_code=0, result={"live": live.version, "version": version, "already": True})
    state = publisher.spool.find(batch_id)
    if state == "held":
        _check_twin(publisher, batch_id)
        return None
    why = {
        None: "there is no such batch; `dynlora status` lists those that were held",
        "done": "it is not in the live version, nor held; drop its images again to learn them anew",
        "failed": "it failed, so nothing was learnt that could be promoted",
    }.get(state, "it is not judged yet: wait until it is published or held")
    raise DaemonError(f"{batch_id} cannot be promoted: {why}")


def _check_twin(publisher: Publisher, batch_id: str) -> None:
    """Nobody else brought the same meanwhile.

    Raises:
        DaemonError: another batch did, and is in the live version.
    """
    content = publisher.spool.load(batch_id).content_sha256
    twin = known(publisher.store).contents.get(content)
    if twin is not None:
        raise DaemonError(
            f"{batch_id} cannot be promoted: {twin} brought the same and is in the live version"
        )


def check_revertible(publisher: Publisher, batch_id: str) -> Answer | None:
    """The answer where the batch was taken out already.

    Raises:
        DaemonError: it is not in the live version; says what is.
    """
    live = publisher.store.live_manifest()
    batches = [entry.batch for entry in live.lineage]
    if batch_id in batches:
        return None
    if (version := reverted_batches(publisher.store).get(batch_id)) is not None:
        return Answer(exit_code=0, result={"live": live.version, "version": version, "already": True})
    raise DaemonError(
        f"{batch_id} cannot be reverted: version {live.version} was not learnt from it, but from "
        f"{', '.join(batches) or 'no batch'}"
    )
