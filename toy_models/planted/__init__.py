"""Bugs to re-introduce and bugs to mend: functions called once in each rank, before process groups exist."""
