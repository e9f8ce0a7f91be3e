"""Which file systems a database may lie on."""

from __future__ import annotations

import re
from pathlib import Path

#: File systems over a network, as Linux names them. Their locks and shared memory are not those that a write-ahead log
#: needs: see https://www.sqlite.org/wal.html ("does not work over a network filesystem"). "9p" and "virtiofs" share a
#: folder of a host with a virtual machine.
NETWORK = frozenset(
    (
        *("nfs", "nfs4", "lustre", "wekafs", "gpfs", "beegfs", "beegfs_nodev", "ceph", "glusterfs", "panfs"),
        *("pvfs2", "orangefs", "cifs", "smb3", "smbfs", "afs", "9p", "virtiofs", "vboxsf", "ocfs2", "gfs2"),
    )
)
#: Of "fuse.NAME" these are local.
_LOCAL_FUSE = frozenset(("fuse.fuseblk", "fuse.ntfs", "fuse.overlayfs", "fuse.fuse-overlayfs"))
_MOUNTS = Path("/proc/self/mountinfo")


def network_file_system(folder: Path, mounts: Path = _MOUNTS) -> str | None:
    """The kind of network file system that the folder lies on; None for a local one, or if nothing tells.

    mounts: a file as Linux writes /proc/self/mountinfo.
    """
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    folder, found, longest = folder.resolve(), None, -1
    for line in lines:
        fields, _, rest = line.partition(" - ")
        names = fields.split()
        if len(names) < 5 or not rest.split():
            continue
        point = Path(_unescaped(names[4]))
        # Of two mounts at one point, the later one hides the other.
        if (point == folder or point in folder.parents) and len(point.parts) >= longest:
            found, longest = rest.split()[0], len(point.parts)
    if found is None:
        return None
    fuse = found.startswith("fuse.") and found not in _LOCAL_FUSE
    return found if found in NETWORK or fuse else None


def _unescaped(text: str) -> str:
    """Blanks in mountinfo are octal: \\040."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)
