"""The comparison of two commits on a CPU: turns, ratios, and work that is done a turn at a time."""
import io

import pytest
from conftest import ROOT, load_script

from adcam.pipeline import load_result

cpu = load_script(ROOT / "tools/bench/cpu.py")


class Fake:
    "A side whose turns take what they are told to"

    def __init__(self, name, times, log):
        self.name, self.times, self.log = name, iter(times), log

    def begin(self, row): self.log.append(f"{self.name} begins")

    def tell(self, word): self.log.append(f"{self.name} {word}s")

    def turn(self):
        self.log.append(self.name)
        return next(self.times)


def test_sides_change_who_is_first_and_the_first_turns_are_not_counted():
    log = []
    pairs = cpu.in_turns("row", [Fake("a", [9, 9, 1, 2], log), Fake("b", [9, 9, 3, 4], log)], seconds=0, least=2)
    assert pairs == [(1, 3), (2, 4)]
    assert log == ["a begins", "b begins", *"baabbaab", "a stops", "b stops"]


@pytest.mark.parametrize("after, ratio, paired, ok", [
    ([1.02, 2.04, 3.06], 1.02, 1.02, True),
    ([1.00, 2.20, 3.30], 1.00, 1.10, False),     # the fastest turns alone would hide it
    ([1.10, 2.00, 3.00], 1.10, 1.00, False)])
def test_both_ratios_must_reach_the_goal(after, ratio, paired, ok):
    r = cpu.compared("row", list(zip([1., 2., 3.], after)))
    assert (r["ratio"], r["paired_ratio"], r["ok"]) == (ratio, paired, ok)


def test_work_is_done_a_turn_at_a_time_until_it_is_stopped(monkeypatch):
    told, words = io.StringIO(), io.StringIO("go\ngo\nstop\n")
    monkeypatch.setattr("sys.stdin", words)
    with pytest.raises(cpu.Ended):
        cpu.WORK["random walk, 2 maps of 94x125, 2^8 steps"](cpu.Turns(told))
    begin, *turns = map(float, told.getvalue().split())
    assert begin == 0 and len(turns) == 2 and min(turns) > 0


def test_a_commit_that_is_not_here_is_named(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["cpu.py", "--before", "no-such-commit"])
    with pytest.raises(SystemExit, match="2"):
        cpu.main()
    assert "no commit no-such-commit here" in capsys.readouterr().err


def test_the_committed_comparison_has_every_row():
    assert [r["name"] for r in load_result("cpu", ROOT / "results/bench")["rows"]] == list(cpu.WORK)
