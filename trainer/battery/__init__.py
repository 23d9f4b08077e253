"""Tests that every function of an algorithm passes; for plug-ins' authors, too."""

from polyturn.trainer.battery.failures import BatteryFailure
from polyturn.trainer.battery.kit import Case, cases, checks, run_battery, run_check

__all__ = ["BatteryFailure", "Case", "cases", "checks", "run_battery", "run_check"]
