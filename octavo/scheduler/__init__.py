"""Decides what every step computes: queues and Scheduler. No torch."""

from octavo.scheduler.limits import SchedulerLimits
from octavo.scheduler.scheduler import Scheduler
from octavo.scheduler.sequence import Sequence

__all__ = ["Scheduler", "SchedulerLimits", "Sequence"]
