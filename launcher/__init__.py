"""Schedules and shows: submit, attempt, watch, runs, logs, cancel, board. Never imports torch, except in a job."""
