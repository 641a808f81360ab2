"""What the system tells, read from files written by hand; how busy other programs keep a machine."""

from pathlib import Path

import pytest

from quasar_core import system
from quasar_core.system import Load, LoadMeter, Usage, load_between

# user nice system idle iowait irq softirq steal
STAT = """cpu  1 1 1 1 1 1 1 1 0 0
cpu0 100 0 50 800 50 0 0 0 0 0
cpu1 300 0 0 500 0 0 0 200 0 0
cpu7 9 9 9 9 9 9 9 9 9 9
intr 12
"""


def test_core_seconds_are_those_of_the_usable_cores_and_what_is_stolen_counts_as_work() -> None:
    tick = 1 / system.os.sysconf("SC_CLK_TCK")
    there, worked = system._core_seconds(STAT, {0, 1})
    assert (there, worked) == (pytest.approx(2000 * tick), pytest.approx((150 + 500) * tick))


def test_counters_of_no_core_are_none() -> None:
    with pytest.raises(ValueError, match="no cores"):
        system._core_seconds("cpu0 0 0 0 0 0 0 0 0\n", {0})


@pytest.mark.parametrize(
    ("worked", "own", "others"),
    [
        (0.0, 0.0, 0.0),
        (2.0, 2.0, 0.0),  # all of it this process's
        (4.0, 2.0, 0.5),
        (4.0, 0.0, 1.0),
        (1.0, 1.2, 0.0),  # the two clocks differ a little
    ],
)
def test_the_load_is_what_others_took(worked: float, own: float, others: float) -> None:
    assert load_between(Usage(0, 0, 0, 0), Usage(2, 4, worked, own)).others == others


def test_within_a_tick_nothing_is_known() -> None:
    assert load_between(Usage(1, 4, 2, 2), Usage(1, 4, 2, 2)) == Load(None)


def test_a_tenth_of_the_cores_makes_a_machine_busy() -> None:
    assert not Load(0.1).is_busy
    assert Load(0.11).is_busy
    assert not Load(None).is_busy
    assert Load(0.53).describe() == "other programs took 53 % of the cores"


@pytest.fixture
def moments(monkeypatch: pytest.MonkeyPatch) -> list[Usage]:
    """The moments that are read, in order."""
    given: list[Usage] = []
    monkeypatch.setattr(system, "read_usage", lambda: given.pop(0))
    monkeypatch.setattr(LoadMeter, "_moments", system.deque([Usage(0, 0, 0, 0)], maxlen=4))
    return given


def test_a_meter_tells_the_time_since_it_was_made(moments: list[Usage]) -> None:
    moments += [Usage(10, 20, 5, 5), Usage(12, 24, 7, 5)]
    assert LoadMeter().read() == Load(0.5)


def test_of_a_moment_too_short_it_tells_a_longer_one(moments: list[Usage]) -> None:
    moments += [Usage(10, 20, 5, 5), Usage(10.01, 20.02, 5, 5)]
    assert LoadMeter().read() == Load(0.0)
    moments += [Usage(10.1, 20.2, 10.2, 5), Usage(10.11, 20.22, 10.2, 5)]
    assert LoadMeter().read().others == pytest.approx(5.2 / 20.22)  # since the first moment: 0.1 s ago is too near


def test_without_counters_the_load_average_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(system, "STAT", tmp_path / "none")
    monkeypatch.setattr(system, "usable_cores", lambda: {0, 1, 2, 3})
    monkeypatch.setattr(system.os, "getloadavg", lambda: (3.0, 0, 0))
    monkeypatch.setattr(system, "_counted", [])
    times = iter([100.0, 102.0])
    monkeypatch.setattr(system.time, "monotonic", lambda: next(times))
    monkeypatch.setattr(system.os, "times", lambda: (1.0, 0.0, 0.0, 0.0, 0.0))
    assert load_between(system.read_usage(), system.read_usage()).others == pytest.approx(0.75)


def test_this_process_does_not_make_its_own_machine_busy() -> None:
    """Real counters: work of its own is taken off, whatever else runs here."""
    usage = system.read_usage()
    assert 0 <= usage.worked <= usage.there
    assert usage.own > 0


def test_the_processor_is_read_once_for_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("model name\t: A Processor\nflags\t: avx2 avx512f\ncpu MHz\t: 2100.5\n")
    monkeypatch.setattr(system, "CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(system, "CPU_FOLDERS", tmp_path)
    assert system.processor_name.__wrapped__() == "A Processor"
    assert system.processor_flags.__wrapped__() == {"avx2", "avx512f"}
    assert system.frequency() == 2100.5
    monkeypatch.setattr(system, "usable_cores", lambda: {0, 1})
    for core, kilohertz in ((0, 2_000_000), (1, 3_000_000)):
        (tmp_path / f"cpu{core}" / "cpufreq").mkdir(parents=True)
        (tmp_path / f"cpu{core}" / "cpufreq" / "scaling_cur_freq").write_text(f"{kilohertz}\n")
    assert system.frequency() == 2500.0


def test_where_nothing_is_told_nothing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("CPU_INFO", "CPU_FOLDERS", "MEMORY_INFO"):
        monkeypatch.setattr(system, name, tmp_path / "none")
    assert system.processor_flags.__wrapped__() == frozenset()
    assert system.processor_name.__wrapped__()
    assert (system.frequency(), system.free_memory()) == (None, None)
