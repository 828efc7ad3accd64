"""A run on one machine: its folder, its processes, and the supervisor that keeps them alive."""

from deploy.local.environments import check_environments
from deploy.local.folder import RunBusyError, RunLock, create_run, holder, launcher_of, newest_run, note_launcher
from deploy.local.plan import check_gpus, plan_run
from deploy.local.supervisor import EXIT_INTERRUPTED, Supervisor

__all__ = [
    "EXIT_INTERRUPTED",
    "RunBusyError",
    "RunLock",
    "Supervisor",
    "check_environments",
    "check_gpus",
    "create_run",
    "holder",
    "launcher_of",
    "newest_run",
    "note_launcher",
    "plan_run",
]
