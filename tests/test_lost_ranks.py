"""A rank that is killed from outside, in the middle of a case, costs nothing: no finding, no hang, all is judged."""

import os
import signal
import threading

import psutil

from fuzz import known
from fuzz.case import Case
from fuzz.trial import Trials
from toy_models.spec import PPO, Batch, Layout, MoEModel

LONG = Case(
    layout=Layout(world=2, ep=2),
    model=MoEModel(layers=2, experts=4, top_k=2),
    batch=Batch(rows=24, prompt=6, response=5),
    ppo=PPO(mini_batches=2, epochs=2),
)


def test_a_rank_killed_from_outside_is_no_finding() -> None:
    trials = Trials(plants=known.mends())
    try:
        whole = trials.judge(LONG)
        victim = trials._pools[2]._pool.processes[1].pid
        killer = threading.Timer(0.3, os.kill, (victim, signal.SIGKILL))
        killer.start()
        verdict = trials.judge(LONG)
        assert killer.finished.is_set() and not psutil.pid_exists(victim)
    finally:
        trials.close()
    assert whole.violation is None and not whole.doubts
    assert verdict.violation is None and verdict.counts == whole.counts
    assert verdict.doubts == ["a rank was lost once, and not when the case ran again"]
