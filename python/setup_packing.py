"""What setup.py packs into a wheel and into an sdist. This file is part of the sdist, and of no wheel."""

from __future__ import annotations

import gzip
import io
import os
import shutil
import tarfile
from pathlib import Path

from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist


class BuildModules(build_py):
    """Empties build/lib first. All files there go into the wheel, even modules that have been deleted since."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "gemma_norm", ignore_errors=True)
        super().run()


class PlatformWheel(bdist_wheel):
    """Tags the wheel py3-none-<platform>: it has native libraries, but none that depends on the Python version."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class SourceArchive(sdist):
    """Packs the same files into the same bytes: without the times, owners and modes of this checkout.

    The time of all is SOURCE_DATE_EPOCH, in seconds since 1970, or else 1980, the first that a wheel can hold.
    """

    def run(self) -> None:
        super().run()
        time = int(os.environ.get("SOURCE_DATE_EPOCH", 315532800))

        def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
            member.mtime, member.uid, member.gid, member.uname, member.gname = time, 0, 0, "", ""
            member.pax_headers = {}  # which have the time once more, in fractions of a second
            member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            return member

        for name in filter(lambda name: name.endswith(".tar.gz"), self.archive_files):
            packed = io.BytesIO()
            with tarfile.open(name) as old, tarfile.open(fileobj=packed, mode="w") as new:
                for member in sorted(old.getmembers(), key=lambda member: member.name):
                    new.addfile(plain(member), old.extractfile(member) if member.isfile() else None)
            with open(name, "wb") as file, gzip.GzipFile("", "wb", mtime=time, fileobj=file) as archive:
                archive.write(packed.getvalue())
