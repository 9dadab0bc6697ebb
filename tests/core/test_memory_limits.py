"""How much memory is left, on control groups that exist only as files."""

from __future__ import annotations

import mmap
from pathlib import Path

from expertier.planning.memory import MemoryLimit, memory_left, memory_limits, process_memory

GIB = 1 << 30


def v2_group(root: Path, path: str, limit: str, current: int, **stat: int) -> Path:
    group = root / "sys/fs/cgroup" / path
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.max").write_text(f"{limit}\n")
    (group / "memory.current").write_text(f"{current}\n")
    (group / "memory.stat").write_text("".join(f"{key} {value}\n" for key, value in stat.items()))
    return group


def v1_group(root: Path, path: str, limit: int, usage: int, **stat: int) -> Path:
    group = root / "sys/fs/cgroup/memory" / path
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (group / "memory.usage_in_bytes").write_text(f"{usage}\n")
    (group / "memory.stat").write_text("".join(f"{key} {value}\n" for key, value in stat.items()))
    return group


def groups(limits: list[MemoryLimit]) -> list[MemoryLimit]:
    return [limit for limit in limits if limit.source != "machine"]


def test_without_control_groups_the_machine_is_the_limit(tmp_path: Path) -> None:
    (only,) = memory_limits(tmp_path, "0::/\n")
    assert only.source == "machine"
    assert 0 < only.left <= only.limit
    assert memory_limits(tmp_path)[0].source == "machine", "a kernel without control groups has no such file"


def test_page_cache_that_can_be_dropped_counts_as_free(tmp_path: Path) -> None:
    group = v2_group(tmp_path, "job", str(4 * GIB), 3 * GIB, anon=GIB, active_file=GIB, inactive_file=GIB // 2)
    (bound,) = groups(memory_limits(tmp_path, "0::/job\n"))
    assert bound == MemoryLimit(source=str(group), limit=4 * GIB, left=GIB + GIB + GIB // 2)


def test_every_group_above_counts_and_the_tightest_comes_first(tmp_path: Path) -> None:
    v2_group(tmp_path, "", "max", 50 * GIB)
    outer = v2_group(tmp_path, "outer", str(2 * GIB), GIB + GIB // 2)
    inner = v2_group(tmp_path, "outer/inner", str(8 * GIB), GIB)
    v2_group(tmp_path, "outer/inner/leaf", "max", GIB)
    found = groups(memory_limits(tmp_path, "0::/outer/inner/leaf\n"))
    assert [bound.source for bound in found] == [str(outer), str(inner)]
    assert [bound.left for bound in found] == [GIB // 2, 7 * GIB]
    everything = memory_limits(tmp_path, "0::/outer/inner/leaf\n")
    assert everything == sorted(everything, key=lambda bound: bound.left)


def test_inside_a_container_the_mount_point_is_the_group(tmp_path: Path) -> None:
    mount = v2_group(tmp_path, "", str(GIB), GIB // 4)
    for path in ("/", "/docker/0123456789abcdef", "/../../elsewhere"):
        (bound,) = groups(memory_limits(tmp_path, f"0::{path}\n"))
        assert (bound.source, bound.left) == (str(mount), GIB - GIB // 4)


def test_a_group_over_its_limit_has_nothing_left(tmp_path: Path) -> None:
    v2_group(tmp_path, "job", str(GIB), 2 * GIB)
    assert memory_limits(tmp_path, "0::/job\n")[0].left == 0


def test_version_1_groups_are_found_by_their_memory_controller(tmp_path: Path) -> None:
    v1_group(tmp_path, "", 9223372036854771712, 10 * GIB)
    job = v1_group(tmp_path, "slice/job", 3 * GIB, 2 * GIB, total_inactive_file=GIB // 2, total_active_file=GIB // 4)
    membership = "12:cpu,cpuacct:/other\n11:memory:/slice/job\n1:name=systemd:/slice/job\n"
    (bound,) = groups(memory_limits(tmp_path, membership))
    assert bound == MemoryLimit(source=str(job), limit=3 * GIB, left=GIB + GIB // 2 + GIB // 4)


def test_both_versions_may_be_mounted_side_by_side(tmp_path: Path) -> None:
    v1 = v1_group(tmp_path, "job", 3 * GIB, GIB)
    unified = tmp_path / "sys/fs/cgroup/unified/job"
    unified.mkdir(parents=True)
    (unified / "memory.max").write_text(f"{GIB}\n")
    (unified / "memory.current").write_text("0\n")
    (unified / "memory.stat").write_text("")
    found = groups(memory_limits(tmp_path, "4:memory:/job\n0::/job\n"))
    assert [bound.source for bound in found] == [str(unified), str(v1)]


def test_a_bound_from_which_the_kernel_slows_a_group_down_counts_as_its_limit(tmp_path: Path) -> None:
    for name, most, high, limit in (("a", "max", 2 * GIB, 2 * GIB), ("b", str(GIB), 2 * GIB, GIB)):
        group = v2_group(tmp_path, name, most, GIB // 2)
        (group / "memory.high").write_text(f"{high}\n")
        (bound,) = groups(memory_limits(tmp_path, f"0::/{name}\n"))
        assert bound == MemoryLimit(source=str(group), limit=limit, left=limit - GIB // 2)
    (tmp_path / "sys/fs/cgroup/b/memory.high").write_text("max\n")
    assert groups(memory_limits(tmp_path, "0::/b\n"))[0].limit == GIB


def test_a_path_with_colons_is_read_whole(tmp_path: Path) -> None:
    group = v2_group(tmp_path, "pod:one:two", str(GIB), 0)
    (bound,) = groups(memory_limits(tmp_path, "0::/pod:one:two\n"))
    assert bound.source == str(group)


def test_a_group_without_a_memory_controller_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "sys/fs/cgroup/job").mkdir(parents=True)
    assert groups(memory_limits(tmp_path, "0::/job\n")) == []


def test_membership_is_read_from_the_process_table(tmp_path: Path) -> None:
    group = v2_group(tmp_path, "job", str(GIB), 0)
    table = tmp_path / "proc/self/cgroup"
    table.parent.mkdir(parents=True)
    table.write_text("0::/job\n")
    assert groups(memory_limits(tmp_path))[0].source == str(group)


def test_on_this_machine_something_is_left_and_the_process_knows_its_size() -> None:
    assert memory_left().left > 0
    memory = process_memory()
    assert 0 < memory.anonymous <= memory.committed
    assert memory.untouched == memory.committed - memory.anonymous


def test_what_is_allocated_but_not_touched_is_promised_memory() -> None:
    size = 64 << 20
    before = process_memory()
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
        promised = process_memory()
        assert promised.committed - before.committed >= size // 2
        assert promised.untouched - before.untouched >= size // 2
        for start in range(0, size, mmap.PAGESIZE):
            block[start] = 1
        assert process_memory().anonymous - before.anonymous >= size // 2
