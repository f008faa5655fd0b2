"""Decides what every step computes: queues and Scheduler. No torch."""

from octavo.scheduler.scheduler import Scheduler, SchedulerLimits
from octavo.scheduler.sequence import Sequence

__all__ = ["Scheduler", "SchedulerLimits", "Sequence"]
