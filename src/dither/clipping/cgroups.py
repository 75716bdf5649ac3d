"""How much memory the control groups of this process leave it: a container's limit is not the machine's.

Read as https://docs.kernel.org/admin-guide/cgroup-v2.html (memory.max, memory.current, memory.stat) and
https://docs.kernel.org/admin-guide/cgroup-v1/memory.html describe it. A group is bound by its ancestors' limits too.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class _Names:
    """A version's files: the limit, what is used, and what of memory.stat the kernel would give up at once."""

    limit: str
    used: str
    cache: str


_V1 = _Names("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Names("memory.max", "memory.current", "inactive_file")


def left_by_cgroups(membership: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes that the tightest limit leaves; infinite without one.

    Args:
        membership: the kernel's list of this process's groups.
        mount: where the groups are mounted; the memory controller of version 1 in `memory` below.
    """
    least = float("inf")
    with suppress(OSError):
        for line in membership.read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if "memory" in controllers.split(","):
                least = min(least, _least(mount / "memory", path, _V1))
            elif number == "0" and not controllers:
                least = min(least, _least(mount, path, _V2))
    return least


def _least(root: Path, path: str, names: _Names) -> float:
    """Of a group and its ancestors; inside a container these may be mounted as the root alone."""
    parts = [part for part in path.split("/") if part not in ("", "..")]
    return min(_left(root.joinpath(*parts[:count]), names) for count in range(len(parts) + 1))


def _left(group: Path, names: _Names) -> float:
    with suppress(OSError, ValueError):  # "max", or no such group here
        limit, used = int((group / names.limit).read_text()), int((group / names.used).read_text())
        return float(max(0, limit - max(0, used - _cache(group, names))))
    return float("inf")


def _cache(group: Path, names: _Names) -> int:
    with suppress(OSError, ValueError):
        for line in (group / "memory.stat").read_text().splitlines():
            if line.startswith(f"{names.cache} "):
                return int(line.split()[1])
    return 0
