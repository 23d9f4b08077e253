"""Tests that every function of an algorithm passes; for plug-ins' authors, too."""

from polyturn.trainer.battery.invariances import BatteryFailure
from polyturn.trainer.battery.kit import Case, cases, checks, run_battery, run_check
from polyturn.trainer.battery.ranks import check_over_ranks

__all__ = ["BatteryFailure", "Case", "cases", "check_over_ranks", "checks", "run_battery", "run_check"]
