"""Where a run log lies: network file systems, and folders that may not be written."""

import pytest
from heads import snapshot

from hnf_attention.diagnosis import diagnose
from hnf_attention.run_log import RunLog, RunLogWriter, database, places


def write(path, steps):
    out = RunLogWriter(path)
    for step in steps:
        out.write(diagnose([snapshot(step, a={})]))
    out.close()


def test_a_log_is_read_where_no_file_can_be_made_beside_it(tmp_path, monkeypatch):
    opened = database._opened_to_read

    def refused(path, how):  # as SQLite refuses the folder of somebody else, unless root asks
        if how == "mode=ro":
            raise OSError("attempt to write a readonly database")
        return opened(path, how)

    monkeypatch.setattr(database, "_opened_to_read", refused)
    path = tmp_path / "run.db"
    write(path, [1])
    with RunLog(path) as log:
        assert log.steps.tolist() == [1]
        write(tmp_path / "longer.db", [1, 2])
        (tmp_path / "longer.db").replace(path)
        log.refresh()
        assert log.steps.tolist() == [1, 2]
    (tmp_path / "run.db-wal").write_bytes(b"of a process that writes")
    with pytest.raises(OSError, match="readonly"):
        RunLog(path)


MOUNTS = r"""22 1 8:1 / / rw - ext4 /dev/sda1 rw
40 22 0:33 / /net rw shared:1 - nfs4 server:/x rw
41 40 8:2 / /net/local\040disk rw - xfs /dev/sdb rw
42 22 0:44 / /fuse rw - fuse.sshfs host: rw
44 22 0:45 / /daten/größe\040π rw - nfs server:/y rw
43 22 0:45 / /ntfs rw - fuse.ntfs /dev/sdc rw
broken line
"""


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("/home", None),
        ("/net/runs/a", "nfs4"),
        ("/net/local disk/a", None),
        ("/network", None),
        ("/daten/größe π/a", "nfs"),
        ("/fuse/x", "fuse.sshfs"),
        ("/ntfs/x", None),
    ],
)
def test_network_file_systems_are_known(tmp_path, folder, kind):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS)
    assert places.network_file_system(places.Path(folder), mounts) == kind
    assert places.network_file_system(places.Path(folder), tmp_path / "none") is None
