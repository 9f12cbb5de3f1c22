"""Checkpoints by the wall clock, and a stop before the time limit."""

from __future__ import annotations

from types import SimpleNamespace

from nemo_aapo.checkpoint.schedule import SaveSchedule
from nemo_aapo.config.schema import Checkpoint


class Clock:
    """A wall clock that the test turns."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def schedule(clock: Clock, save_interval_s=None, max_time_s=None, elapsed=0.0, keep_best=None) -> SaveSchedule:
    settings = Checkpoint(
        save_interval=50,
        save_interval_s=save_interval_s,
        max_time_s=max_time_s,
        async_save=True,
        keep_last=2,
        keep_best=keep_best,
        resume="auto",
    )
    return SaveSchedule(settings, clock, elapsed)


def test_a_checkpoint_is_due_once_its_interval_has_passed_and_not_again_right_after():
    clock = Clock()
    by_time = schedule(clock, save_interval_s=60)
    clock.now += 59
    assert not by_time.time_for_a_checkpoint()
    clock.now += 1
    assert by_time.time_for_a_checkpoint()
    by_time.saved()
    assert not by_time.time_for_a_checkpoint()


def test_time_is_up_while_the_longest_step_so_far_still_fits():
    clock = Clock()
    limited = schedule(clock, max_time_s=100)
    for seconds in (10, 30, 10):
        clock.now += seconds
        limited.step_done()
        assert not limited.time_is_up(save_s=0.0)  # 50 gone, and 30 may come
    clock.now += 15
    limited.step_done()
    assert not limited.time_is_up(save_s=0.0)  # 65 gone: a step of 30 would end at 95
    assert limited.time_is_up(save_s=6.0)  # and be saved at 101


def test_what_went_by_before_the_first_step_counts_and_is_no_part_of_a_step():
    clock = Clock()
    limited = schedule(clock, max_time_s=100, elapsed=40)  # imports, loading
    clock.now += 20  # reference rewards
    limited.step_begins()
    clock.now += 15
    limited.step_done()
    assert not limited.time_is_up(save_s=0.0)  # 75 gone, and 15 may come
    clock.now += 11
    assert limited.time_is_up(save_s=0.0)


def test_without_settings_the_clock_decides_nothing():
    clock = Clock()
    free = schedule(clock)
    clock.now += 1e9
    free.step_done()
    assert not free.time_is_up(save_s=0.0)
    assert not free.time_for_a_checkpoint()


def test_each_validation_is_saved_where_the_best_by_its_figures_is_kept():
    trainer = SimpleNamespace(val_check_interval=20)
    names = (None, "reward/mean", "validation/accuracy_greedy")
    kept = {best: schedule(Clock(), keep_best=best).intervals(trainer) for best in names}
    assert kept == dict(zip(names, [(50, 0), (50, 0), (50, 20)], strict=True))
