"""Drills: faults put on small runs of one's own cluster, which must end well without a hand.

The tests of the fault matrix put on the same faults, by the same functions (`faults`).
"""
