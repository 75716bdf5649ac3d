"""Free memory inside a container: the tightest limit of its control groups, of either version."""

from __future__ import annotations

import torch

from dither.clipping.cgroups import left_by_cgroups
from dither.clipping.machine import free_memory


def group(place, version, limit, used, cache=0):
    limit_name, used_name = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        2: ("memory.max", "memory.current"),
    }[version]
    place.mkdir(parents=True, exist_ok=True)
    (place / limit_name).write_text(f"{limit}\n")
    (place / used_name).write_text(f"{used}\n")
    name = "total_inactive_file" if version == 1 else "inactive_file"
    (place / "memory.stat").write_text(f"anon 5\n{name} {cache}\nactive_file 7\n")


def test_version_2(tmp_path):
    membership = tmp_path / "membership"
    membership.write_text("0::/jobs/mine\n")
    assert left_by_cgroups(membership, tmp_path) == float("inf")
    group(tmp_path / "jobs/mine", 2, "max", 300)
    assert left_by_cgroups(membership, tmp_path) == float("inf")
    group(tmp_path / "jobs/mine", 2, 1000, 300, cache=100)  # cached files are given up
    assert left_by_cgroups(membership, tmp_path) == 800
    group(tmp_path / "jobs", 2, 900, 700)  # shared with other groups
    assert left_by_cgroups(membership, tmp_path) == 200
    group(tmp_path / "jobs", 2, 600, 700)
    assert left_by_cgroups(membership, tmp_path) == 0


def test_inside_a_container_the_root_is_its_own(tmp_path):
    membership = tmp_path / "membership"
    group(tmp_path, 2, 1000, 400)
    for path in ("/", "/../../docker/abc"):
        membership.write_text(f"0::{path}\n")
        assert left_by_cgroups(membership, tmp_path) == 600
    membership.write_text("9:cpu,cpuacct:/\n4:memory:/docker/of-the-host\n0::/\n")
    group(tmp_path / "memory", 1, 500, 450, cache=50)
    assert left_by_cgroups(membership, tmp_path) == 100


def test_version_1_without_a_limit_is_not_the_tightest(tmp_path):
    membership = tmp_path / "membership"
    membership.write_text("4:memory:/user\n")
    group(tmp_path / "memory/user", 1, 2**63 - 4096, 100)
    assert left_by_cgroups(membership, tmp_path) > 2**62


def test_here_it_is_a_number():
    assert left_by_cgroups() > 0
    assert 0 < free_memory(torch.device("cpu")) <= left_by_cgroups()
