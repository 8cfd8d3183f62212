"""The unit files: what they promise, and a whole life under a real systemd."""

import json
import os
import pwd
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from daemon import cli_systemd, systemd, unit_files
from daemon.systemd import SystemdError
from daemon.unit_files import SERVE_UNIT, SOCKET_UNIT, UNIT, Target

ROOT = Path(__file__).resolve().parents[2]
LAB = Path(__file__).with_name("lab")
needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed here"
)


def why_no_lab() -> str | None:
    """What the lab lacks on this machine; None if nothing."""
    if os.geteuid() != 0:
        return "booting a systemd of its own needs root"
    missing = [
        name for name in ("systemd-nspawn", "mount", "useradd", "setfacl") if shutil.which(name) is None
    ]
    if missing:
        return f"{', '.join(missing)} not installed (Debian: systemd-container, acl)"
    return (
        None
        if "overlay" in Path("/proc/filesystems").read_text()
        else "the kernel has no overlay file system"
    )


def unit_of(target: Target) -> str:
    """The daemon's unit file."""
    return unit_files.render(target)[target.unit_path]


@pytest.fixture(params=[unit_files.SYSTEM_HOME, Path("/home/alice/dynlora")], ids=["system", "below-home"])
def written(request, tmp_path) -> Path:
    """The units of an installation in a folder, with a program that is there."""
    target = Target(home=request.param, python=Path("/usr/bin/env"))
    for path, content in unit_files.render(target).items():
        if path.parent == target.unit_dir:
            (tmp_path / path.name).write_text(content)
    return tmp_path


def findings(scenario: str) -> list[dict]:
    """What a scenario reports that is run in a booted systemd."""
    python = f"/opt/python/bin/python{sys.version_info[0]}.{sys.version_info[1]}"
    lab = [LAB, "600", ROOT, sys.prefix, sys.base_prefix]
    done = subprocess.run(
        [*lab, python, f"/opt/src/tests/systemd/{scenario}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_daemon_and_server_tell_nobody_what_they_do(written):
    """ONNX Runtime sends no telemetry from either, whichever Python package loads it first."""
    for unit in (UNIT, SERVE_UNIT):
        [line] = [line for line in (written / unit).read_text().splitlines() if "OMP_WAIT_POLICY" in line]
        assert line.startswith("Environment=") and " ORT_DISABLE_TELEMETRY=1" in line


@needs_systemd
@pytest.mark.parametrize(("unit", "tenths"), [(UNIT, 12), (SERVE_UNIT, 10)])
def test_the_services_are_exposed_by_no_more_than_was_promised(written, unit, tenths):
    """`systemd-analyze security` on the very files that are installed: daemon 1.2, server 1.0."""
    security = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", f"--threshold={tenths}", written / unit],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    print(security.stdout.splitlines()[-1])
    assert security.returncode == 0, security.stdout.splitlines()[-1]


@needs_systemd
def test_systemd_finds_nothing_to_complain_of_in_the_units(written):
    """`systemd-analyze verify`, the socket and its service together."""
    units = [written / name for name in (UNIT, SERVE_UNIT, SOCKET_UNIT)]
    verify = subprocess.run(
        ["systemd-analyze", "verify", *units], capture_output=True, text=True, check=False
    )
    assert verify.stderr == ""


@needs_systemd
def test_a_users_systemd_finds_nothing_to_complain_of_either(tmp_path):
    """Daemon, server and socket, from a folder whose name systemd would take apart if it were not quoted."""
    folder = tmp_path / "my 100% folder"
    folder.mkdir()
    (folder / "python").symlink_to("/usr/bin/env")
    target = Target(home=folder / "home", is_user=True, python=folder / "python")
    units = []
    for path, content in unit_files.render(target).items():
        units.append(tmp_path / path.name)
        units[-1].write_text(content)
    verify = subprocess.run(
        ["systemd-analyze", "--user", "verify", *units],
        capture_output=True, text=True, check=False, env=os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)},
    )  # fmt: skip

    assert {path.name for path in units} == {UNIT, SERVE_UNIT, SOCKET_UNIT}
    assert (verify.returncode, verify.stderr) == (0, "")


@pytest.mark.parametrize(
    ("home", "argument"),
    [
        ("/srv/d", "/srv/d"),
        ("/srv/my home", '"/srv/my home"'),
        ("/srv/50%", '"/srv/50%%"'),
        ('/srv/a"b\\c$d', '"/srv/a\\"b\\\\c$$d"'),
    ],
)
def test_a_home_of_any_name_is_one_argument(home, argument):
    """Blanks, systemd's own placeholders, quotes, variables."""
    for is_user in (True, False):
        unit = unit_of(Target(home=Path(home), is_user=is_user, python=Path("/usr/bin/python3")))
        assert f"\nExecStart=/usr/bin/python3 -m daemon.cli --home {argument} run\n" in unit
    assert f"\nReadWritePaths={argument}\n".replace("$$", "$") in unit


@pytest.mark.parametrize(
    ("command", "says", "says_not"),
    [
        (
            "install",
            ["would be written", "Into your own systemd", "$DYNLORA_HOME or ./dynlora-home"],
            "removed",
        ),
        ("uninstall", ["would be removed", "From your own systemd", "users and groups stay"], "written"),
    ],
)
def test_the_help_of_each_command_speaks_of_what_that_one_does(command, says, says_not):
    """The two share their options, and not the words for them."""
    done = CliRunner().invoke(cli_systemd.systemd, [command, "--help"], terminal_width=200)
    words = " ".join(done.output.split())

    assert [part for part in says if part not in words] == []
    assert says_not not in words


def test_with_user_all_units_go_into_ones_own_systemd_and_away_again(tmp_path, monkeypatch):
    """The daemon, the server and its socket; no user is made, and nothing needs root."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    target, said = Target(home=Path("/srv/d"), is_user=True), []
    written = systemd.install(target, said.append)
    assert [path.relative_to(tmp_path).as_posix() for path in written] == [
        f"systemd/user/{name}" for name in (UNIT, SERVE_UNIT, SOCKET_UNIT)
    ]
    assert said == [["systemctl", "--user", "daemon-reload"]]
    service = (tmp_path / "systemd/user" / SERVE_UNIT).read_text()
    assert "Requires=dynlora-serve.socket" in service
    assert "--store /srv/d/serving" in service
    assert "SocketGroup" not in (tmp_path / "systemd/user" / SOCKET_UNIT).read_text()

    said.clear()
    assert systemd.uninstall(target, said.append) == written
    assert said[0] == ["systemctl", "--user", "disable", "--now", UNIT, SERVE_UNIT, SOCKET_UNIT]


def test_a_newer_systemd_gets_notify_reload_and_an_older_one_the_signal():
    """Type=notify-reload exists since 253 and needs no ExecReload."""
    old, new = (unit_of(Target(home=Path("/srv/d"), version=version)) for version in (252, 253))

    assert "Type=notify\nExecReload=/bin/kill -HUP $MAINPID\n" in old
    assert "Type=notify-reload\n" in new
    assert "ExecReload" not in new


def test_the_server_sees_what_was_published_and_nothing_that_was_dropped():
    """A user of its own, and folders with people's images hidden; with --user neither."""
    target = Target(home=Path("/srv/d"))
    unit = unit_files.render(target)[target.unit_dir / SERVE_UNIT]
    assert "User=dynlora-serve\n" in unit
    hidden = next(line for line in unit.splitlines() if line.startswith("InaccessiblePaths="))
    assert {"-/srv/d/inbox", "-/srv/d/spool", "-/srv/d/exams"} <= set(hidden.partition("=")[2].split())
    assert "ReadWritePaths" not in unit

    target = Target(home=Path("/srv/d"), is_user=True)
    unit = unit_files.render(target)[target.unit_dir / SERVE_UNIT]
    assert "User=" not in unit
    assert "LoadCredential" not in unit


def test_a_service_that_cannot_start_yet_is_tried_for_ever(written):
    """A disk that is read-only or missing for an hour must not end in a unit that systemd has given up."""
    for unit in (UNIT, SERVE_UNIT):
        lines = (written / unit).read_text().splitlines()
        assert "StartLimitIntervalSec=0" in lines
        assert "Restart=on-failure" in lines
        assert not [line for line in lines if line.startswith("StartLimitBurst")]


def test_every_place_in_the_files_is_filled():
    """For system and user, wherever the home is."""
    for target in (Target(home=Path("/srv/d")), Target(home=Path("/srv/d"), is_user=True)):
        for content in unit_files.render(target).values():
            assert unit_files._PLACE.search(content) is None


def test_an_installation_writes_its_files_runs_systemds_commands_and_is_taken_away_again(tmp_path):
    """Into another root: the commands are noted instead of run."""
    target, said = Target(home=Path("/srv/d"), root=tmp_path), []
    written = systemd.install(target, said.append)
    assert [path.relative_to(tmp_path).as_posix() for path in written] == [
        "etc/systemd/system/dynlora.service",
        "etc/systemd/system/dynlora-serve.service",
        "etc/systemd/system/dynlora-serve.socket",
        "etc/sysusers.d/dynlora.conf",
        "etc/tmpfiles.d/dynlora.conf",
    ]
    assert [command[0] for command in said] == ["systemd-sysusers", "systemd-tmpfiles", "systemctl"]
    assert "2770" in written[4].read_text()

    said.clear()
    assert systemd.uninstall(target, said.append) == written
    assert said[0] == ["systemctl", "disable", "--now", UNIT, SERVE_UNIT, SOCKET_UNIT]
    with pytest.raises(SystemdError, match="nothing is installed"):
        systemd.uninstall(target, said.append)


def test_a_command_of_systemd_that_fails_says_why_in_its_own_words():
    """Not a traceback of ours."""
    with pytest.raises(SystemdError, match="No such file"):
        systemd.run_command(["ls", "/no/such/place"])
    with pytest.raises(SystemdError, match="no-such-program failed"):
        systemd.run_command(["no-such-program"])


def test_a_python_that_the_unit_would_not_see_is_warned_of(tmp_path):
    """Also where the environment only links to it."""
    link = tmp_path.parent / "python"
    assert unit_files.cautions(Target(home=Path("/srv/d"), python=Path("/usr/bin/python3"))) == []
    [sentence] = unit_files.cautions(Target(home=Path("/srv/d"), python=Path("/root/venv/bin/python")))
    assert "/root" in sentence
    assert unit_files.cautions(Target(home=Path("/srv/d"), python=link, is_user=True)) == []


def test_a_dry_run_prints_what_would_be_written_and_changes_nothing(tmp_path):
    """As text to look at, and as JSON."""
    command = [sys.executable, "-m", "daemon.cli", "systemd", "install", "--dry-run", "--root", str(tmp_path)]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "[Service]" in text
    document = json.loads(
        subprocess.run([*command, "--json"], cwd=ROOT, capture_output=True, check=True).stdout
    )
    assert sorted(Path(path).name for path in document["files"]) == [
        SERVE_UNIT,
        SOCKET_UNIT,
        "dynlora.conf",
        "dynlora.conf",
        UNIT,
    ]
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_for_a_user_prints_the_three_units_and_how_they_outlive_a_logout(tmp_path):
    """For the home that --home names, whatever its name."""
    command = [sys.executable, "-m", "daemon.cli", "--home", str(tmp_path / "my home")]
    command += ["systemd", "install", "--user", "--dry-run", "--json"]
    environment = os.environ | {"XDG_CONFIG_HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, env=environment)
    document = json.loads(done.stdout)

    folder = tmp_path / "systemd/user"
    assert list(document["files"]) == [str(folder / name) for name in (UNIT, SERVE_UNIT, SOCKET_UNIT)]
    assert f'--home "{tmp_path}/my home" run\n' in document["files"][str(folder / UNIT)]
    lingers = (Path("/var/lib/systemd/linger") / pwd.getpwuid(os.getuid()).pw_name).exists()
    assert any("loginctl enable-linger" in sentence for sentence in document["warnings"]) != lingers
    assert list(tmp_path.iterdir()) == []


@pytest.mark.nightly
@pytest.mark.timeout(620)
@pytest.mark.skipif(why_no_lab() is not None, reason=str(why_no_lab()))
def test_a_whole_life_under_a_real_systemd():
    """Ready, drops by another user, reload, restart in mid-training, watchdog, stop: in a booted systemd."""
    found = findings("scenario.py")
    steps = {entry["step"]: entry for entry in found}

    assert (steps["start"]["active"], steps["start"]["status"]) == ("active", "idle; serving version 0")
    drops = [entry for entry in found if entry["step"] == "drop"]
    assert {"cp -r", "mv"} <= {entry["way"] for entry in drops}
    assert {entry["outcome"] for entry in drops} <= {"published", "held"}
    assert any(
        "step" in status and "serving version" in status for entry in drops for status in entry["status"]
    )
    assert "rights" in steps["private"]["sentence"]
    assert steps["reload"]["changed"] == ["learning.steps"]
    assert steps["restart"]["interrupted"] == 1
    assert steps["restart"]["seconds"] < 100
    assert steps["watchdog"]["told"]
    assert steps["outlast"]["meanwhile"] in ("activating", "active"), "systemd has not given up"
    assert "serving version" in steps["outlast"]["status"]
    assert steps["stop"]["seconds"] < 60
    assert (steps["stop"]["result"], steps["stop"]["published"], steps["stop"]["traceback"]) == (
        "success",
        True,
        False,
    )
    assert steps["uninstall"]["left"] == []
    assert steps["uninstall"]["home"]


@pytest.mark.nightly
@pytest.mark.timeout(620)
@pytest.mark.skipif(why_no_lab() is not None, reason=str(why_no_lab()))
def test_the_servers_life_under_a_real_systemd():
    """A token as credential, a version published beside it, restarts without a lost request, hang, stop."""
    steps = {entry["step"]: entry for entry in findings("serving.py")}

    assert (steps["start"]["active"], steps["start"]["status"]) == ("active", "serving version 0")
    assert steps["start"]["codes"] == {"without a token": 401, "with it": 200}
    looks = {"serving/current/manifest.json": "read", "inbox": "refused", "spool": "refused"}
    assert steps["sight"]["looks"] == looks
    assert (steps["follow"]["live"], steps["follow"]["code"]) == (1, 200)
    assert steps["restart"]["failed"] == []
    assert steps["restart"]["answers"] > 60
    assert steps["restart"]["processes"] == 4
    assert steps["watchdog"] == {"step": "watchdog", "told": True, "code": 200, "is_new": True}
    assert steps["on demand"] == {"step": "on demand", "before": "inactive", "code": 200}
    assert steps["stop"]["seconds"] < 40
    assert (steps["stop"]["result"], steps["stop"]["traceback"]) == ("success", False)
    assert steps["stop"]["drained"]
