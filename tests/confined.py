"""Commands as a service has them: a user without rights, and a file system that cannot be written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

MEMORY = "/dev/shm"
_USER = "54321"
"""One that no file belongs to, and that the system has no name for."""
_READ_ONLY = """
mount --make-rprivate /
while [ "$1" != -- ]; do
    mount --bind "$1" "$1" && mount --options remount,bind,ro "$1" || exit 125
    shift
done
shift
exec "$@"
"""


def as_nobody(*command: str) -> list[str]:
    """The command, as a user who owns nothing."""
    return ["setpriv", f"--reuid={_USER}", f"--regid={_USER}", "--clear-groups", *command]


def read_only(*command: str, folders: tuple[str, ...] = ("/",)) -> list[str]:
    """The command, where these file systems cannot be written."""
    return ["unshare", "--mount", "sh", "-c", _READ_ONLY, "sh", *folders, "--", *command]


def _can_confine() -> bool:
    if os.geteuid() != 0 or not all(map(shutil.which, ("setpriv", "unshare", "mount"))):
        return False
    tried = read_only(*as_nobody(sys.executable, "-c", "import lattice_serve.engine"), folders=("/", MEMORY))
    return subprocess.run(tried, capture_output=True).returncode == 0


needs_confinement = pytest.mark.skipif(not _can_confine(), reason="needs root, who may mount and become another user")
