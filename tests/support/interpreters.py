"""The Pythons of this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

#: What an interpreter has to be able to do. It says which one it is.
PROBE = "import ensurepip, sqlite3, sys; print('%d.%d' % sys.version_info[:2])"


def find(version: str, environ: Mapping[str, str] = os.environ) -> Path | None:
    """Return a Python of that version (``3.12``) that can make a virtual environment, or None.

    It is looked for on PATH, in pyenv, and at last it may be the one that runs this.
    """
    for candidate in _candidates(version, environ):
        # A shim of pyenv exists for each version that is installed, and fails for those that are not active.
        found = subprocess.run([candidate, "-c", PROBE], capture_output=True, text=True, check=False)
        if found.returncode == 0 and found.stdout.strip() == version:
            return candidate
    return None


def _candidates(version: str, environ: Mapping[str, str]) -> Iterator[Path]:
    for directory in environ.get("PATH", "").split(os.pathsep):
        if found := shutil.which(f"python{version}", path=directory):
            yield Path(found)
    pyenv = Path(environ.get("PYENV_ROOT") or Path(environ.get("HOME", "/"), ".pyenv"))
    yield from sorted(pyenv.glob(f"versions/{version}.*/bin/python"), reverse=True)
    yield Path(sys.executable)
